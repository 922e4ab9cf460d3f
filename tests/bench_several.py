"""Do several GPUs learn and draw what one does, and what if one dies? Tables, on the smallest toy world.

Losses: ranks.py's runs of six steps of eight trials, float32. What a step draws follows from the trial, so that it is
the same in any number of processes; "one" is a single process. Then a process is killed, and its run goes on. Then
recon.py and refine.py, in one process and in two.

    python tests/bench_several.py           two GPUs; five minutes. DeepSpeed's rows need pip install deepspeed
    python tests/bench_several.py --cpu     two CPU processes, without DeepSpeed's rows
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import toy  # noqa: E402
from checkpoints import load_checkpoint, torch_load  # noqa: E402

SMALL = "--hidden_dim=32 --prior_depth=1 --prior_dim_head=16 --teacher_views=1".split()
SIX_STEPS = [*SMALL, "--num_sessions=2", "--num_epochs=2", "--mixup_pct=.5"]
DYING = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import model, train
losses, steps = train.step_losses, []
def step(*given):
    steps.append(1)
    if len(steps) == 10 and os.environ["RANK"] == "1":
        open("died", "w").write(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return losses(*given)
train.step_losses = step
model.run_main(train.main)
"""


def start(folder: Path, config: str | None, script: Path, *flags: object, cpu: bool) -> subprocess.CompletedProcess:
    """The script in one process, or in two with a file of configs/; in `folder`, in float32."""
    how = []
    if config and cpu:
        how = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    elif config:
        how = ["-m", "accelerate.commands.launch", f"--config_file={ROOT / 'configs' / config}.yaml",
               "--num_processes=2", "--mixed_precision=no"]
    own = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"} if cpu else {}
    own |= {"ACCELERATE_MIXED_PRECISION": "no", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # the latter: to fork is allowed
    done = subprocess.run([sys.executable, *how, script, *map(str, flags)], cwd=folder, env=os.environ | own,
                          capture_output=True, text=True)
    if done.returncode and script.name != "dying.py":
        sys.exit(f"{script.name} {config}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return done


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([x.flatten().float() for x in load_checkpoint(folder)["model_state_dict"].values()])


def losses_table(world: Path, folder: Path, cpu: bool) -> None:
    print("| six steps of 8 trials | processes | losses | furthest from one process | furthest weight |\n"
          "|---|--:|---|--:|--:|", flush=True)
    flags, script = [f"--data_path={world}", *SIX_STEPS], ROOT / "tests/ranks.py"
    start(folder, None, script, folder, "one,two,one of 2,2 apart", *flags, cpu=cpu)
    rows = [("one", "one", "", 1), ("two", "one", "`--gather_negatives`", 2),
            ("one of 2", "one of 2", "each loss a mean over halves of the batch", 1), ("2 apart", "one of 2", "DDP", 2)]
    if not cpu and importlib.util.find_spec("deepspeed"):
        for name, config in (("zero2", "deepspeed_zero2"), ("offload", "deepspeed_zero2_offload")):
            start(folder, config, script, folder, name, *flags, cpu=cpu)
            rows.append((name, "one of 2", f"`{config}.yaml`", 2))
    curve = {}
    for name, _, _, _ in rows:  # DeepSpeed's folder keeps the losses in its client state
        if (folder / name / "last.pth").exists():
            curve[name] = load_checkpoint(folder / name)["train_losses"]
        else:
            curve[name] = torch_load(folder / name / "last/mp_rank_00_model_states.pt", "")["run"]["train_losses"]
    for name, same, title, count in rows:
        apart = max(abs(a / b - 1) for a, b in zip(curve[name], curve[same], strict=True))
        moved = (weights(folder / name) - weights(folder / same)).abs().max()
        print(f"| {title or 'as it is'} | {count} | {', '.join(f'{x:.3f}' for x in curve[name])} | {apart:.0e} | "
              f"{moved:.0e} |", flush=True)


def kill_table(world: Path, folder: Path, cpu: bool) -> None:
    dying = folder / "dying.py"
    dying.write_text(DYING)
    flags = [f"--data_path={world}", f"--train_logs={folder}", *SMALL, "--batch_size=3", "--ckpt_interval=1",
             "--num_epochs=8", "--resume"]
    for name in ("whole", "again"):
        start(folder, "multi_gpu", ROOT / "train.py", f"--model_name={name}", *flags, cpu=cpu)
    done = start(folder, "multi_gpu", dying, "--model_name=cut", *flags, cpu=cpu)
    seconds = time.time() - float((folder / "died").read_text())
    reached = load_checkpoint(folder / "cut")["step"]
    start(folder, "multi_gpu", ROOT / "train.py", "--model_name=cut", *flags, cpu=cpu)
    whole, again, cut = (weights(folder / name) for name in ("whole", "again", "cut"))
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ") or "SIGKILL" in line]
    print(f"\nThe second of two processes killed at step 10: exit code {done.returncode} after {seconds:.0f} s. "
          f"The checkpoint is of step {reached}; resumed to the end, no weight is further than "
          f"{(cut - whole).abs().max():.0e} from a run that was never killed; two such runs differ by "
          f"{(again - whole).abs().max():.0e}. It said:\n")
    print("\n".join(f"    {line.strip()}" for line in said), flush=True)


def pictures_table(world: Path, folder: Path, cpu: bool) -> None:
    print("\n| pictures | seconds, one process | two | furthest pixel |\n|---|--:|--:|--:|", flush=True)
    for stage, kind, flags in (
            ("recon", "recons", [f"--train_logs={folder}", "--scheduler=dpm", "--steps=2", "--guidance=1"]),
            ("refine", "enhancedrecons", ["--steps=4"])):
        found, took = [], []
        for config in (None, "multi_gpu"):
            evals, began = folder / f"evals {config}", time.time()
            start(folder, config, ROOT / f"{stage}.py", "--model_name=one", f"--data_path={world}", "--subj=1",
                  f"--evals={evals}", "--batch_size=3", *flags, cpu=cpu)
            took.append(time.time() - began)
            found.append(torch.load(evals / f"one/one_all_{kind}.pt", weights_only=True))
        apart = (found[0] - found[1]).abs().max() * 255
        print(f"| `{stage}.py`, {len(found[0])} | {took[0]:.0f} | {took[1]:.0f} | {apart:.2f} of 255 |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    tables = {"losses": losses_table, "kill": kill_table, "pictures": pictures_table}  # pictures need the losses' model
    parser.add_argument("--cpu", action="store_true", help="two CPU processes")
    parser.add_argument("--only", choices=["losses", "kill"], help="one of the tables; none: all")
    args = parser.parse_args()
    if not args.cpu:
        print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as name:
        folder, world = Path(name), Path(name) / "world"
        toy.build_world(world, toy.SMOKE, seed=0)
        for table in tables.values() if args.only is None else [tables[args.only]]:
            table(world, folder, args.cpu)


if __name__ == "__main__":
    main()
