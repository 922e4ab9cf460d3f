"""Train the same from one, two and four processes. Started by test_processes.py, as a process of its own:

    python tests/ranks.py FOLDER flags of train.py ..       a folder FOLDER/NAME of records for each of RUNS

Forked from one that has imported torch once, which takes longer than to train; PyTorch forbids it after a backward.

What a step draws is drawn by each process: in any number of them, only functions of the trial can be the same. So here
MixCo, the prior's times and noise come from numbers of the trial, MixCo's partner is its neighbour, and nothing is
dropped out. All else is train.py: its data order, losses, DDP, AdamW and files.
"""

import json
import os
import socket
import sys
from pathlib import Path

import numpy as np
import torch
import torch.utils.tensorboard  # noqa: F401  before the forks, as below
from accelerate.utils import extract_model_from_parallel

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402
import model as networks  # noqa: E402
import train  # noqa: E402
from frozen import FrozenCLIP  # noqa: E402

TRIALS = 8  # a step, of all processes together
# name: processes, with --gather_negatives, groups within which one process contrasts
RUNS = {"one": (1, False, 1), "two": (2, True, 1), "four": (4, True, 1),
        "one of 2": (1, False, 2), "2 apart": (2, False, 1), "one of 4": (1, False, 4), "4 apart": (4, False, 1),
        "zero2": (2, False, 1), "offload": (2, False, 1)}  # these two by accelerate launch, with DeepSpeed


def draw_by_trial() -> None:
    mixco, loss = networks.mixco, networks.DiffusionPrior.loss

    def by_voxels(voxels):
        perm = torch.arange(len(voxels)) ^ 1
        return mixco(voxels, perm=perm, betas=voxels[:, 0].abs() % 1, select=voxels[:, 1] > 0)

    def by_tokens(self, backbone, target, **given):
        if not self.training:
            return loss(self, backbone, target, **given)
        draws = [np.random.default_rng(np.frombuffer(x.cpu().numpy().tobytes(), np.uint8)) for x in target]
        times = torch.tensor([int(rng.integers(self.timesteps)) for rng in draws])
        noise = torch.stack([torch.from_numpy(rng.standard_normal(target[0].shape, np.float32)) for rng in draws])
        keep = tuple(torch.tensor([bool(rng.random() < .8) for rng in draws]) for _ in range(2))
        on = target.device
        return loss(self, backbone, target, times.to(on), noise.to(on), tuple(flags.to(on) for flags in keep))

    networks.mixco, networks.DiffusionPrior.loss = by_voxels, by_tokens
    torch.nn.Dropout.forward = lambda self, x: x


def contrast_within(groups: int) -> None:
    """One process whose losses are the means over `groups` parts of its batch, drawn as so many processes would."""
    batches = data.epoch_batches

    def joined(trials, share, steps, seed, epoch, rank, world, together):
        parts = [batches(trials, share // groups, steps, seed, epoch, rank, groups) for rank in range(groups)]
        return ([np.concatenate(chosen) for chosen in zip(*step, strict=True)] for step in zip(*parts, strict=True))

    def in_parts(loss):
        def mean(*given, **options):
            split = [x.chunk(groups) if isinstance(x, torch.Tensor) else [x] * groups for x in given]
            if loss is mixco_nce:  # the partners' positions count from the part's first
                split[3] = [perm - i * len(perm) for i, perm in enumerate(split[3])]
            return sum(loss(*part, **options) for part in zip(*split, strict=True)) / groups
        return mean

    mixco_nce = networks.mixco_nce
    data.epoch_batches = joined
    for name in ("mixco_nce", "soft_clip_loss", "soft_contrastive_loss"):
        setattr(networks, name, in_parts(getattr(networks, name)))


def note_writing(folder: Path, writes: list) -> None:
    """Note each file of `folder` that this process opens to write, makes, renames or removes."""
    def hook(event, given):
        makes = event in ("os.rename", "os.remove") or event == "os.mkdir" and not os.path.exists(given[0])
        if event == "open" and isinstance(given[0], str | os.PathLike):
            makes = given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if makes and str(given[0]).startswith(str(folder)):
            writes.append(f"{event} {given[0]}")
    sys.addaudithook(hook)


def one_process(folder: Path, name: str, rank: int, flags: list[str]) -> None:
    """Train as process `rank` of the run, and write its record: trials of each step, images encoded, files written."""
    world, gathering, groups = RUNS[name]
    record = {"trials": [], "encoded": 0, "writes": []}
    fetch, tokens = train.fetch, FrozenCLIP.tokens

    def noting_fetch(sets, targets, chosen, args):
        record["trials"].append(chosen[0].tolist())
        return fetch(sets, targets, chosen, args)

    def noting_tokens(self, images):
        record["encoded"] += len(images)
        return tokens(self, images)

    train.fetch, FrozenCLIP.tokens = noting_fetch, noting_tokens
    draw_by_trial()
    if groups > 1:
        contrast_within(groups)
    note_writing(folder, record["writes"])
    train.main([*flags, f"--train_logs={folder}", f"--model_name={name}", f"--batch_size={TRIALS // world}",
                *["--gather_negatives"] * gathering])
    (folder / f"{name} {rank}.json").write_text(json.dumps(record))


def main(folder: Path, names: list[str], flags: list[str]) -> None:
    if "RANK" in os.environ:  # one of several that were launched
        return one_process(folder, names[0], int(os.environ["RANK"]), flags)
    extract_model_from_parallel(torch.nn.Identity())  # accelerate imports DeepSpeed here: once, before the forks
    for name in names:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        world = RUNS[name][0]
        for rank in range(world):
            if not (child := os.fork()):
                code = 1
                if world > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                                   "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
                try:
                    one_process(folder, name, rank, flags)
                    code = 0
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            raise SystemExit(f"{name}: exit codes {codes}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
