"""How fast and how large is recon.py at the paper's sizes? Prints the table that README.md quotes.

Random weights of the true sizes, so the pictures are noise; what is timed is the same work. "As the original" is its
loop: one image at a time, float32 weights under float16 autocast, on the same GPU in the same run.

    python tests/bench_recon.py            an NVIDIA GPU of 40 GB or more; some four minutes
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import GitConfig, GitForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import frozen  # noqa: E402
import recon  # noqa: E402
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
    return network


def print_head() -> None:
    """The card, and the head of the table whose rows `measure` prints."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"| {'pass':<46} | batch | s / image | images/s | peak GiB |")
    print(f"|{'-' * 48}|------:|----------:|---------:|---------:|")


def measure(name: str, images: int, work: Callable) -> float:
    """Run twice; print and return the second run's seconds an image, and the peak of the GPU's memory."""
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
    print(f"| {name:<46} | {images:>5} | {seconds:>9.3f} | {1 / seconds:>8.2f} | {peak:>8.1f} |", flush=True)
    return seconds


def tokens_pass(kind: str, change: Callable, sizes: tuple[int, ...]) -> None:
    """Pass 1: three repeats of each image through MindEye2 and the prior's 20 steps."""
    model, args = change(random_weights(lambda: MindEye2([15724]))), SimpleNamespace(prior_steps=20, blurry_recon=True)
    args.seed = 0
    brains = SimpleNamespace(voxels=torch.randn(3 * max(sizes), 15724), ids=range(max(sizes)))
    brains.positions = [np.arange(3 * i, 3 * i + 3) for i in brains.ids]
    for size in sizes:
        measure(f"MindEye2 and prior{kind}", size,
                lambda size=size: recon.read_brains(model, 0, brains, slice(0, size), args))


def captions_pass() -> None:
    """GIT-large's sizes: a text decoder of 6 layers x 768 on 257 tokens of 1024."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
              "image_size": 224, "patch_size": 14}
    git = random_weights(lambda: GitForCausalLM(GitConfig(vision_config=vision)))
    converter = random_weights(lambda: frozen.CLIPConverter(256, 257, 1664, 1024))
    words = SimpleNamespace(batch_decode=lambda rows, skip_special_tokens: [""] * len(rows))
    captioner = frozen.Captioner(git, converter, words)
    measure("captions", 16, lambda: captioner.caption(torch.randn(16, 256, 1664, device=DEVICE)))


def pictures_pass() -> None:
    """38 Euler steps with guidance 5 and the VAE at 768 pixels."""
    scheduler = EulerDiscreteScheduler(**frozen.UNCLIP_SCHEDULER)
    unclip = SimpleNamespace(scheduler=scheduler, output_scale=0.8, output_shift=0.2)
    unclip.vae = random_weights(lambda: AutoencoderKL(**frozen.UNCLIP_VAE))
    unclip.vae.enable_slicing()

    def draw(size: int, **options) -> None:
        tokens, blind = torch.randn(2, size, 256, 1664, device=DEVICE)
        recon.draw(unclip, tokens, torch.randn(size, 4, 96, 96, device=DEVICE), blind, **options)

    unclip.unet = random_weights(lambda: UNet2DConditionModel(**frozen.UNCLIP_UNET))
    with torch.autocast("cuda", torch.float16):
        original = measure("pictures, as the original", 1, lambda: draw(1))
    unclip.unet = None
    unclip.unet = random_weights(lambda: UNet2DConditionModel(**frozen.UNCLIP_UNET), torch.bfloat16)
    for size in (1, 8, 16):
        ours = measure("pictures, bfloat16", size, lambda size=size: draw(size))
    measure("pictures, bfloat16, --low_memory", 8, lambda: draw(8, one_by_one=True))
    print(f"\nBatches of 16 against the original's loop: {original / ours:.1f} times as fast.")


if __name__ == "__main__":
    print_head()
    tokens_pass("", lambda model: model, (1, 16))
    tokens_pass(", --low_memory", recon.halve, (16,))
    captions_pass()
    pictures_pass()
