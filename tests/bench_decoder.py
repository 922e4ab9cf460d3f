"""What do fewer steps, another solver and guidance cost the toy's decoder? Prints the table that README.md quotes.

Pictures are drawn from the true CLIP tokens of unseen scenes, and from tokens with noise as strong as a brain's errors;
PixCorr against the scenes, seconds as a ratio to the paper's setting, all in one run, one after another.

    python tests/bench_decoder.py          two minutes on a CPU
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import frozen  # noqa: E402
import metrics  # noqa: E402
import recon  # noqa: E402
import toy  # noqa: E402

SETTINGS = [("euler", 38, 5), ("euler", 38, 2), ("euler", 38, 1), ("euler", 12, 1), ("euler", 6, 1),
            ("dpm", 12, 1), ("dpm", 6, 1), ("dpm", 4, 1)]


def main(count: int = 64) -> None:
    clip, unclip = frozen.load_clip(toy.NETWORKS, "cpu"), frozen.load_unclip(toy.NETWORKS / "unclip", "cpu")
    images = toy.render(toy.draw_scenes(count, seed=4242)).float() / 255
    torch.manual_seed(0)
    tokens, start = clip.tokens(images), torch.randn(count, 4, 8, 8)
    noisy, nothing = tokens + 0.6 * tokens.std() * torch.randn_like(tokens), torch.randn_like(tokens)
    recon.draw(unclip, tokens[:8], start[:8], steps=2, guidance=1)  # the first call is slower
    first = None
    print("| scheduler | steps | guidance | PixCorr, true tokens | PixCorr, noisy tokens | time |")
    print("|---|---:|---:|---:|---:|---:|")
    for scheduler, steps, guidance in SETTINGS:
        began = time.perf_counter()
        drawn = [recon.draw(unclip, prompt, start, nothing, steps, guidance, scheduler) for prompt in (tokens, noisy)]
        scores = [metrics.pixcorr(images, pictures).mean().item() for pictures in drawn]
        seconds = time.perf_counter() - began
        first = first or seconds
        print(f"| {scheduler} | {steps} | {guidance} | {scores[0]:.3f} | {scores[1]:.3f} | {seconds / first:.2f} |")


if __name__ == "__main__":
    main()
