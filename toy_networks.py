"""How the toy world's frozen networks were trained: CLIP, teacher, VAE, unCLIP decoder, captioner, refiner, judges.

MindEye2 stands on networks that others pretrained for months: OpenCLIP bigG, a VICRegL ConvNeXt, the Stable Diffusion
VAE and an SDXL fine-tuned to take CLIP tokens (paper §2.1-2.5). Their toy twins learn the same jobs from 60,000
procedural scenes. The repository ships the result in toy_networks/, so you need this file only to change a network:

    python toy.py --train_frozen              # half an hour on an H100, days on a CPU; writes toy_networks/
    python toy_networks.py git                # one of them anew, on those that are there

| folder         | saved by                     | maps                                                              |
|----------------|------------------------------|-------------------------------------------------------------------|
| clip/          | open_clip (+ a HF tokenizer) | picture (3, 64, 64) -> 16 tokens x 64; caption -> one vector      |
| teacher/       | transformers ConvNextModel   | picture -> 2 x 2 places x 512 features that survive colour jitter |
| unclip/vae     | diffusers AutoencoderKL      | picture <-> latents (4, 8, 8)                                     |
| unclip/unet    | diffusers UNet2DCondition    | noisy latents + CLIP tokens -> velocity                           |
| git/           | transformers GitForCausalLM  | CLIP tokens -> caption, word by word                              |
| bigG_to_L_epoch8.pth | torch, as released     | CLIP tokens -> 17 tokens, as GIT's own image encoder would give   |
| alexnet-*.pth, inception_*.pth, efficientnet_*.pth, swav_*.pth.tar | torch     | judges: picture -> features        |
| clip_L/, clip_B/ | open_clip                  | judges: picture or caption -> one vector                          |
| sentence/      | transformers BertModel       | a judge: caption -> one vector                                    |
| sdxl/          | diffusers SDXL, without VAE  | noisy latents + caption -> velocity (its VAE is unclip/vae)       |
| SHA256SUMS     |                              | checked before the weights are used                               |

What made them good enough to look at (each was worth more than a bigger network):
* CLIP: contrast alone never learns shapes, as colour and background already tell most captions apart; and its tokens
  then hold no layout. So each token also tells each attribute of the picture, and draws its own patch, linearly.
  (Told by the pooled vector alone, shape was 1 % of the tokens' variance, and nothing that reads brains found it.)
* Refiner and decoder predict velocity, not noise: at high noise "which noise was added" says nothing about the picture.
  (Told to predict noise, a decoder trained as long ended at PixCorr .854 from true tokens instead of .988.)
* The decoder is made from the refiner, as the paper made its own from SDXL. 2.7 times as large, from random
  weights, it draws true tokens better (PixCorr .996 against .964) and a brain's blurred (edges .66 as strong as seen
  ones, against .93; two-way CLIP .921 against .970). --token_noise matters less: from SDXL, .972 without it, .976 with
  .4, .970 with .7. (150 test pictures, the model of all sessions, seed 0: by these the shipped one, of .4, was chosen.)
* Each step is one CUDA graph, but for GIT's and the sentence judge's: networks this small wait for Python.

The shipped weights were made by this code: on an H100 CLIP (110 s) and SDXL (407 s) beside the judges (489 s), on an
H200 GIT (125 s) beside SwAV's twin (133 s), and the decoder (217 s). VAE and teacher are older, of the same code.
"""
import argparse
import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    GitConfig,
    GitForCausalLM,
    PreTrainedTokenizerFast,
)

import data
import frozen
import judges
import refine
import toy
import unclip
from model import run_main

NUM_SCENES = 60_000
STEPS = {"clip": 12000, "teacher": 1500, "vae": 4500, "unet": 11000, "git": 6000, "sdxl": 10000}
BATCH = {"clip": 512, "teacher": 256, "vae": 128, "unet": 512, "git": 128, "sdxl": 512}
MAX_LR = {"clip": 1e-3, "teacher": 1e-3, "vae": 8e-4, "unet": 6e-4, "git": 2e-3, "sdxl": 8e-4}


# ---------------------------------------------------------------------------------------------------------------------
# One training loop for all
# ---------------------------------------------------------------------------------------------------------------------
def train(name: str, network: nn.Module, loss_fn, device: str, scale: float = 1.0, graph: bool = True,
          decay: float = .999) -> nn.Module:
    """Minimise loss_fn() over network's parameters; return its moving average, which draws cleaner."""
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
        torch._foreach_lerp_(average, parameters, 1 - decay)
        return loss.detach()

    step = frozen.record(step) if graph else step
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


def both_ways(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The contrast of CLIP, and of all that learn likewise: rows find their columns, and columns their rows."""
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


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


def scene_labels(scenes: toy.Scenes) -> dict[str, torch.Tensor]:
    """The classes (n,) of each picture by attribute: shape0 .. of the left object, shape1 .. of the right, or -100."""
    labels = {"count": scenes.count - 1, "ground": scenes.ground, "sky": scenes.sky}
    for k in range(2):
        for name in ("shape", "colour", "size"):
            labels[f"{name}{k}"] = getattr(scenes, name)[:, k].masked_fill(scenes.count <= k, -100)  # -100: not scored
    return labels


def train_clip(images: torch.Tensor, scenes: toy.Scenes, folder: Path, device: str, scale: float) -> None:
    """Contrast picture and caption; let each token tell all that is in the picture, and draw its own patch."""
    tokenizer = build_tokenizer(folder)
    length = CLIP_CONFIG["text_cfg"]["context_length"]
    config = CLIP_CONFIG | {"text_cfg": CLIP_CONFIG["text_cfg"] | {"vocab_size": len(tokenizer)}}
    clip = open_clip.CLIP(**config, output_dict=False).to(device)
    clip.visual.output_tokens = True
    words = tokenizer(scenes.captions(), padding="max_length", max_length=length, return_tensors="pt").input_ids
    words = words.to(device)  # (n, 20)
    labels = {name: values.to(device) for name, values in scene_labels(scenes).items()}
    dim, patch = CLIP_CONFIG["vision_cfg"]["width"], CLIP_CONFIG["vision_cfg"]["patch_size"]
    heads = nn.ModuleDict({name: nn.Linear(dim, int(values.max()) + 1, bias=False) for name, values in labels.items()})
    draw_patch = nn.Linear(dim, 3 * (patch // 2) ** 2)
    both = nn.ModuleList([clip, heads, draw_patch]).to(device)

    def loss() -> torch.Tensor:
        rows = torch.randint(len(images), (BATCH["clip"],), device=device)
        pictures = images[rows].float() / 255
        pooled, tokens = clip.visual(frozen.clip_preprocess(pictures, patch * 4))  # (B, 64), (B, 16, 64)
        image_vector = F.normalize(pooled.float(), dim=-1)
        text_vector = F.normalize(clip.encode_text(words[rows]).float(), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * image_vector @ text_vector.T  # (B, B)
        same = (words[rows][:, None] == words[rows][None]).all(-1).float()  # a twin caption is no negative
        target = same / same.sum(1, keepdim=True)
        contrast = both_ways(logits, target)
        # Cosines times 16: to be sure of a class, a token must spend much of its length on it.
        told = F.normalize(torch.cat([pooled[:, None], tokens], 1).float(), dim=-1)  # (B, 17, 64)
        attributes = 0
        for name, values in labels.items():
            scores = 16 * told @ F.normalize(heads[name].weight, dim=-1).T  # (B, 17, classes)
            truth = values[rows][:, None].expand(scores.shape[:2])  # (B, 17)
            weight = 2 if "shape" in name else 1
            attributes = attributes + weight * F.cross_entropy(scores.flatten(0, 1), truth.flatten())
        patches = F.pixel_unshuffle(F.avg_pool2d(pictures, 2), patch // 2).flatten(2).mT  # (B, 16, 192)
        return contrast + .3 * attributes + 40 * F.mse_loss(draw_patch(tokens), patches)

    train("clip", both, loss, device, scale)
    save_clip(clip, config, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Teacher of the low-level head (paper §2.2.3)
# ---------------------------------------------------------------------------------------------------------------------
def recolour(x: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [0, 1] with other brightness, contrast and saturation; one in ten is grey."""
    brightness, contrast, saturation = (torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(.6, 1.4)
                                        for _ in range(3))
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x * brightness, contrast)
    x = torch.lerp(x.mean(1, keepdim=True), x, saturation).clamp(0, 1)
    grey = torch.rand(len(x), 1, 1, 1, device=x.device) < .1
    return torch.where(grey, x.mean(1, keepdim=True), x)


def train_teacher(images: torch.Tensor, folder: Path, device: str, scale: float) -> None:
    """Like VICRegL: the features of a place must find that place in a recoloured copy, among all other places."""
    teacher = ConvNextModel(ConvNextConfig(hidden_sizes=[24, 48, 96, 512], depths=[1, 1, 2, 0], image_size=64,
                                           layer_scale_init_value=0.)).to(device)
    mean, std = (torch.tensor(v, device=device).reshape(3, 1, 1) for v in (frozen.TEACHER_MEAN, frozen.TEACHER_STD))

    def features(x: torch.Tensor) -> torch.Tensor:
        maps = teacher((x - mean) / std).last_hidden_state  # (B, 512, 2, 2)
        return F.normalize(maps.flatten(2).mT.flatten(0, 1), dim=-1)  # (B * 4, 512)

    def loss() -> torch.Tensor:
        pictures = images[torch.randint(len(images), (BATCH["teacher"],), device=device)].float() / 255
        logits = features(recolour(pictures)) @ features(recolour(pictures)).T / .1  # (B * 4, B * 4)
        target = torch.arange(len(logits), device=device)
        return both_ways(logits, target)

    train("teacher", teacher, loss, device, scale)
    teacher.half().save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# VAE, of the low-level head, the decoder and the refiner (paper §2.2.3, 2.4, 2.5)
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


# ---------------------------------------------------------------------------------------------------------------------
# Captioner (paper §2.3)
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
    mean = tokens.mean(0)

    def loss() -> torch.Tensor:
        rows = torch.randint(len(tokens), (BATCH["git"],), device=device)
        context, said = unclip.imperfect(tokens[rows], mean, most=.7), words[rows]
        logits = captioner.git(input_ids=said, pixel_values=converter(context)[:, None]).logits  # (B, 17 + 15, words)
        logits = logits[:, -said.shape[1]:-1].flatten(0, 1).float()  # each word foretells the next
        return F.cross_entropy(logits, said[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id)

    train("git", nn.ModuleList([git, converter]), loss, device, scale, graph=False)
    git.git.image_encoder = image_encoder
    git.half().save_pretrained(out / "git")
    state = {name: x.half().cpu() for name, x in converter.state_dict().items()}
    torch.save({"model_state_dict": state}, out / "bigG_to_L_epoch8.pth")


# ---------------------------------------------------------------------------------------------------------------------
# Judges (paper §3, A.9): who says how good the pictures and captions are (judges.py)
# ---------------------------------------------------------------------------------------------------------------------
STEPS |= {"alexnet": 1500, "inception": 1500, "efficientnet": 1500, "swav": 1500,
          "clip_L": 3000, "clip_B": 3000, "sentence": 2000}
BATCH |= {"alexnet": 128, "inception": 64, "efficientnet": 64, "swav": 128,
          "clip_L": 256, "clip_B": 256, "sentence": 128}
MAX_LR |= {"alexnet": 1e-3, "inception": 4e-3, "efficientnet": 4e-3, "swav": 3e-3,
           "clip_L": 1.5e-3, "clip_B": 2e-3, "sentence": 2e-3}
# How wide the twins of the published networks are: 2 MB of files, and 300 pictures take 10 s on one CPU core.
WIDTHS = {"alexnet": 1 / 4, "inception": 3 / 32, "efficientnet": 1 / 8, "swav": 3 / 32}
JUDGE_CLIPS = {
    "clip_L": {"embed_dim": 48,
               "vision_cfg": {"image_size": 64, "patch_size": 8, "layers": 4, "width": 48, "head_width": 12},
               "text_cfg": {"context_length": 20, "width": 48, "heads": 4, "layers": 2, "hf_tokenizer_name": "clip"}},
    "clip_B": {"embed_dim": 32,
               "vision_cfg": {"image_size": 64, "patch_size": 16, "layers": 3, "width": 32, "head_width": 8},
               "text_cfg": {"context_length": 20, "width": 32, "heads": 4, "layers": 2, "hf_tokenizer_name": "clip"}},
}


def worn(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, 64, 64) as a decoder might draw them, half of them blurred, half of them noisy, by any amount.

    A judge that never saw such pictures calls each of them strange, and none better than another.
    """
    blur, noise = ((2 * torch.rand(len(pictures), 1, 1, 1, device=pictures.device) - 1).clamp(min=0) for _ in range(2))
    soft = F.avg_pool2d(F.pad(pictures, (3, 3, 3, 3), mode="replicate"), 7, 1)
    return (torch.lerp(pictures, soft, blur) + .12 * noise * torch.randn_like(pictures)).clamp(0, 1)


def zoomed(pictures: torch.Tensor, size: int) -> torch.Tensor:
    """A random square of each picture (B, 3, 64, 64), 60 to 100% of its side, maybe mirrored: (B, 3, size, size)."""
    side, left, top, mirror = torch.rand(4, len(pictures), device=pictures.device)
    side = .6 + .4 * side
    theta = torch.zeros(len(pictures), 2, 3, device=pictures.device)
    theta[:, 0, 0], theta[:, 1, 1] = side * torch.sign(mirror - .5), side
    theta[:, 0, 2], theta[:, 1, 2] = (2 * left - 1) * (1 - side), (2 * top - 1) * (1 - side)
    grid = F.affine_grid(theta, (len(pictures), 3, size, size), align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False, padding_mode="reflection")


def narrow(network: nn.Module, share: float) -> nn.Module:
    """Make each layer's channels fewer, `share` of what they are: a published network's twin in small."""
    def shape(x: torch.Tensor) -> torch.Size:
        inputs = [n if n in (1, 3) else math.ceil(n * share) for n in x.shape[1:2]]  # 1: depthwise; 3: the picture
        return torch.Size([math.ceil(x.shape[0] * share), *inputs, *x.shape[2:]])

    judges.fit(network, {name: shape(x) for name, x in network.state_dict().items() if x.ndim})
    return network


@torch.no_grad()
def settle(network: nn.Module, draw, batches: int = 30) -> None:
    """Measure anew what the batch norms divide by: the trained weights are an average that no step has run with."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean of all batches
    network.train()
    for _ in range(batches):
        network(draw())
    network.eval()


def train_convolutional(name: str, images: torch.Tensor, scenes: toy.Scenes, out: Path, device: str,
                        scale: float) -> None:
    """A narrow twin of one of torchvision's networks, at the size at which it judges, saved as the released file.

    It learns to name each object and the background; SwAV's, taught without labels, to know a picture again in another
    cut and other colours. What names is left out: only the features behind it judge.
    """
    judge = judges.VISION[name]
    network = narrow(create_feature_extractor(judge.build(), judge.taps), WIDTHS[name]).to(device).train()
    tap = list(judge.taps.values())[-1]
    pool = 4 if name == "alexnet" else 1  # where the network does not pool itself, a summary of 4 x 4 places
    with torch.no_grad():
        width = network(torch.zeros(2, 3, 128, 128, device=device))[tap].shape[1] * pool ** 2
    labels = {key: values.to(device) for key, values in scene_labels(scenes).items()}
    heads = {key: nn.Linear(width, int(values.max()) + 1) for key, values in labels.items()}
    if name == "swav":
        heads = {"project": nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 64))}
    heads = nn.ModuleDict(heads).to(device)

    def draw() -> torch.Tensor:
        return images[torch.randint(len(images), (BATCH[name],), device=device)].float() / 255

    def features(pictures: torch.Tensor) -> torch.Tensor:
        seen = judges.view(pictures, judge.size, judges.IMAGENET_MEAN, judges.IMAGENET_STD)
        return F.adaptive_avg_pool2d(network(seen)[tap], pool).flatten(1)  # (B, width)

    def naming() -> torch.Tensor:
        rows = torch.randint(len(images), (BATCH[name],), device=device)
        vectors = features(worn(images[rows].float() / 255))
        return sum(F.cross_entropy(heads[key](vectors).float(), values[rows]) for key, values in labels.items())

    def recognising() -> torch.Tensor:
        pictures = draw()
        # Each view is worn on its own: a shared noise would give the pair away, and noise be all that is learned.
        views = [recolour(zoomed(worn(pictures), judge.size)) for _ in range(2)]
        one, two = (F.normalize(heads["project"](features(view)).float(), dim=-1) for view in views)  # (B, 64) each
        logits, target = one @ two.T / .1, torch.arange(len(one), device=device)  # (B, B)
        return both_ways(logits, target)

    train(name, nn.ModuleList([network, heads]), recognising if name == "swav" else naming, device, scale, decay=.99)
    settle(network, lambda: judges.view(worn(draw()), judge.size, judges.IMAGENET_MEAN, judges.IMAGENET_STD))
    prefix = "module." if name == "swav" else ""  # as released
    torch.save({prefix + key: x.half().cpu() for key, x in network.state_dict().items() if x.ndim},
               out / judges.file_name(name))


def train_judge_clip(name: str, images: torch.Tensor, scenes: toy.Scenes, folder: Path, device: str,
                     scale: float) -> None:
    """A CLIP of its own, that MindEye2 was not trained on: it contrasts pictures and captions, and names attributes."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, config = build_tokenizer(folder), JUDGE_CLIPS[name]
    config = config | {"text_cfg": config["text_cfg"] | {"vocab_size": len(tokenizer)}}
    clip = open_clip.CLIP(**config, output_dict=False).to(device)
    words = tokenizer(scenes.captions(), padding="max_length", max_length=config["text_cfg"]["context_length"],
                      return_tensors="pt").input_ids.to(device)  # (n, 20)
    labels = {key: values.to(device) for key, values in scene_labels(scenes).items()}
    size = config["vision_cfg"]["image_size"]
    heads = nn.ModuleDict({key: nn.Linear(config["embed_dim"], int(values.max()) + 1)
                           for key, values in labels.items()}).to(device)

    def loss() -> torch.Tensor:
        rows = torch.randint(len(images), (BATCH[name],), device=device)
        pictures = worn(images[rows].float() / 255)
        image = clip.encode_image(judges.view(pictures, size, frozen.CLIP_MEAN, frozen.CLIP_STD)).float()
        text = clip.encode_text(words[rows]).float()                       # (B, E), both
        logits = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T  # (B, B)
        logits = clip.logit_scale.exp().clamp(max=100) * logits
        target = (words[rows][:, None] == words[rows][None]).all(-1).float()
        target = target / target.sum(1, keepdim=True)  # a twin caption is no negative
        contrast = both_ways(logits, target)
        named = sum(F.cross_entropy(heads[key](vectors), values[rows])
                    for vectors in (image, text) for key, values in labels.items())
        return contrast + .25 * named

    train(name, nn.ModuleList([clip, heads]), loss, device, scale, decay=.99)
    save_clip(clip, config, folder)


SWAPPED = [0, 1, 5, 6, 7, 2, 3, 4]  # of ground, sky, and shape, colour, size of each object: the objects change places


def shared_attributes(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of all that captions i and j say, the share that both say: labels (n, 8) and (m, 8), -100 for nothing, (n, m).

    Objects are compared left with left and right with right, or crosswise, whichever gives more.
    """
    shares = []
    for other in (b, b[:, SWAPPED]):
        said = (a >= 0)[:, None] | (other >= 0)[None]  # (n, m, 8)
        shares.append(((a[:, None] == other[None]) & said).sum(-1) / said.sum(-1))
    return torch.maximum(*shares)


def train_sentence(scenes: toy.Scenes, folder: Path, device: str, scale: float) -> None:
    """A tiny BERT: the cosine of two captions is the share of attributes in common. In SentenceTransformers' layout."""
    # A second caption for each scene, with half of its attributes from another one: chance makes few close pairs.
    scenes = toy.Scenes(*[x[:20_000] for x in vars(scenes).values()])
    order = torch.randperm(len(scenes.count))
    pairs = scenes, toy.Scenes(*[torch.where(torch.rand(x.shape) < .5, x, x[order]) for x in vars(scenes).values()])
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(folder)
    texts = [tokenizer(part.captions(), padding="max_length", max_length=20, return_tensors="pt").to(device)
             for part in pairs]
    labels = [torch.stack([x for key, x in scene_labels(part).items() if key != "count"], 1).to(device)
              for part in pairs]  # (n, 8) each
    bert = BertModel(BertConfig(
        vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=32, hidden_dropout_prob=0., attention_probs_dropout_prob=0.,
        pad_token_id=tokenizer.pad_token_id)).to(device)

    def embed(k: int, rows: torch.Tensor) -> torch.Tensor:
        mask = texts[k].attention_mask[rows]
        vectors = bert(texts[k].input_ids[rows], attention_mask=mask).last_hidden_state.float() * mask[..., None]
        return F.normalize(vectors.sum(1), dim=-1)  # (B, 48)

    def loss() -> torch.Tensor:
        rows = torch.randint(len(labels[0]), (BATCH["sentence"],), device=device)
        error = embed(0, rows) @ embed(1, rows).T - shared_attributes(labels[0][rows], labels[1][rows])  # (B, B)
        return (error ** 2).mean() + (error.diagonal() ** 2).mean()

    train("sentence", bert, loss, device, scale, graph=False, decay=.99)
    bert.half().save_pretrained(folder)
    parts = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    settings = {
        "modules.json": [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                         for i, (path, kind) in enumerate(parts.items())],
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
        "sentence_bert_config.json": {"max_seq_length": 20, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True,
                                  "pooling_mode_cls_token": False, "pooling_mode_max_tokens": False},
    }
    for name, value in settings.items():
        (folder / name).write_text(json.dumps(value, indent=1))


def train_judges(images: torch.Tensor, scenes: toy.Scenes, out: Path, device: str, scale: float) -> None:
    """All judges, each in the place where judges.py looks for the published one."""
    for name in WIDTHS:
        train_convolutional(name, images, scenes, out, device, scale)
    for name in JUDGE_CLIPS:
        train_judge_clip(name, images, scenes, out / name, device, scale)
    train_sentence(scenes, out / "sentence", device, scale)


# ---------------------------------------------------------------------------------------------------------------------
# Refiner (paper §2.5)
# ---------------------------------------------------------------------------------------------------------------------
def blank_prompts(length: int) -> list[str]:
    """What counts as no prompt: nothing, or words that the tokenizer does not know, of any number up to `length`.

    With the second, a negative prompt made for the real SDXL means "no prompt" to the toy's.
    """
    unknown = [" ".join("?" * count) for count in range(1, length + 1)]
    return unknown + [""] * (length // 2) + unknown[-1:] * (length // 2)  # a long prompt is cut: often all unknown


def train_sdxl(images: torch.Tensor, scenes: toy.Scenes, out: Path, device: str, scale: float) -> None:
    """Latents from captions: SDXL in small, its UNet and its two text encoders, which here learn together with it."""
    length, folder = CLIP_CONFIG["text_cfg"]["context_length"], out / "sdxl"
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = build_tokenizer(folder / name)
        tokenizer.model_max_length = length  # diffusers' pipeline asks for it
        tokenizer.save_pretrained(folder / name)
    numbers = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    common = numbers | {"vocab_size": len(tokenizer), "max_position_embeddings": length, "intermediate_size": 128}
    first = CLIPTextModel(CLIPTextConfig(**common, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    second = CLIPTextModelWithProjection(CLIPTextConfig(
        **common, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, projection_dim=64))
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 80), layers_per_block=1, transformer_layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2,
        cross_attention_dim=32 + 64, attention_head_dim=[4, 5], norm_num_groups=16, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64 + 6 * 8)
    networks = nn.ModuleDict({"unet": unet, "text_encoder": first, "text_encoder_2": second}).to(device)
    scheduler = DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear",
                              prediction_type="v_prediction", clip_sample=False)
    vae = AutoencoderKL.from_pretrained(out / "unclip/vae").to(device)
    latents = encode_all(lambda pictures: frozen.encode_latents(vae, pictures), images, "latents")  # (n, 4, 8, 8)
    words, blank = (tokenizer(texts, padding="max_length", max_length=length, truncation=True,
                              return_tensors="pt").input_ids.to(device)  # (n, 20), (38, 20)
                    for texts in (scenes.captions(), blank_prompts(length - 2)))
    alphas, sizes = scheduler.alphas_cumprod.to(device), refine.size_numbers(64, 64).to(device)  # (1000,), (6,)

    def loss() -> torch.Tensor:
        rows = torch.randint(len(latents), (BATCH["sdxl"],), device=device)
        x, said = latents[rows], words[rows]
        none = blank[torch.randint(len(blank), (len(x),), device=device)]
        said = torch.where(torch.rand(len(x), 1, device=device) < .1, none, said)  # for guidance
        # The last hidden states are not used, so what makes them learns nothing: as in SDXL.
        texts = [network(said, output_hidden_states=True) for network in (first, second)]
        tokens = torch.cat([text.hidden_states[-2] for text in texts], -1)  # (B, 20, 96)
        added = {"text_embeds": texts[1].text_embeds, "time_ids": sizes.expand(len(x), -1)}
        t = torch.randint(1000, (len(x),), device=device)
        a = alphas[t].reshape(-1, 1, 1, 1)
        noise = torch.randn_like(x)
        velocity = a.sqrt() * noise - (1 - a).sqrt() * x
        guess = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, tokens, added_cond_kwargs=added).sample
        return F.mse_loss(guess.float(), velocity)

    train("sdxl", networks, loss, device, scale)
    index = {name: ["diffusers", kind] for name, kind in
             {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDPMScheduler"}.items()}
    for name, network in networks.items():
        network.half().save_pretrained(folder / name)
        index.setdefault(name, ["transformers", type(network).__name__])
    index |= {name: ["transformers", "PreTrainedTokenizerFast"] for name in ("tokenizer", "tokenizer_2")}
    scheduler.save_pretrained(folder / "scheduler")
    index |= {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# Decoder (paper §2.4): after the refiner, from which it is made
# ---------------------------------------------------------------------------------------------------------------------
def train_unclip(images: torch.Tensor, out: Path, device: str, scale: float) -> None:
    """Latents from CLIP tokens: the toy's SDXL loses its text, as in the paper, by unclip.py."""
    work = out.with_name(out.name + ".unclip")
    shutil.rmtree(work, ignore_errors=True)
    data.write_images(work / "scenes.hdf5", images.cpu().numpy() / np.float16(255))
    steps = max(2, int(STEPS["unet"] * scale))
    unclip.main([
        f"--base={out / 'sdxl'}", f"--vae={out / 'unclip/vae'}", f"--images={work / 'scenes.hdf5'}",
        f"--cache_dir={out}", f"--train_logs={work}", f"--num_steps={steps}", f"--ckpt_interval={max(1, steps // 4)}",
        f"--batch_size={BATCH['unet']}", f"--max_lr={MAX_LR['unet']}", "--warmup=200", "--decay=.5", "--ema=.999",
        "--token_noise=.4", "--blind=.1",  # brains' tokens are not exact; guidance leads away from noise
        "--num_val=256", "--num_eval=256", "--scheduler=dpm", "--steps=6", "--guidance=1",
        *(["--graph", "--compile"] if device == "cuda" else [])])
    for name in ("unet", "scheduler"):
        shutil.rmtree(out / "unclip" / name, ignore_errors=True)
        (work / "decoder/unclip" / name).rename(out / "unclip" / name)
    (work / "decoder/unclip/model_index.json").replace(out / "unclip/model_index.json")
    shutil.rmtree(out / "targets", ignore_errors=True)
    shutil.rmtree(work)


# ---------------------------------------------------------------------------------------------------------------------
def save_half(state: dict, path: Path) -> None:
    save_file({k: v.detach().half().contiguous().cpu() for k, v in state.items()}, path)


def save_clip(clip: nn.Module, config: dict, folder: Path) -> None:
    """As open_clip reads it from a folder."""
    about = {"model_cfg": config, "preprocess_cfg": {"mean": frozen.CLIP_MEAN, "std": frozen.CLIP_STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(about, indent=1))
    save_half(clip.state_dict(), folder / "open_clip_model.safetensors")


def write_hashes(folder: Path) -> None:
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(folder)}"
             for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "SHA256SUMS"]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")


ALL = ("clip", "teacher", "vae", "git", "judges", "sdxl", "unet")


def train_all(out: Path, seed: int = 0, num_scenes: int = NUM_SCENES, scale: float = 1.0, only=ALL) -> None:
    """Train the networks named in `only`, on those that are in `out` already, and write them whole or not at all.

    scale < 1 shortens every training. What is trained on another network (GIT on CLIP, SDXL on the VAE, the UNet on
    CLIP, VAE and SDXL) must be trained again after it.
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
        "git": lambda: train_git(images, scenes, building, device, scale),
        "judges": lambda: train_judges(images, scenes, building, device, scale),
        "sdxl": lambda: train_sdxl(images, scenes, building, device, scale),
        "unet": lambda: train_unclip(images, building, device, scale),
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
    run_main(lambda: train_all(toy.NETWORKS, only=parser.parse_args().networks))
