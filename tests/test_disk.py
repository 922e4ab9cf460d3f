"""A disk that becomes full while something is written: one sentence, exit code 2, what was there before is whole.

On a real disk, a tmpfs of 64 MB, for which the tests need the right to mount. (A limit on the size of files
would not do: it is another error, and a signal.) Writing into a memory map there ends the process by SIGBUS, HDF5 by
SIGSEGV: such a test fails by losing its worker.

    python -m pytest tests/test_disk.py
"""

import os
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from test_train import SMALL, arguments
from test_unclip import FAST, world  # noqa: F401  a fixture

import checkpoints
import data
import evaluate
import files
import frozen
import model
import nsd
import recon
import toy
import train
import unclip


@pytest.fixture
def disk(tmp_path):
    """An empty disk of 64 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path, leave: int = 0) -> None:
    """Another program's file takes all but `leave` bytes, in whole pages."""
    space = os.statvfs(disk)
    with open(disk / "other", "ab", buffering=0) as file:
        file.write(bytes(max(0, space.f_bavail * space.f_frsize - leave)))


def refused(main, capfd, *names: str) -> str:
    """main() ends with one sentence that holds the names, exit code 2, and no traceback, of any thread."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        model.run_main(main)
    said = capfd.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and "Traceback" not in said, said
    assert all(name in errors[0] for name in (*names, "free")), errors
    return errors[0]


def rest(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.suffix in (".tmp", ".building", ".old")]


def folder_of_weights(path: Path) -> None:
    with files.replacing_folder(path) as building:
        AutoencoderKL(block_out_channels=(256,), layers_per_block=1).save_pretrained(building)


def test_leftovers_of_this_machine_go_and_others_files_stay(tmp_path):
    """Whether a process still runs can be told of this machine's only; another may share the disk."""
    here, names = socket.gethostname(), []
    for machine, process in ((here, 2**22 + 1), (here, os.getpid()), (f"{here}2", 2**22 + 1)):  # Linux has fewer
        names.append(f"a.pt.{machine}.{process}.tmp")
        (tmp_path / names[-1]).touch()
    files.save(tmp_path / "a.pt", 1)
    assert sorted(rest(tmp_path)) == sorted(names[2:])


BIG = np.zeros((40, 10**5), np.float32)  # 16 MB
WRITERS = {
    "large tensors": lambda path: files.save(path, {"a": torch.zeros(2**20), "b": torch.zeros(2**22)}),
    "small tensors": lambda path: files.save(path, [torch.zeros(2**10 + i) for i in range(4000)]),
    "a checkpoint": lambda path: checkpoints.save_checkpoint(path, torch.nn.Linear(2000, 2000)),
    "betas": lambda path: data.write_betas(path, BIG),
    "masks": lambda path: data.write_region_masks(path, {1: {f"V{i}": np.ones(10**5, bool) for i in range(200)}}),
    "a tar": lambda path: data.write_session_tar(path, *toy_trials(3000)),
    "shared1000.npy": lambda path: nsd.save_shared(path.parent, np.ones(2**24, bool)),
    "weights of diffusers": folder_of_weights,
    "a toy world": lambda path: toy.build_world(path, toy.SMOKE),
    "a grid": lambda path: (fill(path.parent, 4096), recon.save_grid(
        path, [("seen", torch.rand(2, 3, 99, 99), [""] * 2)], ["1"] * 2)),
    "scores": lambda path: evaluate.write(*scores_of(path)),
}


def toy_trials(count: int) -> tuple[np.ndarray, ...]:
    return np.zeros((count, 17)), np.zeros((count, 15, 17)), np.zeros((count, 15, 17)), np.zeros((count, 3, 17))


def scores_of(path: Path) -> tuple:
    args = evaluate.parse([f"--evals={path.parent}", f"--model_name={path.name}"])
    return args, [], SimpleNamespace(scores={"recons/ssim": torch.zeros(2**22)}), [{"key": "recons/ssim"}]


@pytest.mark.parametrize("what", WRITERS)
def test_every_writer_names_the_file_and_leaves_nothing(disk, capfd, what):
    path = disk / "made"
    fill(disk, 2**23)
    refused(lambda: WRITERS[what](path), capfd, str(disk))
    assert [found.name for found in disk.rglob("*") if found.is_file() and found != disk / "other"] == []


def test_a_training_keeps_its_checkpoint(smoke_world, disk, capfd, monkeypatch):
    """With no byte left, and with room for half of the next checkpoint."""
    flags = arguments(smoke_world, disk, "--model_name=a", "--num_epochs=2", "--ckpt_interval=1", "--resume", *SMALL)
    last, epoch = disk / "train_logs/a/last.pth", train.train_epoch

    def filling(args, accelerator, run, *more):
        epoch(args, accelerator, run, *more)
        if run.step == 2 * run.steps:
            fill(disk, leave)
    monkeypatch.setattr(train, "train_epoch", filling)
    for leave in (0, 2**20):
        refused(lambda: train.main(flags), capfd, str(last), "no space is left")
        assert checkpoints.load_checkpoint(last)["epoch"] == 0 and rest(disk) == []
        assert last.stat().st_size > 2 * leave
        (disk / "other").unlink()
    monkeypatch.undo()
    train.main(flags)
    assert checkpoints.load_checkpoint(last)["epoch"] == 1


class Pictures:
    """As data.Images: n of the same."""
    def __len__(self) -> int:
        return 40

    def __getitem__(self, rows) -> torch.Tensor:
        return torch.zeros(len(rows), 3, 2, 2)


def test_a_cache_goes_on_when_there_is_room_again(disk, capfd):
    seen, last = [], 36

    def encode(pictures, rows):
        seen.append(rows.tolist())
        if rows[0] == last:
            fill(disk, 10_000)
        return torch.from_numpy(rows.astype(np.float32))[:, None].expand(-1, 50_000)  # 100 kB a row
    cache = data.TargetCache(disk / "targets", "clip", encode, (50_000,), "a")
    refused(lambda: cache.fill(Pictures(), range(40), batch_size=2), capfd, str(cache.path))
    missing = cache.missing(range(40)).tolist()  # what was written while the disk became full may be noted or not
    assert missing in ([34, 35, 36, 37, 38, 39], [36, 37, 38, 39]) and len(seen) in (19, 20)
    (disk / "other").unlink()
    seen.clear()
    last = None
    cache.fill(Pictures(), range(40), batch_size=2)
    assert sum(seen, []) == missing and torch.equal(cache[range(40)][:, -1], torch.arange(40).half())


def filling_at(monkeypatch, module, name: str, call: int, disk: Path, leave: int = 4096) -> None:
    """Before the call-th call of module.name, another program fills the disk."""
    plain, calls = getattr(module, name), []

    def counted(*given, **options):
        calls.append(1)
        if len(calls) == call:
            fill(disk, leave)
        return plain(*given, **options)
    monkeypatch.setattr(module, name, counted)


@pytest.fixture(scope="module")
def drawn(smoke_world, tmp_path_factory) -> tuple[list[str], torch.Tensor]:
    """Flags of recon.py for a model trained for a moment, and what it draws."""
    folder = tmp_path_factory.mktemp("drawn")
    train.main(arguments(smoke_world, folder, "--model_name=a", "--num_epochs=1", "--no-blurry_recon", *SMALL))
    flags = [f"--data_path={smoke_world}", f"--train_logs={folder / 'train_logs'}", "--model_name=a", "--no-captions",
             "--no-blurry_recon", *"--scheduler=dpm --steps=2 --guidance=1 --prior_steps=2 --batch_size=6".split()]
    return flags, recon.main([*flags, f"--evals={folder}"])["recons"]


@pytest.mark.parametrize("where, call, file", [("draw_recons", 2, "a_parts/recons_00001.pt"), ("write", 1, "a_all_")])
def test_recon_goes_on_when_there_is_room_again(drawn, disk, capfd, where, call, file):
    flags, recons = drawn
    flags = [*flags, f"--evals={disk}"]
    with pytest.MonkeyPatch.context() as patch:
        filling_at(patch, recon, where, call, disk)
        refused(lambda: recon.main(flags), capfd, str(disk / "a" / file))
    assert rest(disk) == [] and not list(disk.glob("a/*_all_recons.pt"))
    (disk / "other").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recon, "read_brains", None)  # that pass is not done again
        recon.main(flags)
    assert torch.equal(torch.load(disk / "a/a_all_recons.pt", weights_only=True), recons)
    assert not (disk / "a/a_parts").exists()


def test_a_decoder_keeps_its_state(world, disk, capfd):  # noqa: F811
    flags = [f"--data_path={world}", f"--train_logs={disk}", *FAST, "--ckpt_interval=2"]
    run = disk / "decoder"
    unclip.main([*flags, "--num_steps=2"])
    for file, where in (("unclip", (unclip, "save_decoder")), ("state/step_", (Accelerator, "save_state"))):
        with pytest.MonkeyPatch.context() as patch:
            filling_at(patch, *where, 1, disk, leave=20_000)
            refused(lambda: unclip.main([*flags, "--num_steps=4"]), capfd, str(run / file), "no space is left")
        assert [path.name for path in (run / "state").iterdir()] == ["step_00000002"] and rest(disk) == []
        frozen.load_unclip(run / "unclip", "cpu")
        (disk / "other").unlink()
    unclip.main([*flags, "--num_steps=4"])
    assert [path.name for path in (run / "state").iterdir()] == ["step_00000004"]
