"""The refinement: SDXL draws each reconstruction again, told by its caption what is in it (2.5).

Reconstructions have the right layout, but distorted things in it: the unCLIP decoder was trained at 256 pixels, from
tokens that a brain never gives exactly. So each one, under the noise of half-way, is where base SDXL starts to draw
("image to image"), with the predicted caption as its prompt. Two passes, so that only one large network is in memory:
    prompts    captions and the negative prompt -> two CLIP text encoders -> tokens (B, 77, 2048), pooled (B, 1280)
    refined    reconstruction -> VAE -> latents, noise added -> UNet, the last 12 of 25 Euler steps -> VAE -> picture
Restartable and for any number of processes, as recon.py.

    in    evals/{model_name}/{model_name}_all_recons.pt             (n, 3, H, W) in [0, 1]     written by recon.py
                                         _all_predcaptions.pt       (n,) texts                 the same
          {data_path}/wds and images                                whose they are, for the grid and the seeds
          {cache_dir}/sdxl or {cache_dir}/zavychromaxl_v30.safetensors                         SDXL, see load_part
    out   evals/{model_name}/{model_name}_all_enhancedrecons.pt     (n, 3, H, W) float32 in [0, 1], H = 256 or smaller
                                         _refined_grid.png          the first pictures: seen, reconstructed, refined
Row i belongs to row i of the reconstructions.

    python refine.py --model_name toy_1session_pretrained --data_path toy --evals toy/evals
    python refine.py --model_name final_subj01_pretrained_40sess_24bs --data_path DATA --subj 1    NSD, on one GPU
    accelerate launch --num_processes 8 refine.py ...                                              on eight
    python refine.py --model_name ... --prompt empty                                  Table 11: what captions are worth
"""

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from open_clip import SimpleTokenizer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import frozen
import processes
from arrays import load_array, load_texts
from checkpoints import reading
from data import Images, data_folder, load_trials, repeats, resized
from files import save
from model import UserError, run_main
from recon import (
    GRID_COLUMNS,
    MAX_SIZE,
    batch_noise,
    collect,
    euler,
    guided,
    noise_levels,
    open_parts,
    run_pass,
    save_grid,
    start_latents,
)

SIZE = 768  # pixels at which SDXL works here: the original's, three quarters of what SDXL was made for
STREAM = 1_000_000  # of recon.batch_noise: the decoder, whose streams are 1, 2, .., drew from other noise
FLAG = "--cache_dir or --sdxl"
SDXL_FILE = "zavychromaxl_v30.safetensors"
NEGATIVE = ("painting, sketch, cartoon, render, blurry, grainy, overexposed, distorted, deformed, disfigured, "
            "bad anatomy, extra limbs, missing limbs, fused fingers, ugly face, duplicate, cropped, watermark, text")


def parse(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("refine.py", description=__doc__.split("\n\n")[0], formatter_class=formatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model_name", default="testing", help="a name: folder of the reconstructions in --evals, and of the output")
    add("--data_path", default=data_folder(), help="folder of the data; NSD's in the paper")
    add("--cache_dir", help="folder of the frozen networks; None = --data_path")
    add("--sdxl", help="SDXL: a folder of diffusers' StableDiffusionXLPipeline, or one .safetensors file in the "
                       f"original format; None = CACHE_DIR/sdxl, or else CACHE_DIR/{SDXL_FILE}, the paper's")
    add("--evals", default="evals", help="folder of the reconstructions and of the output")
    add("--subj", type=int, default=1, help="number of the subject, 1 to 8 in NSD; 1, 2, 5 and 7 in the paper")
    add("--new_test", action=switch, default=True, help="the complete test set, the paper's; as for recon.py")
    add("--prompt", default="captions", help="what SDXL is told: captions (predicted by recon.py; the paper's), empty "
        "(nothing; the other column of Table 11), or a file with a prompt for each picture: .txt, one a line, or "
        ".pt, an array or a list of texts")
    add("--negative_prompt", default=NEGATIVE, help="a text: what guidance leads away from, the same for all; ours is "
                                                    "of the same intent as the original's, not the same words")
    add("--steps", type=int, default=25, help="steps from pure noise to a picture; 25 in the paper's code")
    add("--strength", type=float, default=0.5, help="share of the steps that is done, the last ones, above 0 up to 1: "
        "int(steps * strength), so 12 of 25 in the paper's code, which starts at t = 479 with noise of 1.5 times the "
        "picture's deviation. Less keeps more of the reconstruction")
    add("--guidance", type=float, default=5.0, help="guidance scale; 5 in the paper's code, 1 = off at half the cost")
    add("--batch_size", type=int, default=16, help="pictures at once, a process; 1 in the paper's code")
    add("--compile", action=switch, default=False, help="torch.compile of the networks' blocks on a GPU: pictures in "
        "three quarters of the time, after half a minute")
    add("--low_memory", action=switch, default=False, help="for a small GPU: the two halves of guidance one after the "
        "other")
    add("--num_images", type=int, help="pictures, the first by row number; None = all (1000 in the paper)")
    add("--seed", type=int, default=42, help="a number, the seed of all noise; 42 in the paper's code")
    args = parser.parse_args(argv)
    for name, low in {"steps": 1, "batch_size": 1, "num_images": 1, "seed": 0}.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise UserError(f"--{name} must be at least {low}, not {getattr(args, name)}.")
    if not 0 < args.strength <= 1:
        raise UserError(f"--strength must be above 0 and at most 1, not {args.strength}.")
    if not kept_steps(args.steps, args.strength):
        raise UserError(f"--strength {args.strength} leaves none of {args.steps} steps: raise --steps or --strength.")
    args.cache_dir = args.cache_dir or args.data_path
    folder = Path(args.cache_dir) / "sdxl"
    args.sdxl = args.sdxl or str(folder if folder.exists() else folder.with_name(SDXL_FILE))
    return args


# ---------------------------------------------------------------------------------------------------------------------
# SDXL: four networks, from a folder in diffusers' layout or from one file in the original's

SDXL_UNET = frozen.UNCLIP_UNET | {  # 2.6 billion parameters; the decoder's was made from it
    "sample_size": 128, "cross_attention_dim": 2048, "class_embed_type": None, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}
SDXL_TEXT = {  # the text halves of OpenAI's CLIP ViT-L/14 and of OpenCLIP's ViT-bigG/14
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "hidden_act": "quick_gelu", "eos_token_id": 49407,
}
SDXL_TEXT_2 = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu", "eos_token_id": 49407,
}
_OPEN_CLIP = "conditioner.embedders.1.model."
SDXL_PARTS = {  # part: its class, where its keys begin in the file, and who knows their new names
    "text_encoder": (CLIPTextModel, "conditioner.embedders.0.transformer.",
                     lambda state, network: convert_ldm_clip_checkpoint(state)),
    "text_encoder_2": (CLIPTextModelWithProjection, _OPEN_CLIP,
                       lambda state, network: convert_open_clip_checkpoint(network, state, _OPEN_CLIP)),
    "unet": (UNet2DConditionModel, "model.diffusion_model.",
             lambda state, network: convert_ldm_unet_checkpoint(state, network.config)),
    "vae": (AutoencoderKL, "first_stage_model.",
            lambda state, network: convert_ldm_vae_checkpoint(state, network.config)),
}
NO_WEIGHTS = re.compile(r"position_ids$|\.logit_scale$|^denoiser\.sigmas$")  # may be in the file, none is needed


def empty_part(part: str) -> nn.Module:
    """A network of SDXL without weights, at its published size."""
    kind = SDXL_PARTS[part][0]
    with torch.device("meta"):
        if part.startswith("text"):
            return kind(CLIPTextConfig(**(SDXL_TEXT if part == "text_encoder" else SDXL_TEXT_2)))
        return kind(**(SDXL_UNET if part == "unet" else frozen.UNCLIP_VAE))


def converted(part: str, network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors of one part, under the names that `network` has for them."""
    _, prefix, convert = SDXL_PARTS[part]
    own = {key: value for key, value in state.items() if key.startswith(prefix) and not NO_WEIGHTS.search(key)}
    # transformers 5 has left out the first word of the names that diffusers' converters know.
    names = {name.removeprefix("text_model."): name for name in network.state_dict()}
    return {names.get(name.removeprefix("text_model."), name): value for name, value in convert(own, network).items()}


def check_sdxl(sdxl: Path) -> None:
    """Raise UserError for all that loading or drawing would only find after the first pass."""
    if not sdxl.exists():
        nor = f", nor does {sdxl.with_name('sdxl')}" if sdxl.name == SDXL_FILE else ""
        raise UserError(f"{sdxl} does not exist{nor}: put it there, or name another place with {FLAG}.")
    (check_folder if sdxl.is_dir() else check_file)(sdxl)


def check_file(file: Path, flag: str = FLAG) -> None:
    """Raise UserError unless the file holds exactly the weights of the four networks. Reads no weights, only names."""
    def wrong(reason: str) -> UserError:
        return UserError(f"{file} is not an SDXL in the original format ({reason}): replace it by {SDXL_FILE}, or name "
                         f"another with {flag}.")  # fmt: skip

    with reading(file, flag), safe_open(file, "pt") as content:
        shapes = {key: content.get_slice(key).get_shape() for key in content.keys()}  # noqa: SIM118  (no dict)
    # The converters rename, cut and turn whatever they are given: here each tensor is its key's number, repeated.
    numbers = {key: torch.tensor(i, dtype=torch.int16).expand(shape) for i, (key, shape) in enumerate(shapes.items())}
    keys, unused = list(shapes), {key for key in shapes if not NO_WEIGHTS.search(key)}
    for part in SDXL_PARTS:
        network = empty_part(part)
        try:
            found = converted(part, network, numbers)
        except (KeyError, IndexError) as error:
            raise wrong(f"{error.args[0]} of the {part} is missing") from None
        for name, value in network.state_dict().items():
            if found.get(name) is None:
                raise wrong(f"what becomes {name} of the {part} is missing")
            if found[name].shape != value.shape:
                raise wrong(f"what becomes {name} of the {part} has shape {tuple(found[name].shape)} instead of "
                            f"{tuple(value.shape)}")
            unused.discard(keys[found[name][(0,) * value.ndim].item()])
    if unused:
        raise wrong(f"{min(unused)} is unknown")


def check_folder(folder: Path) -> None:
    """Raise UserError unless the folder holds all that is needed, and its parts fit each other."""
    names = [f"{part}/config.json" for part in SDXL_PARTS]
    for name in [*names, "tokenizer", "tokenizer_2", "scheduler/scheduler_config.json"]:
        if not (folder / name).exists():  # diffusers would look for the missing part on the internet
            raise UserError(f"{folder} cannot be read (it has no {name}): replace it, or name another with {FLAG}.")
    with reading(folder, FLAG):
        first, second, unet, vae = (json.loads((folder / name).read_text()) for name in names)
        width = first["hidden_size"] + second["hidden_size"]
        vector = second["projection_dim"] + 6 * (unet.get("addition_time_embed_dim") or 0)
        needed = [unet.get(name) for name in ("cross_attention_dim", "projection_class_embeddings_input_dim",
                                              "in_channels")]  # fmt: skip
    if needed != [width, vector, vae.get("latent_channels")]:
        raise UserError(f"{folder} is not a base SDXL (its UNet does not fit its text encoders and VAE): name another "
                        f"with {FLAG}.")  # fmt: skip


def load_part(sdxl: Path, part: str, device: str | torch.device, dtype: torch.dtype = torch.float32,
              flag: str = FLAG) -> nn.Module:
    """One of SDXL's four networks, for inference. Raises UserError when it cannot be read."""
    with reading(sdxl, flag):
        if sdxl.is_dir():
            plain = [file for file in (sdxl / part).glob("*.safetensors*") if ".fp16." not in file.name]
            network = frozen.read_whole(SDXL_PARTS[part][0], sdxl / part, variant=None if plain else "fp16")
            return frozen.for_inference(network, device, dtype)
        network, prefix = empty_part(part), SDXL_PARTS[part][1]
        with safe_open(sdxl, "pt") as content:
            state = {key: content.get_tensor(key) for key in content.keys() if key.startswith(prefix)}  # noqa: SIM118
        network.load_state_dict(converted(part, network, state), assign=True)
        for module in network.modules():  # no weights: the file may have none
            if hasattr(module, "position_ids"):
                module.position_ids = torch.arange(module.position_ids.shape[-1])[None]  # (1, 77)
    return frozen.for_inference(network, device, dtype)


def load_scheduler(sdxl: Path, flag: str = FLAG):
    """The noise levels that the UNet was trained with, as a scheduler of diffusers."""
    if not sdxl.is_dir():
        return EulerDiscreteScheduler(**frozen.UNCLIP_SCHEDULER)
    with reading(sdxl, flag):
        config = json.loads((sdxl / "scheduler/scheduler_config.json").read_text())
        return getattr(diffusers, config["_class_name"]).from_config(config)


# ---------------------------------------------------------------------------------------------------------------------
# Pass 1: prompts -> what the UNet reads

def load_tokenizer(sdxl: Path, part: str, length: int) -> Callable[[list[str]], Tensor]:
    """n texts -> (n, length) numbers of words: a start word, the text, an end word, and padding."""
    name = part.replace("text_encoder", "tokenizer")
    if sdxl.is_dir():
        with reading(sdxl / name, FLAG):
            tokenizer = AutoTokenizer.from_pretrained(sdxl / name, local_files_only=True)
        return lambda texts: tokenizer(texts, padding="max_length", max_length=length, truncation=True,
                                       return_tensors="pt").input_ids
    # A file has no tokenizer, but open_clip brings CLIP's vocabulary along. Both encoders were trained with it; only
    # the padding differs: the first one's is more end words, the second one's the number 0.
    tokenizer = SimpleTokenizer(context_length=length)
    end = tokenizer.eot_token_id

    def tokenize(texts: list[str]) -> Tensor:
        words = tokenizer(texts)                                      # (n, 77)
        if part == "text_encoder":
            words = words.masked_fill((words == end).cumsum(1) > 0, end)
        return words
    return tokenize


def load_encoders(sdxl: Path, device: str | torch.device) -> list[tuple[Callable, nn.Module]]:
    """SDXL's two text encoders, each with its tokenizer, in float32."""
    networks = [(part, load_part(sdxl, part, device)) for part in ("text_encoder", "text_encoder_2")]
    return [(load_tokenizer(sdxl, part, network.config.max_position_embeddings), network)
            for part, network in networks]


@torch.no_grad()
def encode(encoders: list[tuple[Callable, nn.Module]], texts: list[str]) -> dict[str, Tensor]:
    """n texts -> tokens (n, 77, 2048) and pooled (n, 1280).

    Tokens are both encoders' outputs before the last layer, which is for contrast only, side by side; pooled is the
    second one's final embedding. Both as the UNet knows them from its training.
    """
    hidden = []
    for tokenize, encoder in encoders:
        out = encoder(tokenize(texts).to(encoder.device), output_hidden_states=True)
        hidden.append(out.hidden_states[-2])  # (n, 77, 768), then (n, 77, 1280)
    return {"tokens": torch.cat(hidden, -1), "pooled": out.text_embeds}


# ---------------------------------------------------------------------------------------------------------------------
# Pass 2: pictures -> refined pictures

def kept_steps(steps: int, strength: float) -> int:
    """How many of the last steps are done: 12 for 25 and one half. The original keeps 13 of 26 sigmas, 12 steps."""
    return int(round(steps * strength, 6))  # 50 * .58 is 28.999999999999996


def load_painter(args: argparse.Namespace, device: torch.device) -> SimpleNamespace:
    """UNet, VAE and noise levels; .size in pixels is where they work, .target what the UNet was made for."""
    sdxl = Path(args.sdxl)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32  # float16 would overflow in the VAE
    unet, vae = load_part(sdxl, "unet", device, half), load_part(sdxl, "vae", device, half)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)  # 8
    target = unet.config.sample_size * factor
    size = min(SIZE, target)
    vae.enable_slicing()  # one picture at a time: at 768 pixels each needs gigabytes
    frozen.speed_up(unet, vae, compiled=args.compile)
    return SimpleNamespace(unet=unet, vae=vae, scheduler=load_scheduler(sdxl), size=size, target=target,
                           latent=(unet.config.in_channels, size // factor, size // factor))


def size_numbers(size: int, target: int) -> Tensor:
    """SDXL's six numbers (6,): original height and width, crop's top and left, target height and width."""
    return torch.tensor([size, size, 0, 0, target, target], dtype=torch.float32)


@torch.no_grad()
def redraw(
    sdxl: SimpleNamespace, latents: Tensor, noise: Tensor, prompt: dict[str, Tensor], steps: int = 25,
    strength: float = 0.5, guidance: float = 5.0, one_by_one: bool = False,
) -> Tensor:
    """Latents of pictures (B, 4, L, L), scaled -> of refined pictures, by the last steps of SDXL's sampler (2.5).

    noise (B, 4, L, L) is normal. prompt has tokens (B + 1, 77, 2048) and pooled (B + 1, 1280), the last row of each
    for the negative prompt. one_by_one evaluates the two halves of guidance in turn: half the memory.
    """
    unet, count = sdxl.unet, len(latents)
    numbers = size_numbers(sdxl.size, sdxl.target).to(latents.device)
    prompt = {name: values.to(latents.device, unet.dtype) for name, values in prompt.items()}
    told, blind = ({name: values[rows] for name, values in prompt.items()}
                   for rows in (list(range(count)), [count] * count))
    both = {name: torch.cat((blind[name], told[name])) for name in prompt}      # (2 B, 77, 2048), (2 B, 1280)

    def run_unet(x: Tensor, t: Tensor, words: dict[str, Tensor]) -> Tensor:
        added = {"text_embeds": words["pooled"], "time_ids": numbers.expand(len(x), -1)}
        return unet(x.to(unet.dtype), t, words["tokens"], added_cond_kwargs=added).sample.float()

    predict = guided(run_unet, told, blind, both, guidance, one_by_one)
    skip = steps - kept_steps(steps, strength)
    sigma = noise_levels(sdxl.scheduler, steps)[1][skip].item()                 # 1.509: where the 14th of 25 starts
    start = start_latents(latents, noise, torch.zeros(count, device=noise.device), sigma)
    return euler(predict, start, sdxl.scheduler, steps, skip)                   # (B, 4, L, L)


@torch.no_grad()
def refine(sdxl: SimpleNamespace, pictures: Tensor, ids: np.ndarray, prompt: dict, args: argparse.Namespace) -> dict:
    """Pass 2 for a batch: pictures (B, 3, H, W) in [0, 1] of images `ids` (B,) -> enhancedrecons (B, 3, 256, 256)."""
    vae, scale = sdxl.vae, sdxl.vae.config.scaling_factor
    spread, noise = batch_noise(ids, args.seed, [sdxl.latent, sdxl.latent], STREAM, vae.device)
    posterior = vae.encode((2 * resized(pictures, sdxl.size) - 1).to(vae.device, vae.dtype)).latent_dist
    latents = scale * (posterior.mean + posterior.std * spread)  # (B, 4, L, L); drawn, as in SDXL's training
    latents = redraw(sdxl, latents, noise, prompt, args.steps, args.strength, args.guidance, args.low_memory)
    pixels = vae.decode((latents / scale).to(vae.dtype)).sample.float()  # (B, 3, 8 L, 8 L)
    return {"enhancedrecons": resized((pixels / 2 + 0.5).clamp(0, 1), min(sdxl.size, MAX_SIZE))}


# ---------------------------------------------------------------------------------------------------------------------
# Files in and out

def output_file(args: argparse.Namespace, name: str) -> Path:
    return Path(args.evals) / args.model_name / f"{args.model_name}_{name}"


def read_pictures(args: argparse.Namespace) -> tuple[Tensor, np.ndarray]:
    """Reconstructions (n, 3, H, W) float32, and the row numbers (n,) of the images that were seen. Raises UserError."""
    path = output_file(args, "all_recons.pt")
    if not path.exists():
        raise UserError(f"{path} does not exist: run recon.py first, or name another --model_name or --evals.")
    recons = load_array(path, "run recon.py again, or name another --evals.")
    if not isinstance(recons, Tensor) or recons.ndim != 4 or recons.shape[1] != 3 or not recons.numel():
        raise UserError(f"{path} does not hold pictures (n, 3, H, W): run recon.py again, or name another --evals.")
    if not torch.isfinite(recons).all():
        raise UserError(f"{path} holds NaN or infinite numbers: train again, with a smaller --max_lr.")
    ids = repeats(load_trials(args.data_path, args.subj, "new_test" if args.new_test else "test"))[0]
    if len(recons) > len(ids):
        raise UserError(f"{path} has {len(recons)} pictures for {len(ids)} test images: pass the --data_path, --subj "
                        "and --new_test that recon.py had.")  # fmt: skip
    return recons.float(), ids[: len(recons)]


def read_texts(path: Path, flag: str) -> list[str]:
    """One text a line of a .txt, or an array or list of texts saved by torch.save. Raises UserError."""
    if path.suffix == ".txt":
        with reading(path, flag):
            return path.read_text(encoding="utf-8").splitlines()
    return load_texts(path, f"replace it, or name another with {flag}.")


def prompt_file(args: argparse.Namespace) -> Path | None:
    """Where the prompts are; None for empty ones."""
    if args.prompt == "captions":
        return output_file(args, "all_predcaptions.pt")
    return None if args.prompt == "empty" else Path(args.prompt)


def read_prompts(args: argparse.Namespace, count: int) -> list[str]:
    """A prompt for each of `count` pictures. Raises UserError."""
    path = prompt_file(args)
    if path is None:
        return [""] * count
    if args.prompt == "captions" and not path.exists():
        raise UserError(f"{path} does not exist: run recon.py first, with --captions, or pass --prompt=empty.")
    texts = read_texts(path, "--prompt (captions, empty, or a file)")
    if len(texts) != count:
        raise UserError(f"{path} has {len(texts)} texts for {count} reconstructions: run recon.py again, or pass "
                        "another --prompt.")  # fmt: skip
    return texts


def main(argv: list[str] | None = None) -> dict[str, Tensor]:
    """Returns {enhancedrecons (n, 3, H, W)}; {} on processes other than the first."""
    args, state = parse(argv), processes.start()
    with processes.naming_lost(state, "the same command goes on where they were."):
        return refine_all(args, state)


def refine_all(args: argparse.Namespace, state: PartialState) -> dict[str, Tensor]:
    """Both passes; see `main`."""
    device, sdxl = state.device, Path(args.sdxl)
    pictures, ids = read_pictures(args)
    prompts = read_prompts(args, len(pictures))[: args.num_images]
    pictures, ids = pictures[: args.num_images], ids[: args.num_images]
    seen = Images(args.data_path)[ids[:GRID_COLUMNS]]  # (k, 3, H, W)
    if state.is_local_main_process:
        check_sdxl(sdxl)
        trained = load_scheduler(sdxl).config.num_train_timesteps
        if args.steps >= trained:
            raise UserError(f"--steps must be below {trained}, the number of noise levels that {sdxl} knows.")
    folder = output_file(args, "refine_parts")
    weights = sorted(sdxl.rglob("*")) if sdxl.is_dir() else [sdxl]
    inputs = [output_file(args, "all_recons.pt"), prompt_file(args), *weights]
    open_parts(folder, args, state, [file for file in inputs if file])
    batches = [slice(first, min(first + args.batch_size, len(ids))) for first in range(0, len(ids), args.batch_size)]

    run_pass("prompts", folder, batches, state, lambda: load_encoders(sdxl, device),
             lambda encoders, rows, _: encode(encoders, [*prompts[rows], args.negative_prompt]), first="prompts")
    run_pass("refined", folder, batches, state, lambda: load_painter(args, device),
             lambda painter, rows, prompt: refine(painter, pictures[rows], ids[rows], prompt, args), first="prompts")
    if not state.is_main_process:
        return {}
    arrays = collect(folder, ["refined"], len(batches))
    save(output_file(args, "all_enhancedrecons.pt"), arrays["enhancedrecons"])
    k, none = len(seen), [""] * len(seen)
    rows = [("seen", seen, none), ("reconstructed", pictures[:k], none),
            ("refined", arrays["enhancedrecons"][:k], prompts[:k])]
    save_grid(output_file(args, "refined_grid.png"), rows, [str(i) for i in ids[:k]])
    print(f"wrote {output_file(args, 'all_enhancedrecons.pt')} and {output_file(args, 'refined_grid.png')}")
    shutil.rmtree(folder)
    return arrays


if __name__ == "__main__":
    run_main(main)
