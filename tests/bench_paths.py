"""Does speed cost quality? The toy's pretrained model of one session, trained and drawn in the fast and the plain way.

    plain    float32 on a CPU, a new recolouring for the teacher at each step, nothing compiled
    fast     a GPU: bfloat16, adamw.py, attention.py, cached recolourings, CUDA graphs, --compile in every stage

Three seeds each, worlds of their own. The two may run on different machines; then bring paths/*/evals together.

A GPU draws other first weights than a CPU, and other noise: those are other runs. So `switch` trains on one device,
from the same first weights and with the same noise, with parts of the fast path taken out (SWITCHES), and tells how
far the prior ends from its targets.

    python tests/bench_paths.py plain             an hour of one CPU core
    python tests/bench_paths.py fast              a GPU; five minutes
    python tests/bench_paths.py table             the table that docs/measured.md quotes
    python tests/bench_paths.py switch 2 0 1      world 2, run 0, SWITCHES[1]; a GPU, two minutes. The first run of a
                                                  world makes it and its targets: no other beside that one
    python tests/bench_paths.py switched          the table of those that have run
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT, OUT, SEEDS = Path(__file__).parents[1], Path("paths"), (0, 1, 2)
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import frozen  # noqa: E402
import model  # noqa: E402
import recon  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402

NAME = "toy_1session_pretrained"
ROWS = {"retrieval/image": "image retrieval", "retrieval/brain": "brain retrieval", "recons/pixcorr": "PixCorr",
        "recons/ssim": "SSIM", "recons/alex2": "AlexNet(2)", "recons/alex5": "AlexNet(5)",
        "recons/inception": "Inception", "recons/clip_l": "two-way CLIP", "recons/efficientnet": "EffNet, distance",
        "recons/swav": "SwAV, distance", "blurryrecons/pixcorr": "blurry PixCorr",
        "enhancedrecons/clip_l": "refined, two-way CLIP", "captions/meteor": "METEOR",
        "captions/clip_l": "captions, CLIP"}
# What is taken out: the flag, and what is patched, (module, name, value).
BY_ROWS, ATTENTION = (train, "wide_layers", lambda _: {}), (model, "fused", lambda _: False)
SWITCHES = {"fast": ("--compile", []), "without `adamw.py`": ("--compile", [BY_ROWS]),
            "without `attention.py`, `--compile`": ("", [ATTENTION]),
            "float32 (TF32 products), without all of them": ("", [BY_ROWS])}  # attention.py is for half precision


def start(stage: str, flags: str, fast: bool) -> None:
    own = {} if fast else {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    print(f"$ python {stage}.py {flags}", flush=True)
    subprocess.run([sys.executable, ROOT / f"{stage}.py", *flags.split()], check=True, env=os.environ | own)


def trainings(flags: str, logs: Path) -> list[str]:
    """Flags of the pretraining and of the fine-tuning after it."""
    recipe = toy.Recipe()
    return [f"--model_name=before {flags} --multi_subject {recipe.from_scratch} {recipe.pretrain}",
            f"--model_name={NAME} {flags} --multisubject_ckpt={logs / 'before'} {recipe.fine_tune} {recipe.session}"]


def train_and_draw(path: str, seed: int) -> None:
    """All stages of toy.headline for one model."""
    fast, recipe, world, here = path == "fast", toy.Recipe(), OUT / f"world{seed}", OUT / path / f"seed{seed}"
    toy.build_world(world, None, seed)
    compiled = "--compile" if fast else ""
    where, evals = f"--data_path={world} --subj=1", f"--evals={OUT / path / 'evals' / str(seed)}"
    views = "" if fast else "--teacher_views=0"  # the last of two flags holds
    trained = f"{where} --train_logs={here} --seed={seed} {recipe.sizes} {views} {compiled}"
    for flags in trainings(trained, here):
        start("train", flags, fast)
    start("recon", f"--model_name={NAME} {where} --train_logs={here} {evals} --seed={seed} {recipe.draw} {compiled}",
          fast)
    start("refine", f"--model_name={NAME} {where} {evals} --seed={seed} {recipe.refine} {compiled}", fast)
    start("evaluate", f"--model_name={NAME} {where} {evals} --tables={here} --train_logs={here} --no-report", fast)


def scores(path: str) -> np.ndarray:
    """(seeds, rows)."""
    found = []
    for seed in SEEDS:
        file = OUT / path / "evals" / str(seed) / NAME / f"{NAME}_metrics.json"
        values = {row["key"]: row["value"] for row in json.loads(file.read_text())["rows"]}
        found.append([values[key] for key in ROWS])
    return np.array(found)


@torch.no_grad()
def distance(flags: str) -> float:
    """Mean square between what the prior says of 300 test images and their CLIP tokens, in float32."""
    torch.backends.cuda.matmul.allow_tf32 = False  # train.py allows it
    args = recon.parse(flags.split())
    brains, device = recon.seen_brains(args), "cuda" if torch.cuda.is_available() else "cpu"
    net, ridge = recon.load_model(args, recon.num_voxels(args.data_path, args.subj))
    net, clip = net.float().to(device).eval(), frozen.load_clip(args.data_path, device)
    images, squares = data.Images(args.data_path), []
    for first in range(0, len(brains.ids), 50):
        rows = slice(first, first + 50)
        start, steps = recon.prior_noise(net.backbone.token_shape, brains, rows, args)
        brain = data.embed_images(net, brains.voxels, brains.positions[rows], ridge)["backbone"]
        noises = start.to(device), steps.to(device).transpose(0, 1)
        tokens = net.diffusion_prior.sample(brain.to(device), args.prior_steps, *noises, method=args.prior_sampler)
        target = clip.tokens(images[brains.ids[rows]].to(device))
        squares.append((tokens - target).square().mean((1, 2)))
    return torch.cat(squares).mean().item()


def switch(world: int, run: int, place: int) -> None:
    """Train by the `place`-th of SWITCHES, from first weights that follow from the other two; write the distance."""
    recipe, path, seed = toy.Recipe(), OUT / f"world{world}", world + 100 * run
    name, (compiled, patches) = list(SWITCHES.items())[place]
    toy.build_world(path, None, world)
    logs, precision = OUT / "switches" / f"{world}_{run}_{place}", "no" if "float32" in name else "bf16"
    flags = f"--data_path={path} --subj=1 --train_logs={logs} --seed={seed}"
    trained = f"{flags} {recipe.sizes} {compiled}"
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, ACCELERATE_MIXED_PRECISION=precision))
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        for one in trainings(trained, logs):
            train.main(one.split())
    (logs / "distance.txt").write_text(f"{distance(f'--model_name={NAME} {flags} {recipe.draw}')}\n")


def switched() -> None:
    """A row a world and run: each distance, and by how much it is more than the fast one."""
    found = {}
    for file in sorted((OUT / "switches").glob("*/distance.txt")):
        world, run, place = map(int, file.parent.name.split("_"))
        found.setdefault((world, run), {})[place] = float(file.read_text())
    found = {key: row for key, row in found.items() if 0 in row}
    print(f"| world, run | {' | '.join(SWITCHES)} |\n|---|{'--:|' * len(SWITCHES)}")
    for (world, run), row in found.items():
        cells = [f"{row[i]:.3f} ({row[i] / row[0] - 1:+.1%})" if i in row else "" for i in range(1, len(SWITCHES))]
        print(f"| {world}, {run} | {row[0]:.3f} | {' | '.join(cells)} |")
    shares = [[row[i] / row[0] - 1 for row in found.values() if i in row] for i in range(1, len(SWITCHES))]
    means = [f"{np.mean(share):+.1%} ({len(share)} runs)" if share else "" for share in shares]
    print(f"| mean | | {' | '.join(means)} |")


def table() -> None:
    """The seeds' means and how far apart they are; and fast - plain, seed by seed."""
    plain, fast = scores("plain"), scores("fast")
    print("| seeds 0, 1, 2 | plain, mean (lowest to highest) | fast | fast - plain of each seed | of the spread |")
    print("|---|--:|--:|--:|--:|")
    for i, title in enumerate(ROWS.values()):
        ways = [f"{x.mean():.3f} ({x.min():.3f} to {x.max():.3f})" for x in (plain[:, i], fast[:, i])]
        each = fast[:, i] - plain[:, i]
        share = abs(each.mean()) / np.ptp(plain[:, i])
        print(f"| {title} | {ways[0]} | {ways[1]} | {', '.join(f'{x:+.3f}' for x in each)} | {share:.0%} |")


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        table()
    elif sys.argv[1:] == ["switched"]:
        switched()
    elif sys.argv[1:2] == ["switch"] and len(sys.argv) == 5:
        switch(*map(int, sys.argv[2:]))
    elif sys.argv[1:] in (["plain"], ["fast"]):
        for number in SEEDS:
            train_and_draw(sys.argv[1], number)
    else:
        sys.exit(__doc__)
