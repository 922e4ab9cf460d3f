"""Train MindEye2: pretrain on seven subjects, fine-tune on an eighth, or train on one subject from scratch.

In   {data_path}: betas, session tars and images of each subject (data.py); {cache_dir}: frozen networks (frozen.py)
Out  train_logs/{model_name}/last.pth          weights, optimizer, losses: the official layout
                            /last/             the same by DeepSpeed, in its place
                            /best.pth          weights of the best validation, with --val_sessions
                            /curves.png, samples.png, and a TensorBoard log

    python train.py                                                   # toy world, subject 1, one session: a minute
    python train.py --model_name=pretrained --multi_subject --subj=1 --num_sessions=40 --batch_size=42
    python train.py --model_name=finetuned --subj=1 --num_sessions=1 --batch_size=24 \\
        --multisubject_ckpt=train_logs/pretrained
    accelerate launch --config_file=configs/multi_gpu.yaml train.py ...    # without the file: all GPUs, float32

One step, top to bottom (paper §2.1-2.2): trials are drawn, voxels mixed (MixCo), every subject's voxels pass its own
ridge, the backbone turns them into tokens, and three heads learn from frozen targets:

    L = 30 L_prior + 1 (BiMixCo, later SoftCLIP) + .5 L_lowlevel         (the paper divides by 30: 1, .033, .016)

The frozen targets (CLIP tokens, VAE latents, teacher features of each image) are computed once and read from a
memory-mapped file: the loop holds no frozen network, which is most of our speed (original: 43% of each step).
"""
import argparse
import math
import os
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    is_wandb_available,
    set_seed,
)
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2
from tqdm import tqdm

import checkpoints
import data
import files
import model as networks
import processes
from frozen import decode_latents, encode_latents, load_clip, load_teacher, load_vae
from model import MindEye2, UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend is chosen first: there may be no screen


# ----------------------------------------------------------------------------------------------------------------------
# Options: names and defaults of the original; what it does not have comes last
# ----------------------------------------------------------------------------------------------------------------------
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Train MindEye2.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = argparse.BooleanOptionalAction
    p.add_argument("--model_name", default="testing", help="run name: folder in train_logs that receives everything")
    p.add_argument("--data_path", help="folder of the dataset; none: this one if it has wds/, as in the original, else "
                                       "the toy world in ./toy, built if it is missing")
    p.add_argument("--cache_dir", help="folder of the frozen networks and their cached targets; none: data_path")
    p.add_argument("--subj", type=int, default=1,
                   help="subject to train on, 1 to 8 in NSD; with --multi_subject the one LEFT OUT of pretraining")
    p.add_argument("--multisubject_ckpt", help="fine-tune from this pretrained run (folder or .pth); a released one "
                                               "that is not there is downloaded")
    p.add_argument("--num_sessions", type=int, default=1,
                   help="sessions (hours) of --subj to train on, from the first; the paper: 1 or 40; pretraining: all")
    p.add_argument("--use_prior", action=flag, default=True, help="train the diffusion prior (paper §2.2)")
    p.add_argument("--batch_size", type=int, default=16,
                   help="trials a step and process, of all subjects together and of each as many; the paper: 24 alone, "
                        "63 (released: 42) for 7")
    p.add_argument("--wandb_log", action=flag, default=False, help="log to Weights & Biases besides TensorBoard")
    p.add_argument("--wandb_project", default="stability", help="Weights & Biases project")
    p.add_argument("--mixup_pct", type=float, default=.33, help="share of epochs with BiMixCo, then SoftCLIP")
    p.add_argument("--blurry_recon", action=flag, default=True, help="train the low-level head (paper §2.2.3)")
    p.add_argument("--blur_scale", type=float, default=.5, help="weight of the low-level loss")
    p.add_argument("--clip_scale", type=float, default=1., help="weight of the contrastive loss")
    p.add_argument("--prior_scale", type=float, default=30, help="weight of the prior's loss")
    p.add_argument("--use_image_aug", action=flag, default=False,
                   help="recolour images, so encode them in the loop: slow, and off in the paper")
    p.add_argument("--num_epochs", type=int, default=150, help="epochs; the paper: 150")
    p.add_argument("--multi_subject", action=flag, default=False, help="pretrain on every subject but --subj")
    p.add_argument("--new_test", action=flag, default=True, help="test set of all 40 sessions, not of the first 37")
    p.add_argument("--n_blocks", type=int, help="backbone blocks (none: 4); no effect with --backbone=released")
    p.add_argument("--hidden_dim", type=int,
                   help="width of the shared space (none: 1024); the paper: 4096. These and the next sizes follow "
                        "--multisubject_ckpt where they are not given")
    p.add_argument("--lr_scheduler_type", default="cycle", choices=["cycle", "linear"],
                   help="cycle: OneCycle, 2 epochs up, cosine down; linear: the original's, which RISES to the end")
    p.add_argument("--ckpt_saving", action=flag, default=True, help="write checkpoints")
    p.add_argument("--ckpt_interval", type=int, default=5, help="epochs between tests (and checkpoints)")
    p.add_argument("--seed", type=int, default=42, help="decides initial weights, data order and noise")
    p.add_argument("--max_lr", type=float, default=3e-4, help="highest learning rate; the paper's code: 3e-4")
    # Ours
    p.add_argument("--backbone", choices=["released", "mlp"],
                   help="released (none): linear, as the published weights are; mlp: the residual MLP of the paper")
    p.add_argument("--ridge", choices=["linear", "mlp"],
                   help="each subject's own first layer; linear (none): the paper's; mlp: a norm, GELU and dropout .5 "
                        "after it, as in MindEye1 (the paper's Table 4)")
    p.add_argument("--prior", choices=["target", "correction"],
                   help="what the prior predicts; target (none): the image tokens, the paper's; correction: what to "
                        "add to the brain tokens to get them")
    p.add_argument("--pretrain_on", type=int, nargs="+", metavar="SUBJECT",
                   help="with --multi_subject, who takes part; none: all but --subj, as in the paper, whose Table 10 "
                        "has 2 5 7 and 5 as well")
    p.add_argument("--finetune", choices=["all", "ridge", "lora"], default="all",
                   help="what learns with --multisubject_ckpt; all: the paper's; ridge: the new subject's first layer "
                        "alone; lora: that, and low-rank corrections of backbone_linear and the prior's linear layers")
    p.add_argument("--lora_rank", type=int, default=8,
                   help="rank of the corrections with --finetune=lora; not in the paper")
    p.add_argument("--mixing", choices=["right", "original"], default="right",
                   help="original: MixCo as the paper's code has it, with partners of the wrong subject, a partner's "
                        "weight where a sample drew itself, and mixed voxels for unmixed latents (README.md)")
    p.add_argument("--prior_depth", type=int, help="layers of the prior (none: 6, as the paper's code)")
    p.add_argument("--prior_dim_head", type=int, help="channels of an attention head (none: 52, as the paper's code)")
    p.add_argument("--tie_positions", action=flag, default=False,
                   help="start brain and image tokens from one position code: the prior learns sooner (model.py)")
    p.add_argument("--teacher_views", type=int, default=2,
                   help="cached recolourings of each image for the low-level teacher; 0: a new one each step, as in "
                        "the paper, with the teacher in the loop")
    p.add_argument("--in_memory", action=flag, default=False,
                   help="read the cached targets into memory first, 1 MB an image and process: for a slow disk")
    p.add_argument("--val_sessions", type=int, default=0,
                   help="sessions after the last training session to validate on and keep best.pth by; 0: none")
    p.add_argument("--gradient_checkpointing", action=flag, default=False,
                   help="compute the prior's activations twice instead of keeping them: slower, smaller")
    p.add_argument("--gradient_accumulation", type=int, default=1,
                   help="batches whose gradients make one step of the optimizer; unlike a larger --batch_size, the "
                        "contrastive loss still compares within each")
    p.add_argument("--gather_negatives", action=flag, default=False,
                   help="with several processes, contrast each sample with those of all, not of its own alone (the "
                        "paper's code): N processes then learn as one with N times --batch_size. The low-level loss "
                        "takes N^2 times the memory; one process: no effect")
    p.add_argument("--optimizer_bits", type=int, default=32, choices=[8, 32],
                   help="of AdamW's two numbers a weight: 8 saves 6 bytes a weight (13 GB of the paper's model) for "
                        "small GPUs; needs pip install torchao")
    p.add_argument("--compile", action=flag, default=False,
                   help="torch.compile of the prior's layers and the retrieval head: on a GPU faster steps, after half "
                        "a minute")
    p.add_argument("--detect_anomaly", action=flag, default=False,
                   help="stop at the first operation whose gradient is NaN, and say which: to study, for it is slow; "
                        "not in the paper")
    p.add_argument("--resume", action=flag, default=False,
                   help="go on from last.pth if there is one, to the same weights as if never interrupted")
    p.add_argument("--train_logs", default="train_logs", help="folder of all runs")
    return p.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------
def load_subject(args: argparse.Namespace, subject: int, split: str, sessions=None, without=()) -> SimpleNamespace:
    """Trials and voxels of one subject: .trials (n), .voxels (n, V) half precision, as in the original."""
    trials = data.load_trials(args.data_path, subject, split, sessions)
    trials = trials[~np.isin(trials.image, without)]
    if not len(trials):
        raise UserError(f"No trial of subject {subject} is left to validate on: raise --val_sessions, or set it to 0.")
    return SimpleNamespace(trials=trials, voxels=data.load_voxels(args.data_path, trials).half())


def load_data(args: argparse.Namespace) -> SimpleNamespace:
    """.train: a list with one entry a subject; .val: the held-out sessions or None; .test: of the first subject."""
    if args.multi_subject:  # all sessions of everybody else; they are tested on the first of them, as in the original
        subjects = args.pretrain_on or [s for s in range(1, 9) if s != args.subj]
        first, count = 0, None
    else:
        subjects, first, count = [args.subj], args.num_sessions, args.num_sessions
    if args.batch_size < len(subjects):
        raise UserError(f"--batch_size={args.batch_size} is less than a trial of each of {len(subjects)} subjects: "
                        "raise it, or name fewer with --pretrain_on.")
    sessions = {s: data.count_sessions(args.data_path, s) for s in subjects}
    for s in subjects if args.val_sessions else ():
        if (count or 1) + args.val_sessions > sessions[s]:
            raise UserError(f"Subject {s} has {sessions[s]} sessions, too few to train on {count or 'any'} and to hold "
                            f"out --val_sessions={args.val_sessions}: lower it, or --num_sessions.")
    keep = {s: range(count or sessions[s] - args.val_sessions) for s in subjects}
    train = [load_subject(args, s, "train", keep[s]) for s in subjects]
    val = None
    if args.val_sessions:
        first = first or sessions[subjects[0]] - args.val_sessions
        known = np.unique(train[0].trials.image)  # an image may come again in the next session: not held out
        val = load_subject(args, subjects[0], "train", range(first, first + args.val_sessions), without=known)
    test = load_subject(args, subjects[0], "new_test" if args.new_test else "test")
    return SimpleNamespace(subjects=subjects, train=train, val=val, test=test)


def load_targets(args: argparse.Namespace, accelerator: Accelerator, sets: SimpleNamespace) -> SimpleNamespace:
    """The frozen networks, and what they say about every image in use (data.cache_targets)."""
    used, images = [*sets.train, sets.test] + ([sets.val] if sets.val else []), data.Images(args.data_path)
    rows = sorted({int(row) for part in used for row in part.trials.image})
    images[rows[-1:]]  # before gigabytes are loaded: is the file whole, and has it all pictures?
    device = accelerator.device
    dtype = torch.float16 if device.type == "cuda" else torch.float32  # the original's, and what the cache holds
    frozen = {"clip": load_clip(args.cache_dir, device, dtype)}
    if args.blurry_recon:
        frozen["vae"] = load_vae(args.cache_dir, device, dtype)
        frozen["teacher"] = load_teacher(args.cache_dir, device, dtype)
    with accelerator.main_process_first():  # one process encodes, the others then find all rows done
        cached = data.cache_targets(images, args.cache_dir, rows, frozen, args.teacher_views, device)
    if args.in_memory:
        for cache in cached.values():
            cache.to_memory(rows)
    if not args.use_image_aug:  # all that the loop needs is on disk; the VAE stays, for samples.png
        frozen["clip"] = SimpleNamespace(seq_dim=frozen["clip"].seq_dim, emb_dim=frozen["clip"].emb_dim)
        if args.teacher_views:
            frozen.pop("teacher", None)
    return SimpleNamespace(frozen=frozen, images=images, rows=rows, **cached)


def fetch(sets: SimpleNamespace, targets: SimpleNamespace, chosen: list[np.ndarray], args: argparse.Namespace) -> dict:
    """What one step needs, on the CPU and as it is stored; `chosen` are positions in each subject's trials.

    voxels [(b_s, V_s), ..], clip (B, S, D), latents (B, 4, L, L), features (B, 1 + views, F, 512); images (B, 3, H, W)
    where there is a network in the loop to look at them.
    """
    rows = np.concatenate([part.trials.image[picked] for part, picked in zip(sets.train, chosen, strict=True)])  # (B,)
    batch = {"voxels": [part.voxels[picked] for part, picked in zip(sets.train, chosen, strict=True)]}
    if args.use_image_aug or args.blurry_recon and not args.teacher_views:  # recoloured pictures have no cached targets
        batch["images"] = targets.images[rows]
    if not args.use_image_aug:
        batch["clip"] = targets.clip[rows]
        if args.blurry_recon:
            batch["latents"], batch["features"] = targets.vae[rows], targets.teacher[rows]
    return batch


def encode(batch: dict, targets: SimpleNamespace, device: torch.device) -> dict:
    """`fetch`'s batch on the device, in float32, with features and features_aug (B, F, 512) told apart."""
    voxels = [x.to(device, non_blocking=True).float() for x in batch.pop("voxels")]
    batch = {name: x.to(device, non_blocking=True).float() for name, x in batch.items()}
    images, features = batch.pop("images", None), batch.pop("features", None)
    if "clip" not in batch:  # --use_image_aug
        recolour = v2.RandomApply([v2.ColorJitter(.4, .4, .4, .1)], .3)
        images = torch.stack([recolour(image) for image in images])  # one by one: a call draws once
        batch["clip"] = targets.frozen["clip"].tokens(images).float()
        if "vae" in targets.frozen:
            batch["latents"] = encode_latents(targets.frozen["vae"], images).float()
            features = targets.frozen["teacher"](images)[:, None].float()  # (B, 1, F, 512)
    if features is not None:
        batch["features"] = features[:, 0]
        if features.shape[1] > 1:  # one of the cached recolourings
            batch["features_aug"] = features[:, int(torch.randint(1, features.shape[1], ()))]
        else:
            recoloured = data.augmented(images, torch.randint(2**31, (len(images),)), 1)
            batch["features_aug"] = targets.frozen["teacher"](recoloured).float()
    return batch | {"voxels": voxels}


# ----------------------------------------------------------------------------------------------------------------------
# Losses of one step
# ----------------------------------------------------------------------------------------------------------------------
def mix_subjects(voxels: list[torch.Tensor], original: bool = False) -> tuple[list[torch.Tensor], SimpleNamespace]:
    """MixCo (paper §2.2) within each subject; the partners' positions then count through the whole batch.

    The original forgot to count: each subject's partners pointed into the FIRST subject's part of the batch.
    """
    mixed, perms, betas, selects, offset = [], [], [], [], 0
    for x in voxels:
        x, perm, beta, select = networks.mixco(x)
        mixed.append(x)
        perms.append(perm + offset)
        betas.append(beta)
        selects.append(select)
        offset += 0 if original else len(x)
    return mixed, SimpleNamespace(perm=torch.cat(perms), betas=torch.cat(betas), select=torch.cat(selects))


def contrast(brain: torch.Tensor, image: torch.Tensor, mix: SimpleNamespace | None, temp: float,
             original: bool = False) -> torch.Tensor:
    """All tokens as one long vector of unit length: BiMixCo while voxels are mixed, SoftCLIP after."""
    brain, image = F.normalize(brain.flatten(1).float(), dim=-1), F.normalize(image.flatten(1), dim=-1)  # (B, S * D)
    if mix is not None:
        return networks.mixco_nce(brain, image, .006, mix.perm, mix.betas, mix.select, original)
    return networks.soft_clip_loss(brain, image, temp)


def of_all(accelerator: Accelerator, x: torch.Tensor) -> torch.Tensor:
    """The rows of all W processes, in their order; only this one's carry a gradient, W-fold.

    The loss of all rows has the gradient sum_r dL/dx_r dx_r/dw. Process r adds its own term alone, and DDP takes the
    mean of the processes: (1/W) sum_r W dL/dx_r dx_r/dw. So nothing need be sent backwards.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    rows = list(networks.gathered(x.detach()).chunk(world))
    rows[rank] = x + (world - 1) * (x - x.detach()) if x.requires_grad else x  # the value of x
    return torch.cat(rows)


SOFT_SHARE = .1  # of SoftCLIP in the low-level loss, beside L1


def low_level(out: dict, batch: dict, mix: SimpleNamespace | None, everyone=lambda x: x) -> torch.Tensor:
    """L1 to the VAE latents + .1 SoftCLIP to the teacher, place by place (paper §2.2.3); `everyone`: `step_losses`.

    A mixed brain should show mixed latents. (The original mixed them only after the loss was taken.)
    """
    latents = batch["latents"]
    if mix is not None:
        share = mix.betas.reshape(-1, 1, 1, 1)
        latents = share * latents + (1 - share) * latents[mix.perm]
    l1 = F.l1_loss(out["blurry_latents"].float(), latents)
    student, teacher, recoloured = (F.normalize(everyone(x).flatten(0, 1).float(), dim=-1)  # (B * F, 512)
                                    for x in (out["blurry_features"], batch["features"], batch["features_aug"]))
    return l1 + SOFT_SHARE * networks.soft_contrastive_loss(student, teacher, recoloured, .2)


def lr_schedule(optimizer, kind: str, max_lr: float, epochs: int, steps: int):
    """OneCycle: 2 epochs up from max_lr / 25, cosine down to max_lr / 25000; AdamW's beta1 goes .95 -> .85 -> .95.

    An 8-bit AdamW keeps beta1 at .9: it is compiled with that number inside, and would be anew at each step.
    """
    total = epochs * steps
    if kind == "linear":
        return torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=total)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps=max(3, total),
                                               pct_start=min(.5, 2 / epochs), final_div_factor=1000,
                                               cycle_momentum=type(optimizer).__name__ != "AdamW8bit")


# ----------------------------------------------------------------------------------------------------------------------
# Testing
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test(model: MindEye2, part: SimpleNamespace, targets: SimpleNamespace, device, limit: int = 300) -> dict:
    """Outputs averaged over each image's repeats -> retrieval among (up to) 300 images, and the prior's loss.

    image_retrieval: given the brain, is its image the nearest? brain_retrieval: given the image, its brain? (The
    original has these two the wrong way round: its similarity matrix is transposed.)
    """
    model.eval()
    ids, positions = data.repeats(part.trials)
    ids, positions = ids[:limit], positions[:limit]
    half = next(model.parameters()).dtype  # DeepSpeed keeps the model's weights so; without it they are float32
    autocast = torch.autocast(device.type, half, enabled=half != torch.float32)
    with autocast:
        mean = data.embed_images(model, part.voxels, positions)
    clip_target = targets.clip[ids].float()
    brain, image = (F.normalize(x.flatten(1), dim=-1) for x in (mean["clip_voxels"], clip_target))
    similarity = brain @ image.T  # (brains, images)
    truth = torch.arange(len(ids))
    rank = (similarity > similarity.diag()[:, None]).sum(1) + 1
    scores = {"image_retrieval": (similarity.argmax(1) == truth).float().mean().item(),
              "brain_retrieval": (similarity.argmax(0) == truth).float().mean().item(),
              "reciprocal_rank": (1 / rank).mean().item()}
    if model.diffusion_prior is not None:  # the same noise and times at each test, nothing dropped: comparable numbers
        generator = torch.Generator().manual_seed(0)
        given = (mean["backbone"], clip_target, torch.linspace(0, 99, len(ids)).long(),
                 torch.randn(clip_target.shape, generator=generator), torch.ones(len(ids), dtype=torch.bool))
        total = 0.
        for some in zip(*(x.split(32) for x in given), strict=True):  # 300 at once take some 16 GB at the paper's size
            backbone, target, times, noise, keep = (x.to(device) for x in some)
            with autocast:
                loss, _ = model.diffusion_prior.loss(backbone, target, timesteps=times, noise=noise, keep=(keep, keep))
            total += loss.item() * len(target)
        scores["loss_prior"] = total / len(ids)
    if "blurry_latents" in mean:
        scores["loss_latents"] = F.l1_loss(mean["blurry_latents"], targets.vae[ids].float()).item()
    model.train()
    return scores | {"ids": ids, "blurry_latents": mean.get("blurry_latents")}


def save_curves(folder: Path, history: dict[str, list[tuple[int, float]]]) -> None:
    """curves.png: every logged number against steps."""
    names = sorted(history)
    figure, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 2.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        axis.plot(*zip(*history[name], strict=True), lw=1)
        axis.set(title=name, xlabel="step")
        axis.title.set_size(9)
    figure.tight_layout()
    with files.replacing(folder / "curves.png") as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


def save_samples(folder: Path, last: dict, targets: SimpleNamespace) -> None:
    """samples.png: seen and blurry of some test images."""
    if last["blurry_latents"] is None:
        return
    device = next(targets.frozen["vae"].parameters()).device
    rows = {"seen": targets.images[last["ids"][:12]],
            "blurry": decode_latents(targets.frozen["vae"], last["blurry_latents"][:12].to(device)).cpu()}
    figure, axes = plt.subplots(2, len(rows["seen"]), figsize=(len(rows["seen"]), 2.2), squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        line[0].set_title(name, size=9, loc="left")
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy())
            axis.axis("off")
    figure.tight_layout(pad=.2)
    with files.replacing(folder / "samples.png") as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# Before the first step
# ----------------------------------------------------------------------------------------------------------------------
def check_args(args: argparse.Namespace) -> None:
    """Fill in the folders, building the toy world if none is named; raise UserError for flags that do not fit."""
    if args.data_path is None:
        args.data_path = data.data_folder()
        if args.data_path == "toy" and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            import toy  # the only place where a stage hears of the toy: no other dataset can be made from nothing
            toy.build_world(Path("toy"))
    args.cache_dir = args.cache_dir or args.data_path
    if args.multi_subject and args.multisubject_ckpt:
        raise UserError("--multisubject_ckpt starts a fine-tuning: use it with --no-multi_subject.")
    least = dict.fromkeys(("num_epochs", "batch_size", "num_sessions", "ckpt_interval", "gradient_accumulation",
                           "lora_rank", "hidden_dim", "prior_depth", "prior_dim_head"), 1)
    for name, low in (least | {"n_blocks": 0, "teacher_views": 0, "val_sessions": 0, "seed": 0}).items():
        if (value := getattr(args, name)) is not None and value < low:
            raise UserError(f"--{name}={value} must be at least {low}.")
    if not 0 <= args.mixup_pct <= 1:
        raise UserError(f"--mixup_pct={args.mixup_pct} must lie in 0..1: it is a share of the epochs.")
    if (args.prior_dim_head or 0) % 2:
        raise UserError(f"--prior_dim_head={args.prior_dim_head} must be even: positions turn pairs of channels.")
    if args.optimizer_bits == 8 and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise UserError("--optimizer_bits=8 does not know fp16's loss scaler: leave it out, or launch with "
                        "--mixed_precision=bf16.")
    if args.optimizer_bits == 8 and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError("--optimizer_bits=8 cuts weights into pieces, which DeepSpeed does not know: leave it out, or "
                        "launch with configs/one_gpu.yaml or multi_gpu.yaml.")
    if args.finetune != "all" and not args.multisubject_ckpt:
        raise UserError(f"--finetune={args.finetune} keeps the weights of a pretrained model: name it with "
                        "--multisubject_ckpt.")
    if args.tie_positions and args.multisubject_ckpt:
        raise UserError("--tie_positions is for first weights, and --multisubject_ckpt brings others: leave one out.")
    if args.pretrain_on and (not args.multi_subject or args.subj in args.pretrain_on):
        raise UserError(f"--pretrain_on names subjects for --multi_subject to pretrain on, and not --subj={args.subj}, "
                        "who is left out.")


def start_accelerator(args: argparse.Namespace, gradient_accumulation: int = 1) -> Accelerator:
    """With devices, processes, precision as `accelerate launch` says (else bfloat16 on a GPU). Raises UserError."""
    trackers = [TensorBoardTracker(args.model_name, args.train_logs)]
    if args.wandb_log:
        if not is_wandb_available():
            raise UserError("--wandb_log needs wandb: pip install wandb, or leave it out.")
        trackers.append(WandBTracker(args.wandb_project, name=args.model_name, config=vars(args)))
    half = "bf16" if torch.cuda.is_available() else "no"
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # no second copy of the gradients
    accelerator = Accelerator(mixed_precision=os.environ.get("ACCELERATE_MIXED_PRECISION", half), log_with=trackers,
                              project_dir=args.train_logs, gradient_accumulation_steps=gradient_accumulation,
                              kwargs_handlers=[InitProcessGroupKwargs(timeout=processes.PATIENCE), ddp])
    if accelerator.gradient_accumulation_steps != gradient_accumulation:  # DeepSpeed's config goes before ours
        raise UserError("accelerate was launched with gradient_accumulation_steps="
                        f"{accelerator.gradient_accumulation_steps}, not {gradient_accumulation}: write the number of "
                        "--gradient_accumulation into the --config_file, too.")
    return accelerator


def wide_layers(model: MindEye2) -> dict[str, networks.WideLinear]:
    """Those that learn, by name."""
    return {name: layer for name, layer in model.named_modules()
            if isinstance(layer, networks.WideLinear) and layer.weight.requires_grad}


def exchange_rows(accelerator: Accelerator, model: MindEye2) -> None:
    """With plain DDP, take the widest layers out of its hands: they exchange rows (model.WideLinear).

    And the buffers, constants here, which it would send before each step. But DDP wants something to do: where nothing
    else learns (--finetune=ridge), it keeps them.
    """
    if accelerator.distributed_type not in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        return
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wide = wide_layers(model)
    parameters = {f"{name}.{part}" for name, layer in wide.items() for part, _ in layer.named_parameters()}
    if parameters == learning:
        return
    for layer in wide.values():
        layer.exchanges_rows = True
        for parameter in layer.parameters():  # DDP does so for the others: all start from the first one's weights
            torch.distributed.broadcast(parameter.data, 0)
    buffers = {name for name, _ in model.named_buffers()}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, parameters | buffers)


def ready_for_deepspeed(accelerator: Accelerator, network: torch.nn.Module, batch_size: int, clip: float = 0) -> None:
    """Where DeepSpeed will wrap the network, tell it the batch size and keep its hands off gradients and autocast."""
    plugin = accelerator.state.deepspeed_plugin
    if not plugin:
        return
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size  # it is given no data loader to ask
    plugin.deepspeed_config["gradient_clipping"] = clip  # 0: none, as in the paper's code; accelerate's default is 1
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if dtype:  # it turns autocast off around a network whose weights it halved: on again inside
        network.forward = torch.autocast(accelerator.device.type, dtype)(network.forward)


def choose_sizes(args: argparse.Namespace) -> tuple[dict, dict | None]:
    """Constructor arguments that are a choice, and the pretrained state dict (or None), whose sizes then hold."""
    sizes = {"hidden_dim": 1024, "n_blocks": 4, "prior_depth": 6, "prior_dim_head": 52, "backbone": "released",
             "ridge": "linear", "prior": "target"}
    given = {name: getattr(args, name) for name in sizes if getattr(args, name) is not None}
    if not args.multisubject_ckpt:
        return sizes | given, None
    path = Path(args.multisubject_ckpt)
    if not path.exists() and path.suffix != ".pth":  # perhaps one of the release's
        import hub  # here: most runs need no hub
        with processes.start().main_process_first():
            hub.fetch_model(path.name, path.parent, "--multisubject_ckpt")
    pretrained, known = checkpoints.load_model(path, "--multisubject_ckpt")
    sizes |= {name: known[name] for name in sizes if name in known}
    for name, value in given.items():
        if value != sizes[name]:
            raise UserError(f"{args.multisubject_ckpt} was trained with --{name}={sizes[name]}, not {value}: leave "
                            f"--{name} out, or pretrain with --{name}={value}.")
    return sizes, pretrained.state_dict()


def build_model(args: argparse.Namespace, sizes: dict, pretrained: dict | None, num_voxels: list[int],
                targets: SimpleNamespace) -> MindEye2:
    """The frozen networks set the sizes of the targets; `pretrained` gives all but the ridge its first weights."""
    latent_size = targets.vae[targets.rows[:1]].shape[-1] if args.blurry_recon else 28
    clip = targets.frozen["clip"]
    model = MindEye2(num_voxels, clip_seq_dim=clip.seq_dim, clip_emb_dim=clip.emb_dim, latent_size=latent_size,
                     blurry_recon=args.blurry_recon, use_prior=args.use_prior, **sizes)
    if args.tie_positions:
        model.tie_positions()
    if pretrained:
        checkpoints.load_pretrained(model, pretrained)
    if args.finetune == "ridge":
        model.freeze()
    elif args.finetune == "lora":
        model.adapt(args.lora_rank)
    if args.use_prior:
        model.diffusion_prior.net.causal_transformer.checkpointing = args.gradient_checkpointing
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # it would cut each layer where a bucket of gradients is full
        model.compile_blocks()
    return model


def in_pieces(optimizer_class, groups: list[dict], most: int = 2**26, **options) -> torch.optim.Optimizer:
    """An optimizer that sees each weight of more than `most` numbers as several, rows of the one.

    torchao's AdamW holds both numbers of a weight in 32 bits while it works on it, and one layer has 78% of the model.
    """
    whole = [p for group in groups for p in group["params"] if p.numel() > most and p.requires_grad]
    pieces = {p: [torch.nn.Parameter(rows) for rows in p.detach().split(max(1, most // p[0].numel()))] for p in whole}
    groups = [group | {"params": [x for p in group["params"] for x in pieces.get(p, [p])]} for group in groups]
    optimizer = optimizer_class(groups, **options)

    def share_gradients(*_) -> None:
        for p, rows in pieces.items():
            for piece, grad in zip(rows, p.grad.split(len(rows[0])), strict=True):
                piece.grad = grad
            p.grad = None  # the pieces hold it
    optimizer.register_step_pre_hook(share_gradients)
    return optimizer


def eight_bit_adamw() -> type[torch.optim.Optimizer]:
    """torchao's AdamW, whose two numbers a weight take a byte each. Raises UserError if it is not installed."""
    try:
        from torchao.optim import AdamW8bit  # here: it is needed for nothing else
    except ImportError:
        raise UserError("An 8-bit AdamW needs torchao: pip install torchao, or leave the flag out.") from None
    return AdamW8bit


def make_optimizer(args: argparse.Namespace, accelerator: Accelerator, model: MindEye2) -> torch.optim.Optimizer:
    """AdamW; on a GPU in few kernels, of which one makes the widest layers' gradients itself (adamw.py).

    Not where others look for those gradients: DeepSpeed, fp16's loss scaler, DDP (see `exchange_rows`).
    """
    groups, on_gpu = networks.parameter_groups(model), accelerator.device.type == "cuda"
    if accelerator.state.deepspeed_plugin:  # it makes one tensor of what learns in a group, and cannot of nothing
        groups = [group for group in groups if any(p.requires_grad for p in group["params"])]
    if args.optimizer_bits == 8:
        return in_pieces(eight_bit_adamw(), groups, lr=args.max_lr)
    alone = accelerator.distributed_type == DistributedType.NO  # one process may have DDP, too
    wide = [layer for layer in wide_layers(model).values() if alone or layer.exchanges_rows]
    if on_gpu and wide and networks.has_triton() and not (accelerator.state.deepspeed_plugin or accelerator.scaler):
        from adamw import RowAdamW  # here: a CPU has no Triton
        return RowAdamW(groups, wide, lr=args.max_lr, fused=True)
    return torch.optim.AdamW(groups, lr=args.max_lr, fused=on_gpu)


def step_losses(args: argparse.Namespace, accelerator: Accelerator, model, batch: dict, mixing: bool,
                temp: float) -> dict[str, torch.Tensor]:
    """One batch through the model -> its weighted losses; their sum is what gets minimised (paper eq. 1).

    With --gather_negatives, `everyone` turns the rows of this process into those of all.
    """
    gathering = args.gather_negatives and accelerator.num_processes > 1
    everyone = partial(of_all, accelerator) if gathering else lambda x: x
    original = args.mixing == "original"
    voxels, mix = mix_subjects(batch["voxels"], original) if mixing else (batch["voxels"], None)
    with accelerator.autocast():
        out = model(voxels, batch["clip"] if args.use_prior else None)
    partners = mix
    if gathering and mix is not None:  # their positions count through the rows of all
        perm = mix.perm + accelerator.process_index * len(mix.perm)
        partners = SimpleNamespace(perm=everyone(perm), betas=everyone(mix.betas), select=everyone(mix.select))
    losses = {"clip": args.clip_scale * contrast(everyone(out["clip_voxels"]), everyone(batch["clip"]), partners, temp,
                                                 original)}
    if args.use_prior:  # mixed voxels, unmixed target, as in the original
        losses["prior"] = args.prior_scale * out["loss_prior"]
    if args.blurry_recon:
        losses["lowlevel"] = args.blur_scale * low_level(out, batch, None if original else mix, everyone)
    return losses


def report(args: argparse.Namespace, accelerator: Accelerator, run: SimpleNamespace) -> None:
    """Test, log, and write checkpoints: last.pth always, best.pth when validation is the best so far."""
    processes.meet(run)
    gather_losses(args, accelerator, run)
    logs = {"train/loss": float(np.mean(run.losses[-run.steps:])),
            "train/lr": float(run.scheduler.get_last_lr()[0])}
    logs |= {f"train/{name}": value.item() for name, value in run.parts.items()}  # of this process's last batch
    if accelerator.is_main_process:
        bare, device = accelerator.unwrap_model(run.model), accelerator.device
        run.last = test(bare, run.sets.test, run.targets, device)
        logs |= {f"test/{name}": value for name, value in run.last.items() if isinstance(value, float)}
        if run.sets.val is not None:
            scores = test(bare, run.sets.val, run.targets, device)
            logs |= {f"val/{name}": value for name, value in scores.items() if isinstance(value, float)}
            # Without the contrastive loss, nothing ever trained what retrieves.
            score = scores["reciprocal_rank"] if args.clip_scale or not args.use_prior else -scores["loss_prior"]
            if score >= run.best:  # of equal ones the later, whose learning rate has come down further
                run.best = score
                if args.ckpt_saving:
                    checkpoints.save_checkpoint(run_folder(args) / "best.pth", bare, **about(args, accelerator, run))
        for name, value in logs.items():
            run.history.setdefault(name, []).append((run.step, value))
        run.bar.set_postfix(loss=f"{logs['train/loss']:.2f}", retrieval=f"{run.last['image_retrieval']:.2f}")
    save(args, accelerator, run)
    accelerator.log(logs, step=run.step)
    processes.meet(run)


LEAST_SCALE = 1e-4  # of fp16's losses, from 65536 halved 30 times: an overflow ends sooner, a gradient of NaN never


def gather_losses(args: argparse.Namespace, accelerator: Accelerator, run: SimpleNamespace) -> None:
    """Move this process's run.fresh, tensors, to run.losses: numbers, each the mean of all processes.

    This is the one look at the losses an interval: reading each would make a step wait for the GPU. Raises UserError,
    in every process, if a loss is NaN or infinite (it names the trials of the first such), or if no scale of the
    losses makes fp16's gradients finite, so that each step is skipped.
    """
    if not run.fresh:
        return
    losses = accelerator.gather(torch.stack(run.fresh)).reshape(accelerator.num_processes, -1)  # (processes, steps)
    bad = (~losses.T.isfinite()).nonzero().tolist()
    if bad:
        place, process = bad[0]
        epoch, step = divmod(len(run.losses) + place, run.steps)
        picked = next(islice(run.batches(epoch, process), step, None))
        rows = "; ".join(f"subject {part.trials.subject}: {', '.join(map(str, part.trials.image[chosen]))}"
                         for part, chosen in zip(run.sets.train, picked, strict=True))
        raise UserError(f"The loss became {losses[process, place].item()} in epoch {epoch}, step {step} (image rows of "
                        f"{rows}): lower --max_lr (now {args.max_lr}). The checkpoint before it is kept.")
    if accelerator.scaler and accelerator.scaler.get_scale() < LEAST_SCALE:
        raise UserError(f"fp16's loss scaler came down to {accelerator.scaler.get_scale():.1e} by epoch "
                        f"{(run.step - 1) // run.steps}, and gradients are infinite still: lower --max_lr (now "
                        f"{args.max_lr}), or use bf16. The checkpoint before it is kept.")
    run.losses += losses.mean(0).tolist()
    run.fresh.clear()


# ----------------------------------------------------------------------------------------------------------------------
# A checkpoint to go on from
# ----------------------------------------------------------------------------------------------------------------------
# Flags that change none of a run's numbers beyond rounding, and so may change between a kill and going on.
FREE = {"resume", "model_name", "train_logs", "data_path", "cache_dir", "multisubject_ckpt", "gradient_checkpointing",
        "compile", "in_memory", "detect_anomaly", "ckpt_interval", "ckpt_saving", "wandb_log", "wandb_project"}


def run_folder(args: argparse.Namespace) -> Path:
    return Path(args.train_logs) / args.model_name


def all_flags(args: argparse.Namespace, accelerator: Accelerator) -> dict:
    """What a checkpoint keeps of the flags that a run was started with."""
    return vars(args) | {"num_processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}


def spelled(name: str, value: object) -> str:
    """A flag as one types it."""
    if value is None or isinstance(value, bool):
        return {None: f"no --{name}", True: f"--{name}", False: f"--no-{name}"}[value]
    return f"--{name} {' '.join(map(str, value))}" if isinstance(value, list) else f"--{name}={value}"


def refuse_other_flags(path: Path, theirs: dict, ours: dict, free: set[str]) -> None:
    """Raise UserError if the run at `path` had other flags than ours, but for those in `free`."""
    for name, value in theirs.items():
        if name not in free and ours.get(name, value) != value:
            raise UserError(f"{path} is of a run with {spelled(name, value)}, not {ours[name]}: pass that, or start "
                            "another with --model_name.")


def about(args: argparse.Namespace, accelerator: Accelerator, run: SimpleNamespace) -> dict:
    """What a checkpoint says of the run. epoch, counted from 0, is the official name for how far it came."""
    return {"epoch": (run.step - 1) // run.steps, "step": run.step,
            "config": run.sizes, "flags": all_flags(args, accelerator)}


def save(args: argparse.Namespace, accelerator: Accelerator, run: SimpleNamespace) -> None:
    """last.pth: weights, optimizer, schedule and all that was logged, in the official layout.

    DeepSpeed's optimizer is in parts, one a process: they write the folder last/ in its place, DeepSpeed's own layout.
    """
    if not args.ckpt_saving:
        return
    history = {name: [value for _, value in values] for name, values in run.history.items()}
    scaler = {"scaler": accelerator.scaler.state_dict()} if accelerator.scaler else {}  # of fp16
    state = dict(scaler, lr_scheduler=run.scheduler.state_dict(), train_losses=run.losses,
                 test_losses=history.get("test/loss_prior", []), lrs=history.get("train/lr", []), history=run.history,
                 best=run.best, **about(args, accelerator, run))
    last = run_folder(args) / "last.pth"
    if not accelerator.state.deepspeed_plugin and accelerator.is_main_process:
        checkpoints.save_checkpoint(last, accelerator.unwrap_model(run.model),
                                    optimizer_state_dict=run.optimizer.state_dict(), **state)
    elif accelerator.state.deepspeed_plugin:
        processes.meet(run)
        run.model.save_checkpoint(str(last.parent), "last.building", client_state={"run": state}, save_latest=False)
        processes.meet(run)
        if accelerator.is_main_process:
            files.replace_folder(last.parent / "last.building", last.with_suffix(""))
            last.unlink(missing_ok=True)  # of another run: it would be read in place of the folder


def resume(args: argparse.Namespace, accelerator: Accelerator, run: SimpleNamespace) -> None:
    """Put last.pth (or last/) in place, if there is one. Raises UserError if it is of a run that gives other numbers.

    Data order and noise need no saving: they follow from seed, step and process (`step_seed`, data.epoch_batches).
    """
    path, bare = run_folder(args) / "last.pth", accelerator.unwrap_model(run.model)
    other = path.with_suffix("")  # what a run with DeepSpeed leaves
    if accelerator.state.deepspeed_plugin:
        path, other, old = other, path, path.with_name("last.old")
        with accelerator.main_process_first():
            if old.exists() and not path.exists():  # killed between two renames
                old.rename(path)
    if not path.exists():
        if other.exists():
            then = "without" if accelerator.state.deepspeed_plugin else "with"
            raise UserError(f"{other} is of a run {then} DeepSpeed: launch it so again, or leave --resume out to start "
                            "over.")
        return
    if accelerator.state.deepspeed_plugin:
        with checkpoints.reading(path, "--model_name"):
            state = run.model.load_checkpoint(str(path.parent), path.name)[1]["run"]
    else:
        state = checkpoints.torch_load(path, "--model_name")
    with checkpoints.reading(path, "--model_name"):
        refuse_other_flags(path, state.get("flags", {}), all_flags(args, accelerator), FREE | run.sizes.keys())
        refuse_other_flags(path, state.get("config", {}), run.sizes, set())  # what those flags, or none, came to
        if not accelerator.state.deepspeed_plugin:
            bare.load_state_dict(state["model_state_dict"])
            run.optimizer.load_state_dict(state["optimizer_state_dict"])
        run.scheduler.load_state_dict(state["lr_scheduler"])
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(state["scaler"])
        run.step, run.best = state["step"], state["best"]
        run.history = {name: [tuple(x) for x in values] for name, values in state["history"].items()}
        run.losses = [float(loss) for loss in state["train_losses"]]
        if not 0 < run.step == len(run.losses) <= args.num_epochs * run.steps:
            raise ValueError(f"step {run.step} with the losses of {len(run.losses)} steps")


def stop_if_asked(args: argparse.Namespace, accelerator: Accelerator, run: SimpleNamespace) -> None:
    """Save and exit if any process got SIGTERM."""
    if processes.asked_to_stop(accelerator, run):
        gather_losses(args, accelerator, run)
        save(args, accelerator, run)
        raise processes.end_of_sigterm(accelerator, run)


def step_seed(seed: int, step: int, rank: int) -> int:
    """All that a step draws follows from seed, step and process: a run that was killed goes on with the same."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


# ----------------------------------------------------------------------------------------------------------------------
# The method, top to bottom
# ----------------------------------------------------------------------------------------------------------------------
def set_up(args: argparse.Namespace, accelerator: Accelerator, sizes: dict, pretrained: dict | None) -> SimpleNamespace:
    """All that the loop needs: .sets and .targets, .model, .optimizer and .scheduler, .steps of an epoch, and .batches:
    the trials of each step of an epoch. And what it has seen: .step, .losses of each, .fresh (`gather_losses`),
    .history, .best, .last test, .parts of the last loss. (`train` adds .ahead, batches that are being read, and .bar;
    processes.noting_sigterm .stop and .cpus.)
    """
    sets = load_data(args)
    targets = load_targets(args, accelerator, sets)
    with accelerator.device:  # a GPU draws two billion first weights in no time
        model = build_model(args, sizes, pretrained, [part.voxels.shape[1] for part in sets.train], targets)
    model.to(accelerator.device)  # what a library makes on the CPU all the same
    ready_for_deepspeed(accelerator, model, args.batch_size)
    exchange_rows(accelerator, model)
    optimizer = make_optimizer(args, accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    adamw = optimizer.optimizer
    if accelerator.state.deepspeed_plugin:  # it may have put one of its own in place of ours
        adamw = adamw.optimizer
        state = accelerator.unwrap_model(model).state_dict(keep_vars=True)
        for name, value in networks.constants(state).items():  # it halves them, too
            state[name].data = value.to(accelerator.device)

    trials, rank, world = [part.trials for part in sets.train], accelerator.process_index, accelerator.num_processes
    share = args.batch_size // len(trials)  # trials a subject: 42 = 7 x 6
    steps = data.steps_per_epoch(trials, share * len(trials), world)
    whole = args.gradient_accumulation  # an epoch is of whole steps of the optimizer
    steps = max(1, steps // whole) * whole
    scheduler = lr_schedule(adamw, args.lr_scheduler_type, args.max_lr, args.num_epochs, steps // whole)
    return SimpleNamespace(
        sizes=sizes, sets=sets, targets=targets, model=model, optimizer=optimizer, scheduler=scheduler, steps=steps,
        batches=lambda epoch, process=rank: data.epoch_batches(trials, share, steps, args.seed, epoch, process, world,
                                                               args.gather_negatives),
        step=0, losses=[], fresh=[], history={}, best=-math.inf, last={}, parts={})


def fetch_all(args: argparse.Namespace, run: SimpleNamespace) -> Iterator[dict]:
    """The batches of all steps from run.step on. One stream: reading ahead does not start anew with each epoch."""
    epoch, done = divmod(run.step, run.steps)
    chosen = chain.from_iterable(map(run.batches, range(epoch, args.num_epochs)))
    return (fetch(run.sets, run.targets, picked, args) for picked in islice(chosen, done, None))


def train_epoch(args: argparse.Namespace, accelerator: Accelerator, run: SimpleNamespace, mixing: bool,
                temp: float) -> None:
    """The steps of one epoch, or what is left of it."""
    for batch in islice(run.ahead, run.steps - run.step % run.steps):
        torch.manual_seed(step_seed(args.seed, run.step, accelerator.process_index))
        batch = encode(batch, run.targets, accelerator.device)
        # Within --gradient_accumulation, DDP exchanges gradients, and the optimizer steps, after the last batch only.
        with accelerator.accumulate(run.model):
            run.parts = step_losses(args, accelerator, run.model, batch, mixing, temp)
            loss = sum(run.parts.values())
            accelerator.backward(loss)
            run.optimizer.step()
            run.optimizer.zero_grad()
        # By fp16's loss scaler; on a GPU a fused AdamW skips by itself, unseen, and the schedule counts its step.
        if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
            run.scheduler.step()
        run.fresh.append(loss.detach())
        run.step += 1
        run.bar.update()
        if accelerator.sync_gradients and run.step % run.steps:  # after an epoch's last step, its test comes first
            stop_if_asked(args, accelerator, run)


def main(argv: list[str] | None = None) -> dict[str, list[tuple[int, float]]]:
    """Train; return what was logged: name -> [(step, value), ..]."""
    args = parse_args(argv)
    check_args(args)
    sizes, pretrained = choose_sizes(args)
    accelerator = start_accelerator(args, args.gradient_accumulation)
    with processes.naming_lost(accelerator, "--resume goes on from the last checkpoint."):
        return train(args, accelerator, sizes, pretrained)


def train(args: argparse.Namespace, accelerator: Accelerator, sizes: dict, pretrained: dict | None) -> dict:
    """The whole run; see `main`."""
    accelerator.wait_for_everyone()  # the first process may have built the toy world
    set_seed(args.seed)
    torch.autograd.set_detect_anomaly(args.detect_anomaly)
    torch.backends.cuda.matmul.allow_tf32 = True  # what stays float32: faster, and 3 bits finer than bfloat16

    run = set_up(args, accelerator, sizes, pretrained)
    if args.resume:
        resume(args, accelerator, run)
    mixco_epochs = int(args.mixup_pct * args.num_epochs)
    # SoftCLIP's; BiMixCo's is fixed (`contrast`), so the zeros are never read.
    temps = [0.] * mixco_epochs + networks.cosine_anneal(.004, .0075, args.num_epochs - mixco_epochs).tolist()
    accelerator.init_trackers(args.model_name)
    run.bar = tqdm(total=args.num_epochs * run.steps, initial=run.step, desc=args.model_name,
                   disable=not accelerator.is_main_process)
    run.ahead = data.prefetch(fetch_all(args, run), accelerator.device, pin=True)
    with processes.noting_sigterm(run), run.bar:
        for epoch in range(run.step // run.steps, args.num_epochs):
            if run.step:
                stop_if_asked(args, accelerator, run)
            train_epoch(args, accelerator, run, epoch < mixco_epochs, temps[epoch])
            if epoch % args.ckpt_interval == 0 or epoch == args.num_epochs - 1:
                report(args, accelerator, run)
    if accelerator.is_main_process and run.last:  # a finished run that is resumed has nothing new to show
        save_curves(run_folder(args), run.history)
        save_samples(run_folder(args), run.last, run.targets)
    accelerator.end_training()
    return run.history


if __name__ == "__main__":
    networks.run_main(main)
