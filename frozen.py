"""The frozen networks: what MindEye2 takes from others and never trains.

    CLIP             images -> the tokens that are MindEye2's target (2.2), and pooled embeddings of images and texts
    VAE              images <-> latents, the blurry head's target (2.2.3)
    teacher          images -> low-level features, the blurry head's second target (2.2.3)
    unCLIP decoder   image tokens -> pictures (2.4)
    captioner        image tokens -> a sentence (2.3)

Each is read from a folder of --cache_dir in the format of its library; the released files, which come in formats of
their own, load as well. Images are (B, 3, H, W) in [0, 1] everywhere; every loader raises UserError when a file is
missing or damaged. Letters as in model.py: B samples, S tokens of D channels, L side of a VAE latent.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only
from tqdm import tqdm
from transformers import AutoTokenizer, ConvNextModel, GitForCausalLM, PreTrainedTokenizerBase

from checkpoints import reading, torch_load
from files import is_disk_full, replacing_folder
from model import UserError


def for_inference(network: nn.Module, device: str | torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Ready for inference. (nn.Module's own `to`: diffusers' prints a warning that means nothing here.)"""
    return nn.Module.to(network.eval().requires_grad_(False), device, dtype)


def read_whole(kind: type, place: Path | str, local_files_only: bool = True, **options) -> nn.Module:
    """kind.from_pretrained(place). Raises KeyError if a weight is missing: the libraries go on with random numbers."""
    options |= {"local_files_only": local_files_only, "output_loading_info": True}
    network, report = kind.from_pretrained(place, **options)
    if report["missing_keys"]:
        raise KeyError(f"no {min(report['missing_keys'])} in {Path(place).name}")
    return network


def record(work: Callable, warm_up: int = 3) -> Callable:
    """work(tensors), on a GPU, from the fourth call with tensors of these shapes on, as one CUDA graph.

    One launch in place of thousands: at small batches a GPU waits for Python most of the time. A graph reads and writes
    the same memory at each replay, so tensors are copied into those of the recording, and its results out of it. What
    is no tensor must be the same at each call.
    """
    graphs, stream = {}, torch.cuda.Stream()

    def call(*args, **kwargs) -> object:
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        kept = graphs.setdefault(tuple((x.shape, x.dtype) for x in given), SimpleNamespace(calls=0))
        kept.calls += 1
        if kept.calls <= warm_up:  # not on the main stream, as PyTorch asks
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = work(*args, **kwargs)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if kept.calls == warm_up + 1:
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            kept.given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
            kept.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(kept.graph, capture_error_mode="thread_local"):  # others may pin memory
                kept.result = work(*args, **kwargs)
        for old, new in zip(kept.given, given, strict=True):
            old.copy_(new)
        kept.graph.replay()
        return tree_map_only(Tensor, Tensor.clone, kept.result)
    return call


def free_memory() -> None:
    """Give the GPU back what nobody holds: the next network needs the place. (A recorded network holds itself.)"""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def compile_blocks(network: nn.Module) -> None:
    """torch.compile what most of a UNet's or VAE's time goes to, by pieces: the whole would take minutes.

    Compiled convolutions are faster with channels last, on an H100; the others are slower so.
    """
    torch._dynamo.config.recompile_limit = 64  # a block is compiled for each of its sizes; 8 is the default
    nn.Module.to(network, memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            module.compile(dynamic=False)


def speed_up(unet: nn.Module, *others: nn.Module, compiled: bool) -> None:
    """On a GPU: the UNet as a CUDA graph, and with `compiled` the blocks of all of them compiled."""
    if next(unet.parameters()).is_cuda:
        for network in (unet, *others) if compiled else ():
            compile_blocks(network)
        unet.forward = record(unet.forward)


CLIP_MEAN, CLIP_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
# .228 is a slip of the original's for .229; the released low-level heads learned with it.
TEACHER_MEAN, TEACHER_STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)


def normalised(images: Tensor, mean: tuple, std: tuple) -> Tensor:
    """(x - mean) / std of each channel, with plain numbers: a CUDA graph (toy_networks.py) takes no new tensors."""
    return torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], 1)


def clip_preprocess(images: Tensor, size: int, washed_out: bool = True) -> Tensor:
    """What CLIP gets to see: (B, 3, H, W) in [0, 1] -> (B, 3, size, size), resized bicubically and normalised.

    The original's encoder expects [-1, 1] and maps x to (x + 1) / 2, but is given [0, 1]: it sees washed-out pictures
    in [.5, 1]. All released MindEye2 models learned the tokens of those, so it is kept. The released decoder alone
    learned from pictures as they are: washed_out=False.
    """
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bicubic", align_corners=True)
    return normalised((images + 1) / 2 if washed_out else images, CLIP_MEAN, CLIP_STD)


class FrozenCLIP(nn.Module):
    """CLIP's image tokens, the prior's targets, and its pooled embeddings of images and texts.

    seq_dim = S, emb_dim = D, image_size in pixels. Images are (B, 3, H, W) in [0, 1]; see `clip_preprocess` for
    washed_out, which is for `tokens`.
    """
    def __init__(self, clip: nn.Module, tokenizer: Callable[[list[str]], Tensor]) -> None:
        super().__init__()
        self.clip, self.tokenizer, self.washed_out = clip, tokenizer, True
        clip.visual.output_tokens = True  # give the patch tokens after the last LayerNorm besides the pooled vector
        positions, self.emb_dim = clip.visual.positional_embedding.shape
        self.seq_dim = positions - 1  # one position is the class token's, which is not used
        self.image_size = clip.visual.image_size[0]

    def _see(self, images: Tensor, washed_out: bool = True) -> tuple[Tensor, Tensor]:
        seen = clip_preprocess(images, self.image_size, washed_out)
        return self.clip.visual(seen.to(self.clip.visual.positional_embedding.dtype))  # (B, E), (B, S, D)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, S, D): patch tokens, not projected."""
        return self._see(images, self.washed_out)[1]  # (B, S, D)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E) of unit length, from the same washed-out view."""
        return F.normalize(self._see(images)[0], dim=-1)  # (B, E)

    @torch.no_grad()
    def embed_text(self, texts: list[str]) -> Tensor:
        """n captions -> (n, E) of unit length, comparable with `embed`."""
        words = self.tokenizer(texts).to(self.clip.visual.positional_embedding.device)  # (n, words)
        return self.clip.encode_text(words, normalize=True)                             # (n, E)


def in_hub_cache(repository: str, file: str, *places: str | Path | None) -> Path | None:
    """A file downloaded from huggingface.co, of the first of the places that has it; None is the libraries' own."""
    for place in places:
        found = huggingface_hub.try_to_load_from_cache(repository, file, cache_dir=place)
        if isinstance(found, str):
            return Path(found)
    return None


def hub_place(cache_dir: str | Path, repository: str, files: tuple[str, ...]) -> str | None:
    """Where a library finds or keeps a network of the hub: cache_dir; None, its own place, if only that has it.

    There the original's code left it.
    """
    def has(place: str | None) -> bool:
        return any(in_hub_cache(repository, file, place) for file in files)
    return None if has(None) and not has(str(cache_dir)) else str(cache_dir)


BIGG = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
GIT = "microsoft/git-large-coco", ("model.safetensors", "pytorch_model.bin")  # on the hub: repository, weights


def load_clip(cache_dir: str | Path, device: str | torch.device, dtype: torch.dtype = torch.float32) -> FrozenCLIP:
    """CLIP from cache_dir/clip (an open_clip folder) or else ViT-bigG/14, kept in or downloaded to cache_dir.

    Raises UserError when it can be neither read nor downloaded.
    """
    folder = Path(cache_dir) / "clip"
    name, weights, place, kept = f"local-dir:{folder}", None, folder, str(cache_dir)
    if not folder.exists():
        name, weights, place, kept = "ViT-bigG-14", "laion2b_s39b_b160k", Path(cache_dir), hub_place(cache_dir, *BIGG)
    with reading(place, "--cache_dir", must_exist=False):
        clip = open_clip.create_model(name, pretrained=weights, cache_dir=kept, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name, cache_dir=str(cache_dir))
    return for_inference(FrozenCLIP(clip, tokenizer), device, dtype)


VAE_FILE = "sd_image_var_autoenc.pth"
SD_VAE = {  # Stable Diffusion 1's, 83.7 million parameters
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "scaling_factor": 0.18215,
}


def read_vae(folder: Path, flag: str) -> AutoencoderKL:
    """A VAE from a folder in diffusers' layout, on the CPU, for inference. Raises UserError, which names `flag`."""
    with reading(folder, flag):
        return for_inference(read_whole(AutoencoderKL, folder), "cpu")


def load_vae(cache_dir: str | Path, device: str | torch.device, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """The VAE of the blurry latents: cache_dir/vae (a diffusers folder) or the released sd_image_var_autoenc.pth.

    Raises UserError when neither can be read.
    """
    folder, file = Path(cache_dir) / "vae", Path(cache_dir) / VAE_FILE
    if folder.exists():
        return for_inference(read_vae(folder, "--cache_dir"), device, dtype)
    state = torch_load(file, "--cache_dir")
    # The file is older than today's names of the attention's four linear layers.
    renames = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    for old, new in renames.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    vae = AutoencoderKL(**SD_VAE)
    with reading(file, "--cache_dir"):
        vae.load_state_dict(state)
    return for_inference(vae, device, dtype)


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> scaled latents (B, 4, H/8, W/8): the mode, no sampling noise."""
    return vae.encode((2 * images - 1).to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents (B, 4, L, L) -> images (B, 3, 8 L, 8 L) in [0, 1]."""
    return (vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, then a two-layer perceptron at each position; no layer scale."""
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        inner = self.norm(self.dwconv(x).permute(0, 2, 3, 1))  # (B, H, W, C)
        return x + self.pwconv2(F.gelu(self.pwconv1(inner))).permute(0, 3, 1, 2)


class ConvNeXtTeacher(nn.Module):
    """The released low-level teacher: ConvNeXt-XL trained by VICRegL (Bardes et al. 2022), with its map projector."""
    def __init__(self, depths: tuple = (3, 3, 27, 3), dims: tuple = (256, 512, 1024, 2048)) -> None:
        super().__init__()
        downsample = [nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), ChannelNorm(dims[0], eps=1e-6))]
        for narrow, wide in zip(dims[:-1], dims[1:], strict=True):
            downsample.append(nn.Sequential(ChannelNorm(narrow, eps=1e-6), nn.Conv2d(narrow, wide, 2, 2)))
        stages = [nn.Sequential(*map(ConvNeXtBlock, [dim] * n)) for dim, n in zip(dims, depths, strict=True)]
        parts = {"downsample_layers": nn.ModuleList(downsample), "stages": nn.ModuleList(stages)}
        self.backbone = nn.ModuleDict(parts | {"norm": nn.LayerNorm(dims[-1], eps=1e-6)})
        self.maps_projector = nn.Sequential(
            nn.Linear(dims[-1], 512), nn.LayerNorm(512), nn.ReLU(),
            nn.Linear(512, 512), nn.LayerNorm(512), nn.ReLU(),
            nn.Linear(512, 512, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> (B, 512, H/32, W/32)."""
        for downsample, stage in zip(self.backbone["downsample_layers"], self.backbone["stages"], strict=True):
            x = stage(downsample(x))
        x = self.backbone["norm"](x.permute(0, 2, 3, 1))   # (B, H/32, W/32, 2048)
        return self.maps_projector(x).permute(0, 3, 1, 2)  # (B, 512, H/32, W/32)


class FrozenTeacher(nn.Module):
    """Low-level features of images (B, 3, H, W) in [0, 1]: (B, F, 512)."""
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        maps = self.network(normalised(images, TEACHER_MEAN, TEACHER_STD).to(dtype))
        maps = getattr(maps, "last_hidden_state", maps)  # (B, 512, h, w)
        return maps.flatten(2).transpose(1, 2)           # (B, F, 512)


def load_teacher(cache_dir: str | Path, device: str | torch.device,
                 dtype: torch.dtype = torch.float32) -> FrozenTeacher:
    """The low-level teacher: cache_dir/teacher (a transformers ConvNextModel folder) or the released VICRegL file.

    Raises UserError when neither can be read, or when the file is of another network (the original went on silently).
    """
    folder, file = Path(cache_dir) / "teacher", Path(cache_dir) / "convnext_xlarge_alpha0.75_fullckpt.pth"
    if folder.exists():
        with reading(folder, "--cache_dir"):
            network = read_whole(ConvNextModel, folder)
        return for_inference(FrozenTeacher(network), device, dtype)
    state = torch_load(file, "--cache_dir")
    state = {name.removeprefix("module."): value for name, value in state.get("model", state).items()}
    with torch.device("meta"):
        network = ConvNeXtTeacher()
    # The file also holds the heads of VICRegL's training, which are left out; nothing of ours may be missing.
    with reading(file, "--cache_dir"):
        own = {name: state[name] for name in network.state_dict()}
        network.load_state_dict(own, assign=True)
    return for_inference(FrozenTeacher(network), device, dtype)


UNCLIP_FILE = "unclip6_epoch0_step110000.ckpt"
UNCLIP_UNET = {  # SDXL's, 2.5 billion parameters, made for tokens of 1664 channels and the 1024 of `unclip_vector`
    "sample_size": 96, "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "cross_attention_dim": 1664, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 1024,
}
UNCLIP_VAE = SD_VAE | {"sample_size": 768, "scaling_factor": 0.13025}  # SDXL's: other weights, the same structure
UNCLIP_SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
UNCLIP_PARTS = {  # part: where its keys begin in the file, and who knows their new names
    "unet": ("model.diffusion_model.", convert_ldm_unet_checkpoint),
    "vae": ("first_stage_model.", convert_ldm_vae_checkpoint),
}
UNCLIP_SHARD = 2**28  # bytes of one file of weights; the conversion needs about five times as much memory
UnclipPlan = dict[str, tuple[str, tuple[int, ...]]]  # key in the file: name and shape in diffusers


def _not_unclip(file: Path, reason: str) -> UserError:
    """The error of a file that is readable, but of another network."""
    mend = f"replace it by {UNCLIP_FILE} of the release, or name another decoder with --unclip"
    return UserError(f"{file} is not the released decoder ({reason}): {mend}.")


def _unclip_state(file: Path) -> dict[str, Tensor]:
    """The file's tensors by key, mapped into memory: a tensor is read from disk when it is used. Raises UserError."""
    content = torch_load(file, "--cache_dir")
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise _not_unclip(file, "it has no state_dict of tensors")
    return state


def unclip_networks() -> dict[str, nn.Module]:
    """The decoder's two networks without weights: they tell the names and shapes that the file must fill."""
    with torch.device("meta"):
        return {"unet": UNet2DConditionModel(**UNCLIP_UNET), "vae": AutoencoderKL(**UNCLIP_VAE)}


def match_unclip(
    shapes: dict[str, tuple[int, ...]], networks: dict[str, nn.Module], file: Path,
) -> dict[str, UnclipPlan]:
    """Where each weight belongs, {"unet": plan, "vae": plan}; shapes are those of the file's tensors, by key.

    Each key is used once, and all of them fill `networks` exactly. Left out are CLIP's weights (conditioner.*), which
    open_clip loads by itself, and denoiser.sigmas, which are no weights. Raises UserError naming the first key that is
    missing, of another shape, or unknown.
    """
    plans, unused = {}, {key for key in shapes if key != "denoiser.sigmas" and not key.startswith("conditioner.")}
    for part, (prefix, convert) in UNCLIP_PARTS.items():
        keys = [key for key in shapes if key.startswith(prefix)]
        # The converters put whatever they are given under its new name: the keys' numbers, in place of the tensors.
        try:
            converted = convert({key: torch.tensor(i) for i, key in enumerate(keys)}, networks[part].config)
        except KeyError as error:
            raise _not_unclip(file, f"{prefix}{error.args[0]} is missing") from None
        names = {keys[i]: name for name, i in converted.items() if i is not None}
        wanted = {name: tuple(value.shape) for name, value in networks[part].state_dict().items()}
        plans[part] = {key: (name, wanted.pop(name)) for key, name in names.items() if name in wanted}
        unused -= plans[part].keys()
        if wanted:
            raise _not_unclip(file, f"what becomes {next(iter(wanted))} of the {part} is missing")
        for key, (_, shape) in plans[part].items():
            # The VAE's attention has 1x1 convolutions in the file and linear layers, which are the same, in diffusers.
            if tuple(shapes[key]) not in (shape, (*shape, 1, 1)):
                raise _not_unclip(file, f"{key} has shape {tuple(shapes[key])} instead of {shape}")
    if unused:
        raise _not_unclip(file, f"{min(unused)} is unknown")
    return plans


def _write_shard(checkpoint: Path, file: Path, plan: UnclipPlan, dtype: torch.dtype) -> None:
    """One safetensors file with the weights of `plan` in `dtype`.

    The checkpoint is mapped anew each time, because the pages that were read count as memory until it is unmapped.
    """
    state = _unclip_state(checkpoint)
    tensors = {
        name: state[key].reshape(shape).to(dtype, copy=True, memory_format=torch.contiguous_format)
        for key, (name, shape) in plan.items()
    }
    file.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))  # its save_file hides that a disk is full


def _write_weights(checkpoint: Path, folder: Path, plan: UnclipPlan, dtype: torch.dtype, bar: tqdm) -> None:
    """All weights of `plan` in files of about UNCLIP_SHARD bytes, and the index by which diffusers finds them."""
    sizes = {key: math.prod(shape) * dtype.itemsize for key, (_, shape) in plan.items()}
    shards = [{}]
    for key, target in plan.items():
        if sum(sizes[k] for k in shards[-1]) >= UNCLIP_SHARD:
            shards.append({})
        shards[-1][key] = target
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = folder / f"diffusion_pytorch_model-{i:05}-of-{len(shards):05}.safetensors"
        _write_shard(checkpoint, file, shard, dtype)
        weight_map |= {name: file.name for name, _ in shard.values()}
        bar.update(len(shard))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def training_sigmas(scheduler) -> Tensor:
    """sigma of each of a diffusers scheduler's timesteps (1000,): the noise's deviation when the picture's own is 1."""
    kept = scheduler.alphas_cumprod.double()  # share of the variance that is still the picture's
    return ((1 - kept) / kept).sqrt()


def _check_noise_levels(state: dict[str, Tensor], scheduler: EulerDiscreteScheduler, file: Path) -> None:
    """Raise UserError unless the network was trained with the scheduler's own noise levels (1000,)."""
    levels = training_sigmas(scheduler)
    sigmas = state.get("denoiser.sigmas", torch.empty(0))
    if sigmas.shape != levels.shape or not torch.allclose(sigmas.to(levels), levels, rtol=1e-3):
        raise _not_unclip(file, "its denoiser.sigmas are missing or others")


def convert_unclip(checkpoint: Path, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """The released decoder's file -> a folder in diffusers' layout, with the UNet in `dtype` and the VAE in float32.

    The folder is built beside its place and renamed, so it exists whole or not at all. Raises UserError when it
    exists already or cannot be written, or when the file is damaged or another one.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already: remove it, or name another place with --unclip.")
    networks, scheduler = unclip_networks(), EulerDiscreteScheduler(**UNCLIP_SCHEDULER)
    state = _unclip_state(checkpoint)
    plans = match_unclip({key: tuple(value.shape) for key, value in state.items()}, networks, checkpoint)
    _check_noise_levels(state, scheduler, checkpoint)
    bar = tqdm(total=sum(map(len, plans.values())), desc=f"converting {checkpoint.name}", unit="weight")
    try:
        with bar, replacing_folder(folder) as building:
            for part, network in networks.items():
                network.save_config(building / part)
                kind = torch.float32 if part == "vae" else dtype  # float16 overflows in the VAE
                _write_weights(checkpoint, building / part, plans[part], kind, bar)
            scheduler.save_pretrained(building / "scheduler")
            (building / "model_index.json").write_text(json.dumps({"output_scale": 0.8, "output_shift": 0.2}))
    except OSError as error:
        if is_disk_full(error):
            raise
        mend = f"name a folder where you may write, with a link to {checkpoint.name} beside it, with --unclip"
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): {mend}.") from error


def unclip_configs(folder: str | Path) -> tuple[dict, dict]:
    """What the decoder's UNet and scheduler say of themselves. Raises UserError if the folder is no decoder.

    Where there is no such folder, it is made once of the released file beside it.
    """
    folder, flag = Path(folder), "--cache_dir or --unclip"
    file = folder.parent / UNCLIP_FILE
    if not folder.exists() and not file.exists():
        raise UserError(f"{folder} does not exist, nor does {file}: put one there, or name another place with {flag}.")
    if not folder.exists():
        convert_unclip(file, folder)
    for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        if not (folder / name).exists():  # diffusers would look for the missing part on the internet
            raise UserError(f"{folder} cannot be read (it has no {name}): replace it, or name another with {flag}.")
    with reading(folder, flag):
        unet, scheduler = (json.loads((folder / name).read_text())
                           for name in ("unet/config.json", "scheduler/scheduler_config.json"))
    return unet, scheduler


def load_unclip(folder: str | Path, device: str | torch.device, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """The image decoder (2.4): a folder in diffusers' layout -> .unet, .vae, .scheduler, .output_scale, .output_shift.

    A picture is clamp(x * output_scale + output_shift, 0, 1) of the VAE's output x; model_index.json may hold the
    two numbers. dtype is the UNet's; also the VAE's, except float16, which overflows in it. Raises UserError.
    """
    folder, (_, scheduler_config) = Path(folder), unclip_configs(folder)
    with reading(folder, "--cache_dir or --unclip"):
        index_file = folder / "model_index.json"
        index = json.loads(index_file.read_text()) if index_file.exists() else {}
        unet = read_whole(UNet2DConditionModel, folder / "unet", torch_dtype=dtype)
        vae = read_whole(AutoencoderKL, folder / "vae")
        scheduler = getattr(diffusers, scheduler_config["_class_name"]).from_config(scheduler_config)
    # The released decoder saw pictures in [-1, 1] as they are, the prior's targets are of washed-out ones
    # (see `clip_preprocess`): the authors' .8 x + .2, found by hand, presumably makes up for it.
    return SimpleNamespace(
        unet=for_inference(unet, device, dtype), scheduler=scheduler,
        vae=for_inference(vae, device, torch.float32 if dtype == torch.float16 else dtype),
        output_scale=index.get("output_scale", 0.8), output_shift=index.get("output_shift", 0.2),
    )


def size_vector(numbers: Tensor, dim: int) -> Tensor:
    """SDXL's conditioning on sizes as one vector (B, dim), of n numbers (B, n): height, width, crop's top and left.

    Each number v becomes [cos(v f) | sin(v f)], with dim / 2n frequencies f from 1 down towards 1/10000.
    """
    count = dim // (2 * numbers.shape[1])
    frequencies = torch.exp(-math.log(10000) * torch.arange(count, device=numbers.device) / count)  # (dim / 2n,)
    angles = numbers.float()[..., None] * frequencies                                               # (B, n, dim / 2n)
    return torch.cat((angles.cos(), angles.sin()), -1).flatten(1)                                   # (B, dim)


def unclip_vector(dim: int, size: int) -> Tensor:
    """`size_vector` of a whole picture of `size` pixels: (1, dim)."""
    return size_vector(torch.tensor([[size, size, 0, 0]]), dim)


# ----------------------------------------------------------------------------------------------------------------------
# Captioner (2.3): image tokens -> a sentence, by GIT (Wang et al. 2022)
# ----------------------------------------------------------------------------------------------------------------------


CONVERTER_FILE = "bigG_to_L_epoch8.pth"


class CLIPConverter(nn.Module):
    """Tokens of our CLIP -> tokens of the CLIP that GIT reads, for GIT was trained on the smaller ViT-L/14.

    Two linear maps, one over the tokens (256 -> 257: theirs have a class token), one over the channels (1664 -> 1024).
    """
    def __init__(self, seq_in: int, seq_out: int, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(seq_in, seq_out), nn.Linear(dim_in, dim_out)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 256, 1664) -> (B, 257, 1024)."""
        tokens = self.linear1(tokens.transpose(1, 2))   # (B, 1664, 257)
        return self.linear2(tokens.transpose(1, 2))     # (B, 257, 1024)


class TokensAsImage(nn.Module):
    """Stands where GIT's image encoder was: what comes in as an "image" (B, 1, 257, 1024) is already its output."""
    def forward(self, pixel_values: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=pixel_values[:, 0])


class Captioner(nn.Module):
    """Image tokens (B, S, D) of our CLIP -> sentences."""
    def __init__(self, git: GitForCausalLM, converter: CLIPConverter, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        git.git.image_encoder = TokensAsImage()
        self.git, self.converter, self.tokenizer = git, converter, tokenizer

    @torch.no_grad()
    def caption(self, tokens: Tensor, max_length: int = 20) -> list[str]:
        """The likeliest next word, again and again (greedy): (B, S, D) -> B sentences. max_length counts the start."""
        image = self.converter(tokens.to(self.converter.linear1.weight))[:, None]  # (B, 1, 257, 1024)
        config = self.git.config
        words = torch.full((len(image), 1), config.bos_token_id, device=image.device)  # (B, 1)
        ended = words == config.eos_token_id
        # Not git.generate: transformers 5.17 counts the image's tokens as words there, and other sentences come out.
        while words.shape[1] < max_length and not ended.all():
            likeliest = self.git(input_ids=words, pixel_values=image).logits[:, -1].argmax(-1, keepdim=True)  # (B, 1)
            words = torch.cat((words, likeliest.masked_fill(ended, config.pad_token_id)), 1)  # (B, <= max_length)
            ended = ended | (likeliest == config.eos_token_id)
        return [text.strip() for text in self.tokenizer.batch_decode(words, skip_special_tokens=True)]


def load_captioner(cache_dir: str | Path, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Captioner:
    """GIT from cache_dir/git (a transformers folder) or else microsoft/git-large-coco, kept in or downloaded to
    cache_dir; and the converter of the release, cache_dir/bigG_to_L_epoch8.pth.

    Raises UserError when either can be neither read nor downloaded.
    """
    folder, file = Path(cache_dir) / "git", Path(cache_dir) / CONVERTER_FILE
    checkpoint = torch_load(file, "--cache_dir, or pass --no-captions")
    with reading(file, "--cache_dir, or pass --no-captions"):
        state = checkpoint["model_state_dict"]
        (seq_out, seq_in), (dim_out, dim_in) = state["linear1.weight"].shape, state["linear2.weight"].shape
        converter = CLIPConverter(seq_in, seq_out, dim_in, dim_out)
        converter.load_state_dict(state)
    place, options = folder, {}
    if not folder.exists():
        place, options = GIT[0], {"cache_dir": hub_place(cache_dir, *GIT), "local_files_only": False}
    with reading(folder, "--cache_dir, or pass --no-captions", must_exist=False):
        git = read_whole(GitForCausalLM, place, **options)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    return for_inference(Captioner(git, converter, tokenizer), device, dtype)


def check_files(cache_dir: str | Path, vae: bool, captioner: bool) -> None:
    """Raise UserError now for what `load_vae` or `load_captioner` would miss after an hour of other work."""
    cache_dir = Path(cache_dir)
    wanted = {"--no-blurry_recon": ("vae", VAE_FILE)} if vae else {}
    wanted |= {"--no-captions": (CONVERTER_FILE,)} if captioner else {}
    for flag, names in wanted.items():
        if not any((cache_dir / name).exists() for name in names):
            places = " does not exist, nor does ".join(str(cache_dir / name) for name in names)
            missing = places if len(names) > 1 else f"{places} does not exist"
            raise UserError(f"{missing}: put it there, name another --cache_dir, or pass {flag}.")
