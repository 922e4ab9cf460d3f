"""The judges: frozen networks whose features say how alike two pictures or two captions are (paper §3, A.9).

Pixels cannot say that a dog was drawn for a dog; a network that learned to see dogs can. evaluate.py shows each judge
the seen picture and its reconstruction, or two captions, and compares what it says of them:

| judge        | in --cache_dir                   | sees   | says of B pictures, or of n captions                      |
|--------------|----------------------------------|--------|-----------------------------------------------------------|
| alexnet      | alexnet-owt-7be5be79.pth         | 256 px | alex2 (B, 184512) early, alex5 (B, 57600) after 5 layers  |
| inception    | inception_v3_google-0cc3c7bd.pth | 342 px | inception (B, 2048): its last maps, averaged over places  |
| efficientnet | efficientnet_b1-c27df63c.pth     | 255 px | efficientnet (B, 1280), likewise                          |
| swav         | swav_800ep_pretrain.pth.tar      | 224 px | swav (B, 2048), likewise: a ResNet-50 taught unsupervised |
| clip_l       | clip_L/, or OpenAI's ViT-L/14    | 224 px | clip_l (B, 768); captions (n, 768)                        |
| clip_b       | clip_B/, or OpenAI's ViT-B/32    |        | captions (n, 512)                                         |
| sentence     | sentence/, or all-MiniLM-L6-v2   |        | captions (n, 384)                                         |
| fid          | weights-inception-2015-..d.pth   | 299 px | (B, 2048), for FID, which compares sets (unclip.py)       |

evaluate.py never downloads a judge. It leaves out the rows of one that is not there, and names this command:

    python judges.py --cache_dir toy               # which are there?
    python judges.py --cache_dir toy --download    # bring those that are not, up to 3 GB in all
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import huggingface_hub
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from transformers import AutoModel, AutoTokenizer

from checkpoints import reading, torch_load
from data import resized
from files import is_disk_full
from frozen import CLIP_MEAN, CLIP_STD, in_hub_cache, normalised, read_whole
from model import UserError, run_main

FLAG = "--cache_dir"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Missing(Exception):
    """A judge, or a file of captions, is not there; the text is one sentence: which file brings it, and where to."""


def view(images: Tensor, size: int, mean: tuple, std: tuple, antialias: bool = False) -> Tensor:
    """What a judge gets to see: (B, 3, H, W) in [0, 1] -> (B, 3, size, size), resized bilinearly and normalised.

    No crop. The paper's torchvision made tensors smaller without antialiasing, and its numbers hold for that only.
    """
    images = images.float() if images.shape[-2:] == (size, size) else resized(images, size, antialias)
    return normalised(images, mean, std)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures: four convolutional networks of torchvision
# ----------------------------------------------------------------------------------------------------------------------


class Convolutional(NamedTuple):
    """A published network, and which of its parts speaks."""
    title: str
    url: str                       # of the weights; its last part is the file's name
    build: Callable[[], nn.Module]
    heads: tuple[str, ...]         # parts of the file that come after what we read, or only serve training
    taps: dict[str, str]           # part whose output we read: our name of it
    size: int                      # pixels


# transform_input: Inception's weights are TensorFlow's and expect [-1, 1]. The network itself turns ImageNet's
# normalisation into that; without, it still gives features, but of over-contrasted pictures.
_inception = partial(models.inception_v3, transform_input=True, aux_logits=False, init_weights=False)
VISION = {
    "alexnet": Convolutional("torchvision AlexNet", models.AlexNet_Weights.IMAGENET1K_V1.url, models.alexnet,
                             ("classifier.",), {"features.4": "alex2", "features.11": "alex5"}, 256),
    "inception": Convolutional("torchvision InceptionV3", models.Inception_V3_Weights.IMAGENET1K_V1.url, _inception,
                               ("AuxLogits.", "fc."), {"avgpool": "inception"}, 342),
    "efficientnet": Convolutional("torchvision EfficientNet-B1", models.EfficientNet_B1_Weights.IMAGENET1K_V2.url,
                                  models.efficientnet_b1, ("classifier.",), {"avgpool": "efficientnet"}, 255),
    "swav": Convolutional("SwAV ResNet-50", "https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar",
                          models.resnet50, ("fc.", "projection_head.", "prototypes."), {"avgpool": "swav"}, 224),
}


FID_URL = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
           "weights-inception-2015-12-05-6726825d.pth")


def url(name: str) -> str:
    """Where the weights of "fid" or one of VISION are released."""
    return FID_URL if name == "fid" else VISION[name].url


def file_name(name: str) -> str:
    """The released weights' file name, "alexnet-owt-7be5be79.pth" for "alexnet"."""
    return url(name).rsplit("/")[-1]


def _missing(what: str, where: str, cache_dir: str | Path) -> Missing:
    return Missing(f"{what} is not in {cache_dir}: put it there {where}, or run "
                   f"`python judges.py --cache_dir {cache_dir} --download`.")


def find_file(name: str, cache_dir: str | Path) -> Path:
    """The weights of "fid" or one of VISION: in cache_dir, or where torch.hub keeps downloads. Raises Missing."""
    places = Path(cache_dir), Path(torch.hub.get_dir()) / "checkpoints"
    for file in (place / file_name(name) for place in places):
        if file.exists():
            return file
    title = "FID's Inception" if name == "fid" else VISION[name].title
    raise _missing(f"{title} ({file_name(name)})", f"from {url(name)}", cache_dir)


def fit(network: nn.Module, shapes: dict[str, torch.Size]) -> None:
    """Exchange each convolution and batch norm whose weight has another shape in `shapes` for one as wide as there.

    Kernels, strides, padding and what is connected with what stay as published, so a narrow twin of a network needs
    no code of its own. Raises ValueError when the shapes are of another network.
    """
    for name, layer in list(network.named_modules()):
        shape = shapes.get(f"{name}.weight")
        if not isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)) or shape in (None, layer.weight.shape):
            continue
        if len(shape) != layer.weight.ndim or shape[2:] != layer.weight.shape[2:]:
            raise ValueError(f"{name}.weight is {tuple(shape)}, {tuple(layer.weight.shape)} when published")
        if isinstance(layer, nn.Conv2d):
            groups = 1 if layer.groups == 1 else shape[0]  # else depthwise, in all four: a group a channel
            new = nn.Conv2d(shape[1] * groups, shape[0], layer.kernel_size, layer.stride, layer.padding,
                            groups=groups, bias=layer.bias is not None, device=layer.weight.device)
        else:
            new = nn.BatchNorm2d(shape[0], layer.eps, layer.momentum, device=layer.weight.device)
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, new.train(layer.training))


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _described(title: str, weights: int, published: int) -> str:
    """The title, or that another, smaller network stands in for it."""
    return title if weights == published else f"stand-in for {title}, {weights:,} weights instead of {published:,}"


COUNTER = "num_batches_tracked"  # nothing reads it, and older files lack it


def _read_weights(file: Path, heads: tuple[str, ...]) -> dict[str, Tensor]:
    """A file's weights by name, without the heads' and without batch norm's counters of batches. Raises UserError."""
    state = torch_load(file, FLAG)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} cannot be read (it holds no weights): replace it, or name another with {FLAG}.")
    state = {name.removeprefix("module."): value for name, value in state.items()}  # SwAV's were saved by DDP
    return {name: value for name, value in state.items()
            if not name.startswith(heads) and not name.endswith(COUNTER)}


def load_convolutional(name: str, cache_dir: str | Path, device: str | torch.device) -> tuple[nn.Module, str, Path]:
    """One of VISION, cut after the last part that is read: (B, 3, size, size), normalised -> {name: maps}.

    Returns it, its description for the table, and its file. Raises Missing, or UserError when the file is damaged or
    another network's.
    """
    judge, file = VISION[name], find_file(name, cache_dir)
    with torch.device("meta"):
        network = create_feature_extractor(judge.build().eval(), judge.taps)
    published, state = _count(network), _read_weights(file, judge.heads)
    with reading(file, FLAG):
        own = {key for key in network.state_dict() if not key.endswith(COUNTER)}
        if own != set(state):
            missing, foreign = own - set(state), set(state) - own
            raise ValueError(f"it lacks {min(missing)}" if missing else f"it has {min(foreign)}, of another network")
        fit(network, {key: value.shape for key, value in state.items()})
        network.load_state_dict(state, assign=True)
        # Channels last: half the time on a CPU.
        network = network.requires_grad_(False).to(device, torch.float32, memory_format=torch.channels_last)
        if _count(network) != published:
            network(torch.zeros(1, 3, 96, 96, device=device))  # do the layers' widths fit each other?
    return network, _described(judge.title, _count(network), published), file


# ----------------------------------------------------------------------------------------------------------------------
# CLIP: pictures and captions
# ----------------------------------------------------------------------------------------------------------------------


class Clip(NamedTuple):
    """One of OpenAI's CLIPs, as open_clip has it."""
    title: str
    folder: str      # in cache_dir, in open_clip's layout
    model: str       # open_clip's name of the network
    repository: str  # of the weights on huggingface.co
    weights: int     # how many the published one has


CLIPS = {
    "clip_l": Clip("CLIP ViT-L/14", "clip_L", "ViT-L-14", "timm/vit_large_patch14_clip_224.openai", 427_616_513),
    "clip_b": Clip("CLIP ViT-B/32", "clip_B", "ViT-B-32", "timm/vit_base_patch32_clip_224.openai", 151_277_313),
}
CLIP_FILE = "open_clip_model.safetensors"


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def load_openai_clip(name: str, cache_dir: str | Path, device: str | torch.device) -> SimpleNamespace:
    """One of CLIPS -> .network, .tokenizer, .description, .files. Raises Missing or UserError."""
    clip, folder = CLIPS[name], Path(cache_dir) / CLIPS[name].folder
    if folder.exists():
        files, source, options = _files(folder), f"local-dir:{folder}", {}
    else:
        file = in_hub_cache(clip.repository, CLIP_FILE, cache_dir, None)
        if file is None:
            raise _missing(f"{clip.title} of OpenAI", f"as {clip.folder}/, open_clip's folder of it", cache_dir)
        # OpenAI trained with a cheaper GELU; open_clip only warns when it is given the wrong one.
        files, source, options = [file], clip.model, {"pretrained": str(file), "force_quick_gelu": True}
    with reading(folder if folder.exists() else files[0], FLAG):
        network = open_clip.create_model(source, require_pretrained=True, **options)
        tokenizer = open_clip.get_tokenizer(source)
    network = network.eval().requires_grad_(False).to(device)
    description = _described(f"OpenAI's {clip.title}", _count(network), clip.weights)
    return SimpleNamespace(network=network, tokenizer=tokenizer, description=description, files=files)


# ----------------------------------------------------------------------------------------------------------------------
# Captions: SentenceTransformer
# ----------------------------------------------------------------------------------------------------------------------

SENTENCE_REPOSITORY, SENTENCE_WEIGHTS = "sentence-transformers/all-MiniLM-L6-v2", 22_713_216


def load_sentence(cache_dir: str | Path, device: str | torch.device) -> SimpleNamespace:
    """all-MiniLM-L6-v2, a BERT whose word vectors are averaged -> .embed, .description, .files.

    In the folder layout of SentenceTransformers, but read without that library. Raises Missing or UserError.
    """
    folder = Path(cache_dir) / "sentence"
    if not folder.exists():
        file = in_hub_cache(SENTENCE_REPOSITORY, "config.json", cache_dir, None)
        if file is None:
            raise _missing("SentenceTransformer all-MiniLM-L6-v2", "as sentence/, its folder on huggingface.co",
                           cache_dir)  # fmt: skip
        folder = file.parent
    with reading(folder, FLAG):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        network = read_whole(AutoModel, folder)
        settings = folder / "sentence_bert_config.json"
        limit = json.loads(settings.read_text())["max_seq_length"] if settings.exists() else 256
    network = network.eval().requires_grad_(False).to(device, torch.float32)

    def embed(texts: list[str]) -> Tensor:
        words = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(device)
        vectors = network(words.input_ids, attention_mask=words.attention_mask).last_hidden_state  # (n, words, 384)
        real = words.attention_mask[..., None].float()                                             # (n, words, 1)
        return F.normalize((vectors * real).sum(1) / real.sum(1), dim=-1)                          # (n, 384)

    description = _described("SentenceTransformer all-MiniLM-L6-v2", _count(network), SENTENCE_WEIGHTS)
    return SimpleNamespace(embed=embed, description=description, files=_files(folder))


# ----------------------------------------------------------------------------------------------------------------------
# What evaluate.py calls
# ----------------------------------------------------------------------------------------------------------------------


def load_vision(name: str, cache_dir: str | Path, device: str | torch.device) -> SimpleNamespace:
    """A judge of pictures: "alexnet", "inception", "efficientnet", "swav" or "clip_l".

    .features(images (B, 3, H, W) in [0, 1], antialias=False) -> {name: (B, F) float32 on device}; AlexNet's names are
    alex2 and alex5. .description says what it is, .files what it was read from. Raises Missing, or UserError.
    """
    if name in VISION:
        network, description, file = load_convolutional(name, cache_dir, device)
        spread, size, files = (IMAGENET_MEAN, IMAGENET_STD), VISION[name].size, [file]
    else:
        clip = load_openai_clip(name, cache_dir, device)
        spread, size = (CLIP_MEAN, CLIP_STD), clip.network.visual.image_size[0]  # 224; a stand-in may see less
        description, files = clip.description, clip.files

    @torch.no_grad()
    def features(images: Tensor, antialias: bool = False) -> dict[str, Tensor]:
        seen = view(images.to(device), size, *spread, antialias)  # (B, 3, size, size)
        said = network(seen) if name in VISION else {name: clip.network.encode_image(seen)}
        return {key: values.float().flatten(1) for key, values in said.items()}  # (B, F) each

    return SimpleNamespace(features=features, description=description, files=files)


def load_fid(cache_dir: str | Path, device: str | torch.device) -> SimpleNamespace:
    """The Inception that FID is defined by: .network(pictures (B, 3, H, W) uint8) -> (B, 2048), .description, .files.

    TensorFlow's weights and resize: torchvision's Inception gives numbers of another scale. Raises Missing, UserError.
    """
    file = find_file("fid", cache_dir)
    from torchmetrics.image.fid import NoTrainInceptionV3  # here: only FID needs torch-fidelity
    with reading(file, FLAG):
        torch.load(file, weights_only=True)  # torch-fidelity would run code that a file holds: such a one ends here
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))
    network.num_features = 2048  # torchmetrics would find it out by a picture on the CPU
    return SimpleNamespace(network=network.to(device), description="FID's Inception", files=[file])


def load_text(name: str, cache_dir: str | Path, device: str | torch.device) -> SimpleNamespace:
    """A judge of captions: "sentence", "clip_b" or "clip_l".

    .embed(n texts) -> (n, E) float32 of unit length, on the CPU: the cosine of two captions is their dot product.
    .description and .files as of `load_vision`. Raises Missing, or UserError.
    """
    judge = load_sentence(cache_dir, device) if name == "sentence" else load_openai_clip(name, cache_dir, device)
    if name == "sentence":
        embed_batch = judge.embed
    else:
        embed_batch = lambda texts: judge.network.encode_text(judge.tokenizer(texts).to(device), normalize=True)  # noqa: E731

    @torch.no_grad()
    def embed(texts: list[str]) -> Tensor:
        batches = [list(texts[i : i + 100]) for i in range(0, len(texts), 100)]
        return torch.cat([embed_batch(batch).float().cpu() for batch in batches])  # (n, E)

    return SimpleNamespace(embed=embed, description=judge.description, files=judge.files)


# ----------------------------------------------------------------------------------------------------------------------
# Which are there?
# ----------------------------------------------------------------------------------------------------------------------

JUDGES = (*VISION, *CLIPS, "sentence", "fid")


def load(name: str, cache_dir: str | Path, device: str | torch.device = "cpu") -> SimpleNamespace:
    """Any of JUDGES. Raises Missing or UserError."""
    if name == "fid":
        return load_fid(cache_dir, device)
    return (load_vision if name in VISION else load_text)(name, cache_dir, device)


def download(name: str, cache_dir: Path) -> None:
    """Bring one judge into cache_dir, whole or not at all. Raises UserError when its server cannot be reached."""
    repositories = {key: (clip.repository, [CLIP_FILE]) for key, clip in CLIPS.items()}
    repositories["sentence"] = SENTENCE_REPOSITORY, ["*.json", "*.txt", "*.safetensors"]
    repository, patterns = repositories.get(name, (None, None))
    source = f"https://huggingface.co/{repository}" if repository else url(name)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        if repository:
            huggingface_hub.snapshot_download(repository, cache_dir=cache_dir, allow_patterns=patterns)
        else:
            digest = re.search(r"-([0-9a-f]{8})\.", source)  # torchvision's names end in it
            torch.hub.download_url_to_file(source, str(cache_dir / file_name(name)), digest and digest[1])
    except (OSError, RuntimeError, huggingface_hub.errors.HfHubHTTPError) as error:
        if is_disk_full(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"{source} cannot be downloaded ({reason}): bring it into {cache_dir} by other means, or name "
                        f"another folder with {FLAG}.") from error  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, bool]:
    """Prints, of each judge, what it is or why it is not there; returns which are there."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("judges.py", description=__doc__.split("\n\n")[0], formatter_class=formatter)
    parser.add_argument(FLAG, default="toy", type=Path, help="folder of the frozen networks")
    parser.add_argument("--download", action="store_true", help="bring those that are not there, up to 3 GB in all")
    args = parser.parse_args(argv)
    there = {}
    for name in JUDGES:
        try:
            try:
                judge = load(name, args.cache_dir)
            except Missing:
                if not args.download:
                    raise
                download(name, args.cache_dir)
                judge = load(name, args.cache_dir)
            there[name], line = True, judge.description
        except Missing as missing:
            there[name], line = False, str(missing)
        print(f"{name:<13} {line}")
    return there


if __name__ == "__main__":
    run_main(main)
