"""What does refinement do to the toy's pictures? Prints the table that docs/measured.md quotes.

Each model's pictures before refine.py, after it, and blended with the blurry ones as evaluate.py does: SSIM and PixCorr
with the images seen; two-way identification by the toy's CLIP-L; sharpness (the images' own edges = 1); and how often
GIT, looking at the picture, names the object, and its colour with it, that was seen.

    python tests/bench_refined.py --data_path toy          after python toy.py; a minute on a CPU
"""

import argparse
import sys
from pathlib import Path

import torch
from bench_captions import rates

sys.path.insert(0, str(Path(__file__).parents[1]))
import frozen  # noqa: E402
import judges  # noqa: E402
import metrics  # noqa: E402


def edges(pictures: torch.Tensor) -> float:
    """Mean absolute difference of neighbouring pixels."""
    return (pictures.diff(dim=-1).abs().mean() + pictures.diff(dim=-2).abs().mean()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data_path", default="toy", help="folder of the toy world")
    path = Path(parser.parse_args().data_path)
    seen = torch.load(path / "evals/all_images.pt", weights_only=True)  # (n, 3, 64, 64)
    true = torch.load(path / "evals/all_captions.pt", weights_only=False).tolist()
    clip, captioner = frozen.load_clip(path, "cpu"), frozen.load_captioner(path, "cpu")
    judge = judges.load_vision("clip_l", path, "cpu").features
    print("| pictures | SSIM | PixCorr | two-way CLIP | sharpness | object | colour and object |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for file in sorted((path / "evals").glob("*/*_all_enhancedrecons.pt")):
        drawn, refined, blurry = (torch.load(str(file).replace("enhancedrecons", kind), weights_only=True)
                                  for kind in ("recons", "enhancedrecons", "blurryrecons"))
        for kind, pictures in {"drawn": drawn, "refined": refined, "blended": .75 * refined + .25 * blurry}.items():
            named = rates(captioner.caption(clip.tokens(pictures)), true)
            right = metrics.two_way_identification(judge(seen)["clip_l"], judge(pictures)["clip_l"])
            numbers = [metrics.ssim(seen, pictures).mean(), metrics.pixcorr(seen, pictures).mean(), right.mean(),
                       edges(pictures) / edges(seen), named["object"], named["both"]]
            name = file.parent.name.removeprefix("toy_")
            print(f"| {name}, {kind} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
