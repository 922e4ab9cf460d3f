"""From brain activity to pictures: the trained model and the frozen decoder on the test images (paper 2.2, 2.4).

For each test image:
    its 1-3 single trials -> MindEye2, outputs averaged -> brain tokens, retrieval tokens, blurry latents
    brain tokens  -> diffusion prior (20 steps)         -> CLIP image tokens (S, D)
    image tokens  -> unCLIP decoder (UNet + VAE)        -> the reconstruction
    blurry latents -> Stable Diffusion's VAE            -> the blurry reconstruction: right layout, no detail

    in    train_logs/{model_name}/last.pth                          written by train.py
          {data_path}/wds, betas, images                            see data.py
          {cache_dir}/unclip/{unet,vae,scheduler}, {cache_dir}/vae  the frozen networks, see model.py
    out   evals/{model_name}/{model_name}_all_recons.pt         (n, 3, H, W) float32 in [0, 1], H = 256 or smaller
          evals/{model_name}/{model_name}_all_blurryrecons.pt   (n, 3, H, W) float32 in [0, 1]
          evals/{model_name}/{model_name}_all_clipvoxels.pt     (n, S, D) float16, for retrieval
          evals/{model_name}/{model_name}_grid.png              the first pictures beside what was seen
Row i of each belongs to the i-th of the test images' row numbers, sorted ascending.

    python recon.py --model_name testing --data_path toy --scheduler dpm --steps 6 --guidance 1     the toy, on a CPU
    python recon.py --model_name final_subj01 --data_path DATA --subj 1                             NSD, on one GPU
    accelerate launch --num_processes 8 recon.py ...                                                on eight
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from data import Images, average_repeats, load_trials, load_voxels, num_voxels, repeats, replacing
from model import MindEye2, UserError, config_from_state_dict, decode_latents, load_checkpoint, run_main

from model import load_unclip, load_vae, unclip_vector  # isort: skip

MAX_SIZE = 256  # pixels; larger pictures are saved at this size, as the original's are
GRID_COLUMNS = 16


def parse(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("recon.py", description=__doc__.split("\n\n")[0], formatter_class=formatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model_name", default="testing", help="a name: folder of the checkpoint in --train_logs and of the output")
    add("--tag", default="last", help="a name: which checkpoint of the model, TAG.pth; the paper's is last")
    add("--data_path", default="toy", help="folder of the data; NSD's in the paper")
    add("--cache_dir", help="folder of the frozen networks; None = --data_path")
    add("--unclip", help="folder of the image decoder in diffusers' layout; None = CACHE_DIR/unclip")
    add("--train_logs", default="train_logs", help="folder of the checkpoints")
    add("--evals", default="evals", help="folder of the output")
    add("--subj", type=int, default=1, choices=range(1, 9), help="number of the subject; 1, 2, 5 and 7 in the paper")
    add("--new_test", action=switch, default=True, help="the complete test set, the paper's; no = its first part")
    add("--blurry_recon", action=switch, default=True, help="also decode the low-level head; on in the paper")
    add("--hidden_dim", type=int, help="channels, 4096 in the paper; None = the checkpoint's, else it must agree")
    add("--n_blocks", type=int, help="residual blocks, 4 in the paper; None = the checkpoint's, else it must agree")
    add("--prior_steps", type=int, default=20, help="sampling steps of the prior, 2 to 100; 20 in the paper")
    add("--steps", type=int, default=38, help="denoising steps of the decoder; 38 in the paper's code")
    add("--scheduler", default="euler", choices=["euler", "dpm"], help="solver of the decoder; the paper's is euler")
    add("--guidance", type=float, default=5.0, help="guidance scale; 5 in the paper's code, 1 = off at half the cost")
    add("--batch_size", type=int, default=16, help="images at once, a process; 1 in the paper's code")
    add("--num_images", type=int, help="images, the first by row number; None = all (1000 in the paper)")
    add("--seed", type=int, default=42, help="a number, the seed of all noise; 42 in the paper's code")
    args = parser.parse_args(argv)
    for name, least in {"prior_steps": 2, "steps": 1, "batch_size": 1, "num_images": 1, "seed": 0}.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, not {getattr(args, name)}.")
    args.cache_dir = args.cache_dir or args.data_path
    args.unclip = args.unclip or Path(args.cache_dir) / "unclip"
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Loading

def load_model(args: argparse.Namespace, voxels: int) -> tuple[MindEye2, int]:
    """The trained model, and which of its ridge layers is for a brain of so many voxels. Raises UserError."""
    path = Path(args.train_logs) / args.model_name / f"{args.tag}.pth"
    checkpoint = load_checkpoint(path)
    state = checkpoint["model_state_dict"]
    config = config_from_state_dict(state) | checkpoint.get("config", {})
    for name in ("hidden_dim", "n_blocks"):
        if getattr(args, name) not in (None, config[name]):
            raise UserError(f"{path} has {name} {config[name]}, not {getattr(args, name)}: leave out --{name}.")
    if not config["use_prior"]:
        raise UserError(f"{path} has no diffusion prior to make image tokens: train it with --use_prior.")
    if args.blurry_recon and not config["blurry_recon"]:
        raise UserError(f"{path} has no low-level head: pass --no-blurry_recon.")
    if args.prior_steps > config["prior_timesteps"]:
        raise UserError(f"{path} has a prior of {config['prior_timesteps']} steps: lower --prior_steps.")
    fitting = [i for i, count in enumerate(config["num_voxels"]) if count == voxels]
    if len(fitting) != 1:  # none of them learned this brain, or we cannot tell which
        counts = ", ".join(map(str, config["num_voxels"]))
        raise UserError(f"{path} reads brains of {counts} voxels, of which exactly one must be subject {args.subj}'s "
                        f"{voxels}: pass another --subj or --model_name.")  # fmt: skip
    with torch.device("meta"):  # 2 billion initial values, soon overwritten, would take half a minute
        model = MindEye2(**config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} is not a whole MindEye2 model ({reason}): name another --model_name.") from None
    return model.eval().requires_grad_(False), fitting[0]


def load_decoders(args: argparse.Namespace, model: MindEye2, device: torch.device) -> SimpleNamespace:
    """The unCLIP decoder, and as its .blurry_vae the VAE of the blurry latents (None if not wanted)."""
    # bfloat16 halves the UNet's 10 GB. Its 8 bits would show as bands in a picture, so the VAE stays in float32.
    unclip = load_unclip(args.unclip, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    unclip.vae.float().enable_slicing()  # one picture at a time: at 768 pixels each needs gigabytes
    wanted, given = unclip.unet.config.cross_attention_dim, model.backbone.token_shape[1]
    if wanted != given:
        raise UserError(f"{args.unclip} needs tokens of {wanted} channels, ours have {given}: name another --unclip.")
    if args.steps >= (trained := unclip.scheduler.config.num_train_timesteps):
        raise UserError(f"--steps must be below {trained}, the number of noise levels that {args.unclip} knows.")
    unclip.blurry_vae = load_vae(args.cache_dir, device) if args.blurry_recon else None
    return unclip


# ---------------------------------------------------------------------------------------------------------------------
# One batch of images

def embed_images(model: MindEye2, voxels: Tensor, positions: list[np.ndarray], ridge: int) -> dict[str, Tensor]:
    """Brain outputs of images: voxels (trials, V), and for each of B images the rows of its repetitions.

    Returns backbone (B, S, D), clip_voxels (B, S, D), blurry_latents (B, 4, L, L). Not the voxels are averaged but
    the outputs (A.2): the model was trained on single trials and never saw the weaker noise of an average.
    """
    rows = np.concatenate(positions)
    groups = np.split(np.arange(len(rows)), np.cumsum([len(p) for p in positions])[:-1])
    device = next(model.parameters()).device
    out = model.embed(voxels[torch.from_numpy(rows)].to(device), ridge)
    return {name: average_repeats(x.float(), groups) for name, x in vars(out).items() if x is not None}


def draw_noise(image: int, args: argparse.Namespace, tokens: tuple[int, int], latent: tuple[int, ...]) -> list[Tensor]:
    """All random numbers of one picture: latent (4, L, L), unconditional (S, D), prior's start (S, D) and its steps.

    They depend on the seed and the image only, not on the batch, the processes or the pictures before. (The original
    seeds once, so its picture i changes with all that was drawn earlier.)
    """
    generator = torch.Generator().manual_seed(1_000_000 * args.seed + int(image))
    return [torch.randn(shape, generator=generator) for shape in (latent, tokens, tokens, (args.prior_steps, *tokens))]


def make_schedule(saved, name: str, steps: int, device: torch.device | str):
    """The noise levels and the solver; `saved` is the decoder's own scheduler and knows what its UNet predicts."""
    if name == "dpm":  # second order: a few steps do
        schedule = DPMSolverMultistepScheduler.from_config(saved.config, timestep_spacing="trailing")
        schedule.set_timesteps(steps, device=device)
        return schedule
    # No timestep_spacing of diffusers gives the original's levels (999, 972, 946, ..., 26 for 38), so they are named.
    # "leading" only decides how large the first noise is: sqrt(1 + sigma^2), again as in the original.
    schedule = EulerDiscreteScheduler.from_config(saved.config, timestep_spacing="leading")
    last = saved.config.num_train_timesteps - 1
    schedule.set_timesteps(timesteps=np.linspace(last, 0, steps, endpoint=False).astype(int).tolist(), device=device)
    return schedule


@torch.no_grad()
def draw(
    unclip: SimpleNamespace, tokens: Tensor, noise: Tensor, unconditional: Tensor | None = None,
    steps: int = 38, guidance: float = 5.0, scheduler: str = "euler",
) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] of image tokens (B, S, D), by the unCLIP decoder of `load_unclip` (2.4).

    noise (B, 4, L, L) of variance 1 is where each picture starts, H = 8 L. unconditional (B, S, D): random tokens,
    needed if guidance is not 1.
    """
    unet, vae = unclip.unet, unclip.vae
    schedule = make_schedule(unclip.scheduler, scheduler, steps, noise.device)
    guided = guidance != 1
    # Guidance wants to know what the UNet draws without a prompt, but it was never trained without one: there is no
    # empty prompt. Random tokens stand for "any picture", drawn once and kept for all steps.
    prompt = (torch.cat((unconditional, tokens)) if guided else tokens).to(unet.dtype)           # (2B, S, D)
    size = noise.shape[-1] * 2 ** (len(vae.config.block_out_channels) - 1)
    vector = unclip_vector(unet.config.projection_class_embeddings_input_dim, size).to(prompt)   # (1, 1024)
    vector = vector.expand(len(prompt), -1)                                                      # (2B, 1024)
    x = noise * schedule.init_noise_sigma                                                        # (B, 4, L, L)
    for t in schedule.timesteps:
        seen = schedule.scale_model_input(x, t)                                                  # variance 1 again
        seen = torch.cat((seen, seen)) if guided else seen                                       # (2B, 4, L, L)
        prediction = unet(seen.to(unet.dtype), t, prompt, class_labels=vector).sample.float()    # (2B, 4, L, L)
        if guided:
            blind, told = prediction.chunk(2)
            prediction = blind + guidance * (told - blind)                                       # (B, 4, L, L)
        x = schedule.step(prediction, t, x).prev_sample                                          # (B, 4, L, L)
    pixels = vae.decode(x / vae.config.scaling_factor).sample                                    # (B, 3, 8 L, 8 L)
    # Scale and shift are .5 for a decoder that draws in [-1, 1]. The released one has .8 and .2, found by hand: its
    # prompts here are tokens of washed-out pictures (model.clip_preprocess), in its training they were of plain ones.
    return (pixels * unclip.output_scale + unclip.output_shift).clamp(0, 1)


def resized(pictures: Tensor, size: int) -> Tensor:
    """(B, 3, H, H) -> (B, 3, size, size); without antialiasing, as the torchvision of the paper's code had it."""
    return F.interpolate(pictures, (size, size), mode="bilinear", align_corners=False, antialias=False)


@torch.no_grad()
def reconstruct(
    model: MindEye2, ridge: int, unclip: SimpleNamespace, voxels: Tensor, images: np.ndarray,
    positions: list[np.ndarray], args: argparse.Namespace,
) -> dict[str, Tensor]:
    """The output of a batch of B images, on the CPU: recons, blurryrecons (B, 3, H, W), clipvoxels (B, S, D)."""
    device, side = next(model.parameters()).device, unclip.unet.config.sample_size
    latent = (unclip.unet.config.in_channels, side, side)
    noise = zip(*(draw_noise(image, args, model.backbone.token_shape, latent) for image in images), strict=True)
    start, unconditional, prior_start, prior_steps = (torch.stack(part).to(device) for part in noise)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        brain = embed_images(model, voxels, positions, ridge)
        prior_steps = prior_steps.transpose(0, 1)  # (steps, B, S, D), of which DDIM leaves two unused
        tokens = model.diffusion_prior.sample(brain["backbone"], args.prior_steps, prior_start, prior_steps)
    pictures = draw(unclip, tokens, start, unconditional, args.steps, args.guidance, args.scheduler)
    size = min(pictures.shape[-1], MAX_SIZE)
    out = {"recons": resized(pictures, size)}
    if unclip.blurry_vae is not None:
        out["blurryrecons"] = resized(decode_latents(unclip.blurry_vae, brain["blurry_latents"]), size)
    return {name: x.cpu() for name, x in out.items()} | {"clipvoxels": brain["clip_voxels"].half().cpu()}


# ---------------------------------------------------------------------------------------------------------------------
# Output

def save(path: Path, value: object) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(value, file)


def gather(batches: list[dict[str, Tensor]], prefix: str, state: PartialState) -> list[dict[str, Tensor]]:
    """On process 0: the batches of all processes, in order, through files (a GPU might not hold them all at once)."""
    if state.num_processes == 1:
        return batches
    parts = [Path(f"{prefix}_part{rank}.pt") for rank in range(state.num_processes)]
    save(parts[state.process_index], batches)
    state.wait_for_everyone()
    batches = []
    for part in parts if state.is_main_process else ():
        batches += torch.load(part, weights_only=True)
        part.unlink()
    return batches


def save_grid(path: Path, rows: dict[str, Tensor], images: np.ndarray) -> None:
    """One picture file: a labelled row for each entry of rows {label: (columns, 3, H, H)}, image numbers above."""
    columns, size = len(images), 256
    strips = [resized(x.float(), size).permute(2, 0, 3, 1).flatten(1, 2) for x in rows.values()]
    figure = Figure(figsize=(1.3 * columns + 1.2, 1.3 * len(rows) + 0.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(torch.cat(strips).numpy(), aspect="equal")  # (rows * size, columns * size, 3)
    axes.set_yticks([size * (i + 0.5) for i in range(len(rows))], list(rows), fontsize=13)
    axes.set_xticks([size * (i + 0.5) for i in range(columns)], [str(image) for image in images], fontsize=8)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def write(prefix: str, arrays: dict[str, Tensor], seen: Tensor, images: np.ndarray) -> None:
    for name, array in arrays.items():
        save(Path(f"{prefix}_all_{name}.pt"), array)
    if "blurryrecons" not in arrays:  # an earlier run's would be taken for this one's
        Path(f"{prefix}_all_blurryrecons.pt").unlink(missing_ok=True)
    labels = {"blurryrecons": "blurry", "recons": "reconstructed"}
    rows = {"seen": seen} | {label: arrays[name][: len(seen)] for name, label in labels.items() if name in arrays}
    save_grid(Path(f"{prefix}_grid.png"), rows, images[: len(seen)])
    print(f"wrote {prefix}_all_{{{','.join(arrays)}}}.pt and {prefix}_grid.png")


def main(argv: list[str] | None = None) -> dict[str, Tensor]:
    """Returns {image_ids (n,), recons, blurryrecons, clipvoxels} as written; {} on processes other than the first."""
    args, state = parse(argv), PartialState(cpu=not torch.cuda.is_available())
    trials = load_trials(args.data_path, args.subj, "new_test" if args.new_test else "test")
    images, positions = (part[: args.num_images] for part in repeats(trials))
    seen = Images(args.data_path)[images[:GRID_COLUMNS]]  # (16, 3, H, W), read early: the rest takes long
    model, ridge = load_model(args, num_voxels(args.data_path, args.subj))
    unclip = load_decoders(args, model, state.device)
    model, voxels = model.to(state.device), load_voxels(args.data_path, trials)  # (trials, V)

    mine, batches = np.array_split(np.arange(len(images)), state.num_processes)[state.process_index], []
    with tqdm(total=len(mine), desc="reconstructing", unit="image", disable=not state.is_main_process) as bar:
        for first in range(0, len(mine), args.batch_size):
            rows = mine[first : first + args.batch_size]
            batch = images[rows], [positions[row] for row in rows]
            batches.append(reconstruct(model, ridge, unclip, voxels, *batch, args))
            bar.update(len(rows))

    prefix = str(Path(args.evals) / args.model_name / args.model_name)
    batches = gather(batches, prefix, state)
    if not state.is_main_process:
        return {}
    arrays = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    write(prefix, arrays, seen, images)
    return {"image_ids": torch.from_numpy(images)} | arrays


if __name__ == "__main__":
    run_main(main)
