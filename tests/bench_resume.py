"""Killed three times at random steps and resumed, does a training end with the same weights? A table with hashes.

SIGKILL from inside, at the start of a step: nothing can catch it. On the smallest toy world, so it takes a minute.

    python tests/bench_resume.py [--seed 0]
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import toy  # noqa: E402
from checkpoints import load_checkpoint, torch_load  # noqa: E402

EPOCHS = 8  # BiMixCo in the first two, SoftCLIP after
KILLER = """
import os, signal, sys
import train
losses, steps = train.step_losses, []
def step(*given):
    if len(steps) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    steps.append(1)
    return losses(*given)
train.step_losses = step
train.main(sys.argv[2:])
"""


def train_until(world: Path, folder: Path, steps: int) -> int:
    """Start (or go on with) the training, to be killed after so many steps; its exit code."""
    flags = [f"--data_path={world}", f"--train_logs={folder}", "--resume", f"--num_epochs={EPOCHS}", "--batch_size=3",
             "--ckpt_interval=1", "--teacher_views=1", "--hidden_dim=32", "--prior_depth=1", "--prior_dim_head=16"]
    return subprocess.run([sys.executable, "-c", KILLER, str(steps), *flags], cwd=ROOT, capture_output=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}).returncode


def digest(folder: Path) -> str:
    """Of all weights of last.pth."""
    state = load_checkpoint(folder / "testing")["model_state_dict"]
    return hashlib.sha1(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()[:12]


def step_of(folder: Path) -> int:
    path = folder / "testing/last.pth"
    return torch_load(path, "")["step"] if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the steps at which to kill")
    rng = np.random.default_rng(parser.parse_args().seed)
    with tempfile.TemporaryDirectory() as name:
        world, whole, cut = (Path(name) / part for part in ("world", "whole", "cut"))
        toy.build_world(world, toy.SMOKE)
        assert train_until(world, whole, 10**9) == 0
        total = step_of(whole)
        print(f"| {total} steps | killed at step | exit code | goes on from step | weights |\n|---|--:|--:|--:|---|")
        print(f"| never killed | | 0 | | {digest(whole)} |", flush=True)
        for i, step in enumerate(sorted(rng.choice(np.arange(1, total), 3, replace=False)), 1):
            code = train_until(world, cut, step - step_of(cut))
            print(f"| kill {i} | {step} | {code} | {step_of(cut)} | |", flush=True)
        code = train_until(world, cut, 10**9)
        print(f"| resumed to the end | | {code} | | {digest(cut)} |")
        sys.exit(digest(cut) != digest(whole))


if __name__ == "__main__":
    main()
