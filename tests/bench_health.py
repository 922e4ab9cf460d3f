"""Does a long training stay healthy? Prints how memory grows, and what is left after the end and after Ctrl-C.

    python tests/bench_health.py                  2,000 steps of train.py at the smallest sizes: minutes on a CPU

The toy world, with a test and a checkpoint every 80 steps. Memory is what the process holds in RAM (Linux's VmRSS), its
growth a straight line through all but the first quarter of the steps, in which libraries fill their own caches.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402

FLAGS = ["--num_sessions=2", "--batch_size=3", "--ckpt_interval=10", "--teacher_views=1", "--hidden_dim=32",
         "--prior_depth=1", "--prior_dim_head=16", "--max_lr=1e-4"]


def memory() -> float:
    """MB of RAM that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files() -> set[str]:
    """Files, sockets and pipes that this process holds open, but for the fonts that matplotlib keeps."""
    names = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            names.add(f"{entry.name} {os.readlink(entry)}")
        except FileNotFoundError:  # the listing's own
            pass
    return {name for name in names if "/mpl-data/fonts/" not in name}


def processes(session: int) -> list[int]:
    """Those that were started from the process `session`, its own number among them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()  # state, parent, group, session, ..
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def children() -> list[str]:
    return [child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()]


def scratch(*folders: Path) -> list[str]:
    """Temporary files there, by the names that data.replacing and checkpoints.save_checkpoint give them."""
    return [str(path) for folder in folders for path in folder.rglob("*") if path.suffix in (".tmp", ".building")]


def watch(world: Path, folder: Path, steps: int) -> SimpleNamespace:
    """Train here: .memory (MB at each step), .files and .children that are more than before."""
    seen, losses = [], train.step_losses

    def noting(*given):
        seen.append(memory())
        return losses(*given)
    epoch = len(data.load_trials(world, 1, "train", range(2))) // 3
    files = open_files()
    train.step_losses = noting
    try:
        train.main([f"--data_path={world}", f"--train_logs={folder}", f"--num_epochs={-(-steps // epoch)}", *FLAGS])
    finally:
        train.step_losses = losses
    return SimpleNamespace(memory=seen, files=sorted(open_files() - files), children=children(),
                           scratch=scratch(world, folder))


def interrupt(world: Path, folder: Path) -> SimpleNamespace:
    """Train in another process and press Ctrl-C in its third epoch: .code, .scratch, .processes that are left."""
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    command = [sys.executable, ROOT / "train.py", f"--data_path={world}", f"--train_logs={folder}", "--num_epochs=999"]
    running = subprocess.Popen([*command, *FLAGS], stderr=subprocess.PIPE, start_new_session=True,
                               env=os.environ | {"TMPDIR": str(temporary)})
    shown = b""
    while b"20/" not in shown and (more := running.stderr.read1()):  # the progress bar
        shown += more
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    return SimpleNamespace(code=running.returncode, processes=processes(running.pid),
                           scratch=scratch(world, folder) + [str(path) for path in temporary.iterdir()])


def slope(memory: list[float]) -> float:
    """MB in 100 steps."""
    steps = np.arange(len(memory))[len(memory) // 4:]
    return float(np.polyfit(steps, memory[len(memory) // 4:], 1)[0] * 100)


def main(argv: list[str] | None = None) -> tuple[SimpleNamespace, SimpleNamespace]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="steps of training")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        toy.build_world(world, toy.SMOKE, seed=0)
        ended = watch(world, Path(folder) / "ended", args.steps)
        stopped = interrupt(world, Path(folder) / "stopped")
    ended.slope = slope(ended.memory)
    rows = {f"memory: MB per 100 of {len(ended.memory)} steps": (f"{ended.slope:.2f}", "< 1"),
            "memory: MB after a quarter, at the end":
                (f"{ended.memory[len(ended.memory) // 4]:.0f}, {ended.memory[-1]:.0f}", ""),
            "open files after the end": (len(ended.files), 0),
            "child processes after the end": (len(ended.children), 0),
            "temporary files after the end": (len(ended.scratch), 0),
            "exit code of Ctrl-C": (stopped.code, -signal.SIGINT),
            "processes after Ctrl-C": (len(stopped.processes), 0),
            "temporary files after Ctrl-C": (len(stopped.scratch), 0)}
    print(f"| {'health of train.py':<42} | {'found':>10} | {'reach':>5} |\n|{'-' * 44}|{'-' * 11}:|{'-' * 6}:|")
    for name, (found, reach) in rows.items():
        print(f"| {name:<42} | {found:>10} | {reach:>5} |")
    for left in (*ended.files, *ended.scratch, *stopped.scratch):
        print("left:", left)
    return ended, stopped


if __name__ == "__main__":
    main()
