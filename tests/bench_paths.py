"""Does speed cost quality? The toy's pretrained model of one session, trained and drawn in the fast and the plain way.

    plain    float32 on a CPU, a new recolouring for the teacher at each step, nothing compiled
    fast     a GPU: bfloat16, attention.py's kernels, cached recolourings, CUDA graphs, --compile in every stage

Three seeds each, worlds of their own. The two may run on different machines; then bring paths/*/evals together.

    python tests/bench_paths.py plain     an hour of one CPU core
    python tests/bench_paths.py fast      a GPU; five minutes
    python tests/bench_paths.py table     the table that docs/measured.md quotes
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT, OUT, SEEDS = Path(__file__).parents[1], Path("paths"), (0, 1, 2)
sys.path.insert(0, str(ROOT))
import toy  # noqa: E402

NAME = "toy_1session_pretrained"
ROWS = {"retrieval/image": "image retrieval", "retrieval/brain": "brain retrieval", "recons/pixcorr": "PixCorr",
        "recons/ssim": "SSIM", "recons/alex2": "AlexNet(2)", "recons/alex5": "AlexNet(5)",
        "recons/inception": "Inception", "recons/clip_l": "two-way CLIP", "recons/efficientnet": "EffNet, distance",
        "recons/swav": "SwAV, distance", "blurryrecons/pixcorr": "blurry PixCorr",
        "enhancedrecons/clip_l": "refined, two-way CLIP", "captions/meteor": "METEOR",
        "captions/clip_l": "captions, CLIP"}


def run(stage: str, flags: str, fast: bool) -> None:
    own = {} if fast else {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    print(f"$ python {stage}.py {flags}", flush=True)
    subprocess.run([sys.executable, ROOT / f"{stage}.py", *flags.split()], check=True, env=os.environ | own)


def train_and_draw(path: str, seed: int) -> None:
    """All stages of toy.headline for one model."""
    fast, recipe, world, here = path == "fast", toy.Recipe(), OUT / f"world{seed}", OUT / path / f"seed{seed}"
    toy.build_world(world, None, seed)
    compiled = "--compile" if fast else ""
    data, evals = f"--data_path={world} --subj=1", f"--evals={OUT / path / 'evals' / str(seed)}"
    views = "" if fast else "--teacher_views=0"  # the last of two flags holds
    trained = f"{data} --train_logs={here} --seed={seed} {recipe.sizes} {views} {compiled}"
    run("train", f"--model_name=before {trained} --multi_subject {recipe.from_scratch} {recipe.pretrain}", fast)
    run("train", f"--model_name={NAME} {trained} --multisubject_ckpt={here / 'before'} {recipe.fine_tune} "
                 f"{recipe.session}", fast)
    run("recon", f"--model_name={NAME} {data} --train_logs={here} {evals} --seed={seed} {recipe.draw} {compiled}", fast)
    run("refine", f"--model_name={NAME} {data} {evals} --seed={seed} {recipe.refine} {compiled}", fast)
    run("evaluate", f"--model_name={NAME} {data} {evals} --tables={here} --train_logs={here} --no-report", fast)


def scores(path: str) -> np.ndarray:
    """(seeds, rows)."""
    found = []
    for seed in SEEDS:
        file = OUT / path / "evals" / str(seed) / NAME / f"{NAME}_metrics.json"
        values = {row["key"]: row["value"] for row in json.loads(file.read_text())["rows"]}
        found.append([values[key] for key in ROWS])
    return np.array(found)


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
    elif sys.argv[1:] in (["plain"], ["fast"]):
        for number in SEEDS:
            train_and_draw(sys.argv[1], number)
    else:
        sys.exit(__doc__)
