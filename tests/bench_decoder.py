"""What does a brain's decoder need: which start, how many steps, which solver? The table of docs/measured.md.

Each decoder draws test pictures from their true CLIP tokens, and from those that the toy's model of all sessions read
from a brain. Then the toy's own decoder does so by other solvers and steps: with 6 of dpm's, why toy.py draws as it
does. PixCorr and two-way CLIP against what was seen; edges, the seen pictures' = 1; time, the first row's = 1.

    python tests/bench_decoder.py --data_path toy [DECODER ..]        after python toy.py; five minutes on a CPU
    python toy_networks.py unet                                       the toy's own decoder anew, on a GPU: its flags
                                                                      are what the others were made with, too
"""

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import frozen  # noqa: E402
import judges  # noqa: E402
import metrics  # noqa: E402
import recon  # noqa: E402

MODEL = "toy_allsessions_scratch"
TOY = ("dpm", 6, 1)  # scheduler, steps, guidance
SETTINGS = [("euler", 38, 5), ("euler", 38, 1), ("euler", 12, 1), ("euler", 6, 1), ("dpm", 12, 1), TOY, ("dpm", 4, 1)]


def edges(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.diff(dim=-1).abs().mean()


def row(unclip: SimpleNamespace, world: SimpleNamespace, setting: tuple[str, int, float]) -> tuple[str, float]:
    """The table's columns of one decoder and setting, and the seconds it took to draw."""
    scheduler, steps, guidance = setting
    start = torch.randn(len(world.seen), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    nothing = torch.randn(world.true.shape, generator=torch.Generator().manual_seed(1))
    began = time.perf_counter()
    true, brain = (recon.draw(unclip, tokens, start, nothing, steps, guidance, scheduler)
                   for tokens in (world.true, world.brain))  # (n, 3, 64, 64) each
    seconds = time.perf_counter() - began
    two_way = metrics.two_way_identification(world.features, world.judge.features(brain)["clip_l"]).mean()
    numbers = [metrics.pixcorr(world.seen, true).mean(), metrics.pixcorr(world.seen, brain).mean(), two_way,
               edges(brain) / edges(world.seen)]
    return " | ".join(f"{number:.3f}" for number in numbers), seconds


@torch.no_grad()
def main(count: int = 150) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("decoders", nargs="*", type=Path, help="folders, as unclip.py writes them")
    parser.add_argument("--data_path", type=Path, default="toy", help="folder of the toy world")
    args = parser.parse_args()
    seen = torch.load(args.data_path / "evals/all_images.pt", weights_only=True)[:count]
    brain = torch.load(args.data_path / f"evals/{MODEL}/{MODEL}_all_prior_out.pt", weights_only=True)[:count].float()
    judge = judges.load_vision("clip_l", args.data_path, "cpu")
    world = SimpleNamespace(seen=seen, brain=brain, true=frozen.load_clip(args.data_path, "cpu").tokens(seen),
                            judge=judge, features=judge.features(seen)["clip_l"])
    own = args.data_path / "unclip"
    columns = "PixCorr, true tokens | PixCorr, brain's | two-way CLIP, brain's | edges, brain's"
    print(f"| decoder | {columns} |\n|---|---:|---:|---:|---:|")
    for folder in [own, *args.decoders]:
        print(f"| {folder} | {row(frozen.load_unclip(folder, 'cpu'), world, TOY)[0]} |")
    unclip, first = frozen.load_unclip(own, "cpu"), None
    print(f"\n| scheduler | steps | guidance | {columns} | time |\n|---|---:|---:|---:|---:|---:|---:|---:|")
    for setting in SETTINGS:
        text, seconds = row(unclip, world, setting)
        first = first or seconds
        print(f"| {' | '.join(map(str, setting))} | {text} | {seconds / first:.2f} |")


if __name__ == "__main__":
    main()
