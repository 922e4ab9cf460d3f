"""How fast and how large is refine.py at the paper's sizes? Prints a table as tests/bench_recon.py does.

Random weights of the true sizes, so the pictures are noise; what is timed is the same work: encoding captions, and
12 UNet steps with guidance 5 between the VAE's encoder and decoder at 768 pixels. "As the original" is its loop: one
picture at a time, float32 weights under float16 autocast, on the same GPU in the same run.

    python tests/bench_refine.py           an NVIDIA GPU of 40 GB or more; some two minutes
"""

import gc
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from bench_recon import DEVICE, measure, print_head, random_weights  # noqa: E402

import frozen  # noqa: E402
import refine  # noqa: E402

CAPTION = "a man riding a wave on top of a surfboard"


def prompts_pass() -> None:
    """Captions and the negative prompt through both text encoders."""
    encoders = []
    for part in ("text_encoder", "text_encoder_2"):
        network = random_weights(lambda part=part: refine.empty_part(part))
        for module in network.modules():
            if hasattr(module, "position_ids"):
                module.position_ids = torch.arange(77, device=DEVICE)[None]
        encoders.append((refine.load_tokenizer(Path("none.safetensors"), part, 77), network))
    measure("prompts", 16, lambda: refine.encode(encoders, [CAPTION] * 16 + [refine.NEGATIVE]))


def painter(dtype: torch.dtype) -> SimpleNamespace:
    sdxl = SimpleNamespace(scheduler=EulerDiscreteScheduler(**frozen.UNCLIP_SCHEDULER), size=768, target=1024,
                           latent=(4, 96, 96), vae=random_weights(lambda: refine.empty_part("vae"), dtype),
                           unet=random_weights(lambda: refine.empty_part("unet"), dtype))
    sdxl.vae.enable_slicing()
    return sdxl


def pictures_pass(short: bool) -> None:
    def draw(sdxl: SimpleNamespace, size: int, flag: str = "") -> None:
        prompt = {"tokens": torch.randn(size + 1, 77, 2048), "pooled": torch.randn(size + 1, 1280)}
        refine.refine(sdxl, torch.rand(size, 3, 256, 256), np.arange(size), prompt, refine.parse(flag.split()))

    sdxl = painter(torch.float32)
    with torch.autocast(DEVICE.type, torch.float16):
        original = measure("refined, as the original", 1, lambda: draw(sdxl, 1))
    for flag in ("--compile",) if short else ("", "--compile"):
        sdxl = None  # the memory of the one before, and its graphs
        gc.collect()
        sdxl = painter(torch.bfloat16)
        frozen.speed_up(sdxl.unet, sdxl.vae, compiled=bool(flag))
        for size in (1, 8):
            ours = measure(f"refined {flag}", size, partial(draw, sdxl, size))
    if not short:
        measure("refined --compile --low_memory", 8, lambda: draw(sdxl, 8, "--low_memory"))
    print(f"\nBatches of 8 with --compile against the original's loop: {original / ours:.1f} times as fast.")


def main(short: bool = False) -> None:
    """All rows; `short`: those with --compile, and the original's."""
    print_head()
    prompts_pass()
    pictures_pass(short)


if __name__ == "__main__":
    main()
