"""From brain activity to pictures and captions: the trained model and the frozen networks on the test images (2.3-2.5).

Four passes over the test images, so that only one large network is in memory at a time:
    brain      1-3 single trials of an image -> MindEye2, outputs averaged -> brain tokens, retrieval tokens,
               blurry latents; brain tokens -> diffusion prior (20 steps) -> CLIP image tokens (S, D)
    captions   image tokens -> converter -> GIT -> a sentence
    recons     image tokens -> unCLIP decoder (UNet + VAE, 38 Euler steps) -> the reconstruction
    blurry     blurry latents -> Stable Diffusion's VAE -> the blurry reconstruction: right layout, no detail
Each batch of a pass is a file in evals/{model_name}/{model_name}_parts/ until all is done, so a killed run goes on
where it stopped, and any number of processes can share the work.

    in    train_logs/{model_name}/last.pth                          written by train.py, or the release's
          {data_path}/wds, betas, images (masks for --stimulate)    see data.py
          {cache_dir}/unclip, vae, git, bigG_to_L_epoch8.pth        the frozen networks, see frozen.py (and clip, for
                                                                    --n_samples)
    out   evals/{model_name}/{model_name}_all_recons.pt             (n, 3, H, W) float32 in [0, 1], H = 256 or smaller
                                         _all_blurryrecons.pt       (n, 3, H, W) float32 in [0, 1]
                                         _all_predcaptions.pt       (n,) numpy array of str
                                         _all_clipvoxels.pt         (n, S, D) float16, for retrieval
                                         _all_backbones.pt          (n, S, D) float16, before the prior
                                         _all_prior_out.pt          (n, S, D) float16, after it
                                         _grid.png                  the first pictures beside what was seen
Row i of each belongs to the i-th of the test images' row numbers, sorted ascending.

    python recon.py --model_name toy_1session_pretrained --data_path toy --scheduler dpm --steps 6 --guidance 1
    python recon.py --model_name final_subj01_pretrained_40sess_24bs --data_path DATA --subj 1    NSD, on one GPU
    accelerate launch --num_processes 8 recon.py ...                                              on eight
    python recon.py --model_name toy_allsessions_scratch --data_path toy --stimulate V1 V4 higher_vis     A.14
"""

import argparse
import json
import shutil
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import DPMSolverMultistepScheduler
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import frozen
import processes
from checkpoints import load_model as load_model_file
from checkpoints import reading
from data import (
    Images,
    data_folder,
    embed_images,
    load_region_masks,
    load_trials,
    load_voxels,
    num_voxels,
    prefetch,
    repeats,
    resized,
)
from files import replacing, save
from model import MindEye2, UserError, run_main

MAX_SIZE = 256  # pixels; larger pictures are saved at this size, as the original's are
GRID_COLUMNS = 12
DRAWS = 3  # pictures of each stimulus: what they have in common is the region's, the rest is chance


def parse(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("recon.py", description=__doc__.split("\n\n")[0], formatter_class=formatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model_name", default="testing", help="a name: folder of the checkpoint in --train_logs and of the output; "
        "one of the release's that is not there is downloaded")
    add("--tag", default="last", help="a name: which checkpoint of the model, TAG.pth; the paper's is last")
    add("--data_path", default=data_folder(), help="folder of the data; NSD's in the paper")
    add("--cache_dir", help="folder of the frozen networks; None = --data_path")
    add("--unclip", help="folder of the image decoder in diffusers' layout; None = CACHE_DIR/unclip, made from "
                         "CACHE_DIR/unclip6_epoch0_step110000.ckpt if that is there instead")
    add("--train_logs", default="train_logs", help="folder of the checkpoints")
    add("--evals", default="evals", help="folder of the output")
    add("--subj", type=int, default=1, help="number of the subject, 1 to 8 in NSD; 1, 2, 5 and 7 in the paper")
    add("--new_test", action=switch, default=True, help="the complete test set, the paper's; no = its first part")
    add("--blurry_recon", action=switch, default=True, help="also decode the low-level head; on in the paper")
    add("--captions", action=switch, default=True, help="also caption, by GIT; on in the paper")
    add("--hidden_dim", type=int, help="channels, 4096 in the paper; None = the checkpoint's, else it must agree")
    add("--n_blocks", type=int, help="residual blocks, 4 in the paper; None = the checkpoint's, else it must agree")
    add("--prior_steps", type=int, default=20, help="sampling steps of the prior, 2 to 100; 20 in the paper")
    add("--prior_sampler", choices=["ddim", "ddpm"], help="how the prior's steps are taken: ddim jumps; ddpm takes all "
        "100, each with noise; None = the paper's code: ddpm for all of them, ddim for fewer")
    add("--steps", type=int, default=38, help="denoising steps of the decoder; 38 in the paper's code. On the toy, 6 "
        "draw as well in a fifth of the time (PixCorr from true tokens .996 with both; from noisy ones .80 to .82)")
    add("--scheduler", default="euler", choices=["euler", "dpm"], help="solver of the decoder; the paper's is euler. "
        "dpm looks back one step; the same on the toy, for few steps with the released decoder")
    add("--guidance", type=float, default=5.0, help="guidance scale; 5 in the paper's code, 1 = off at half the cost: "
        "on the toy, 1 draws a brain's tokens better (PixCorr .59; with 7, .47)")
    add("--n_samples", type=int, default=1, help="pictures drawn of each image, of which the one nearest to the "
                                                 "brain's retrieval tokens in CLIP space is kept; 1 in the paper")
    add("--stimulate", nargs="+", metavar="REGION", help="instead of test images, draw what a pattern of 1 inside "
        f"REGION and 0 outside looks like (A.14), {DRAWS} times each; regions of the masks file, V1+V2 joins two")
    add("--batch_size", type=int, default=16, help="images at once, a process; 1 in the paper's code")
    add("--compile", action=switch, default=False, help="torch.compile of the networks' blocks on a GPU: pictures in "
        "three quarters of the time, after half a minute")
    add("--low_memory", action=switch, default=False, help="for a small GPU: MindEye2's weights in bfloat16, the "
        "two halves of guidance one after the other: at most 6.6 GiB instead of 12.3 (README.md)")
    add("--num_images", type=int, help="images, the first by row number; None = all (1000 in the paper)")
    add("--seed", type=int, default=42, help="a number, the seed of all noise; 42 in the paper's code")
    args = parser.parse_args(argv)
    least = {"prior_steps": 2, "steps": 1, "batch_size": 1, "num_images": 1, "n_samples": 1, "seed": 0}
    for name, low in least.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise UserError(f"--{name} must be at least {low}, not {getattr(args, name)}.")
    args.cache_dir = args.cache_dir or args.data_path
    args.unclip = args.unclip or str(Path(args.cache_dir) / "unclip")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# What to read: brains that saw the test images, or made-up ones

def seen_brains(args: argparse.Namespace) -> SimpleNamespace:
    """.voxels (trials, V); for each test image its .ids row number, its .positions among the trials, its .names; and
    .seen (k, 3, H, W), the first of them."""
    trials = load_trials(args.data_path, args.subj, "new_test" if args.new_test else "test")
    ids, positions = (part[: args.num_images] for part in repeats(trials))
    images = Images(args.data_path)
    images[ids[-1:]]  # read early: if the file is broken, or has too few pictures, say so before the work
    seen = images[ids[:GRID_COLUMNS]]
    return SimpleNamespace(voxels=load_voxels(args.data_path, trials), ids=ids, positions=positions, seen=seen,
                           names=[str(i) for i in ids])


def stimulated_brains(args: argparse.Namespace) -> SimpleNamespace:
    """The same for patterns that nobody had (A.14): voxels are 1 inside a region and 0, their mean, outside."""
    masks, rows = load_region_masks(args.data_path, args.subj, num_voxels(args.data_path, args.subj)), []
    for stimulus in args.stimulate:
        for region in stimulus.split("+"):
            if region not in masks:
                raise UserError(f"{args.data_path} has no region {region}: choose --stimulate from {', '.join(masks)}.")
        rows.append(np.any([masks[region] for region in stimulus.split("+")], axis=0))  # (V,)
    count = len(rows)
    return SimpleNamespace(voxels=torch.from_numpy(np.array(rows, np.float32)), ids=np.arange(DRAWS * count), seen=None,
                           positions=[np.array([i % count]) for i in range(DRAWS * count)], names=args.stimulate)


# ---------------------------------------------------------------------------------------------------------------------
# Pass 1: voxels -> tokens

def checkpoint_file(args: argparse.Namespace) -> Path:
    return Path(args.train_logs) / args.model_name / f"{args.tag}.pth"


def fetch_released(args: argparse.Namespace, state: PartialState) -> None:
    """Download the checkpoint if it is one of the release's and not here. Raises UserError if it is neither."""
    path = checkpoint_file(args)
    with state.main_process_first():
        if args.tag == "last" and not path.exists() and not path.with_suffix("").exists():
            import hub  # here: most runs need no hub
            hub.fetch_model(args.model_name, args.train_logs)


def load_model(args: argparse.Namespace, voxels: int) -> tuple[MindEye2, int]:
    """The trained model, and which of its ridge layers is for a brain of so many voxels. Raises UserError."""
    path = checkpoint_file(args)
    model, config = load_model_file(path)
    for name in ("hidden_dim", "n_blocks"):
        if getattr(args, name) not in (None, config[name]):
            raise UserError(f"{path} has {name} {config[name]}, not {getattr(args, name)}: leave out --{name}.")
    if not config["use_prior"]:
        raise UserError(f"{path} has no diffusion prior to make image tokens: train it with --use_prior.")
    if args.blurry_recon and not config["blurry_recon"]:
        raise UserError(f"{path} has no low-level head: pass --no-blurry_recon.")
    if args.prior_steps > config["prior_timesteps"]:
        raise UserError(f"{path} has a prior of {config['prior_timesteps']} steps: lower --prior_steps.")
    if args.prior_sampler == "ddpm" and args.prior_steps < config["prior_timesteps"]:
        raise UserError(f"--prior_sampler=ddpm takes all {config['prior_timesteps']} steps of {path}: pass as many by "
                        "--prior_steps, or --prior_sampler=ddim.")  # fmt: skip
    fitting = [i for i, count in enumerate(config["num_voxels"]) if count == voxels]
    if len(fitting) != 1:  # none of them learned this brain, or we cannot tell which
        counts = ", ".join(map(str, config["num_voxels"]))
        raise UserError(f"{path} reads brains of {counts} voxels, of which exactly one must be subject {args.subj}'s "
                        f"{voxels}: pass another --subj or --model_name.")  # fmt: skip
    return model.eval().requires_grad_(False), fitting[0]


def halve(model: MindEye2) -> MindEye2:
    """Its matrices in bfloat16. Not its vectors: the rotary frequencies and noise levels would be off by far."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.bfloat16()
    return model


def ready(model: MindEye2, args: argparse.Namespace, device: torch.device) -> MindEye2:
    """The model on the device; on a GPU its prior, which is called 19 times, as a CUDA graph."""
    model = (halve(model) if args.low_memory else model).to(device)
    if device.type == "cuda":
        if args.compile:
            model.compile_blocks()
        model.diffusion_prior.net.forward = frozen.record(model.diffusion_prior.net.forward)
    return model


def batch_noise(images: np.ndarray, seed: int, shapes: list[tuple[int, ...]], stream: int, device) -> list[Tensor]:
    """Random numbers for B pictures: a tensor (B, ..) for each of `shapes`.

    stream 0 is the prior's, 1.. the decoder's, refine.STREAM the refiner's.

    The numbers depend on seed and image only, not on the batch, the processes or the pictures before. (The original
    seeds once, so its picture i changes with all that was drawn earlier.) Each image's are drawn by a thread.
    """
    pin = torch.cuda.is_initialized()
    batch = [torch.empty(len(images), *shape, device="cpu", pin_memory=pin) for shape in shapes]

    def draw(i: int) -> None:
        mixed = np.random.SeedSequence([seed, int(images[i]), stream]).generate_state(1)
        generator = torch.Generator().manual_seed(int(mixed[0]))  # torch looks at 32 bits of a seed
        for part in batch:
            torch.randn(part[i].shape, generator=generator, out=part[i])
    with ThreadPoolExecutor() as pool:
        list(pool.map(draw, range(len(images))))
    return [part.to(device, non_blocking=True) for part in batch]


def prior_noise(tokens: tuple[int, int], brains: SimpleNamespace, rows: slice,
                args: argparse.Namespace) -> list[Tensor]:
    """Where the prior starts (B, S, D), and what it adds at each step (B, steps, S, D), on the CPU.

    9 million numbers an image, more than half of the pass's time if the GPU waited for them: see `run_pass`.
    """
    return batch_noise(brains.ids[rows], args.seed, [tokens, (args.prior_steps, *tokens)], 0, "cpu")


@torch.no_grad()
def read_brains(model: MindEye2, ridge: int, brains: SimpleNamespace, rows: slice, args: argparse.Namespace,
                start: Tensor, steps: Tensor) -> dict:
    """Pass 1 for a batch of B images: backbones, clipvoxels, prior_out (B, S, D), blurry_latents (B, 4, L, L).

    start and steps are `prior_noise`'s.
    """
    device = next(model.parameters()).device
    start, steps = start.to(device, non_blocking=True), steps.to(device, non_blocking=True)
    half = device.type == "cuda" or model.ridge.linears[0].weight.dtype == torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        brain = embed_images(model, brains.voxels, brains.positions[rows], ridge)
        prior_out = model.diffusion_prior.sample(  # DDIM leaves two of the steps' draws unused
            brain["backbone"].to(device), args.prior_steps, start, steps.transpose(0, 1), method=args.prior_sampler)
    out = {"backbones": brain["backbone"].half(), "clipvoxels": brain["clip_voxels"].half(), "prior_out": prior_out}
    return out | ({"blurry_latents": brain["blurry_latents"]} if args.blurry_recon else {})


# ---------------------------------------------------------------------------------------------------------------------
# Pass 3: tokens -> pictures

def noise_levels(scheduler, steps: int) -> tuple[Tensor, Tensor]:
    """The original's timesteps (steps,), 999, 972, .., 26 for 38, and their sigmas (steps + 1,), 14.6 .. 0.16, 0.

    No timestep_spacing of diffusers' Euler scheduler gives these levels; so they, and the loop below, are written out.
    """
    count = scheduler.config.num_train_timesteps
    timesteps = torch.from_numpy(np.linspace(count - 1, 0, steps, endpoint=False).astype(int))
    return timesteps, F.pad(frozen.training_sigmas(scheduler)[timesteps], (0, 1))


def euler(predict: Callable, x: Tensor, scheduler, steps: int, skip: int = 0) -> Tensor:
    """Denoise x (B, 4, L, L), of variance 1, in `steps` straight steps along dx / dsigma = noise (Karras et al. 2022).

    predict(x of variance 1, t) is what the UNet was trained to tell, as the scheduler's config names it: the noise
    (epsilon), or the velocity. The first `skip` steps, the noisiest, are left out: x is then a picture under the noise
    that they would have left (refine.py).
    """
    timesteps, sigmas = (levels[skip:] for levels in noise_levels(scheduler, steps))
    x = x * (sigmas[0] ** 2 + 1).sqrt()
    for t, sigma, following in zip(timesteps.to(x.device), sigmas[:-1], sigmas[1:], strict=True):
        scaled = x / (sigma**2 + 1).sqrt()
        noise = predict(scaled, t)
        if scheduler.config.prediction_type == "v_prediction":
            noise = (noise + sigma * scaled) / (sigma**2 + 1).sqrt()
        x = x + (following - sigma) * noise
    return x


def dpm(predict: Callable, x: Tensor, scheduler, steps: int) -> Tensor:
    """The same by DPM-Solver++ (Lu et al. 2022), of second order: it looks back one step, so a few steps do."""
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    solver.set_timesteps(steps, device=x.device)
    for t in solver.timesteps:
        x = solver.step(predict(x, t), t, x).prev_sample
    return x


def guided(run_unet: Callable, told: object, blind: object, both: object, guidance: float,
           one_by_one: bool) -> Callable:
    """predict(x, t) for a sampler: away from run_unet(x, t, blind), towards run_unet(x, t, told).

    both is blind and told joined into one batch; one_by_one evaluates the two in turn instead: half the memory.
    """
    def predict(x: Tensor, t: Tensor) -> Tensor:
        """(B, 4, L, L) -> (B, 4, L, L)."""
        if guidance == 1:
            return run_unet(x, t, told)
        if one_by_one:
            away, towards = run_unet(x, t, blind), run_unet(x, t, told)
        else:
            away, towards = run_unet(torch.cat((x, x)), t, both).chunk(2)
        return away + guidance * (towards - away)
    return predict


@torch.no_grad()
def draw(
    unclip: SimpleNamespace, tokens: Tensor, start: Tensor, unconditional: Tensor | None = None,
    steps: int = 38, guidance: float = 5.0, scheduler: str = "euler", one_by_one: bool = False,
) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] of image tokens (B, S, D), by the unCLIP decoder of `load_unclip` (2.4).

    start (B, 4, L, L) of variance 1 is where each picture starts, H = 8 L. unconditional (B, S, D): random tokens,
    needed if guidance is not 1. one_by_one evaluates the two halves of guidance in turn: half the memory.
    """
    unet, vae = unclip.unet, unclip.vae
    size = start.shape[-1] * 2 ** (len(vae.config.block_out_channels) - 1)
    vector = frozen.unclip_vector(unet.config.projection_class_embeddings_input_dim, size)       # (1, 1024)
    vector, tokens = vector.to(start.device, unet.dtype), tokens.to(unet.dtype)
    # Guidance compares with no prompt, but the UNet was never trained without one: there is no empty prompt. Random
    # tokens stand for "any picture", drawn once and kept for all steps.
    blind_tokens = None if guidance == 1 else unconditional.to(unet.dtype)
    both = None if guidance == 1 or one_by_one else torch.cat((blind_tokens, tokens))            # (2 B, S, D)

    def run_unet(x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        return unet(x.to(unet.dtype), t, prompt, class_labels=vector.expand(len(x), -1)).sample.float()

    predict = guided(run_unet, tokens, blind_tokens, both, guidance, one_by_one)
    x = (euler if scheduler == "euler" else dpm)(predict, start, unclip.scheduler, steps)        # (B, 4, L, L)
    pixels = vae.decode((x / vae.config.scaling_factor).to(vae.dtype)).sample.float()            # (B, 3, 8 L, 8 L)
    # Scale and shift are .5 for a decoder that draws in [-1, 1]. The released one has .8 and .2, found by hand: its
    # prompts here are tokens of washed-out pictures (frozen.clip_preprocess), in its training they were of plain ones.
    return (pixels * unclip.output_scale + unclip.output_shift).clamp(0, 1)


def start_latents(z: Tensor, noise: Tensor, offset: Tensor, sigma: float) -> Tensor:
    """Where the original's sampler starts, scaled to variance 1: z, noise (B, 4, L, L) and offset (B,), all N(0, 1).

    Its code is for changing pictures, z being the picture; to draw a new one it passes noise for z as well. `offset`
    shifts all of a picture, as in the decoder's training ("offset noise": else no picture is ever very dark).
    """
    noise = noise + 0.04 * offset[:, None, None, None]
    return (z + sigma * noise) / (1 + sigma**2) ** 0.5  # (B, 4, L, L)


def check_decoder(args: argparse.Namespace, token_dim: int) -> None:
    """Mistakes that loading or drawing would only find after the first pass. Raises UserError."""
    config, scheduler = frozen.unclip_configs(args.unclip)
    with reading(Path(args.unclip), "--cache_dir or --unclip"):
        wanted, trained = config["cross_attention_dim"], scheduler["num_train_timesteps"]
    if wanted != token_dim:
        raise UserError(f"{args.unclip} needs tokens of {wanted} channels, ours have {token_dim}: name another "
                        "--unclip.")
    if args.steps >= trained:
        raise UserError(f"--steps must be below {trained}, the number of noise levels that {args.unclip} knows.")


def load_decoder(args: argparse.Namespace, device: torch.device) -> SimpleNamespace:
    """The unCLIP decoder, and as its .clip the judge of --n_samples (None for one)."""
    # bfloat16 halves the UNet's 10 GB, and moves what the toy's VAE draws by .2 of 255 levels in the mean.
    unclip = frozen.load_unclip(args.unclip, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    unclip.vae.enable_slicing()  # one picture at a time: at 768 pixels each needs gigabytes
    frozen.speed_up(unclip.unet, unclip.vae, compiled=args.compile)
    half = torch.float16 if device.type == "cuda" else torch.float32
    unclip.clip = frozen.load_clip(args.cache_dir, device, half) if args.n_samples > 1 else None
    return unclip


@torch.no_grad()
def draw_recons(unclip: SimpleNamespace, brains: SimpleNamespace, rows: slice, args: argparse.Namespace,
                brain: dict) -> dict:
    """Pass 3 for a batch of B images: recons (B, 3, H, W), the best of --n_samples.

    "Best" is what MindEye1 called second-order selection: the brain's retrieval tokens, which saw no prior, pick the
    picture whose CLIP tokens are nearest to them.
    """
    device, side = unclip.unet.device, unclip.unet.config.sample_size
    tokens, latent = brain["prior_out"].to(device), (unclip.unet.config.in_channels, side, side)
    sigma = noise_levels(unclip.scheduler, 1)[1][0].item()
    candidates, scores = [], []
    for sample in range(args.n_samples):
        shapes = [latent, tuple(tokens.shape[1:]), latent, ()]  # in the original's order
        z, unconditional, noise, offset = batch_noise(brains.ids[rows], args.seed, shapes, 1 + sample, device)
        start = start_latents(z, noise, offset, sigma)
        pictures = draw(unclip, tokens, start, unconditional, args.steps, args.guidance, args.scheduler,
                        args.low_memory)
        candidates.append(resized(pictures, min(pictures.shape[-1], MAX_SIZE)).cpu())
        if unclip.clip is not None:
            drawn = unclip.clip.tokens(pictures).flatten(1).float().cpu()  # (B, S * D)
            scores.append(F.cosine_similarity(brain["clipvoxels"].flatten(1).float(), drawn))  # (B,)
    if not scores:
        return {"recons": candidates[0]}
    best = torch.stack(scores).argmax(0)  # (B,)
    return {"recons": torch.stack(candidates)[best, torch.arange(len(best))]}


# ---------------------------------------------------------------------------------------------------------------------
# Passes in batches, each a file until all is done

def open_parts(folder: Path, args: argparse.Namespace, state: PartialState, files: list[Path]) -> None:
    """Make the folder of finished batches; those of a run with other flags or other input files are thrown away."""
    if state.is_main_process:
        stamp = [(file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists()]
        run = json.dumps(vars(args) | {"files": stamp}, default=str, indent=1)
        note = folder / "run.json"
        if folder.exists() and not (note.exists() and note.read_bytes() == run.encode()):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(note) as temporary:
            temporary.write_text(run)
    state.wait_for_everyone()


def read_part(path: Path) -> dict[str, Tensor | list[str]]:
    """A finished batch. Mapped into memory, for a pass reads one of the brain's four tensors. Raises UserError."""
    with reading(path, f"--evals, or delete {path.parent} and run again"):
        return torch.load(path, weights_only=True, mmap=True)


def run_pass(name: str, folder: Path, batches: list[slice], state: PartialState, load: Callable, work: Callable,
             first: str = "brain", prepare: Callable = lambda rows: ()):
    """work(network, rows, found, *prepare(rows)) -> {output: values}, for all batches; the processes take turns.

    found is what the pass `first` saved of these rows; None in that pass itself. For a GPU, prepare runs ahead.
    """
    todo = [i for i in range(state.process_index, len(batches), state.num_processes)
            if not (folder / f"{name}_{i:05d}.pt").exists()]
    network = load() if todo else None
    done = sum(rows.stop - rows.start for rows in batches[state.process_index :: state.num_processes])
    left = sum(batches[i].stop - batches[i].start for i in todo)
    with tqdm(total=done, initial=done - left, desc=name, unit="image", disable=not state.is_main_process) as bar:
        prepared = prefetch((prepare(batches[i]) for i in todo), state.device)
        for i, made in zip(todo, prepared, strict=True):
            found = None if name == first else read_part(folder / f"{first}_{i:05d}.pt")
            out = work(network, batches[i], found, *made)
            save(folder / f"{name}_{i:05d}.pt", {k: v.cpu() if isinstance(v, Tensor) else v for k, v in out.items()})
            bar.update(batches[i].stop - batches[i].start)
    del network
    frozen.free_memory()
    state.wait_for_everyone()


def collect(folder: Path, names: list[str], count: int) -> dict[str, Tensor | np.ndarray]:
    """All batches of all passes, in order: {output: (n, ..)}."""
    arrays = {}
    for name in names:
        parts = [read_part(folder / f"{name}_{i:05d}.pt") for i in range(count)]
        for key in parts[0]:
            if isinstance(parts[0][key], Tensor):
                arrays[key] = torch.cat([part[key] for part in parts])
            else:
                arrays[key] = np.array([text for part in parts for text in part[key]])
    return arrays


# ---------------------------------------------------------------------------------------------------------------------
# Output

def save_grid(path: Path, rows: list[tuple[str, Tensor, list[str]]], titles: list[str]) -> None:
    """One picture file: a row of pictures (columns, 3, H, H) with its label and, under each, a text ("" = none)."""
    columns, captions = len(titles), [0.5 if any(texts) else 0 for _, _, texts in rows]
    height = 0.2 + len(rows) + sum(captions)  # in pictures, as all lengths here
    figure = Figure(figsize=(1.3 * (columns + 1), 1.3 * height), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1), frame_on=False)
    for i, title in enumerate(titles):
        axes.text(i + 0.5, 0.1, title, fontsize=8, ha="center", va="center", parse_math=False)
    top = 0.2
    for (label, pictures, texts), caption in zip(rows, captions, strict=True):
        pictures = resized(pictures, min(256, 4 * pictures.shape[-1]))
        gap = pictures.shape[-1] // 50
        strip = F.pad(pictures, (0, gap), value=1.0).permute(2, 0, 3, 1).flatten(1, 2)  # (H, columns * (H + gap), 3)
        axes.imshow(strip.numpy(), extent=(0, columns, top + 0.98, top), aspect="auto")
        axes.text(-0.06, top + 0.5, label, fontsize=10, ha="right", va="center")
        for i, text in enumerate(texts):
            axes.text(i + 0.5, top + 1.0, textwrap.fill(text, 20), fontsize=6.5, ha="center", va="top",
                      parse_math=False)  # a caption may hold a $
        top += 1 + caption
    axes.set(xlim=(-1, columns), ylim=(height, 0), xticks=[], yticks=[])
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def write(prefix: str, arrays: dict, brains: SimpleNamespace) -> None:
    """All files of the run; what an earlier run left and this one does not make would be taken for this one's."""
    for name in ("blurryrecons", "predcaptions"):
        if name not in arrays:
            Path(f"{prefix}_all_{name}.pt").unlink(missing_ok=True)
    refined = Path(f"{prefix}_all_enhancedrecons.pt")
    if refined.exists():  # of earlier pictures: refine.py's, or the release's, gigabytes to fetch again
        refined.replace(refined.with_suffix(".old.pt"))
    for name, array in arrays.items():
        save(Path(f"{prefix}_all_{name}.pt"), array)
    captions = list(arrays.get("predcaptions", [""] * len(brains.ids)))
    if brains.seen is None:  # stimuli: a column each, the draws below each other
        count = len(brains.names)
        rows = [(f"draw {k + 1}", arrays["recons"][k * count : (k + 1) * count], captions[k * count : (k + 1) * count])
                for k in range(DRAWS)]
        save_grid(Path(f"{prefix}_grid.png"), rows, brains.names)
    else:
        count = len(brains.seen)
        rows = [("seen", brains.seen, [""] * count), ("reconstructed", arrays["recons"][:count], captions[:count])]
        if "blurryrecons" in arrays:
            rows.insert(1, ("blurry", arrays["blurryrecons"][:count], [""] * count))
        save_grid(Path(f"{prefix}_grid.png"), rows, brains.names[:count])
    print(f"wrote {prefix}_all_{{{','.join(arrays)}}}.pt and {prefix}_grid.png")


def main(argv: list[str] | None = None) -> dict[str, Tensor]:
    """Returns {image_ids (n,), and what was written: recons, ..}; {} on processes other than the first."""
    args, state = parse(argv), processes.start()
    with processes.naming_lost(state, "the same command goes on where they were."):
        return reconstruct(args, state)


def reconstruct(args: argparse.Namespace, state: PartialState) -> dict[str, Tensor]:
    """All passes; see `main`."""
    device = state.device
    brains = stimulated_brains(args) if args.stimulate else seen_brains(args)
    fetch_released(args, state)
    model, ridge = load_model(args, num_voxels(args.data_path, args.subj))
    tokens = model.backbone.token_shape
    if state.is_local_main_process:  # may convert the released decoder: once
        check_decoder(args, tokens[1])
    frozen.check_files(args.cache_dir, vae=args.blurry_recon, captioner=args.captions)
    prefix = str(Path(args.evals) / args.model_name / args.model_name) + ("_stimuli" if args.stimulate else "")
    folder = Path(f"{prefix}_parts")
    checkpoint = checkpoint_file(args)  # a file, or DeepSpeed's folder
    inputs = [checkpoint, *sorted(checkpoint.with_suffix("").glob("*")), *sorted(Path(args.unclip).rglob("*"))]
    open_parts(folder, args, state, inputs)
    count = len(brains.ids)
    batches = [slice(first, min(first + args.batch_size, count)) for first in range(0, count, args.batch_size)]

    run_pass("brain", folder, batches, state, lambda: ready(model, args, device),
             lambda net, rows, _, *noise: read_brains(net, ridge, brains, rows, args, *noise),
             prepare=lambda rows: prior_noise(tokens, brains, rows, args))
    model, names = None, ["brain", "recons"]
    frozen.free_memory()
    if args.captions:
        run_pass("captions", folder, batches, state, lambda: frozen.load_captioner(args.cache_dir, device),
                 lambda git, rows, brain: {"predcaptions": git.caption(brain["prior_out"].to(device))})
        names.append("captions")
    run_pass("recons", folder, batches, state, lambda: load_decoder(args, device),
             lambda unclip, rows, brain: draw_recons(unclip, brains, rows, args, brain))
    if args.blurry_recon:
        def decode_blurry(vae, rows, brain) -> dict:
            pictures = frozen.decode_latents(vae, brain["blurry_latents"].to(device))
            return {"blurryrecons": resized(pictures, min(pictures.shape[-1], MAX_SIZE))}
        run_pass("blurry", folder, batches, state, lambda: frozen.load_vae(args.cache_dir, device), decode_blurry)
        names.append("blurry")
    if not state.is_main_process:
        return {}
    arrays = collect(folder, names, len(batches))
    arrays["prior_out"] = arrays["prior_out"].half()
    arrays.pop("blurry_latents", None)
    write(prefix, arrays, brains)
    shutil.rmtree(folder)
    return {"image_ids": torch.from_numpy(brains.ids)} | arrays


if __name__ == "__main__":
    run_main(main)
