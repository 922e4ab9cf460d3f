"""Shared by the tests: one thread, the repository on the path, and one smallest toy world for all.

    python -m pytest
"""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small gain nothing from a second thread
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest  # noqa: E402

import toy  # noqa: E402


@pytest.fixture(scope="session")
def smoke_world(tmp_path_factory) -> Path:
    """The world of `python toy.py --smoke`, seed 0, without models. For reading; the first training adds targets/."""
    path = tmp_path_factory.mktemp("worlds") / "toy-smoke"
    toy.build_world(path, toy.SMOKE, seed=0)
    return path


@pytest.fixture
def world_copy(smoke_world, tmp_path) -> Path:
    """A copy of it to damage. The networks, which no test damages here, are links."""
    path = tmp_path / "copy"
    path.mkdir()
    for entry in smoke_world.iterdir():
        if entry.name in ("clip", "teacher", "unclip", "vae", "git", "sdxl"):
            (path / entry.name).symlink_to(entry)
        elif entry.is_dir():
            shutil.copytree(entry, path / entry.name)
        else:
            shutil.copy(entry, path)
    return path
