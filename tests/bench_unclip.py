"""How fast and how large is unclip.py at SDXL's size? Prints the table that docs/measured.md quotes.

Random weights, tokens and latents of the true sizes at 256 pixels; what is timed is unclip.train_step, the step of the
training itself, without reading the batch. "of matmul": floating point operations of forward and backward pass a
second, as a share of what a bfloat16 product of two 8192 x 8192 matrices reaches in the same run. Operations that
--gradient_checkpointing does twice count once. "card": memory is limited to 93% of so many GB, so the row fits there.

    python tests/bench_unclip.py                 an NVIDIA GPU of 80 GB; ten minutes, most of it compiling
    python tests/bench_unclip.py --weights       only the rows with these flags
"""

import gc
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from bench_gpu import limits  # noqa: E402
from bench_recon import DEVICE, random_weights  # noqa: E402

import frozen  # noqa: E402
import unclip  # noqa: E402

SETTINGS = [  # flags, pictures a step, GB of the card
    ("", 8, 80),
    ("--gradient_checkpointing", 8, 80),
    ("--compile", 8, 80),
    ("--graph", 8, 80),
    ("--graph --compile", 8, 80),
    ("--graph --compile --gradient_checkpointing", 8, 80),
    ("--graph --compile", 32, 80),
    ("--graph --compile --ema=0", 8, 48),
    ("--graph --gradient_checkpointing --optimizer=adamw8bit", 8, 48),
    ("--graph --gradient_checkpointing --ema=0 --train=cross_attention", 8, 24),
    ("--gradient_checkpointing --ema=0 --optimizer=adamw8bit --weights=bfloat16", 8, 24),
]
USABLE = 0.93  # of a card's memory: the driver and the libraries take some


def count_operations() -> float:
    """Of forward and backward pass for one picture."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**frozen.UNCLIP_UNET)
        inputs = [torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, 256, 1664), torch.empty(1, 1024)]
    with FlopCounterMode(display=False) as counter:
        unet(*inputs[:3], class_labels=inputs[3]).sample.sum().backward()
    return counter.get_total_flops()


def measure(flags: str, size: int, card: int, steps: int = 14) -> tuple[float, float]:
    """On a card of so many GB: seconds of a step, median of those after the recording, and the peak of memory, GiB."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, USABLE * card / total))
    torch.cuda.reset_peak_memory_stats()
    args = unclip.parse([f"--batch_size={size}", *flags.split()])
    args.prediction = "epsilon"
    accelerator = Accelerator(mixed_precision="bf16")
    unet = random_weights(lambda: UNet2DConditionModel(**frozen.UNCLIP_UNET), getattr(torch, args.weights)).train()
    scheduler = DDPMScheduler(**frozen.UNCLIP_SCHEDULER)
    run = unclip.set_up(args, accelerator, SimpleNamespace(unet=unet.requires_grad_(True), scheduler=scheduler))
    batch = {"tokens": torch.randn(size, 256, 1664), "latents": torch.randn(size, 4, 32, 32),
             "numbers": torch.tensor([[256, 256, 0, 0]]).expand(size, -1)}
    batch = {name: values.to(DEVICE) for name, values in batch.items()}
    seconds = []
    for step in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        unclip.train_step(args, accelerator, run, batch, step)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    accelerator.free_memory()
    return sorted(seconds[5:])[(steps - 5) // 2], torch.cuda.max_memory_reserved() / 2**30


def main() -> None:
    (limit, _), operations = limits(), count_operations()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {limit / 1e12:.0f} TFLOP/s; forward and "
          f"backward pass of a picture: {operations / 1e12:.2f} TFLOP\n")
    print("| unclip.py | batch | card | ms / step | images/s | of matmul | peak GiB |\n|---|--:|--:|--:|--:|--:|--:|")
    for flags, size, card in SETTINGS:
        if not set(sys.argv[1:]) <= {flag.partition("=")[0] for flag in flags.split()}:
            continue
        try:
            seconds, peak = measure(flags, size, card)
            share = size * operations / seconds / limit
            numbers = f"{1000 * seconds:.0f} | {size / seconds:.1f} | {share:.0%} | {peak:.1f}"
        except (torch.cuda.OutOfMemoryError, unclip.UserError) as error:
            numbers = f"{type(error).__name__} | | |"
        print(f"| `{flags}` | {size} | {card} GB | {numbers} |".replace("``", ""), flush=True)
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
