"""Train the decoder: make a text-to-image diffusion model draw from CLIP image tokens instead (2.4, Table 9).

SDXL knows how to draw what a text says. MindEye2 has no text, it has 256 image tokens, which say far more: what is
where. So SDXL's UNet loses its text and learns, from pictures alone, to read tokens ("unCLIP", as in DALL-E 2):

    what changes                            SDXL                                     here
    what attention reads                    77 words (B, 77, 2048)                   image tokens (B, 256, 1664)
      so to_k, to_v of each layer           (C, 2048)                                (C, 1664), new: --new_attention
    what is added to the time's embedding   pooled text and six numbers (B, 2816)    size and crop (B, 1024)
      so the first layer of that            (1280, 2816)                             (1280, 1024): --new_vector
    all else: 2.2 of 2.5 billion weights    kept, and trained on

One step: a picture's latents get noise of a random strength, and the UNet, told the picture's tokens, says which noise:

    x_t = sqrt(a_t) x + sqrt(1 - a_t) e      a_t: share of the variance that is still the picture's (SDXL's schedule)
    L   = |UNet(x_t, t, tokens, size) - e|^2

Tokens and latents of each picture are computed once and kept (data.TargetCache), or at each step with --no-cache.

    in    --images: webdataset tars of pictures, or an HDF5 file of them  (n, 3, H, H)
          --base: SDXL, a folder of diffusers' or one file; or a decoder made here, to go on; or a UNet's config.json
          {cache_dir}: CLIP, and the judges of Table 9
    out   train_logs/{model_name}/unclip/{unet,vae,scheduler}, model_index.json    for recon.py --unclip
                                 /state/             to go on after a kill, to the same weights: run the command again;
                                                     SIGTERM, as slurm's, saves it within a step
                                 /samples.png        pictures that it never learned from, drawn from their tokens
                                 /curves.png         losses, and a TensorBoard log of all
                                 /table9.csv         how near they are (Table 9)

    python unclip.py --data_path=toy --num_steps=600 --batch_size=64 --max_lr=1e-3 --warmup=50 --ema=.99   two minutes
    accelerate launch --config_file configs/multi_gpu.yaml unclip.py --model_name=decoder --cache_dir=nsd \\
        --images="shards/{000..099}.tar" --base=sd_xl_base_1.0.safetensors         the paper's, on eight GPUs
    python unclip.py --model_name=released --base=nsd/unclip --num_steps=0 --no-washed_out --data_path=nsd
                                                              Table 9 of a decoder that is there: the released one

The original was trained on pictures as they are, while MindEye2 predicts the tokens of washed-out ones
(frozen.clip_preprocess): its .8 x + .2 is a hand-made remedy. Here the decoder learns from the tokens it will be given.
"""

import argparse
import csv
import gc
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import files
import frozen
import judges
import metrics
import nsd
import processes
import recon
import refine
from checkpoints import reading, torch_load
from evaluate import JUDGE_ROWS
from features import encode_all
from model import UserError, run_main
from train import (
    all_flags,
    eight_bit_adamw,
    ready_for_deepspeed,
    refuse_other_flags,
    run_folder,
    save_curves,
    start_accelerator,
    step_seed,
)

FLAG = "--base"
MAX_GRAD_NORM = 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Options

def parse(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("unclip.py", description=__doc__.split("\n\n")[0], formatter_class=formatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model_name", default="decoder", help="a name: folder in --train_logs that receives everything")
    add("--train_logs", default="train_logs", help="folder of all runs")
    add("--data_path", default=data.data_folder(), help="folder of the data, for --images and --cache_dir where "
                                                         "those are not given")
    add("--cache_dir", help="folder of CLIP, of the judges and of cached tokens and latents; None = --data_path")
    add("--images", help="pictures to learn from: tars of .jpg, .png or .webp, \"shards/{000..099}.tar\", or an .hdf5 "
        "file like NSD's; None = DATA_PATH/coco_images_224_float16.hdf5. The paper's were not published")
    add("--num_val", type=int, default=1000, help="pictures to validate on, never learned from; where shared1000.npy "
        "lies beside the .hdf5 file, those that all subjects saw")
    add("--resolution", type=int, help="pixels of the pictures learned from; 256 in the paper; None = 256, or the "
        "base's own if that is less")
    add("--draw_size", type=int, help="pixels at which recon.py will draw; 768 in the paper; None = the base's own, "
        "at most 768")
    add("--cache", action=switch, default=True, help="keep tokens and latents on disk (0.9 MB a picture) instead of "
        "computing them at each step")
    add("--washed_out", action=switch, default=True, help="CLIP sees pale pictures, as MindEye2's targets are; no = "
        "pictures as they are, as the released decoder learned")
    # The network
    add("--base", help="what to start from: a folder of diffusers (SDXL, or a decoder), an SDXL .safetensors file, or "
        "a UNet's config.json for random weights; None = CACHE_DIR/sdxl, or else CACHE_DIR/" + refine.SDXL_FILE)
    add("--vae", help="folder of the VAE in diffusers' layout; None = the base's")
    add("--new_attention", default="random", choices=["random", "zero", "cut"], help="how to_k and to_v start: at "
        "random (the paper's), to_v at zero (at first the UNet is told nothing), or cut from the base's, whose "
        "columns meant words")
    add("--new_vector", default="size", choices=["size", "first", "random"], help="how size and crop are read at "
        "first: by the base's own weights for them; by its first ones, made for the pooled text (the original's); or "
        "at random")
    add("--prediction", choices=["epsilon", "v_prediction"], help="what the UNet says: the noise (the paper's), or the "
        "velocity, sqrt(a) e - sqrt(1 - a) x; None = as the base, epsilon for a config.json")
    add("--train", default="all", choices=["all", "cross_attention"], help="which weights learn; the paper's: all. "
        "cross_attention: what reads the tokens, a fifth; the others are kept in bfloat16, for a small GPU")
    # Learning
    add("--num_steps", type=int, default=110_000, help="steps; 110,000 in the paper; 0 = only judge --base (Table 9)")
    add("--batch_size", type=int, default=8, help="pictures a step and process; 8 in the paper")
    add("--max_lr", type=float, default=1e-5, help="learning rate; 1e-5 in the original")
    add("--warmup", type=int, default=1000, help="steps in which it rises from 0; 1000 in the original")
    add("--decay", type=float, default=0.0, help="share of the steps, the last ones, in which it falls to 0 on a "
        "line; 0 in the original: constant to the end")
    add("--offset_noise", type=float, default=0.04, help="part of the noise that is one number for all of a picture: "
        "else none is ever very dark or bright; .04 in the paper")
    add("--min_snr", type=float, help="weigh t by min(SNR, this) / SNR (Hang et al. 2023: 5), which learns faster; "
        "None = all alike, the paper's")
    add("--token_noise", type=float, default=0.0, help="move half of the tokens some way, up to this (0 to 1), towards "
        "another picture's: what brains get wrong is like that; 0 in the paper")
    add("--blind", type=float, default=0.0, help="share of the pictures whose tokens are pure noise, which guidance "
        "leads away from; 0 in the original (its guidance compares with noise all the same)")
    add("--ema", type=float, default=0.9999, help="decay a step of the moving average of the weights, which is what "
        "is saved; 0 = none, save the weights themselves: 10 GB less")
    add("--optimizer", default="adamw", choices=["adamw", "adamw8bit"], help="AdamW in one kernel, 8 bytes a weight "
        "of state; or torchao's in 8 bits, 2 bytes (pip install torchao)")
    add("--weights", default="float32", choices=["float32", "bfloat16"], help="of what learns. bfloat16 halves weights "
        "and gradients and needs adamw8bit, which rounds at random: plain rounding loses steps of 1e-5")
    add("--gradient_checkpointing", action=switch, default=False, help="compute activations twice instead of keeping "
        "them: slower, smaller")
    add("--compile", action=switch, default=False, help="torch.compile of the transformer blocks: a minute at first")
    add("--graph", action=switch, default=False, help="record a step as a CUDA graph and replay it: with small batches "
        "the GPU waits for Python. One process only")
    add("--seed", type=int, default=42, help="decides new weights, the order of pictures and all noise")
    add("--ckpt_interval", type=int, default=1000, help="steps between validations, with samples and saved weights")
    # Drawing and judging
    add("--steps", type=int, default=38, help="denoising steps of samples; as for recon.py")
    add("--scheduler", default="euler", choices=["euler", "dpm"], help="solver of samples; as for recon.py")
    add("--guidance", type=float, default=5.0, help="guidance scale of samples; as for recon.py")
    add("--num_eval", type=int, default=1000, help="validation pictures drawn and judged at the end, for Table 9: 0 = "
        "none; 30,000 in the paper, which takes 100 GB of memory")
    add("--wandb_log", action=switch, default=False, help="log to Weights & Biases besides TensorBoard")
    add("--wandb_project", default="stability", help="Weights & Biases project")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Fill in the folders; raise UserError for flags and files that do not fit."""
    least = {"num_steps": 0, "num_val": 1, "batch_size": 1, "warmup": 0, "ckpt_interval": 1, "steps": 1, "num_eval": 0,
             "seed": 0}
    for name, low in least.items():
        if getattr(args, name) < low:
            raise UserError(f"--{name} must be at least {low}, not {getattr(args, name)}.")
    for name, high in {"decay": 1, "blind": 1, "token_noise": 1, "ema": 1 - 1e-9}.items():
        if not 0 <= getattr(args, name) <= high:
            raise UserError(f"--{name} must be at least 0 and {'below' if name == 'ema' else 'at most'} 1, not "
                            f"{getattr(args, name)}.")  # fmt: skip
    if args.weights == "bfloat16" and args.optimizer != "adamw8bit":
        raise UserError("--weights=bfloat16 loses small steps to rounding: add --optimizer=adamw8bit, which does not.")
    args.images = args.images or str(data.h5_path(args.data_path, "images"))
    args.cache_dir = args.cache_dir or args.data_path
    folder = Path(args.cache_dir) / "sdxl"
    args.base = args.base or str(folder if folder.exists() else folder.with_name(refine.SDXL_FILE))
    # Before a gigabyte is loaded: are they there? The released decoder may still be a file.
    released = Path(args.base).with_name(frozen.UNCLIP_FILE).exists() and Path(args.base).name == "unclip"
    for flag, path in ((FLAG, args.base), *(("--images", path) for path in data.expanded(args.images))):
        if not Path(path).exists() and not (flag == FLAG and released):
            raise UserError(f"{path} does not exist: put it there, or name another with {flag}.")
    if not args.num_steps and (run_folder(args) / "state").exists():
        raise UserError(f"{run_folder(args)} holds a decoder in training, which --num_steps=0 would replace: name "
                        "another --model_name.")


# ---------------------------------------------------------------------------------------------------------------------
# From a text-conditioned UNet to one that reads tokens

def public(config: dict) -> dict:
    """A config of diffusers without its own notes, one of which tells from_config which values not to believe."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def token_config(config: dict, token_dim: int) -> dict:
    """The config of a UNet that reads tokens of `token_dim` channels, in place of the words of `config`'s.

    Raises UserError where `config` is a decoder already, of other tokens.
    """
    config = public(config)
    if config.get("class_embed_type") == "projection":
        if config["cross_attention_dim"] != token_dim:
            raise UserError(f"the base reads tokens of {config['cross_attention_dim']} channels, CLIP makes "
                            f"{token_dim}: name another {FLAG} or --cache_dir.")
        return config
    if config.get("addition_embed_type") != "text_time":
        raise UserError(f"the base is neither an SDXL nor a decoder: name another {FLAG}.")
    numbers = 4 * config["addition_time_embed_dim"]
    return config | {
        "cross_attention_dim": token_dim, "addition_embed_type": None, "addition_time_embed_dim": None,
        "class_embed_type": "projection", "projection_class_embeddings_input_dim": numbers}


def fresh(weight: Tensor) -> Tensor:
    """PyTorch's own first weights of a linear layer: uniform in +-1 / sqrt(inputs)."""
    return nn.init.kaiming_uniform_(torch.empty(weight.shape), a=math.sqrt(5))


def new_vector_layer(base: UNet2DConditionModel, how: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that reads size and crop, from the base's, which reads more.

    Its columns, in order: the pooled text's, then those of six numbers: height, width, top, left, and the height and
    width aimed at. "size" keeps the middle four. What is left out becomes a constant: an empty text's pooled vector is
    zero in SDXL's training, and the size aimed at is the base's own; so at first nothing is changed.
    """
    layer, width = base.add_embedding.linear_1, base.config.addition_time_embed_dim
    text = layer.weight.shape[1] - 6 * width
    if how == "random":
        return fresh(layer.weight[:, : 4 * width]), layer.bias
    if how == "first":
        return layer.weight[:, : 4 * width], layer.bias
    aim = torch.full((1, 2), 8.0 * base.config.sample_size)
    constant = layer.weight[:, text + 4 * width :] @ frozen.size_vector(aim, 2 * width)[0]
    return layer.weight[:, text : text + 4 * width], layer.bias + constant


@torch.no_grad()
def convert(base: UNet2DConditionModel, token_dim: int, new_attention: str, new_vector: str) -> UNet2DConditionModel:
    """The base's UNet, with all its weights but those of the text, as one that reads tokens (2.4)."""
    config = token_config(dict(base.config), token_dim)
    if config["class_embed_type"] == base.config.class_embed_type:
        return base
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    old, state = base.state_dict(), {}
    for name, weight in unet.state_dict().items():
        source = name.replace("class_embedding", "add_embedding")
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            state[name] = fresh(weight)
            if new_attention == "zero" and "to_v" in name:
                state[name].zero_()
            if new_attention == "cut":  # where tokens have more channels than words, the last ones stay new
                kept = min(weight.shape[1], old[name].shape[1])
                state[name][:, :kept] = old[name][:, :kept]
        else:
            state[name] = old[source]
    state["class_embedding.linear_1.weight"], state["class_embedding.linear_1.bias"] = new_vector_layer(
        base, new_vector)
    unet.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    return unet


def load_base(args: argparse.Namespace, token_dim: int) -> SimpleNamespace:
    """.unet (float32, on the CPU), .vae, .scheduler of --base, already made for tokens. Raises UserError.

    Where args.resolution and args.draw_size are None, they become the base's.
    """
    base = Path(args.base)
    torch.manual_seed(args.seed)  # of new weights
    vae, scheduler = None, DDPMScheduler(**frozen.UNCLIP_SCHEDULER, clip_sample=False)
    with reading(base, FLAG):
        if base.suffix == ".json":
            unet = UNet2DConditionModel(**token_config(json.loads(base.read_text()), token_dim))
        else:
            if not base.is_dir():
                refine.check_file(base, FLAG)
            elif not (base / "unet/config.json").exists():  # diffusers would look for it on the internet
                raise UserError(f"{base} has no unet/config.json: name a folder of SDXL or of a decoder with {FLAG}.")
            scheduler = refine.load_scheduler(base, FLAG)
            unet = convert(refine.load_part(base, "unet", "cpu", flag=FLAG), token_dim, args.new_attention,
                           args.new_vector)
            vae = None if args.vae else refine.load_part(base, "vae", "cpu", flag=FLAG)
    if vae is None and not args.vae:
        raise UserError(f"{base} brings no VAE: name a folder with --vae.")
    vae = vae or frozen.read_vae(Path(args.vae), "--vae")
    vae.enable_slicing()  # one picture at a time: at 768 pixels each needs gigabytes
    factor = 2 ** (len(vae.config.block_out_channels) - 1)  # 8 pixels a latent
    own = unet.config.sample_size * factor
    args.resolution, args.draw_size = args.resolution or min(256, own), args.draw_size or min(768, own)
    for name in ("resolution", "draw_size"):
        grain = factor * 2 ** (len(unet.config.block_out_channels) - 1)
        if getattr(args, name) < 1 or getattr(args, name) % grain:
            raise UserError(f"--{name} must be a multiple of {grain}, not {getattr(args, name)}.")
    unet.register_to_config(sample_size=args.draw_size // factor)
    config = public(scheduler.config) | {"clip_sample": False}
    scheduler = DDPMScheduler.from_config(config | ({"prediction_type": args.prediction} if args.prediction else {}))
    return SimpleNamespace(unet=unet.requires_grad_(True), vae=vae, scheduler=scheduler)


def trained(unet: nn.Module, which: str, half: bool) -> list[nn.Parameter]:
    """The weights that learn; the others are frozen, and with `half` kept in bfloat16, as autocast would see them."""
    def learns(name: str) -> bool:
        return which == "all" or "attn2" in name or name.startswith("class_embedding")
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(learns(name))
        if half and not learns(name):
            parameter.data = parameter.data.bfloat16()
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, their tokens and latents

def load_pictures(args: argparse.Namespace) -> SimpleNamespace:
    """.images, .train and .val: rows to learn from and to validate on."""
    hdf5 = Path(args.images).suffix in (".hdf5", ".h5")
    images = data.Images(args.images, args.resolution) if hdf5 else data.TarImages(args.images, args.resolution)
    rows, shared = np.arange(len(images)), Path(args.images).with_name("shared1000.npy")
    if hdf5 and shared.exists():  # NSD: what all subjects saw are the test images of every other stage
        held_out = nsd.load_shared(shared.parent)[: len(rows)]
        if len(held_out) < len(rows):
            raise UserError(f"{shared} is of {len(held_out)} pictures, {args.images} has {len(rows)}: get both again, "
                            "or name others with --images.")
        val, rows = rows[held_out], rows[~held_out]
    else:
        order = np.random.default_rng(0).permutation(rows)  # the same for all runs, so that they can be compared
        val, rows = np.sort(order[: args.num_val]), np.sort(order[args.num_val :])
    if not len(rows) or not len(val):
        raise UserError(f"{args.images} has {len(images)} pictures, too few to learn from: lower --num_val.")
    return SimpleNamespace(images=images, train=rows, val=val[: args.num_val])


def load_sources(args: argparse.Namespace, accelerator: Accelerator, clip, vae, pictures) -> SimpleNamespace:
    """What gives tokens and latents: .cached {"clip": .., "vae": ..} or, with --no-cache, the networks themselves."""
    device = accelerator.device
    networks = {"clip": clip.to(device), "vae": nn.Module.to(vae, device)}
    if not args.cache:
        return SimpleNamespace(images=pictures.images, networks=networks, cached=None)
    # The pale and the plain view are not to be mixed up in one cache.
    folder = Path(args.cache_dir) / ("targets" if clip.washed_out else "targets_plain")
    rows = np.concatenate((pictures.train, pictures.val))
    with accelerator.main_process_first():  # one process encodes, the others then find all rows done
        cached = data.cache_targets(pictures.images, args.cache_dir, rows, networks, device=device, folder=folder)
    return SimpleNamespace(images=pictures.images, networks=networks, cached=cached)


def fetch(sources: SimpleNamespace, rows: np.ndarray) -> dict[str, Tensor]:
    """On the CPU, of B pictures: tokens (B, S, D) and latents (B, 4, L, L), or the pictures; numbers (B, 4)."""
    batch = {"numbers": sources.images.numbers(rows)}
    if sources.cached:
        return batch | {"tokens": sources.cached["clip"][rows], "latents": sources.cached["vae"][rows]}
    return batch | {"pictures": sources.images[rows]}


def encode(sources: SimpleNamespace, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """`fetch`'s batch, moved to the device: tokens, latents and numbers in float32."""
    batch = {name: values.to(device, non_blocking=True).float() for name, values in batch.items()}
    if "pictures" in batch:
        pictures = batch.pop("pictures")
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            batch["tokens"] = sources.networks["clip"].tokens(pictures).float()         # (B, S, D)
        batch["latents"] = frozen.encode_latents(sources.networks["vae"], pictures)     # (B, 4, L, L)
    return batch


def batches(rows: np.ndarray, args: argparse.Namespace, start: int, rank: int, world: int) -> Iterator[np.ndarray]:
    """From step `start` on, (B,) rows a step: each epoch a permutation that seed and epoch decide."""
    size = args.batch_size * world
    per_epoch = max(1, len(rows) // size)
    epoch, order = -1, rows
    for step in range(start, args.num_steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = np.random.default_rng([args.seed, epoch]).permutation(rows)
            order = np.resize(order, max(size, len(order)))  # fewer pictures than a step takes: some come twice
        first = step % per_epoch * size + rank * args.batch_size
        yield order[first : first + args.batch_size]


# ---------------------------------------------------------------------------------------------------------------------
# The loss

def imperfect(tokens: Tensor, mean: Tensor, most: float, generator: torch.Generator | None = None) -> Tensor:
    """Tokens (B, S, D), half of them as a brain might give them: some way, up to `most`, towards another picture's.

    And shrunk towards the mean (S, D), as the best guess of anything uncertain is. Not white noise: of what the toy's
    brains get wrong, 84 to 95% lies in the 30 directions (of 1024) in which pictures differ most.
    """
    options = {"device": tokens.device, "generator": generator}
    share = most * (2 * torch.rand(len(tokens), 1, 1, **options) - 1).clamp(min=0)
    keep = 1 - share**2
    other = tokens[torch.randperm(len(tokens), **options)]
    return mean + keep * (tokens - mean) + share * keep.sqrt() * (other - mean)


def prepare(batch: dict[str, Tensor], alphas: Tensor, args: argparse.Namespace, vector_dim: int,
            generator: torch.Generator, mean: Tensor | None = None, t: Tensor | None = None) -> SimpleNamespace:
    """What one step shows the UNet: .x, .t, .tokens, .vector, the .target (B, 4, L, L) it should say, .weight (B,)."""
    latents, tokens, count = batch["latents"], batch["tokens"], len(batch["latents"])
    options = {"device": latents.device, "generator": generator}
    t = torch.randint(len(alphas), (count,), **options) if t is None else t
    offset = torch.randn(count, 1, 1, 1, **options)                  # shifts all of a picture, all channels alike
    noise = torch.randn(latents.shape, **options) + args.offset_noise * offset
    if args.token_noise:
        tokens = imperfect(tokens, mean, args.token_noise, generator)
    if args.blind:
        blind = torch.rand(count, 1, 1, **options) < args.blind
        tokens = torch.where(blind, torch.randn(tokens.shape, **options), tokens)
    a = alphas[t].reshape(-1, 1, 1, 1)
    target, weight = noise, torch.ones(count, device=latents.device)
    if args.prediction == "v_prediction":
        target = a.sqrt() * noise - (1 - a).sqrt() * latents
    # min(SNR, min_snr) is to weigh the error of the picture that is guessed (Hang et al. 2023). The noise's error is
    # SNR times as large as that, the velocity's SNR + 1 times: so much less is their weight.
    if args.min_snr:
        snr = alphas[t] / (1 - alphas[t])
        weight = snr.clamp(max=args.min_snr) / (snr + (args.prediction == "v_prediction"))
    return SimpleNamespace(x=a.sqrt() * latents + (1 - a).sqrt() * noise, t=t, tokens=tokens, target=target,
                           weight=weight, vector=frozen.size_vector(batch["numbers"], vector_dim))


def decoder_loss(unet: nn.Module, shown: SimpleNamespace) -> Tensor:
    """Mean squared error of what the UNet says (B, 4, L, L)."""
    x, tokens, vector = (values.to(next(unet.parameters()).dtype) for values in (shown.x, shown.tokens, shown.vector))
    said = unet(x, shown.t, tokens, class_labels=vector, return_dict=False)[0]
    return (shown.weight * F.mse_loss(said.float(), shown.target, reduction="none").mean((1, 2, 3))).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer, moving average, and a state to go on from

def make_optimizer(parameters: list[nn.Parameter], args: argparse.Namespace) -> torch.optim.Optimizer:
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=args.max_lr, fused=parameters[0].is_cuda, capturable=args.graph)
    return eight_bit_adamw()(parameters, lr=args.max_lr, bf16_stochastic_round=args.weights == "bfloat16")


def to_device(optimizer, device: torch.device) -> None:
    """Move an optimizer's rates and counts of steps, which a CUDA graph would take for fixed on the CPU."""
    for numbers, key in [*((group, "lr") for group in optimizer.param_groups),
                         *((state, "step") for state in optimizer.state.values())]:
        numbers[key] = torch.as_tensor(numbers[key], device=device)


def set_lr(optimizer, step: int, args: argparse.Namespace) -> float:
    """Rises on a line in --warmup steps, then constant; in the last share --decay of all steps it falls to 0."""
    left = (args.num_steps - step) / max(1e-9, args.decay * args.num_steps)
    lr = args.max_lr * min(1.0, (step + 1) / max(1, args.warmup), left)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's, or with --graph: compiled or recorded code reads its memory
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    return lr


@torch.no_grad()
def follow(average: list[Tensor], parameters: list[nn.Parameter], step: int, decay: float) -> None:
    """average <- decay * average + (1 - decay) * parameters; a young average follows faster."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    now = [parameter.detach() for parameter in parameters]
    if now and now[0].dtype != average[0].dtype:
        for old, new in zip(average, now, strict=True):
            old.lerp_(new.to(old.dtype), share)
    elif now:
        torch._foreach_lerp_(average, now, share)


@contextmanager
def averaged(unet: nn.Module, parameters: list[nn.Parameter], average: list[Tensor] | None) -> Iterator[nn.Module]:
    """The UNet with the averaged weights, for drawing and saving. They stand in for its own: no copies.

    Not as their .data, which loses DDP's hooks where the average is float32 and the weights are not.
    """
    others = {id(own): other for own, other in zip(parameters, average or [], strict=False)}
    places = [(module, name, own) for module in unet.modules() for name, own in module.named_parameters(recurse=False)
              if id(own) in others]
    for module, name, own in places:
        setattr(module, name, nn.Parameter(others[id(own)], requires_grad=False))
    try:
        yield unet.eval()
    finally:
        for module, name, own in places:
            setattr(module, name, own)
        unet.train()


# Flags that change none of a run's numbers beyond rounding, and so may change between a kill and going on.
FREE = {"model_name", "train_logs", "data_path", "cache_dir", "base", "vae", "gradient_checkpointing", "compile",
        "graph", "ckpt_interval", "draw_size", "steps", "scheduler", "guidance", "num_eval", "wandb_log",
        "wandb_project"}


def find_state(args: argparse.Namespace, accelerator: Accelerator) -> Path | None:
    """The newest state of this run, or None. Raises UserError if it was made with flags that give other numbers."""
    states = sorted(path for path in (run_folder(args) / "state").glob("step_*") if not path.suffix)
    if not states:
        return None
    with reading(states[-1], "--model_name"):
        theirs = json.loads((states[-1] / "progress.json").read_text())["flags"]
        free = FREE if args.decay else FREE | {"num_steps"}  # a longer run with a constant rate is the same run
        refuse_other_flags(states[-1].parent, theirs, all_flags(args, accelerator), free)
    return states[-1]


def state_bytes(run: SimpleNamespace) -> int:
    """About what `save_state` writes: weights, average, and what the optimizer keeps of each weight."""
    kept = [x for state in run.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in [*run.unet.parameters(), *kept, *(run.average or [])])


def save_state(args: argparse.Namespace, accelerator: Accelerator, run: SimpleNamespace) -> None:
    """state/step_00001000: weights, optimizer, average and history. Written whole, then renamed; older ones go."""
    folder, main = run_folder(args) / "state", accelerator.is_main_process
    done = folder / f"step_{run.step:08d}"
    with files.replacing_folder(done) if main else nullcontext(done.with_name(f"{done.name}.building")) as building:
        if main:
            data.check_disk(building, state_bytes(run), "The state to go on from needs", "--train_logs")
        processes.meet(run)
        accelerator.save_state(str(building))
        if main and run.average is not None:
            files.save(building / "average.pt", run.average)
        if main:
            progress = {"step": run.step, "flags": all_flags(args, accelerator), "history": run.history,
                        "losses": [loss.item() for loss in run.losses]}
            (building / "progress.json").write_text(json.dumps(progress))
        processes.meet(run)  # all have written
    for old in folder.glob("step_*") if main else ():
        if old != done:
            shutil.rmtree(old)


def load_state(args: argparse.Namespace, state: Path, accelerator: Accelerator, run: SimpleNamespace) -> None:
    """Put a state in place: weights, optimizer, average, step, history and losses. Raises UserError."""
    with reading(state, "--model_name"):
        accelerator.load_state(str(state))
        for group in run.optimizer.param_groups if args.optimizer == "adamw" else ():
            group["capturable"] = args.graph  # which the earlier run may have had otherwise
        progress = json.loads((state / "progress.json").read_text())
        if run.average is not None:
            for old, new in zip(run.average, torch_load(state / "average.pt", "--model_name"), strict=True):
                old.copy_(new)
        run.step = progress["step"]
        run.history = {name: [tuple(x) for x in values] for name, values in progress["history"].items()}
        run.losses = [torch.tensor(loss, device=accelerator.device) for loss in progress.get("losses", [])]


def save_decoder(args: argparse.Namespace, unet, vae, scheduler) -> Path:
    """The folder that recon.py --unclip reads, weights in half precision; the old one stays until the new is whole."""
    folder = run_folder(args) / "unclip"
    with torch.device("meta"):
        half = UNet2DConditionModel(**public(unet.config))
    half.load_state_dict({name: value.half().cpu() for name, value in unet.state_dict().items()}, assign=True)
    # Of a decoder that learned pale pictures' tokens, VAE output in [-1, 1] maps back plainly (frozen.load_unclip).
    scale = {"output_scale": .5, "output_shift": .5} if args.washed_out else {"output_scale": .8, "output_shift": .2}
    with files.replacing_folder(folder) as building:
        half.save_pretrained(building / "unet")
        vae.save_pretrained(building / "vae")
        scheduler.save_pretrained(building / "scheduler")
        (building / "model_index.json").write_text(json.dumps(scale))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Validation

@torch.no_grad()
def validate(unet: nn.Module, sources: SimpleNamespace, rows: np.ndarray, alphas: Tensor, args: argparse.Namespace,
             accelerator: Accelerator) -> float:
    """Mean loss on the pictures `rows`, true tokens, t from 0 to 999 evenly; the same noise at each call."""
    device, total = accelerator.device, 0.0
    plain = argparse.Namespace(**vars(args) | {"token_noise": 0, "blind": 0, "min_snr": None})
    times = torch.linspace(0, len(alphas) - 1, len(rows)).long()
    times = times[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))].to(device)
    for part in torch.arange(len(rows)).split(args.batch_size):
        batch = encode(sources, fetch(sources, rows[part.numpy()]), device)
        generator = torch.Generator(device).manual_seed(int(part[0]))
        shown = prepare(batch, alphas, plain, unet.config.projection_class_embeddings_input_dim, generator,
                        t=times[part.to(device)])
        with accelerator.autocast():
            total += decoder_loss(unet, shown).item() * len(part)
    return total / len(rows)


@torch.no_grad()
def draw(unclip: SimpleNamespace, sources: SimpleNamespace, rows: np.ndarray, args: argparse.Namespace) -> Tensor:
    """Pictures (B, 3, H, H) of the pictures `rows`, from their true tokens: by recon.draw, but from plain noise.

    recon.py starts as the original does: recon.start_latents, whose offset is left out here.
    """
    device, side = unclip.unet.device, unclip.unet.config.sample_size
    tokens = encode(sources, fetch(sources, rows), device)["tokens"]                # (B, S, D)
    shapes = [(unclip.unet.config.in_channels, side, side), tuple(tokens.shape[1:])]
    start, blind = recon.batch_noise(rows, args.seed, shapes, 1, device)
    pictures = recon.draw(unclip, tokens, start, blind, args.steps, args.guidance, args.scheduler)
    return data.resized(pictures, args.resolution).cpu()                            # (B, 3, H, H)


def save_samples(args: argparse.Namespace, unclip: SimpleNamespace, sources: SimpleNamespace, val: np.ndarray,
                 accelerator: Accelerator) -> Tensor:
    """samples.png: the first validation pictures, and what is drawn from their tokens; returns both (k, 3, H, 2 H)."""
    rows = val[: recon.GRID_COLUMNS]
    with accelerator.autocast():
        drawn = draw(unclip, sources, rows, args)
    seen, names, no_text = sources.images[rows], [str(row) for row in rows], [""] * len(rows)
    recon.save_grid(run_folder(args) / "samples.png", [("seen", seen, no_text), ("drawn", drawn, no_text)], names)
    return torch.cat((seen, drawn), -1)


def mean_loss(args: argparse.Namespace, run: SimpleNamespace) -> float:
    """Of the steps since the last report. Raises UserError if it is no number."""
    loss = torch.stack(run.losses).mean().item()
    if not math.isfinite(loss):
        raise UserError(f"The loss became {loss} before step {run.step}: lower --max_lr (now {args.max_lr}). "
                        "What was saved before is kept.")
    return loss


def report(args: argparse.Namespace, accelerator: Accelerator, run: SimpleNamespace) -> None:
    """Validate, log, draw, and write decoder and state."""
    processes.meet(run)
    logs = {"train/loss": mean_loss(args, run), "train/lr": run.lr}
    if accelerator.is_main_process:
        bare = accelerator.unwrap_model(run.unet)
        with averaged(bare, run.parameters, run.average) as unet:
            logs["val/loss"] = validate(unet, run.sources, run.val[:256], run.alphas, args, accelerator)
            unclip = SimpleNamespace(unet=unet, vae=run.vae, scheduler=run.scheduler, output_scale=.5, output_shift=.5)
            samples = save_samples(args, unclip, run.sources, run.val, accelerator)
            save_decoder(args, unet, run.vae, run.scheduler)
        for name, value in logs.items():
            run.history.setdefault(name, []).append((run.step, value))
        save_curves(run_folder(args), run.history)
        for tracker in accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"seen and drawn": samples.permute(0, 2, 3, 1).numpy()}, step=run.step, **options)
        run.bar.set_postfix(loss=f"{logs['val/loss']:.4f}")
    accelerator.log(logs, step=run.step)
    run.losses.clear()
    save_state(args, accelerator, run)


# ---------------------------------------------------------------------------------------------------------------------
# Table 9

PAPER = {"fid": 13.69, "pixcorr": .676, "ssim": .232, "alex2": .998, "alex5": .998, "inception": .997, "clip_l": .999,
         "efficientnet": .240, "swav": .029}


class InceptionFeatures(nn.Module):
    """Inception's features (B, 2048) of pictures (B, 3, H, H) uint8, for want of the one that FID is defined by."""
    def __init__(self, judge: SimpleNamespace) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, pictures: Tensor) -> Tensor:
        return self.judge.features(pictures.float() / 255)["inception"]


def frechet_distance(seen: Tensor, drawn: Tensor, args: argparse.Namespace, device: torch.device) -> tuple[float, str]:
    """FID of pictures (n, 3, H, H) uint8, and by which network. Raises Missing when there is no Inception at all.

    |m - m'|^2 + tr(C + C' - 2 (C C')^.5), of means and covariances of Inception's features (Heusel et al. 2017). It is
    not of pairs but of sets, and the fewer pictures, the larger: numbers of different n are not to be compared.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # here: it is needed for nothing else
    try:
        judge = judges.load_fid(args.cache_dir, device)
        network, remark = judge.network, judge.description
    except judges.Missing:
        judge = judges.load_vision("inception", args.cache_dir, device)
        network, remark = InceptionFeatures(judge), f"not FID's own, but {judge.description}"
    # One process judges for all: it would wait for ever for the others' share.
    fid = FrechetInceptionDistance(feature=network, sync_on_compute=False).to(device)
    for name, pictures in (("seen", seen), ("drawn", drawn)):
        for part in tqdm(pictures.split(32), desc=f"FID, {name}", leave=False, delay=2):
            fid.update(part.to(device), real=name == "seen")
    return fid.compute().item(), remark


def score(seen: Tensor, drawn: Tensor, args: argparse.Namespace, device: torch.device) -> dict:
    """Table 9's rows of pictures (n, 3, H, H) uint8: {row: (value, by which network)}; without missing judges'."""
    scores, missing = {}, {}
    try:
        scores["fid"] = frechet_distance(seen, drawn, args, device)
    except judges.Missing as reason:
        missing["fid"] = reason
    seen, drawn = seen.float() / 255, drawn.float() / 255
    scores["pixcorr"] = metrics.pixcorr(seen, drawn).mean().item(), ""
    scores["ssim"] = metrics.ssim(seen, drawn).mean().item(), ""
    for judge, rows in JUDGE_ROWS.items():
        try:
            network = judges.load_vision(judge, args.cache_dir, device)
        except judges.Missing as reason:
            missing |= dict.fromkeys(rows, reason)
            continue
        said = [encode_all(network.features, pictures, 32, device, judge) for pictures in (seen, drawn)]
        for row in rows:
            values = metrics.compare_features(row)(*(features[row] for features in said))
            scores[row] = values.mean().item(), network.description
    for row, reason in missing.items():
        print(f"left out {row}: {reason}")
    return scores


def table9(args: argparse.Namespace, accelerator: Accelerator, folder: Path, sources: SimpleNamespace,
           rows: np.ndarray) -> dict[str, float]:
    """Draw the pictures `rows` from their true tokens and compare. The processes share the drawing.

    Killed, it goes on where it was; not with --num_steps=0, which writes the decoder anew.
    """
    device, run = accelerator.device, run_folder(args)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    parts = [slice(first, min(first + args.batch_size, len(rows))) for first in range(0, len(rows), args.batch_size)]
    recon.open_parts(run / "drawn", args, accelerator, sorted((folder / "unet").iterdir()))
    def work(unclip, part: slice, _) -> dict:
        return {"drawn": (draw(unclip, sources, rows[part], args) * 255).round().to(torch.uint8)}
    def load() -> SimpleNamespace:
        unclip = frozen.load_unclip(folder, device, half)
        unclip.vae.enable_slicing()
        # .8 and .2, the released one's, make up for a brain's pale tokens: these are of the kind that it learned from.
        unclip.output_scale = unclip.output_shift = .5
        return unclip
    recon.run_pass("drawn", run / "drawn", parts, accelerator, load, work, first="drawn")
    if not accelerator.is_main_process:
        return {}
    drawn = recon.collect(run / "drawn", ["drawn"], len(parts))["drawn"]
    seen = torch.cat([(sources.images[rows[part]] * 255).round().to(torch.uint8) for part in parts])
    scores = score(seen, drawn, args, device)
    with files.replacing(run / "table9.csv") as temporary, open(temporary, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["metric", "yours", "paper", "judge", "pictures"])
        table.writerows([row, round(value, 6), PAPER[row], judge, len(rows)] for row, (value, judge) in scores.items())
    print(f"\n| Table 9, {len(rows)} pictures | yours | paper (30,000 of COCO) | judge |\n|---|---:|---:|---|")
    for row, (value, judge) in scores.items():
        title = metrics.PICTURES[row][0] if row in metrics.PICTURES else "FID"
        print(f"| {title} | {value:.3f} | {PAPER[row]:.3f} | {judge} |")
    shutil.rmtree(run / "drawn")
    return {row: value for row, (value, _) in scores.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The method, top to bottom

def mean_tokens(sources: SimpleNamespace, rows: np.ndarray, device: torch.device) -> Tensor:
    """Mean (S, D) of the tokens of up to 2000 pictures."""
    some = np.random.default_rng(0).choice(rows, min(2000, len(rows)), replace=False)
    parts = np.split(some, range(64, len(some), 64))
    return sum(encode(sources, fetch(sources, part), device)["tokens"].sum(0) for part in parts) / len(some)


def set_up(args: argparse.Namespace, accelerator: Accelerator, base: SimpleNamespace) -> SimpleNamespace:
    """All that a step needs: .unet, .optimizer, .parameters that learn, their moving .average or None, .alphas."""
    device = accelerator.device
    # nn.Module's `to`: diffusers' own prints a warning that means nothing here.
    unet = nn.Module.to(base.unet, device, getattr(torch, args.weights)).train()
    if device.type == "cuda":
        nn.Module.to(unet, memory_format=torch.channels_last)  # convolutions in half precision are faster so
    parameters = trained(unet, args.train, accelerator.mixed_precision != "no")
    if args.gradient_checkpointing:  # without noting the state of random numbers: nothing in the UNet draws any
        unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    if args.compile:
        unet.compile_repeated_blocks()
    optimizer = make_optimizer(parameters, args)
    ready_for_deepspeed(accelerator, unet, args.batch_size, MAX_GRAD_NORM)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    run = SimpleNamespace(unet=unet, optimizer=optimizer, parameters=parameters, mean=None, lr=0.0,
                          average=[p.detach().float().clone() for p in parameters] if args.ema else None,
                          alphas=base.scheduler.alphas_cumprod.to(device),
                          vector_dim=accelerator.unwrap_model(unet).config.projection_class_embeddings_input_dim)
    run.update = partial(update, args, accelerator, run)
    if args.graph:
        run.update = frozen.record(run.update)
    return run


def update(args: argparse.Namespace, accelerator: Accelerator, run: SimpleNamespace, **shown: Tensor) -> Tensor:
    """Forward, backward, optimizer; returns the loss (). shown is what `prepare` made."""
    with accelerator.autocast():
        loss = decoder_loss(run.unet, SimpleNamespace(**shown))
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(run.parameters, MAX_GRAD_NORM)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if args.graph:  # Python runs only in the first steps: from the recording on, a replay takes its place
        to_device(run.optimizer, accelerator.device)
    return loss.detach()


def train_step(args: argparse.Namespace, accelerator: Accelerator, run: SimpleNamespace, batch: dict[str, Tensor],
               step: int) -> Tensor:
    """One step on tokens (B, S, D), latents (B, 4, L, L) and numbers (B, 4); returns the loss ()."""
    # Noise follows from seed, step and process alone: a run that was killed goes on with the same.
    seed = step_seed(args.seed, step, accelerator.process_index)
    generator = torch.Generator(accelerator.device).manual_seed(seed)
    shown = prepare(batch, run.alphas, args, run.vector_dim, generator, run.mean)
    run.lr = set_lr(run.optimizer, step, args)
    loss = run.update(**vars(shown))
    if run.average is not None:
        follow(run.average, run.parameters, step, args.ema)
    return loss


def learn(args: argparse.Namespace, accelerator: Accelerator, base: SimpleNamespace, sources: SimpleNamespace,
          pictures: SimpleNamespace) -> dict[str, list[tuple[int, float]]]:
    """Train base.unet; what was logged: name -> [(step, value), ..]."""
    device, state = accelerator.device, find_state(args, accelerator)
    run = set_up(args, accelerator, base)
    run.vae, run.scheduler, run.sources, run.val = base.vae, base.scheduler, sources, pictures.val
    run.step, run.losses, run.history = 0, [], {}
    if state:
        load_state(args, state, accelerator, run)
    if args.token_noise:
        run.mean = mean_tokens(sources, pictures.train, device)
    run.bar = tqdm(total=args.num_steps, initial=run.step, desc=args.model_name,
                   disable=not accelerator.is_main_process)
    rows = batches(pictures.train, args, run.step, accelerator.process_index, accelerator.num_processes)
    fetched = (fetch(sources, chosen) for chosen in rows)
    with processes.noting_sigterm(run), run.bar:
        for batch in data.prefetch(fetched, device):
            run.losses.append(train_step(args, accelerator, run, encode(sources, batch, device), run.step))
            run.step += 1
            run.bar.update()
            reported = run.step % args.ckpt_interval == 0 or run.step == args.num_steps
            if reported:
                report(args, accelerator, run)
            if processes.asked_to_stop(accelerator, run):
                if not reported:
                    mean_loss(args, run)
                    save_state(args, accelerator, run)
                raise processes.end_of_sigterm(accelerator, run)
    accelerator.free_memory()  # or the optimizer would stay on the GPU
    return run.history


def main(argv: list[str] | None = None) -> dict:
    """Returns {"history": {name: [(step, value), ..]}, "table": {row: value}}."""
    args = parse(argv)
    check_args(args)
    accelerator = start_accelerator(args)
    with processes.naming_lost(accelerator, "the same command goes on from the last state."):
        return make_decoder(args, accelerator)


def make_decoder(args: argparse.Namespace, accelerator: Accelerator) -> dict:
    """The whole run; see `main`."""
    if args.graph and accelerator.device.type != "cuda":
        raise UserError("--graph needs an NVIDIA GPU: leave it out.")
    if args.graph and accelerator.num_processes > 1:
        raise UserError(f"--graph works in one process, not in {accelerator.num_processes}: leave it out.")
    if not Path(args.base).exists():
        with accelerator.main_process_first():
            frozen.unclip_configs(args.base)  # converts the released decoder's file, once
    clip = frozen.load_clip(args.cache_dir, accelerator.device)
    clip.washed_out = args.washed_out
    base = load_base(args, clip.emb_dim)
    args.prediction = base.scheduler.config.prediction_type
    pictures = load_pictures(args)
    sources = load_sources(args, accelerator, clip, base.vae, pictures)
    if sources.cached:
        clip = sources.networks["clip"] = None  # all that is needed of it is on disk
    history, folder = {}, run_folder(args) / "unclip"
    if args.num_steps:
        accelerator.init_trackers(args.model_name)
        history = learn(args, accelerator, base, sources, pictures)
    elif accelerator.is_main_process:
        folder = save_decoder(args, base.unet, base.vae, base.scheduler)
    accelerator.wait_for_everyone()
    base = None  # its memory is free for drawing
    gc.collect()
    rows = pictures.val[: args.num_eval]
    table = table9(args, accelerator, folder, sources, rows) if len(rows) > 1 else {}
    accelerator.end_training()
    return {"history": history, "table": table}


if __name__ == "__main__":
    run_main(main)
