"""How fast and how large is recon.py at the paper's sizes? Prints the table that docs/measured.md quotes.

Random weights of the true sizes, so the pictures are noise; what is timed is the same work. "As the original" is its
loop: one image at a time, float32 weights under float16 autocast, on the same GPU in the same run.

    python tests/bench_recon.py            an NVIDIA GPU of 40 GB or more; some three minutes
"""

import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import GitConfig, GitForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import frozen  # noqa: E402
import recon  # noqa: E402
from data import prefetch  # noqa: E402
from model import MindEye2  # noqa: E402

DEVICE = torch.device("cuda")


def random_weights(build: Callable, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The network that build() makes, filled on the GPU: 2 billion numbers from the CPU would take a minute."""
    with torch.device("meta"):
        network = build()
    network = torch.nn.Module.to_empty(torch.nn.Module.to(network, dtype), device=DEVICE).eval().requires_grad_(False)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.normal_(std=0.02)
        else:
            tensor.zero_()
    return network


def print_head() -> None:
    """The card, and the head of the table whose rows `measure` prints."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"| {'pass':<46} | batch | s / image | images/s | peak GiB |")
    print(f"|{'-' * 48}|------:|----------:|---------:|---------:|")


def measure(name: str, batch: int, work: Callable, images: int | None = None) -> float:
    """Run twice; print and return the second run's seconds an image (images: batch), and the peak of GPU memory."""
    images = images or batch
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.no_grad():
            work()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / images
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"| {name:<46} | {batch:>5} | {seconds:>9.3f} | {1 / seconds:>8.2f} | {peak:>8.1f} |", flush=True)
    return seconds


def tokens_pass(flag: str, sizes: tuple[int, ...]) -> list[float]:
    """Pass 1: three repeats of each image through MindEye2 and the prior's 20 steps."""
    args = recon.parse(flag.split())
    model = recon.ready(random_weights(lambda: MindEye2([15724])), args, DEVICE)
    brains = SimpleNamespace(voxels=torch.randn(12 * max(sizes), 15724), ids=range(4 * max(sizes)))
    brains.positions = [np.arange(3 * i, 3 * i + 3) for i in brains.ids]

    def read(size: int) -> None:
        batches = [slice(i * size, (i + 1) * size) for i in range(4)]  # four, as noise is drawn ahead
        noise = (recon.prior_noise(model.backbone.token_shape, brains, rows, args) for rows in batches)
        for rows, drawn in zip(batches, prefetch(noise, DEVICE), strict=True):
            recon.read_brains(model, 0, brains, rows, args, *drawn)
    return [measure(f"MindEye2 and prior {flag}", size, partial(read, size), 4 * size) for size in sizes]


def captions_pass() -> float:
    """GIT-large's sizes: a text decoder of 6 layers x 768 on 257 tokens of 1024."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
              "image_size": 224, "patch_size": 14}
    git = random_weights(lambda: GitForCausalLM(GitConfig(vision_config=vision)))
    converter = random_weights(lambda: frozen.CLIPConverter(256, 257, 1664, 1024))
    words = SimpleNamespace(batch_decode=lambda rows, skip_special_tokens: [""] * len(rows))
    captioner = frozen.Captioner(git, converter, words)
    return measure("captions", 16, lambda: captioner.caption(torch.randn(16, 256, 1664, device=DEVICE)))


def blurry_pass() -> float:
    vae = random_weights(lambda: AutoencoderKL(**frozen.SD_VAE))
    return measure("blurry", 16, lambda: frozen.decode_latents(vae, torch.randn(16, 4, 28, 28, device=DEVICE)))


def decoder(dtype: torch.dtype) -> SimpleNamespace:
    unclip = SimpleNamespace(scheduler=EulerDiscreteScheduler(**frozen.UNCLIP_SCHEDULER), output_scale=0.8,
                             output_shift=0.2, vae=random_weights(lambda: AutoencoderKL(**frozen.UNCLIP_VAE), dtype),
                             unet=random_weights(lambda: UNet2DConditionModel(**frozen.UNCLIP_UNET), dtype))
    unclip.vae.enable_slicing()
    return unclip


def pictures_pass(short: bool) -> tuple[float, list[float]]:
    """38 Euler steps with guidance 5 and the VAE at 768 pixels; the original's seconds, and ours by 1, 8 and 16."""
    def draw(unclip: SimpleNamespace, size: int, **options) -> None:
        tokens, blind = torch.randn(2, size, 256, 1664, device=DEVICE)
        recon.draw(unclip, tokens, torch.randn(size, 4, 96, 96, device=DEVICE), blind, **options)

    unclip = decoder(torch.float32)
    with torch.autocast("cuda", torch.float16):
        original = measure("pictures, as the original", 1, lambda: draw(unclip, 1))
    for flag in ("--compile",) if short else ("", "--compile"):
        unclip = None  # the memory of the one before, and its graphs
        gc.collect()
        unclip = decoder(torch.bfloat16)
        frozen.speed_up(unclip.unet, unclip.vae, compiled=bool(flag))
        ours = [measure(f"pictures {flag}", size, partial(draw, unclip, size)) for size in (1, 8, 16)]
    if not short:
        measure("pictures --compile --low_memory", 8, lambda: draw(unclip, 8, one_by_one=True))
    return original, ours


def main(short: bool = False) -> None:
    """All rows; `short`: those with --compile, and the original's."""
    print_head()
    if not short:
        tokens_pass("", (1, 16))
        tokens_pass("--low_memory", (16,))
    tokens = tokens_pass("--compile", (1, 16))
    texts, blurry = captions_pass(), blurry_pass()
    original, ours = pictures_pass(short)
    for size, token, picture in zip((1, 8, 16), (*tokens, tokens[1]), ours, strict=True):
        print(f"\nWith --compile, by {size}: prior and pictures {token + picture:.3f} s an image, with captions and "
              f"blurry {token + picture + texts + blurry:.3f} s; pictures alone {original / picture:.1f} times as fast "
              "as the original's loop.")


if __name__ == "__main__":
    main()
