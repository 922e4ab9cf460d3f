"""Files and folders that are whole or not there: written under another name, which is then changed.

A run that is killed while it writes leaves the earlier file as it was, and a remainder that the next writing of the
same file takes away. A full disk leaves no remainder, and an error that names the file (model.run_main prints it).
"""

import errno
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Errors that say it in words only: HDF5's, safetensors', and numpy's two.
FULL = ("No space left", "quota exceeded", "Not enough free space", "requested and")


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it (as in PyTorch's), says that the disk, or the user's share of it, is full."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(words in str(error) for words in FULL):
            return True
        error = error.__context__
    return False


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn whatever a writer of `path` makes of a full disk into an OSError that says so and names it."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        pass
    return True


@contextmanager
def replacing(path) -> Iterator[Path]:
    """Give a temporary name to write to; it takes the place of `path` only when all is written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    here = socket.gethostname()  # another machine that shares the disk may be writing the same file
    for left in path.parent.glob(f"{glob.escape(f'{path.name}.{here}')}.*.tmp"):
        if not is_running(left.suffixes[-2][1:]):  # of a run that was killed
            left.unlink(missing_ok=True)
    temporary = path.with_name(f"{path.name}.{here}.{os.getpid()}.tmp")
    with naming_full_disk(path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save(path, value: object) -> None:
    """torch.save, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:  # by its path, PyTorch hides that a disk is full
        torch.save(value, file)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder, which is given empty: FOLDER.building."""
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # of a run that was killed
    with naming_full_disk(folder):
        try:
            building.mkdir(parents=True)
            yield building
            replace_folder(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def replace_folder(new: Path, folder: Path):
    """Rename `new` to `folder`. What was there is `folder`.old for a moment, and gone after."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
