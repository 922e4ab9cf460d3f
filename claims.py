"""The paper's claims, and some of our own, as experiments that take minutes: `python toy.py --claims [NAME ..]`.

Each claim trains what it compares, in three small worlds or more (scenes, brains and first weights differ), with the
stages' own flags; prints the paper's numbers beside the toy's, and says whether the claim holds here. A claim that
does not hold is printed as such, with a likely reason. What several claims need is trained once.

In   nothing: worlds are built, as by toy.py but smaller
Out  claims/claims.md                       what is printed: tables, comparisons, verdicts
     claims/results.json                    every number, with seeds, flags, seconds and a hash of the numbers
     claims/seed{N}/world                   the world of a seed
                   /train_logs/{arm}        what train.py wrote, and log.txt: what all stages said
                   /evals/{arm}             what recon.py, refine.py and evaluate.py wrote
                   /arms/{arm}.json         flags, scores and seconds of an arm; one that is there is not made again

    python toy.py --claims                  # all twelve, three seeds: 40 minutes on 2 cores; nine seeds: two hours
    python toy.py --claims finetune         # one of them, and what it needs: at most 15 minutes

To add a claim, add what is to be trained to ARMS and an entry to CLAIMS. How the recipe was found: each arm's
validation (train_logs/*/curves.png) is flat before it ends, for a baseline that is cut short makes a gap that is none;
its weights are those of the best validation (best.pth). All claims but "losses" leave the low-level head out: it
takes two thirds of a step, and no part of what they compare.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from scipy.stats import t as student

import evaluate
import files
import gnet
import judges
import recon
import refine
import toy
import train
from model import UserError

WORLD = toy.World(sessions=(24, *[20] * 7), trials=80, shared=150,  # 61 training trials a session, 244 to validate on
                  voxels=(2360, 2140, 2280, 1970, 1950, 2690, 1900, 2160))  # 3/20 of NSD's
ALL = 20  # sessions that stand for the paper's 40: subject 1 has 24, of which 4 are for validation


# ----------------------------------------------------------------------------------------------------------------------
# What is trained and drawn
# ----------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Arm:
    """One model, or another way to draw a model's pictures (train=None)."""
    train: str | None  # flags of train.py
    start: str = ""  # the arm whose weights it starts from
    draw: str | None = ""  # flags of recon.py; None: no pictures, it is pretrained for others
    refine: str | None = None  # flags of refine.py; None: not refined
    seconds: float = 25  # that it took on one core; only their ratios matter, for the estimate of the time left


EPOCHS = {1: 200, 2: 120, 4: 70, 10: 36, ALL: 24}  # 400 to 1200 steps: until validation is flat


def sessions(count: int) -> str:
    return f"--num_sessions={count} --num_epochs={EPOCHS[count]} --ckpt_interval={EPOCHS[count] // 10} --batch_size=24"


# Of those tried, the best on validation in seed 0's world. One session: from scratch 2.5e-3 (1e-3, 4e-4), fine-tuning
# everything 3e-4 (1e-3, 5e-4, 1e-4), the ridge 1e-3 (3e-3), adapters 1e-3 (3e-4); 20 sessions: everything 1e-3 (3e-4).
# The other arms take these untried.
SCRATCH, TUNE, TUNE_PART = "--tie_positions --max_lr=2.5e-3", "--max_lr=3e-4", "--max_lr=1e-3"
TUNE_MANY = "--max_lr=1e-3"  # from ten sessions on
SCRATCH_10 = f"{SCRATCH} {sessions(10)}"  # the setting of the paper's Tables 4 and 5
SEVEN = f"--multi_subject {SCRATCH} --batch_size=70 --num_epochs=45 --ckpt_interval=5"  # 10 trials a subject and step
TUNE_1 = f"{TUNE} {sessions(1)}"

ARMS = {
    # Pretraining on subjects 2 to 8, and its variants
    "pretrained": Arm(SEVEN, draw=None, seconds=60),
    "pretrained_3": Arm(f"{SEVEN} --pretrain_on 2 5 7 --batch_size=48 --num_epochs=40", draw=None, seconds=55),
    "pretrained_1": Arm(f"{SEVEN} --pretrain_on 5 --batch_size=24 --num_epochs=25", draw=None, seconds=35),
    "pretrained_original": Arm(f"{SEVEN} --mixing=original", draw=None, seconds=60),
    "pretrained_mlp": Arm(f"{SEVEN} --backbone=mlp", draw=None, seconds=65),
    "pretrained_correction": Arm(f"{SEVEN} --prior=correction", draw=None, seconds=60),
    # Subject 1, from one session to all, from scratch and pretrained
    **{f"scratch_{n}s": Arm(f"{SCRATCH} {sessions(n)}", seconds=25 + 6 * math.log2(n)) for n in EPOCHS},
    **{f"tuned_{n}s": Arm(f"{TUNE if n < 10 else TUNE_MANY} {sessions(n)}", "pretrained",
                          seconds=25 + 6 * math.log2(n)) for n in EPOCHS},
    # Ten sessions from scratch, with one thing changed
    "scratch_mlp_ridge": Arm(f"{SCRATCH_10} --ridge=mlp", seconds=45),
    "scratch_mlp_backbone": Arm(f"{SCRATCH_10} --backbone=mlp", seconds=45),
    "scratch_prior": Arm(f"{SCRATCH_10} --clip_scale=0", seconds=45),
    "scratch_prior_low": Arm(f"{SCRATCH_10} --clip_scale=0 --blurry_recon", seconds=125),
    "scratch_all_losses": Arm(f"{SCRATCH_10} --blurry_recon", seconds=125),
    "scratch_bimixco": Arm(f"{SCRATCH_10} --mixup_pct=1", seconds=45),
    "scratch_softclip": Arm(f"{SCRATCH_10} --mixup_pct=0", seconds=45),
    # One session, pretrained, with one thing changed
    "tuned_of_3": Arm(TUNE_1, "pretrained_3"),
    "tuned_of_1": Arm(TUNE_1, "pretrained_1"),
    "tuned_original": Arm(f"{TUNE_1} --mixing=original", "pretrained_original"),
    "tuned_mlp": Arm(TUNE_1, "pretrained_mlp"),
    "tuned_correction": Arm(TUNE_1, "pretrained_correction"),
    "tuned_ridge": Arm(f"{TUNE_PART} {sessions(1)} --finetune=ridge", "pretrained"),
    "tuned_lora": Arm(f"{TUNE_PART} {sessions(1)} --finetune=lora", "pretrained"),
    # The pictures of one session's model, drawn in other ways
    "ddim_5": Arm(None, "tuned_1s", "--prior_steps=5", seconds=10),
    "ddim_100": Arm(None, "tuned_1s", "--prior_steps=100 --prior_sampler=ddim", seconds=15),
    "ddpm_100": Arm(None, "tuned_1s", "--prior_steps=100 --prior_sampler=ddpm", seconds=15),
    "refined_captions": Arm(None, "tuned_1s", "--captions", "--prompt=captions", seconds=35),
    "refined_empty": Arm(None, "tuned_1s", "--captions", "--prompt=empty", seconds=35),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """The world, and flags of all arms: of train.py before an arm's own (`base`) and after (`train`), of recon.py
    (`draw`) and of refine.py (`refine`) before."""
    world: toy.World
    base: str = ("--hidden_dim=256 --prior_depth=2 --prior_dim_head=16 --teacher_views=1 --val_sessions=4 "
                 "--no-blurry_recon")
    train: str = ""
    draw: str = "--batch_size=50 --scheduler=dpm --steps=6 --guidance=1 --no-captions --no-blurry_recon"
    refine: str = "--batch_size=50"


FULL = Sizes(WORLD)
SMOKE = Sizes(
    toy.SMOKE, train="--hidden_dim=32 --prior_depth=1 --num_sessions=1 --val_sessions=1 --num_epochs=2 --batch_size=14",
    draw="--scheduler=dpm --steps=1 --guidance=1 --prior_steps=3 --num_images=6 --no-captions --no-blurry_recon",
    refine="--steps=2")


# ----------------------------------------------------------------------------------------------------------------------
# The claims
# ----------------------------------------------------------------------------------------------------------------------
METRICS = {"retrieval/image": "image retr.", "retrieval/brain": "brain retr.", "recons/pixcorr": "PixCorr",
           "recons/ssim": "SSIM", "recons/clip_l": "two-way CLIP", "enhancedrecons/pixcorr": "refined PixCorr",
           "enhancedrecons/ssim": "refined SSIM", "enhancedrecons/clip_l": "refined CLIP"}
IMAGE, BRAIN, PIXELS, SSIM, CLIP, *REFINED = METRICS
USUAL = (IMAGE, BRAIN, PIXELS, SSIM, CLIP)
SPREAD = .03  # the paper's Tables 4 and 5 have one setting twice: .025 PixCorr and 3 points apart


@dataclass(frozen=True)
class Expect:
    """metric(a) > metric(b); with `within`, |metric(a) - metric(b)| < within. A pair of arms stands for its gap."""
    metric: str
    a: str | tuple[str, str]
    b: str | tuple[str, str]
    within: float | None = None


@dataclass(frozen=True)
class Claim:
    """One experiment; `arms` are the labels of its table -> names in ARMS."""
    letter: str
    says: str
    paper: str
    arms: dict[str, str]
    expects: tuple[Expect, ...]
    if_not: str
    metrics: tuple[str, ...] = USUAL


CLAIMS = {
    "sessions": Claim(
        "a", "Pretrained on other people, a model needs far fewer sessions of a new one; with many, it gains little.",
        "Fig. 5, without numbers; Tables 6 and 8, subject 1: PixCorr .235 with one session (pretrained), .374 with 40 "
        "(pretrained), .376 with 40 (from scratch)",
        {f"{how}, {n} session{'s' * (n > 1)}": f"{arm}_{n}s" for n in EPOCHS
         for how, arm in (("scratch", "scratch"), ("pretrained", "tuned"))},
        (Expect(IMAGE, "pretrained, 1 session", "scratch, 1 session"),
         Expect(CLIP, "pretrained, 1 session", "scratch, 1 session"),
         Expect(IMAGE, "pretrained, 4 sessions", "scratch, 4 sessions"),
         Expect(IMAGE, ("pretrained, 1 session", "scratch, 1 session"),
                (f"pretrained, {ALL} sessions", f"scratch, {ALL} sessions"))),
        "the shared code may be too easy to learn from one session, or its pretraining too short"),
    "linear": Claim(
        "b", "A linear first layer maps a subject's voxels better than MindEye1's MLP with dropout.",
        "Table 4, 10 sessions from scratch, linear / MLP: image retr. .951 / .706, brain retr. .974 / .849, PixCorr "
        ".292 / .225, two-way CLIP .905 / .862",
        {"linear": "scratch_10s", "MLP": "scratch_mlp_ridge"},
        (Expect(IMAGE, "linear", "MLP"), Expect(PIXELS, "linear", "MLP"), Expect(CLIP, "linear", "MLP")),
        "the toy's voxels are few and its code is bent by a tanh, which a bent first layer can undo"),
    "losses": Claim(
        "c", "The retrieval and the low-level loss each make the prior's pictures better.",
        "Table 5, prior / + low-level / + retrieval / all: PixCorr .155 / .281 / .233 / .267, SSIM .309 / .385 / .319 "
        "/ .380, two-way CLIP .795 / .884 / .894 / .879; + retrieval / all: image retr. .958 / .941, brain retr. "
        ".962 / .980",
        {"prior": "scratch_prior", "prior + low-level": "scratch_prior_low", "prior + retrieval": "scratch_10s",
         "all": "scratch_all_losses"},
        (Expect(PIXELS, "prior + low-level", "prior"), Expect(CLIP, "prior + retrieval", "prior"),
         Expect(PIXELS, "all", "prior"), Expect(CLIP, "all", "prior")),
        "in the toy a linear map from voxels to tokens goes far, so the prior's own loss trains the backbone well"),
    "full_data": Claim(
        "d", "With all sessions, a model from scratch is as good as a pretrained one.",
        "Tables 6 and 7, subject 1, scratch / pretrained: image retr. .997 / .999, brain retr. 1.000 / 1.000, PixCorr "
        ".376 / .374, SSIM .440 / .439, two-way CLIP .926 / .936",
        {"scratch": f"scratch_{ALL}s", "pretrained": f"tuned_{ALL}s"},
        (Expect(IMAGE, "pretrained", "scratch", SPREAD), Expect(PIXELS, "pretrained", "scratch", SPREAD),
         Expect(CLIP, "pretrained", "scratch", SPREAD)),
        f"{ALL} sessions of 61 trials are 1,220, not the paper's 27,000: data are still the limit"),
    "subjects": Claim(
        "e", "Pretraining on one or three people is worth about as much as on seven.",
        "Table 10, subject 1 with one session, pretrained on 2-8 / 2, 5, 7 / 5: image retr. .776 / .808 / .803, brain "
        "retr. .940 / .927 / .906, PixCorr .235 / .234 / .232, SSIM .428 / .421 / .421, two-way CLIP .808 / .835 / "
        ".827",
        {"seven": "tuned_1s", "three": "tuned_of_3", "one": "tuned_of_1"},
        (Expect(IMAGE, "seven", "one", SPREAD), Expect(PIXELS, "seven", "one", SPREAD),
         Expect(CLIP, "seven", "one", SPREAD), Expect(CLIP, "seven", "three", SPREAD)),
        "one toy person gives some 980 trials, not 27,000: too few to learn what all have in common"),
    "captions": Claim(
        "f", "The caption that refinement is told hardly changes how good the refined pictures are.",
        "Table 11, subject 1 with one session, captions / empty prompt: PixCorr .235 / .235, SSIM .428 / .423, two-way "
        "CLIP .808 / .812",
        {"captions": "refined_captions", "empty prompt": "refined_empty"},
        tuple(Expect(metric, "captions", "empty prompt", SPREAD) for metric in REFINED),
        "the toy's SDXL is small and knows little but its prompt; without one it draws any scene", tuple(REFINED)),
    "contrast": Claim(
        "g", "BiMixCo first and SoftCLIP after retrieve better than either alone.",
        "§2.2 names both, after MindEye1; no numbers in MindEye2",
        {"BiMixCo, SoftCLIP": "scratch_10s", "BiMixCo": "scratch_bimixco", "SoftCLIP": "scratch_softclip"},
        (Expect(IMAGE, "BiMixCo, SoftCLIP", "BiMixCo"), Expect(IMAGE, "BiMixCo, SoftCLIP", "SoftCLIP")),
        "600 trials and a small model leave little for the one to add to the other"),
    "mixing": Claim(
        "h", "Ours: MixCo with the right partners retrieves better than as the paper's code mixes.",
        "no numbers: an error that we found in the code",
        {"right": "tuned_1s", "as in the code": "tuned_original"},
        (Expect(IMAGE, "right", "as in the code"), Expect(CLIP, "right", "as in the code")),
        "only a third of the epochs mix, and the small share of a wrong partner is noise that SoftCLIP then mends"),
    "sampling": Claim(
        "i", "20 steps of DDIM sample the prior as well as 100, or as 100 of DDPM.",
        "no numbers: the code samples 20 by DDIM, its prior knows 100",
        {"DDIM, 5": "ddim_5", "DDIM, 20": "tuned_1s", "DDIM, 100": "ddim_100", "DDPM, 100": "ddpm_100"},
        (Expect(CLIP, "DDIM, 20", "DDIM, 100", SPREAD), Expect(PIXELS, "DDIM, 20", "DDIM, 100", SPREAD),
         Expect(CLIP, "DDIM, 20", "DDPM, 100", SPREAD), Expect(PIXELS, "DDIM, 20", "DDPM, 100", SPREAD)),
        "fewer steps add less noise on the way, which draws nearer to the mean of what the brain allows",
        (PIXELS, SSIM, CLIP)),
    "backbone": Claim(
        "j", "The residual MLP that the paper describes reads brains better than the linear map that its code is.",
        "no numbers: the paper has only the code's",
        {"linear, 1 session": "tuned_1s", "MLP, 1 session": "tuned_mlp", "linear, 10 sessions": "scratch_10s",
         "MLP, 10 sessions": "scratch_mlp_backbone"},
        (Expect(IMAGE, "MLP, 1 session", "linear, 1 session"), Expect(CLIP, "MLP, 1 session", "linear, 1 session"),
         Expect(IMAGE, "MLP, 10 sessions", "linear, 10 sessions")),
        "with so few and noisy trials a linear map is the better guess, and the prior bends what it must"),
    "finetune": Claim(
        "k", "With one session, fine-tuning everything, as in the paper, beats the ridge alone and low-rank adapters.",
        "no numbers: the paper fine-tunes everything",
        {"everything": "tuned_1s", "ridge": "tuned_ridge", "ridge + adapters": "tuned_lora"},
        tuple(Expect(metric, "everything", arm) for arm in ("ridge", "ridge + adapters") for metric in (IMAGE, CLIP)),
        "one session can teach whose brain it is, but not the shared code, which free weights only forget"),
    "correction": Claim(
        "l", "Ours: a prior that predicts a correction to the brain tokens beats the paper's, which predicts tokens.",
        "no numbers: the paper has only its own",
        {"target": "tuned_1s", "correction": "tuned_correction"},
        (Expect(PIXELS, "correction", "target"), Expect(CLIP, "correction", "target")),
        "the backbone's tokens serve the retrieval head as well, and need not be near the image's"),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Running an arm
# ----------------------------------------------------------------------------------------------------------------------
def needed(names: Iterable[str]) -> list[str]:
    """The arms of these claims and all that they start from, what is started from first."""
    found = {}
    def add(arm: str) -> None:
        if ARMS[arm].start:
            add(ARMS[arm].start)
        found[arm] = None
    for name in names:
        for arm in CLAIMS[name].arms.values():
            add(arm)
    return list(found)


def flags_of(name: str, sizes: Sizes) -> dict[str, str]:
    """What an arm's numbers follow from, but for the seed: flags by stage, its own and those of what it starts from."""
    arm, flags = ARMS[name], {}
    if arm.start:
        flags = {stage if ": " in stage else f"{arm.start}: {stage}": given
                 for stage, given in flags_of(arm.start, sizes).items() if stage.endswith("train")}
    if arm.train is not None:
        flags["train"] = f"{sizes.base} {arm.train} {sizes.train}".strip()
    if arm.draw is not None:
        flags["recon"] = f"{sizes.draw} {arm.draw}".strip()
    if arm.refine is not None:
        flags["refine"] = f"{sizes.refine} {arm.refine}"
    return flags


def record(folder: Path, name: str, sizes: Sizes) -> dict:
    """What is known of an arm with these flags: {} if nothing, with "scores" once it is done."""
    try:
        known = json.loads((folder / "arms" / f"{name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return known if known["flags"] == flags_of(name, sizes) else {}


def write_json(path: Path, value: object) -> None:
    with files.replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def build(folder: Path, seed: int, sizes: Sizes) -> None:
    """The seed's world, with CLIP as its only judge: the others would double the time of an arm."""
    world = folder / "world"
    toy.build_world(world, sizes.world, seed)
    for name in (*map(judges.file_name, judges.VISION), gnet.FILE):
        (world / name).unlink(missing_ok=True)
    for name in ("sentence", "clip_B"):
        shutil.rmtree(world / name, ignore_errors=True)


def train_arm(name: str, folder: Path, seed: int, flags: str) -> None:
    start = f"--multisubject_ckpt={folder}/train_logs/{ARMS[name].start}/best.pth " if ARMS[name].start else ""
    toy.run_stage(train, f"--model_name={name} --data_path={folder}/world --subj=1 --train_logs={folder}/train_logs "
                         f"--seed={seed} --resume {start}{flags}")


def judge_arm(name: str, folder: Path, seed: int, flags: dict[str, str]) -> dict[str, float]:
    """Draw, refine and evaluate the test pictures; {metric: value}."""
    model = name if ARMS[name].train is not None else ARMS[name].start
    common = f"--model_name={model} --data_path={folder}/world --subj=1 --evals={folder}/evals/{name}"
    drawn = toy.run_stage(recon, f"{common} --train_logs={folder}/train_logs --tag=best --seed={seed} {flags['recon']}")
    if "refine" in flags:
        toy.run_stage(refine, f"{common} --seed={seed} --num_images={len(drawn['image_ids'])} {flags['refine']}")
    scores = toy.run_stage(evaluate, f"{common} --tables={folder}/evals/{name} --no-report "
                                     f"--num_images={len(drawn['image_ids'])}")
    return {metric: scores[metric] for metric in METRICS if metric in scores}


def run_arm(name: str, seed: int, base: Path, sizes: Sizes) -> None:
    """Train and judge an arm, or do what is left of it. What the stages say goes to log.txt."""
    folder, flags, began = base / f"seed{seed}", flags_of(name, sizes), time.time()
    places = [folder / "train_logs" / name, folder / "evals" / name]
    known = record(folder, name, sizes)
    if not known:  # never begun, or with other flags
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
        known = {"flags": flags, "seconds": 0.}
        write_json(folder / "arms" / f"{name}.json", known)
    places[0].mkdir(parents=True, exist_ok=True)
    log = open(places[0] / "log.txt", "a")
    try:
        with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            if "train" in flags:
                train_arm(name, folder, seed, flags["train"])
            known["scores"] = judge_arm(name, folder, seed, flags) if "recon" in flags else {}
    finally:  # also of what is interrupted
        known["seconds"] = round(known["seconds"] + time.time() - began, 1)
        write_json(folder / "arms" / f"{name}.json", known)
    (places[0] / "last.pth").unlink(missing_ok=True)  # two thirds of the space, for going on with what is done now


def prepare_worker() -> None:
    """One thread, alone or beside others: two gain little here, and sum in another order, which moves the numbers."""
    torch.set_num_threads(1)


def in_parallel(work: Callable, jobs: list[tuple], processes: int) -> Iterator[tuple]:
    """Yield the jobs, (name, seed, ..), as they get done. One process: this one, for another would first import."""
    if processes == 1 or len(jobs) == 1:
        prepare_worker()
        for job in jobs:
            work(*job)
            yield job
        return
    fresh = multiprocessing.get_context("spawn")  # a forked one would share locks of torch's threads
    with ProcessPoolExecutor(processes, fresh, prepare_worker) as pool:
        futures = {pool.submit(work, *job): job for job in jobs}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def generations(arms: list[str]) -> list[list[str]]:
    """Arms by how many others come before them: each generation needs only what earlier ones made."""
    depth = {}
    for arm in arms:
        depth[arm] = depth[ARMS[arm].start] + 1 if ARMS[arm].start else 0
    return [[arm for arm in arms if depth[arm] == level] for level in range(max(depth.values()) + 1)]


def run_all(names: list[str], seeds: list[int], base: Path, sizes: Sizes, processes: int) -> None:
    """Everything that these claims need and that is not there, with a line for each arm that gets done."""
    arms = needed(names)
    cost = {(arm, seed): ARMS[arm].seconds for arm in arms for seed in seeds
            if "scores" not in record(base / f"seed{seed}", arm, sizes)}
    total, began, spent = len(arms) * len(seeds), time.time(), 0.
    whole, todo = sum(cost.values()), len(cost)
    print(f"{total} arms, of which {total - todo} are there already; {processes} at a time.", flush=True)
    for seed in seeds:
        build(base / f"seed{seed}", seed, sizes)
    for generation in generations(arms):
        jobs = [(arm, seed, base, sizes) for arm in generation for seed in seeds if (arm, seed) in cost]
        jobs.sort(key=lambda job: -ARMS[job[0]].seconds)  # the longest first, so that none is waited for at the end
        for arm, seed, *_ in in_parallel(run_arm, jobs, processes):
            spent, todo = spent + cost[arm, seed], todo - 1
            left = (time.time() - began) * (whole - spent) / spent / 60
            print(f"{total - todo:>4} of {total}  {arm}, seed {seed}; about {left:.0f} minutes left", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# What they say
# ----------------------------------------------------------------------------------------------------------------------
RULE = """A number is a mean over seeds with its 95% interval (Student's t; a seed is another world, other brains, other
first weights). Arms are compared seed by seed: a comparison holds if the interval of the difference is above 0 (where
the claim is "no difference": if it lies within the given distance of 0), does not hold if it is below 0 (beyond that
distance), and otherwise so few seeds cannot tell. A claim holds if all its comparisons do, does not if one does not.
Image retrieval finds images, brain retrieval brains: the paper's two columns have each other's names."""
HOLDS, FAILS, UNKNOWN = "holds here", "does not hold here", "cannot tell"
MARKS = {HOLDS: "✓", FAILS: "✗", UNKNOWN: "?"}  # of one comparison, in the last table


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the 95% interval: infinite for one seed."""
    mean, count = sum(values) / len(values), len(values)
    if count < 2:
        return mean, math.inf
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (count - 1))
    return mean, float(student.ppf(.975, count - 1)) * deviation / math.sqrt(count)


def verdict(differences: list[float], within: float | None = None) -> str:
    """What the differences of the seeds say of "a > b", or of "|a - b| < within"."""
    mean, half = interval(differences)
    low, high = mean - half, mean + half
    if within is None:
        return HOLDS if low > 0 else FAILS if high < 0 else UNKNOWN
    return HOLDS if -within < low and high < within else FAILS if low > within or high < -within else UNKNOWN


def overall(verdicts: list[str]) -> str:
    return FAILS if FAILS in verdicts else UNKNOWN if UNKNOWN in verdicts else HOLDS


def check(claim: Claim, scores: dict[str, list[dict]]) -> dict:
    """A claim's numbers: scores {label: [{metric: value} of each seed]} -> what goes into results.json."""
    def values(arm: str | tuple[str, str], metric: str) -> list[float]:
        if isinstance(arm, tuple):
            return [a - b for a, b in zip(*(values(one, metric) for one in arm), strict=True)]
        return [of_seed[metric] for of_seed in scores[arm]]

    compared = []
    for expect in claim.expects:
        differences = [a - b for a, b in zip(values(expect.a, expect.metric), values(expect.b, expect.metric),
                                             strict=True)]
        mean, half = interval(differences)
        compared.append(asdict(expect) | {"differences": differences, "mean": mean,
                                          "half": half if math.isfinite(half) else None,  # of one seed
                                          "verdict": verdict(differences, expect.within)})
    arms = {label: {"arm": arm, **{metric: values(label, metric) for metric in claim.metrics}}
            for label, arm in claim.arms.items()}
    return {"letter": claim.letter, "says": claim.says, "paper": claim.paper, "arms": arms, "compared": compared,
            "verdict": overall([entry["verdict"] for entry in compared]), "if_not": claim.if_not}


def title(arm: str | tuple[str, str]) -> str:
    return arm if isinstance(arm, str) else f"({arm[0]} - {arm[1]})"  # JSON made a list of the two


def difference(entry: dict) -> str:
    """An entry of "compared", as "image retr., ridge - everything: +0.162 ± 0.161"."""
    mean, half = interval(entry["differences"])
    return f"{METRICS[entry['metric']]}, {title(entry['a'])} - {title(entry['b'])}: {mean:+.3f} ± {half:.3f}"


def claim_text(name: str, claim: Claim, found: dict) -> str:
    """In Markdown: the claim, the paper's numbers, the toy's, the comparisons, the verdict."""
    width = max(map(len, claim.arms))
    lines = [f"## ({claim.letter}) {name}: {claim.says}\n\nPaper: {claim.paper}.\n",
             f"| {'':<{width}} | " + " | ".join(f"{METRICS[metric]:>15}" for metric in claim.metrics) + " |",
             f"|{'-' * (width + 2)}|" + "|".join("-" * 16 + ":" for _ in claim.metrics) + "|"]
    for label, numbers in found["arms"].items():
        cells = ["{:.3f} ± {:.3f}".format(*interval(numbers[metric])) for metric in claim.metrics]
        lines.append(f"| {label:<{width}} | " + " | ".join(f"{cell:>15}" for cell in cells) + " |")
    lines.append("")
    for entry in found["compared"]:
        wanted = "> 0" if entry["within"] is None else f"within {entry['within']:g} of 0"
        lines.append(f"* {difference(entry)} (claim: {wanted}): {entry['verdict']}")
    reason = f" Likely why: {claim.if_not}." if found["verdict"] == FAILS else ""
    return "\n".join([*lines, f"\nVerdict: **{found['verdict']}**.{reason}\n"])


def table(found: dict, seeds: list[int]) -> str:
    """README.md's: a line a claim."""
    lines = [f"| claim | | differences, {len(seeds)} seed{'s' * (len(seeds) > 1)} | verdict |", "|---|---|---|---|"]
    for name, entry in found.items():
        each = "; ".join(f"{difference(one)} {MARKS[one['verdict']]}" for one in entry["compared"])
        lines.append(f"| ({entry['letter']}) {name} | {entry['says']} | {each} | {entry['verdict']} |")
    count = sum(len(entry["compared"]) for entry in found.values())
    chance = f"{count} comparisons, each by itself: were all between equals, chance would put {count / 20:.0f} outside."
    return "\n".join([*lines, "", chance])


def digest(claims: dict) -> str:
    """A hash of all numbers, by which a figure or a table can tell whether it still shows them."""
    return hashlib.sha256(json.dumps(claims, sort_keys=True).encode()).hexdigest()[:16]


def main(names: list[str], seeds: list[int], base: Path, smoke: bool = False, processes: int | None = None,
         rebuild: bool = False) -> dict:
    """Run the claims of these names (none: all) and print them; returns what results.json holds."""
    if unknown := [name for name in names if name not in CLAIMS]:
        raise UserError(f"there is no claim {unknown[0]}: choose --claims from {', '.join(CLAIMS)}.")
    names, sizes, began = names or list(CLAIMS), SMOKE if smoke else FULL, time.time()
    for seed in seeds if rebuild else ():
        shutil.rmtree(base / f"seed{seed}", ignore_errors=True)
    run_all(names, seeds, base, sizes, processes or os.cpu_count() or 1)
    arms = {arm: [record(base / f"seed{seed}", arm, sizes) for seed in seeds] for arm in needed(names)}
    found = {name: check(CLAIMS[name], {label: [of_seed["scores"] for of_seed in arms[arm]]
                                        for label, arm in CLAIMS[name].arms.items()}) for name in names}
    results = {"seeds": seeds, "hash": digest(found), "claims": found,
               "arms": {arm: {"flags": flags_of(arm, sizes), "seconds": [of_seed["seconds"] for of_seed in known]}
                        for arm, known in arms.items()}}
    write_json(base / "results.json", results)
    asked = names if len(names) < len(CLAIMS) else []
    command = " ".join(["python toy.py --claims", *asked, "--seed", *map(str, seeds)])
    head = f"# The claims, in full\n\nPrinted by `{command}` (numbers {results['hash']}).\n\n{RULE}\n"
    text = "\n".join([head, *(claim_text(name, CLAIMS[name], found[name]) for name in names), table(found, seeds)])
    with files.replacing(base / "claims.md") as temporary:
        temporary.write_text(text + "\n")
    print(f"\n{text}\n\n{(time.time() - began) / 60:.1f} minutes. All numbers: {base / 'results.json'}")
    return results
