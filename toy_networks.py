"""How the toy world's frozen networks were trained: CLIP, feature teacher, VAE, unCLIP decoder, captioner.

MindEye2 stands on networks that others pretrained for months: OpenCLIP bigG, a VICRegL ConvNeXt, the Stable Diffusion
VAE and an SDXL fine-tuned to take CLIP tokens (paper §2.1-2.4). Their toy twins learn the same jobs from 60,000
procedural scenes. The repository ships the result in toy_networks/, so you need this file only to change a network:

    python toy.py --train_frozen              # ten minutes on an H100, hours on a CPU; writes toy_networks/
    python toy_networks.py git                # one of them anew, on those that are there

| folder         | saved by                     | maps                                                              |
|----------------|------------------------------|-------------------------------------------------------------------|
| clip/          | open_clip (+ a HF tokenizer) | picture (3, 64, 64) -> 16 tokens x 64; caption -> one vector      |
| teacher/       | transformers ConvNextModel   | picture -> 2 x 2 places x 512 features that survive colour jitter |
| unclip/vae     | diffusers AutoencoderKL      | picture <-> latents (4, 8, 8)                                     |
| unclip/unet    | diffusers UNet2DCondition    | noisy latents + CLIP tokens -> velocity                           |
| git/           | transformers GitForCausalLM  | CLIP tokens -> caption, word by word                              |
| bigG_to_L_epoch8.pth | torch, as released     | CLIP tokens -> 17 tokens, as GIT's own image encoder would give   |
| SHA256SUMS     |                              | checked before the weights are used                               |

What made them good enough to look at (each was worth more than a bigger network):
* CLIP: contrast alone never learns shapes, as colour and background already tell most captions apart; and its tokens
  then hold no layout. So each attribute is also classified, and each token must draw its own patch, linearly.
* UNet: predicts velocity, not noise: at high noise "which noise was added" says nothing about the picture.
* All steps run as one CUDA graph: networks this small otherwise wait for Python.

The shipped weights were made by this code on an H100 in 200 s (CLIP and VAE side by side) and 290 s (UNet, in two
runs of 5,120 and 5,600 steps instead of one of 11,000); GIT and its converter by `python toy_networks.py git` on one
CPU core in twenty minutes. From true tokens they draw unseen scenes at PixCorr .995.
"""
import argparse
import hashlib
import json
import shutil
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers import ConvNextConfig, ConvNextModel, GitConfig, GitForCausalLM, PreTrainedTokenizerFast

import frozen
import toy

NUM_SCENES = 60_000
STEPS = {"clip": 9000, "teacher": 1500, "vae": 4500, "unet": 11000, "git": 1800}
BATCH = {"clip": 512, "teacher": 256, "vae": 128, "unet": 512, "git": 128}
MAX_LR = {"clip": 1e-3, "teacher": 1e-3, "vae": 8e-4, "unet": 6e-4, "git": 2e-3}


# ---------------------------------------------------------------------------------------------------------------------
# One training loop for all
# ---------------------------------------------------------------------------------------------------------------------
def train(name: str, network: nn.Module, loss_fn, device: str, scale: float = 1.0, graph: bool = True) -> nn.Module:
    """Minimise loss_fn() over network's parameters; return its moving average (decay .999), which draws cleaner."""
    total = max(2, int(STEPS[name] * scale))
    parameters = [p for p in network.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    lr = torch.tensor(MAX_LR[name], device=device)  # a tensor, so that the graph reads each step's value
    graph = graph and device == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=.01, betas=(.9, .99), capturable=device == "cuda")

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
            loss = loss_fn()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, parameters, .001)
        return loss.detach()

    step = capture(step) if graph else step
    bar = tqdm(range(total), desc=f"training {name}", mininterval=2)
    for i in bar:
        warmup, left = min(1, (i + 1) / 200), 1 - i / total
        lr.fill_(MAX_LR[name] * warmup * min(1, left / .5))  # constant, then down to 0 over the second half
        loss = step()
        if i % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    with torch.no_grad():
        for p, a in zip(parameters, average, strict=True):
            p.copy_(a)
    return network.eval()


def capture(step):
    """Record step once as a CUDA graph and return its replay: one launch in place of thousands."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up off the graph, as PyTorch asks
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss
    return replay


# ---------------------------------------------------------------------------------------------------------------------
# CLIP (paper §2.2: the target of everything)
# ---------------------------------------------------------------------------------------------------------------------
CLIP_CONFIG = {"embed_dim": 64,
               "vision_cfg": {"image_size": 64, "patch_size": 16, "layers": 8, "width": 64, "head_width": 16},
               "text_cfg": {"context_length": 20, "width": 64, "heads": 4, "layers": 3, "hf_tokenizer_name": "clip"}}


def build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """One number a word. The end word has the highest number: CLIP's text tower reads the picture's name there."""
    words = [*toy.SHAPES, *toy.COLOURS, *toy.SIZES, *toy.GROUNDS, *" ".join(toy.SKIES).split(), "a", "and", "on"]
    vocabulary = ["<pad>", "<start>", "<unknown>", *dict.fromkeys(words), "<end>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", len(vocabulary) - 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>",
                                   eos_token="<end>", unk_token="<unknown>")
    fast.save_pretrained(folder)
    return fast


def train_clip(images: torch.Tensor, scenes: toy.Scenes, folder: Path, device: str, scale: float) -> None:
    """Contrast picture and caption; classify each attribute; let each token draw its own patch."""
    tokenizer = build_tokenizer(folder)
    length = CLIP_CONFIG["text_cfg"]["context_length"]
    config = CLIP_CONFIG | {"text_cfg": CLIP_CONFIG["text_cfg"] | {"vocab_size": len(tokenizer)}}
    clip = open_clip.CLIP(**config, output_dict=False).to(device)
    clip.visual.output_tokens = True
    words = tokenizer(scenes.captions(), padding="max_length", max_length=length, return_tensors="pt").input_ids
    words = words.to(device)  # (n, 20)
    labels = {"count": scenes.count - 1, "ground": scenes.ground, "sky": scenes.sky}
    for k in range(2):
        for name in ("shape", "colour", "size"):
            labels[f"{name}{k}"] = getattr(scenes, name)[:, k].masked_fill(scenes.count <= k, -100)  # -100: not scored
    labels = {name: values.to(device) for name, values in labels.items()}
    dim, patch = CLIP_CONFIG["vision_cfg"]["width"], CLIP_CONFIG["vision_cfg"]["patch_size"]
    heads = nn.ModuleDict({name: nn.Linear(dim, int(values.max()) + 1) for name, values in labels.items()})
    heads["patch"] = nn.Linear(dim, 3 * (patch // 2) ** 2)
    both = nn.ModuleList([clip, heads.to(device)])

    def loss() -> torch.Tensor:
        rows = torch.randint(len(images), (BATCH["clip"],), device=device)
        pictures = images[rows].float() / 255
        pooled, tokens = clip.visual(frozen.clip_preprocess(pictures, patch * 4))  # (B, 64), (B, 16, 64)
        image_vector = F.normalize(pooled.float(), dim=-1)
        text_vector = F.normalize(clip.encode_text(words[rows]).float(), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * image_vector @ text_vector.T  # (B, B)
        same = (words[rows][:, None] == words[rows][None]).all(-1).float()  # a twin caption is no negative
        target = same / same.sum(1, keepdim=True)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        attributes = sum((2 if "shape" in name else 1) * F.cross_entropy(heads[name](pooled), values[rows])
                         for name, values in labels.items())
        patches = F.pixel_unshuffle(F.avg_pool2d(pictures, 2), patch // 2).flatten(2).mT  # (B, 16, 192)
        return contrast + .5 * attributes + 20 * F.mse_loss(heads["patch"](tokens), patches)

    train("clip", both, loss, device, scale)
    preprocess = {"mean": frozen.CLIP_MEAN, "std": frozen.CLIP_STD}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1))
    save_half(clip.state_dict(), folder / "open_clip_model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Teacher of the low-level head (paper §2.5)
# ---------------------------------------------------------------------------------------------------------------------
def train_teacher(images: torch.Tensor, folder: Path, device: str, scale: float) -> None:
    """Like VICRegL: the features of a place must find that place in a recoloured copy, among all other places."""
    teacher = ConvNextModel(ConvNextConfig(hidden_sizes=[24, 48, 96, 512], depths=[1, 1, 2, 0], image_size=64,
                                           layer_scale_init_value=0.)).to(device)
    mean, std = (torch.tensor(v, device=device).reshape(3, 1, 1) for v in (frozen.TEACHER_MEAN, frozen.TEACHER_STD))

    def recolour(x: torch.Tensor) -> torch.Tensor:
        brightness, contrast, saturation = (torch.empty(len(x), 1, 1, 1, device=device).uniform_(.6, 1.4)
                                            for _ in range(3))
        x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x * brightness, contrast)
        x = torch.lerp(x.mean(1, keepdim=True), x, saturation).clamp(0, 1)
        grey = torch.rand(len(x), 1, 1, 1, device=device) < .1
        return torch.where(grey, x.mean(1, keepdim=True), x)

    def features(x: torch.Tensor) -> torch.Tensor:
        maps = teacher((x - mean) / std).last_hidden_state  # (B, 512, 2, 2)
        return F.normalize(maps.flatten(2).mT.flatten(0, 1), dim=-1)  # (B * 4, 512)

    def loss() -> torch.Tensor:
        pictures = images[torch.randint(len(images), (BATCH["teacher"],), device=device)].float() / 255
        logits = features(recolour(pictures)) @ features(recolour(pictures)).T / .1  # (B * 4, B * 4)
        target = torch.arange(len(logits), device=device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    train("teacher", teacher, loss, device, scale)
    teacher.half().save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# VAE and unCLIP decoder (paper §2.3)
# ---------------------------------------------------------------------------------------------------------------------
def train_vae(images: torch.Tensor, folder: Path, device: str, scale: float) -> None:
    """L1 + L2 + sharp edges + a little KL; then the scale that gives the latents unit variance, as in SD."""
    vae = AutoencoderKL(block_out_channels=(32, 64, 96, 96), layers_per_block=1, latent_channels=4, sample_size=64,
                        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                        norm_num_groups=16).to(device)

    def loss() -> torch.Tensor:
        x = images[torch.randint(len(images), (BATCH["vae"],), device=device)].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn_like(posterior.mean)  # (B, 4, 8, 8)
        error = vae.decode(z).sample.float() - x
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = .5 * (posterior.mean ** 2 + posterior.var - 1 - posterior.logvar).mean()
        return error.abs().mean() + (error ** 2).mean() + edges + 3e-4 * kl

    train("vae", vae, loss, device, scale)
    with torch.no_grad():
        latents = vae.encode(images[:512].float() / 127.5 - 1).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    vae.half().save_pretrained(folder)


def encode_all(encode, images: torch.Tensor, label: str) -> torch.Tensor:
    """What a frozen network's encode says of all images, uint8 (n, 3, 64, 64), 500 at a time."""
    return torch.cat([encode(chunk.float() / 255) for chunk in tqdm(images.split(500), desc=label)])


def imperfect(tokens: torch.Tensor, spread: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Tokens (B, 16, 64) as a brain might give them: where u (B, 1, 1) > .5, with noise of up to .3 of their spread."""
    return tokens + spread * torch.randn_like(tokens) * .6 * (u - .5).clamp(min=0)


def train_unclip(images: torch.Tensor, out: Path, device: str, scale: float) -> None:
    """Latents from CLIP tokens alone: SDXL's UNet in small, no text; size and crop are a vector (of 64, not 1024)."""
    clip, vae = frozen.load_clip(out, device), AutoencoderKL.from_pretrained(out / "unclip/vae").to(device)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 128), layers_per_block=2, transformer_layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2,
        cross_attention_dim=clip.emb_dim, attention_head_dim=[4, 8], norm_num_groups=16, use_linear_projection=True,
        class_embed_type="projection", projection_class_embeddings_input_dim=64).to(device)
    scheduler = DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear",
                              prediction_type="v_prediction", clip_sample=False)
    tokens = encode_all(clip.tokens, images, "CLIP tokens")  # (n, 16, 64); each frozen network sees a picture once
    latents = encode_all(lambda pictures: frozen.encode_latents(vae, pictures), images, "latents")  # (n, 4, 8, 8)
    spread = tokens.std()
    vector = frozen.unclip_vector(unet.config.projection_class_embeddings_input_dim, 64).to(device)  # (1, 64)
    alphas = scheduler.alphas_cumprod.to(device)

    def loss() -> torch.Tensor:
        rows = torch.randint(len(latents), (BATCH["unet"],), device=device)
        x, context = latents[rows], tokens[rows]
        # One time in ten, the tokens are pure noise: the "unconditional" of classifier-free guidance (the released
        # decoder is guided by noise, too).
        u = torch.rand(len(x), 1, 1, device=device)
        context = imperfect(context, spread, u)
        context = torch.where(u < .1, torch.randn_like(context), context)
        t = torch.randint(1000, (len(x),), device=device)
        a = alphas[t].reshape(-1, 1, 1, 1)
        noise = torch.randn_like(x)
        velocity = a.sqrt() * noise - (1 - a).sqrt() * x
        out = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, context, class_labels=vector.expand(len(x), -1)).sample
        return F.mse_loss(out.float(), velocity)

    train("unet", unet, loss, device, scale)
    unet.half().save_pretrained(out / "unclip/unet")
    scheduler.save_pretrained(out / "unclip/scheduler")
    # Trained on the same washed-out tokens that MindEye2 predicts, so VAE output in [-1, 1] maps back plainly;
    # the released decoder needs .8 and .2 instead (frozen.load_unclip).
    (out / "unclip/model_index.json").write_text(json.dumps({"output_scale": .5, "output_shift": .5}))


# ---------------------------------------------------------------------------------------------------------------------
# Captioner (paper §2.4)
# ---------------------------------------------------------------------------------------------------------------------
def train_git(images: torch.Tensor, scenes: toy.Scenes, out: Path, device: str, scale: float) -> None:
    """GIT and the converter in front of it learn together to say a picture's caption from its CLIP tokens.

    (The real GIT was trained on pictures, then the converter alone, to give it what its own CLIP would have.)
    """
    clip, tokenizer = frozen.load_clip(out, device), build_tokenizer(out / "git")
    config = GitConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        vision_config={"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
                       "image_size": 64, "patch_size": 16})
    git, converter = GitForCausalLM(config), frozen.CLIPConverter(clip.seq_dim, clip.seq_dim + 1, clip.emb_dim, 64)
    image_encoder = git.git.image_encoder  # never used, but a GIT folder without it would not be a GIT folder
    captioner = frozen.Captioner(git, converter, tokenizer).to(device)
    words = tokenizer(scenes.captions(), padding=True, return_tensors="pt").input_ids.to(device)  # (n, 15)
    tokens = encode_all(clip.tokens, images, "CLIP tokens")  # (n, 16, 64)
    spread = tokens.std()

    def loss() -> torch.Tensor:
        rows = torch.randint(len(tokens), (BATCH["git"],), device=device)
        context, said = tokens[rows], words[rows]
        context = imperfect(context, spread, torch.rand(len(context), 1, 1, device=device))
        logits = captioner.git(input_ids=said, pixel_values=converter(context)[:, None]).logits  # (B, 17 + 15, words)
        logits = logits[:, -said.shape[1]:-1].flatten(0, 1).float()  # each word foretells the next
        return F.cross_entropy(logits, said[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id)

    train("git", nn.ModuleList([git, converter]), loss, device, scale, graph=False)
    git.git.image_encoder = image_encoder
    git.half().save_pretrained(out / "git")
    state = {name: x.half().cpu() for name, x in converter.state_dict().items()}
    torch.save({"model_state_dict": state}, out / "bigG_to_L_epoch8.pth")


# ---------------------------------------------------------------------------------------------------------------------
def save_half(state: dict, path: Path) -> None:
    save_file({k: v.detach().half().contiguous().cpu() for k, v in state.items()}, path)


def write_hashes(folder: Path) -> None:
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(folder)}"
             for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "SHA256SUMS"]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")


ALL = ("clip", "teacher", "vae", "unet", "git")


def train_all(out: Path, seed: int = 0, num_scenes: int = NUM_SCENES, scale: float = 1.0, only=ALL) -> None:
    """Train the networks named in `only`, on those that are in `out` already, and write them whole or not at all.

    scale < 1 shortens every training. What is trained on another network (the UNet on CLIP and VAE, GIT on CLIP) must
    be trained again after it.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    building = out.with_name(out.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    if set(only) != set(ALL):
        shutil.copytree(out, building)
    for name in ("clip", "teacher", "unclip", "git"):
        (building / name).mkdir(parents=True, exist_ok=True)
    scenes = toy.draw_scenes(num_scenes, seed=10_000 + seed)  # the world's seeds are others: none of these is a test
    images = toy.render(scenes, device=device).to(device)  # (n, 3, 64, 64) uint8
    train_one = {
        "clip": lambda: train_clip(images, scenes, building / "clip", device, scale),
        "teacher": lambda: train_teacher(images, building / "teacher", device, scale),
        "vae": lambda: train_vae(images, building / "unclip/vae", device, scale),
        "unet": lambda: train_unclip(images, building, device, scale),
        "git": lambda: train_git(images, scenes, building, device, scale),
    }
    for name in ALL:
        if name in only:
            train_one[name]()
    write_hashes(building)
    shutil.rmtree(out, ignore_errors=True)
    building.rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train some of the toy world's frozen networks anew.")
    parser.add_argument("networks", nargs="+", choices=ALL, help="which; each stands on those before it")
    train_all(toy.NETWORKS, only=parser.parse_args().networks)
