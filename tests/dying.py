"""Kill the stages in the middle of writing, and start them again. Started by test_killed.py, as a process of its own:

    python tests/dying.py FOLDER WORLD       what happened: FOLDER/killed.json, FOLDER/lost.json

Every run is a process forked from this one, which has imported all stages once: that takes longer than they do. A run
is killed by SIGKILL, from inside, so that it is always at the same place: before it renames a file that it has
written, or in the middle of writing rows of a cache.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from test_refine import UNET  # noqa: E402

import checkpoints  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import model  # noqa: E402
import recon  # noqa: E402
import refine  # noqa: E402
import report  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402
import unclip  # noqa: E402

PLACES = ["--data_path={world}", "--evals={folder}/evals", "--train_logs={folder}/logs", "--model_name=a"]
FAST = "--scheduler=dpm --steps=2 --guidance=1".split()
RECON = [*PLACES, *FAST, "--prior_steps=2", "--batch_size=6"]
REFINE = [*PLACES[:2], PLACES[3], "--steps=2", "--batch_size=6", "--prompt=empty", "--guidance=1"]
EVALUATE = [*PLACES, "--tables={folder}/tables", "--cache_dir={folder}/cache"]  # where are no judges: no features
SIZES = "--hidden_dim=16 --prior_depth=1 --prior_dim_head=16 --num_epochs=2 --batch_size=8 --ckpt_interval=1".split()
TRAIN = [*PLACES[:1], *PLACES[2:], "--cache_dir={folder}/cache", "--teacher_views=1", "--resume", *SIZES]
DECODER = [*PLACES[:1], PLACES[2], *FAST, "--num_steps=9", "--batch_size=2", "--num_val=4", "--num_eval=4",
           "--cache_dir={folder}/cache", "--base={folder}/tiny.json", "--vae={world}/vae", "--resolution=64"]

# What is run, its flags, what it writes, and where it is killed: the ends of files about to be renamed, in turn.
KILLED = {
    "toy.py": (lambda flags: toy.build_world(Path(flags[0]), toy.SMOKE), ["{folder}/toy"], "toy",
               ["subj04.building/train/0.tar"]),
    "train.py": (train.main, TRAIN, "cache/targets logs/a/last.pth", ["rows of the cache", "last.pth"]),
    "recon.py": (recon.main, RECON, "evals", ["recons_00001.pt", "a_all_recons.pt"]),
    "refine.py": (refine.main, REFINE, "evals", ["refined_00001.pt", "a_all_enhancedrecons.pt"]),
    "evaluate.py": (evaluate.main, EVALUATE, "evals tables", ["a_metrics.json", "report.html"]),
}
# Where the second of two processes is killed, and the first waits for it.
LOST = {"recon.py": (recon.main, RECON, recon, "draw_recons"), "refine.py": (refine.main, REFINE, refine, "refine"),
        "unclip.py": (unclip.main, DECODER, unclip, "train_step")}


NOW = datetime.now()


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(place: str) -> None:
    """Before a file is renamed to something that ends so."""
    rename, put = os.replace, data.put_rows

    def dying(source, target):
        if str(target).endswith(place) and (place != "last.pth" or os.path.exists(target)):  # the second one
            die()
        rename(source, target)

    def half_put(path, mapped, rows, values):
        if mapped.dtype == np.float16:
            rows, values = rows[: len(rows) // 2], values[: len(rows) // 2]
        put(path, mapped, rows, values)
        if mapped.dtype == np.float16:
            die()
    os.replace = dying
    if place == "rows of the cache":
        data.put_rows = half_put


def forked(run: Callable, errors: Path, before: Callable = lambda: None) -> int:
    """The process of run()."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(errors, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        before()
        report.umap_points = lambda between: np.zeros((len(between), 2))  # of no use here, and slow
        evaluate.commit = lambda: ""  # else a file differs when somebody edits or commits between two runs
        report.datetime = SimpleNamespace(now=lambda: NOW)  # else a page differs when a minute ends between two runs
        model.run_main(run)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def values(x: object) -> object:
    """What a checkpoint holds. Its bytes may differ where that is the same: pickle writes once what is one object."""
    if isinstance(x, dict):
        return {str(name): values(part) for name, part in x.items()}
    if isinstance(x, list | tuple):
        return [values(part) for part in x]
    return x.numpy().tobytes().hex() if isinstance(x, torch.Tensor) else repr(x)


def content(folder: Path, places: str) -> dict[str, object]:
    files = sorted(path for place in places.split() for path in [folder / place, *(folder / place).rglob("*")]
                   if path.is_file())
    return {str(path.relative_to(folder)): values(checkpoints.load_checkpoint(path)) if path.name == "last.pth"
            else path.read_bytes().hex() for path in files}


def remainders(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*")
            if path.suffix in (".tmp", ".building", ".old") or path.name.endswith("_parts")]


def kill(folder: Path, world: Path, name: str) -> dict:
    """Run a stage; again from the start, killed at each place in turn; and at last to its end."""
    stage, flags, places, kills = KILLED[name]
    flags, errors = [flag.format(folder=folder, world=world) for flag in flags], folder / f"{name}.txt"
    earlier = content(folder, places)
    codes = [ended(forked(lambda: stage(flags), errors))]
    whole = content(folder, places)
    for path in whole.keys() - earlier.keys():
        (folder / path).unlink()
    if name == "toy.py":
        shutil.rmtree(folder / "toy")
    left, epoch = [], None  # remainders after each; how far the checkpoint came
    for place in kills:
        codes.append(ended(forked(lambda: stage(flags), errors, lambda place=place: die_at(place))))
        left.append(remainders(folder))
        if place == "last.pth":
            epoch = checkpoints.load_checkpoint(folder / "logs/a")["epoch"]
    codes.append(ended(forked(lambda: stage(flags), errors)))
    left.append(remainders(folder))
    again = content(folder, places)
    different = [path for path in whole.keys() | again.keys() if whole.get(path) != again.get(path)]
    return {"codes": codes, "kills": len(kills), "left": left, "different": different, "files": len(whole),
            "epoch": epoch, "said": errors.read_text()[-2000:]}


def both(stage: Callable, flags: list[str], texts: list[Path], before: Callable = lambda: None) -> list[int]:
    """The two processes of a run; the second begins with before()."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def join(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2",
                       "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
        if rank:
            before()
    return [forked(lambda: stage(flags), text, lambda rank=rank: join(rank)) for rank, text in enumerate(texts)]


def lose(folder: Path, world: Path, name: str) -> dict:
    """Two processes, of which the second dies when it first calls a function: what the first says, and when it ends.

    Then both again, to the end: what they write in evals/, and what of it differs from what one process wrote there.
    """
    stage, flags, module, function = LOST[name]
    flags, alone = [flag.format(folder=folder, world=world) for flag in flags], content(folder, "evals")
    texts = [folder / f"{name} {rank}.txt" for rank in range(2)]
    children = both(stage, flags, texts, lambda: setattr(module, function, die))
    codes = [ended(children[1])]
    died = time.time()
    codes.insert(0, ended(children[0]))
    found = {"codes": codes, "seconds": time.time() - died, "said": texts[0].read_text()[-2000:]}
    earlier = {path: path.stat().st_mtime_ns for path in (folder / "evals").rglob("*")}
    again = [ended(child) for child in both(stage, flags, texts)]
    written = [str(path.relative_to(folder)) for path in (folder / "evals").rglob("a_*.*")
               if earlier.get(path) != path.stat().st_mtime_ns]
    now = content(folder, "evals")
    return found | {"again": again, "said_again": texts[0].read_text()[-2000:], "written": written,
                    "different": [path for path in written if path in alone and now[path] != alone[path]]}


def main(folder: Path, world: Path) -> None:
    """Write killed.json and lost.json: {stage: what happened}. A stage needs what those before it have written."""
    config = UNET | {"class_embed_type": "projection", "cross_attention_dim": 64, "addition_embed_type": None,
                     "projection_class_embeddings_input_dim": 16}
    (folder / "tiny.json").write_text(json.dumps(config))
    (folder / "cache").mkdir()
    for name in ("clip", "vae", "teacher"):
        (folder / "cache" / name).symlink_to(world / name)
    (folder / "killed.json").write_text(json.dumps({name: kill(folder, world, name) for name in KILLED}))
    (folder / "lost.json").write_text(json.dumps({name: lose(folder, world, name) for name in LOST}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
