"""Shared by the tests: one thread, the repository on the path, and one smallest toy world for all.

    python -m pytest
"""

import os
import shutil
import signal
import sys
from pathlib import Path

# Nothing of the machine's own: one thread, for two sum in another order; no GPU, where train.py works in bfloat16; no
# judges that somebody once downloaded; no proxy and no offline mode between test_hub.py and its server.
NOWHERE = str(Path(__file__).parent / "nowhere")
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_HOME": NOWHERE, "HF_HUB_CACHE": NOWHERE,
               "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest  # noqa: E402

import toy  # noqa: E402


@pytest.fixture(scope="session")
def smoke_world(tmp_path_factory) -> Path:
    """The world of `python toy.py --smoke`, seed 0, without models. For reading; the first training adds targets/."""
    path = tmp_path_factory.mktemp("worlds") / "toy-smoke"
    toy.build_world(path, toy.SMOKE, seed=0)
    return path


@pytest.fixture(autouse=True)
def own_sigterm():
    """An error within a training leaves its handler (processes.noting_sigterm): not to the next test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


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
