"""How fast and how large is the training at the paper's size? Prints the table that README.md quotes.

Random weights and data of the true sizes, in the official files. What is timed is train.py's own loop, with its loader,
log and progress bar: all that is put in its way are two looks at the clock. Only the frozen networks are stand-ins,
whose targets are noise of the right shape: the loop reads those from the disk and never calls a network.

"original": the published code's ms / step on the same kind of card, all of it, and what its GPU worked of that.
"floor": operations / the card's matmul rate + bytes of weights, gradients and AdamW / its copy rate, one after another.

    python tests/bench_gpu.py             an NVIDIA GPU of 80 GB; five minutes
    python tests/bench_gpu.py --tiny      the smallest sizes, on a CPU: does the script work?
"""

import argparse
import gc
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import data  # noqa: E402
import train  # noqa: E402

ROWS = [  # what, flags, the original's ms a step: wall time and GPU-busy (shared/reference/gpu_baseline.md)
    ("fine-tuning, 4096 wide", "--subj=1 --hidden_dim=4096 --batch_size=24", 426, 383),
    ("pretraining, 4096 wide", "--multi_subject --subj=8 --hidden_dim=4096 --batch_size=42", 801, 660),
    ("pretraining, 1024 wide, no low-level head",
     "--multi_subject --subj=8 --hidden_dim=1024 --batch_size=42 --no-blurry_recon", 375, None),
]
TRUE = SimpleNamespace(voxels=(15724, 14278, 15226, 13153, 13039, 17907, 12682, 14386), tokens=(256, 1664), pixels=224,
                       latents=28, features=49, flags="", images=600)
TINY = SimpleNamespace(voxels=(20,) * 8, tokens=(4, 16), pixels=16, latents=8, features=4,
                       flags="--hidden_dim=16 --prior_depth=1 --prior_dim_head=8 --batch_size=14", images=40)
OPERATIONS = 0.78e12  # of forward and backward pass of a sample, nearly all of them the prior's (gpu_baseline.md)
BYTES = 34  # a weight: AdamW reads and writes 28, forward and backward pass the rest


class Done(Exception):
    """Raised when enough steps are timed."""


class Frozen(nn.Module):
    """Stands in for CLIP, VAE or teacher: an image -> noise of the right shape."""
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.weight = shape, nn.Parameter(torch.zeros(1))
        self.seq_dim, self.emb_dim = shape[0], shape[-1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(images), *self.shape, device=images.device)

    tokens = forward


def write_world(folder: Path, size: SimpleNamespace, trials: int) -> None:
    """Images, and for each of eight people voxels and one session of training and of testing."""
    rng = np.random.default_rng(0)
    data.write_images(data.h5_path(folder, "images"),
                      rng.random((size.images, 3, size.pixels, size.pixels), np.float32))
    for subject, voxels in enumerate(size.voxels, 1):
        table = np.full((trials + 10, 17), -1.0)
        table[:, data.IMAGE] = np.resize(rng.permutation(size.images), len(table))
        table[:, data.BETA], table[:, data.SESSION] = np.arange(len(table)), 1
        windows = data.behaviour_windows(table)
        for split, rows in (("train", slice(0, trials)), ("new_test", slice(trials, None))):
            data.write_session_tar(data.session_tar(folder, subject, split), table[rows], *(w[rows] for w in windows))
        data.write_betas(data.h5_path(folder, "betas", subject), rng.standard_normal((len(table), voxels), np.float32))


def measure(folder: Path, size: SimpleNamespace, flags: str, warm: int, steps: int) -> SimpleNamespace:
    """.ms a step, .parts of it {name: ms}, GiB at the .peak and .reserved, .weights that learn, .batch."""
    gc.collect()
    cuda = torch.cuda.is_available()
    marks, clock, found = [], [], SimpleNamespace()

    def mark(name: str) -> None:
        if cuda and len(clock) == 1:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append((name, event))

    def around(function, before: str | None, after: str):
        def call(*args, **kwargs):
            if before:
                mark(before)
            result = function(*args, **kwargs)
            mark(after)
            return result
        return call

    def losses(args, accelerator, model, batch, *rest):
        found.calls = getattr(found, "calls", 0) + 1
        if found.calls == 1:
            found.batch = len(batch["clip"])
            found.weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if found.calls in (warm + 1, warm + 1 + steps):
            if cuda:
                torch.cuda.synchronize()
            if cuda and not clock:
                torch.cuda.reset_peak_memory_stats()
            clock.append(time.perf_counter())
        if len(clock) == 2:
            raise Done
        return step(args, accelerator, model, batch, *rest)

    step = around(train.step_losses, "load", "forward")
    seq, channels = size.tokens
    with ExitStack() as stack:
        for target, name, value in (
            (train, "step_losses", losses),
            (Accelerator, "backward", around(Accelerator.backward, None, "backward")),
            (torch.optim.AdamW, "step", around(torch.optim.AdamW.step, None, "AdamW")),
            (train, "load_clip", lambda *_: Frozen((seq, channels))),
            (train, "load_vae", lambda *_: Frozen((4, size.latents, size.latents))),
            (train, "load_teacher", lambda *_: Frozen((size.features, 512))),
            (data, "encode_latents", lambda network, images: network(images)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        try:
            train.main([f"--data_path={folder}", f"--train_logs={folder / 'logs'}", "--num_epochs=9", "--mixup_pct=1",
                        "--ckpt_interval=9", "--no-ckpt_saving", *flags.split(), *size.flags.split()])
        except Done:
            pass
    found.ms = 1000 * (clock[1] - clock[0]) / steps
    found.parts, found.peak, found.reserved = {}, 0.0, 0.0
    if cuda:
        torch.cuda.synchronize()
        found.peak = torch.cuda.max_memory_allocated() / 2**30
        found.reserved = torch.cuda.max_memory_reserved() / 2**30
        for (_, one), (name, two) in zip(marks, marks[1:], strict=False):
            found.parts[name] = found.parts.get(name, 0) + one.elapsed_time(two) / steps
    return found


def limits() -> tuple[float, float]:
    """Operations a second of a bfloat16 matrix product, and bytes a second of a copy, read and written."""
    def rate(work, count: int) -> float:
        for i in range(30):
            if i == 10:
                torch.cuda.synchronize()
                began = time.perf_counter()
            work()
        torch.cuda.synchronize()
        return 20 * count / (time.perf_counter() - began)
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    source, target = torch.empty(2, 2**30, device="cuda", dtype=torch.uint8)
    return rate(lambda: a @ b, 2 * 8192**3), rate(lambda: target.copy_(source), 2 * 2**30)


def main(argv: list[str] | None = None) -> list[SimpleNamespace]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, on a CPU")
    parser.add_argument("--flags", default="--compile", help="more flags of train.py, for each row")
    args = parser.parse_args(argv)
    size, trials, warm, steps = (TINY, 28, 1, 2) if args.tiny else (TRUE, 340, 16, 30)
    if not args.tiny:
        matmul, copy = limits()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {matmul / 1e12:.0f} TFLOP/s, "
              f"{copy / 1e12:.2f} TB/s, flags {args.flags}\n")
    print("| training | batch | ms / step | forward, backward, AdamW, loading | peak GiB (reserved) | floor, ms | "
          "original, ms (GPU) | times as fast (GPU) |\n|---|--:|--:|---|--:|--:|--:|--:|", flush=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder), size, trials)
        for title, flags, wall, busy in ROWS:
            found = measure(Path(folder), size, f"{flags} {'' if args.tiny else args.flags}", warm, steps)
            results.append(found)
            floor = "" if args.tiny else (
                f"{1000 * (found.batch * OPERATIONS / matmul + found.weights * BYTES / copy):.0f}")
            parts = ", ".join(f"{found.parts.get(name, 0):.0f}" for name in ("forward", "backward", "AdamW", "load"))
            print(f"| {title} | {found.batch} | {found.ms:.1f} | {parts} | {found.peak:.1f} ({found.reserved:.1f}) | "
                  f"{floor} | {wall}{f' ({busy})' if busy else ''} | {wall / found.ms:.1f}"
                  f"{f' ({busy / found.ms:.1f})' if busy else ''} |", flush=True)
            torch._dynamo.reset()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return results


if __name__ == "__main__":
    main()
