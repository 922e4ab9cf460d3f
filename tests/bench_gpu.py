"""How fast and how large is all that runs at the paper's size? Prints the tables that README.md quotes.

Random weights and data of the true sizes, in the official files.

Training: what is timed is train.py's own loop, with its loader, log and progress bar: two looks at the clock are put in
its way, and what it does after an epoch, which is short here, is done once, after the timed steps ("test": of 300
images, what --compile takes for it included). Only the frozen networks are stand-ins, whose targets are noise of the
right shape: the loop reads those from the disk and never calls a network. "loader": what reading a batch and bringing
it to the GPU takes by itself, from a disk whose files are not in memory. "original": the published code's ms / step on
the same kind of card, all of it, and what its GPU worked of that. "floor": operations / the card's matmul rate + bytes
of weights and AdamW / its copy rate, one after another.

Targets: data.py's own pass over images, with the frozen networks at their true sizes, from the image file to caches in
/dev/shm, so that it is not the disk that is measured. Pictures: tests/bench_recon.py and tests/bench_refine.py.

Several processes (`--processes`): the same loop, the second row of ROWS, started by `accelerate launch` with the files
of configs/ as they are, on one GPU and on several, with targets that the system keeps in main memory: how much one disk
gives to many is another question. "of linear": samples a second, by those of one GPU times the GPUs.

    python tests/bench_gpu.py             an NVIDIA GPU of 80 GB; eight minutes
    python tests/bench_gpu.py --all       more rows of training, more batch sizes and flags of pictures
    python tests/bench_gpu.py --processes several of them; needs pip install deepspeed
    python tests/bench_gpu.py --tiny      training and targets at the smallest sizes, on a CPU: does the script work?
"""

import argparse
import gc
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import open_clip
import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import AutoencoderKL
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import data  # noqa: E402
import frozen  # noqa: E402
import train  # noqa: E402

# What, flags, GB of the card, the original's ms a step: wall time and GPU-busy (shared/reference/gpu_baseline.md).
ROWS = [
    ("fine-tuning, 4096 wide", "--subj=1 --hidden_dim=4096 --batch_size=24", 48, 426, 383),
    ("pretraining, 4096 wide", "--multi_subject --subj=8 --hidden_dim=4096 --batch_size=42", 48, 801, 660),
    ("pretraining, 1024 wide, no low-level head",
     "--multi_subject --subj=8 --hidden_dim=1024 --batch_size=42 --no-blurry_recon", 24, 375, None),
    ("fine-tuning, 4096 wide, `--optimizer_bits=8`",
     "--subj=1 --hidden_dim=4096 --batch_size=24 --optimizer_bits=8", 24, 426, 383),
    ("pretraining, 4096 wide, the paper's batch",
     "--multi_subject --subj=8 --hidden_dim=4096 --batch_size=63", 80, None, None),
    ("pretraining, 1024 wide, `--gradient_checkpointing`",
     "--multi_subject --subj=8 --hidden_dim=1024 --batch_size=42 --gradient_checkpointing", 24, None, None),
]
DEFAULT = 3  # the first rows; the others with --all
# File in configs/, more flags, steps to warm up and to time.
SEVERAL = [("multi_gpu", "--compile", 16, 30), ("deepspeed_zero2", "", 8, 16), ("deepspeed_zero2_offload", "", 2, 4)]
MEMORY = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # as README.md advises
USABLE = 0.93  # of a card's memory: the driver and the libraries take some
# Images: two batches of 64 to warm up and 17 that targets_table times.
TRUE = SimpleNamespace(voxels=(15724, 14278, 15226, 13153, 13039, 17907, 12682, 14386), tokens=(256, 1664), pixels=224,
                       latents=28, features=49, flags="", images=1216, tests=300)
TINY = SimpleNamespace(voxels=(20,) * 8, tokens=(4, 16), pixels=16, latents=8, features=4,
                       flags="--hidden_dim=16 --prior_depth=1 --prior_dim_head=8 --batch_size=14", images=40, tests=10)
# Of both passes of a sample: the prior's .76e12 (gpu_baseline.md), half of its last layer left out; the rest .02.
OPERATIONS = 0.72e12
BYTES = 32  # a weight: AdamW reads and writes 24, forward and backward pass read 8; a gradient need not be written


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
    """Images, and for each of eight people a session of training, and as many test trials as a test looks at.

    Voxels repeat after 350 trials.
    """
    rng = np.random.default_rng(0)
    data.write_images(data.h5_path(folder, "images"),
                      rng.random((size.images, 3, size.pixels, size.pixels), np.float32))
    for subject, voxels in enumerate(size.voxels, 1):
        table = np.full((trials + size.tests, 17), -1.0)
        table[:, data.IMAGE] = np.resize(rng.permutation(size.images), len(table))
        table[:, data.BETA], table[:, data.SESSION] = np.arange(len(table)), 1
        windows = data.behaviour_windows(table)
        for split, rows in (("train", slice(0, trials)), ("new_test", slice(trials, None))):
            data.write_session_tar(data.session_tar(folder, subject, split), table[rows], *(w[rows] for w in windows))
        some = rng.standard_normal((min(len(table), 350), voxels), np.float32)  # to draw all would take long
        data.write_betas(data.h5_path(folder, "betas", subject), np.resize(some, (len(table), voxels)))


def forget_files(folder: Path) -> None:
    """Let the next reading of the cached targets come from the disk."""
    for path in (folder / "targets").iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def load_only(args: argparse.Namespace, run: SimpleNamespace, device: torch.device) -> float:
    """Milliseconds a step that loading takes when nothing else is done, over an epoch."""
    began = time.perf_counter()
    for batch in data.prefetch(islice(train.fetch_all(args, run), run.steps), device, pin=True):
        train.encode(batch, run.targets, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began) / run.steps


def limit_memory(card: int) -> None:
    """Act as a card of so many GB."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, USABLE * card / total))


def peaks() -> tuple[float, float]:
    """GiB of GPU memory that were in use, and reserved, at most since the last call."""
    if not torch.cuda.is_available():
        return 0.0, 0.0
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return found


def measure(folder: Path, size: SimpleNamespace, flags: str, warm: int, steps: int, disk: bool) -> SimpleNamespace:
    """.ms a step, .parts of it {name: ms}, GiB at the .peak and .reserved, .weights that learn, .batch.

    And .loader: ms that loading takes by itself, from the `disk` or what the system keeps of it in memory. .test: s
    that the test after an epoch takes, .test_peak.
    """
    gc.collect()
    cuda = torch.cuda.is_available()
    marks, clock, found, runs = [], [], SimpleNamespace(), []
    epoch, report = train.train_epoch, train.report

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

    def first_epoch(args, accelerator, run, *rest):
        if not hasattr(found, "loader"):
            if disk:
                forget_files(folder)
            found.loader = load_only(args, run, accelerator.device)
            runs.append(run)
        return epoch(args, accelerator, run, *rest)

    def losses(args, accelerator, model, batch, *rest):
        found.calls = getattr(found, "calls", 0) + 1
        if found.calls == 1:
            found.batch = len(batch["clip"])
            found.weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if found.calls in (warm + 1, warm + 1 + steps):
            if cuda:
                torch.cuda.synchronize()
            if not clock:
                peaks()  # counted anew from here
            clock.append(time.perf_counter())
        if len(clock) == 2:
            found.peak, found.reserved = peaks()
            report(args, accelerator, runs[0])
            found.test, (found.test_peak, _) = time.perf_counter() - clock[1], peaks()
            raise Done
        return step(args, accelerator, model, batch, *rest)

    step = around(train.step_losses, "load", "forward")
    seq, channels = size.tokens
    with ExitStack() as stack:
        for target, name, value in (
            (train, "step_losses", losses),
            (train, "report", lambda *_: None),  # between steps that are timed; `losses` does it
            (train, "train_epoch", first_epoch),
            (Accelerator, "backward", around(Accelerator.backward, None, "backward")),
            (AcceleratedOptimizer, "step", around(AcceleratedOptimizer.step, None, "AdamW")),
            (train, "load_clip", lambda *_: Frozen((seq, channels))),
            (train, "load_vae", lambda *_: Frozen((4, size.latents, size.latents))),
            (train, "load_teacher", lambda *_: Frozen((size.features, 512))),
            (data, "encode_latents", lambda network, images: network(images)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        try:
            train.main([f"--data_path={folder}", f"--train_logs={folder / 'logs'}", "--num_epochs=99", "--mixup_pct=1",
                        "--ckpt_interval=99", "--no-ckpt_saving", *flags.split(), *size.flags.split()])
        except Done:
            pass
    found.ms = 1000 * (clock[1] - clock[0]) / steps
    found.parts = {}
    if cuda:
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


HEAD = ("| training | batch | card | ms / step | forward, backward, AdamW, loading | loader | peak GiB (reserved) | "
        "test, s (peak GiB) | floor, ms | original, ms (GPU) | times as fast (GPU) |\n"
        "|---|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|")


def parts_of(found: dict[str, float]) -> str:
    return ", ".join(f"{found.get(name, 0):.0f}" for name in ("forward", "backward", "AdamW", "load"))


def training_row(number: int, folder: Path, tiny: bool, flags: str) -> SimpleNamespace | None:
    """Measure and print a row; None if it runs out of memory."""
    title, own, card, wall, busy = ROWS[number]
    own = own.replace("--optimizer_bits=8", "") if tiny else f"{own} {flags}"
    matmul, copy = (math.inf, math.inf) if tiny else limits()
    limit_memory(card)
    try:
        found = measure(folder, TINY if tiny else TRUE, own, *((1, 2) if tiny else (16, 30)), disk=True)
    except torch.cuda.OutOfMemoryError as error:
        return print(f"| {title} | | {card} GB | {str(error).splitlines()[0]} |", flush=True)
    floor = 1000 * (found.batch * OPERATIONS / matmul + found.weights * BYTES / copy)
    peak, test = f"{found.peak:.1f} ({found.reserved:.1f})", f"{found.test:.1f} ({found.test_peak:.1f})"
    original = f"{wall}{f' ({busy})' if busy else ''}" if wall else ""
    times = f"{wall / found.ms:.1f}{f' ({busy / found.ms:.1f})' if busy else ''}" if wall else ""
    print(f"| {title} | {found.batch} | {card} GB | {found.ms:.1f} | {parts_of(found.parts)} | {found.loader:.0f} | "
          f"{peak} | {test} | {floor:.0f} | {original} | {times} |", flush=True)
    return found


def training_table(folder: Path, flags: str, rows: range) -> None:
    """Each row in a process of its own: what one leaves of the memory would be the next one's to put up with."""
    matmul, copy = limits()
    torch.cuda.empty_cache()
    print(f"matrix products: {matmul / 1e12:.0f} TFLOP/s, copies: {copy / 1e12:.2f} TB/s, flags {flags}\n\n{HEAD}",
          flush=True)
    for number in rows:
        subprocess.run([sys.executable, __file__, f"--row={number}", f"--folder={folder}", f"--flags={flags}"],
                       env=os.environ | MEMORY, check=True)


def launched_row(number: int, folder: Path, tiny: bool, flags: str, warm: int, steps: int) -> None:
    """One of the processes that accelerate launched: the first writes what it measured to folder/row.json."""
    found = measure(folder, TINY if tiny else TRUE, f"{ROWS[number][1]} {flags}", warm, steps, disk=False)
    if PartialState().is_main_process:
        found.main_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found.processes = PartialState().num_processes
        (folder / "row.json").write_text(json.dumps(vars(found)))
    PartialState().wait_for_everyone()


def processes_table(folder: Path, tiny: bool, names: list[str]) -> list[dict]:
    """Rows: each of `names`, files of configs/, on one GPU, on two, and so on to all that there are."""
    print("| config | GPUs | batch | ms / step | forward, backward, AdamW, loading | loader | samples / s | "
          "of linear | peak GiB a GPU (reserved) | main memory of one process, GiB |\n"
          "|---|--:|--:|--:|---|--:|--:|--:|--:|--:|", flush=True)
    configs, rows, alone = Path(__file__).parents[1] / "configs", [], {}
    counts = [2**i for i in range(4) if 2**i <= (2 if tiny else torch.cuda.device_count())]
    for config, flags, warm, steps in [row for row in SEVERAL if row[0] in names]:
        for count in counts:
            file = config.replace("multi_gpu", "one_gpu") if count == 1 else config  # accelerate insists
            launch = ["torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if tiny else [
                "accelerate.commands.launch", f"--config_file={configs / file}.yaml", f"--num_processes={count}"]
            steps_of = f"{1 if tiny else warm} {2 if tiny else steps}"
            row = ["--row=1", f"--folder={folder}", f"--launched={steps_of}", f"--flags={'' if tiny else flags}"]
            threads = {}  # the launcher's default is 1
            if "offload" in config:  # as its command has it
                threads["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // count))
            done = subprocess.run([sys.executable, "-m", *launch, __file__, *row, *["--tiny"] * tiny],
                                  env=os.environ | MEMORY | threads)
            if done.returncode:
                print(f"| `{file}.yaml` | {count} | exit code {done.returncode} |", flush=True)
                continue
            row = json.loads((folder / "row.json").read_text())
            rate = 1000 * row["processes"] * row["batch"] / row["ms"]
            alone.setdefault(config, rate / count)
            print(f"| `{file}.yaml` | {row['processes']} | {row['processes']} x {row['batch']} | {row['ms']:.1f} | "
                  f"{parts_of(row['parts'])} | {row['loader']:.0f} | {rate:.0f} | {rate / count / alone[config]:.0%} | "
                  f"{row['peak']:.1f} ({row['reserved']:.1f}) | {row['main_memory']:.1f} |", flush=True)
            rows.append(row)
    return rows


def frozen_networks(tiny: bool) -> dict[str, nn.Module]:
    """The three whose outputs are the targets, with random weights: in half precision, as train.py loads them."""
    if tiny:
        return {"clip": Frozen(TINY.tokens)}
    from bench_recon import random_weights
    with torch.device("meta"):
        clip = open_clip.create_model("ViT-bigG-14", device="meta")
    del clip.transformer  # the texts' half is not asked
    return {"clip": random_weights(lambda: frozen.FrozenCLIP(clip, None), torch.float16),
            "vae": random_weights(lambda: AutoencoderKL(**frozen.SD_VAE), torch.float16),
            "teacher": random_weights(lambda: frozen.FrozenTeacher(frozen.ConvNeXtTeacher()), torch.float16)}


def targets_table(folder: Path, tiny: bool) -> dict[str, float]:
    """Images a second of data.cache_targets' pass over all images, by network: from one file to another."""
    images, rates, every, size = data.Images(folder), {}, 73_000, 4 if tiny else 64
    rows, fill = np.arange(len(images)), data.TargetCache.fill
    caches = tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").exists() else None)
    print("\n| targets | images / s | bytes an image | of 73,000 images |\n|---|--:|--:|--:|", flush=True)
    for name, network in frozen_networks(tiny).items():
        def timed(cache, images, rows, *rest, name=name):
            fill(cache, images, rows[:2 * size], *rest)  # the GPU's libraries load what they need
            began = time.perf_counter()
            fill(cache, images, rows, *rest)
            rates[name] = (len(rows) - 2 * size) / (time.perf_counter() - began)
        with mock.patch.object(data.TargetCache, "fill", timed):
            device = "cpu" if tiny else "cuda"
            one = data.cache_targets(images, folder, rows, {name: network}, 2, device, caches, size)[name].row_bytes
        print(f"| {name} | {rates[name]:.0f} | {one:,} | {every / rates[name]:.0f} s, {one * every / 1e9:.1f} GB |",
              flush=True)
    shutil.rmtree(caches)
    together = 1 / sum(1 / rate for rate in rates.values())
    print(f"| all | {together:.0f} | | {every / together:.0f} s |\n", flush=True)
    return rates


def main(argv: list[str] | None = None) -> list[SimpleNamespace]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, on a CPU")
    parser.add_argument("--flags", default="--compile", help="more flags of train.py, for each row")
    parser.add_argument("--only", choices=["training", "targets", "pictures"], help="one of the parts; none: all")
    parser.add_argument("--all", action="store_true", help="more rows of training and of pictures")
    parser.add_argument("--row", type=int, help="one of the training table, from 0, in this process; none: all")
    parser.add_argument("--folder", help="of the data that an earlier process wrote")
    parser.add_argument("--processes", nargs="*", choices=[name for name, *_ in SEVERAL],
                        help="the table of several GPUs, in place of the others; none named: all files of configs/")
    parser.add_argument("--launched", help="steps to warm up and to time, in each of the processes of that table")
    args = parser.parse_args(argv)
    if args.launched:
        return launched_row(args.row, Path(args.folder), args.tiny, args.flags, *map(int, args.launched.split()))
    if args.row is not None:
        return [training_row(args.row, Path(args.folder), args.tiny, args.flags)]
    if not args.tiny:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    began, results = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(folder, *((TINY, 28) if args.tiny else (TRUE, 1400)))  # 33 steps of 42 are an epoch
        if args.processes is not None:
            return processes_table(folder, args.tiny, args.processes or [name for name, *_ in SEVERAL])
        if args.only in (None, "training") and args.tiny:
            print(HEAD)
            results = [training_row(number, folder, True, "") for number in range(3)]
        elif args.only in (None, "training"):
            training_table(folder, args.flags, range(len(ROWS) if args.all else DEFAULT))
        if args.only in (None, "targets"):
            targets_table(folder, args.tiny)
    if args.only in (None, "pictures") and not args.tiny:
        import bench_recon
        import bench_refine
        bench_recon.main(short=not args.all)
        bench_refine.main(short=not args.all)
    print(f"\n{time.perf_counter() - began:.0f} s")
    return results


if __name__ == "__main__":
    main()
