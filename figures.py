"""Figures that carry their numbers: the architecture, drawn from the model, and the claims, drawn from their results.

In   model.py, frozen.py, refine.py    built at the paper's sizes on torch's "meta" device: shapes without memory
     claims/results.json               written by `python toy.py --claims`
Out  docs/figures/model.svg            boxes, weights, losses, and the shape of the tensor at every arrow
     docs/figures/{claim}.svg          a claim's arms, metric by metric, with intervals, and its verdict

Each SVG holds what it shows as JSON, {"hash", "numbers"}, in <metadata> (Dublin Core's description; `shown` reads it),
so a test can tell whether a figure still is of the model that is there, or of the results that are there. The same
input gives the same bytes, with the same matplotlib.

    python figures.py                  # the model, and every claim in claims/results.json
    python figures.py model            # the model alone, which needs no results
    python figures.py sessions --png   # one claim, and a PNG beside it to look at
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import open_clip
import torch
from diffusers import AutoencoderKL
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from torch import Tensor, nn

import claims
import files
import frozen
import recon
import refine
import train
from data import resized
from model import MindEye2, UserError, run_main

BLUE, RED, GREEN, GRAY, INK = "#0072B2", "#D55E00", "#009E73", "#767676", "#222222"  # Okabe and Ito's, for every eye
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "figures", "font.family": "sans-serif", "font.sans-serif":
         ["DejaVu Sans", "Verdana", "Arial", "sans-serif"], "axes.spines.top": False, "axes.spines.right": False}
PX = .75  # points in a pixel; an SVG's pixel is 1/96 inch


def figure_of(name: str, numbers: dict) -> Figure:
    """The figure of this name from the numbers that it shows: `measure`'s, or a claim's of results.json."""
    return draw_model(numbers) if name == "model" else draw_claim(name, numbers)


def svg(name: str, numbers: dict) -> str:
    """The same as the text of an SVG, which holds the numbers and their hash."""
    about = json.dumps({"hash": claims.digest(numbers), "numbers": numbers})
    with plt.rc_context(STYLE), io.StringIO() as text:
        figure = figure_of(name, numbers)
        figure.savefig(text, format="svg", metadata={"Date": None, "Description": about})
        plt.close(figure)
        return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def save_png(path: Path, name: str, numbers: dict) -> None:
    with plt.rc_context(STYLE), files.replacing(path) as temporary:
        figure = figure_of(name, numbers)
        figure.savefig(temporary, format="png", dpi=192)
        plt.close(figure)


def shown(path: str | Path) -> dict:
    """{"hash", "numbers"} of a figure. Raises UserError if the file holds none."""
    try:
        root = ElementTree.parse(path).getroot()
        return json.loads(root.findtext(".//{http://purl.org/dc/elements/1.1/}description"))
    except (OSError, ElementTree.ParseError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no figure with its numbers ({error}): make it by `python figures.py`.") from None


# ----------------------------------------------------------------------------------------------------------------------
# The model: what it says of itself
# ----------------------------------------------------------------------------------------------------------------------
VOXELS = [15724, 14278, 15226, 13153, 13039, 17907, 12682, 14386]  # of NSD's subjects 1 to 8


def weights(part: nn.Module, learning: bool | None = None) -> int:
    """How many weights a part has; learning: of those that do, or of those that do not."""
    return sum(p.numel() for p in part.parameters() if learning in (None, p.requires_grad))


def watch(model: nn.Module, names: list[str], shapes: dict[str, list]) -> None:
    """Let a forward pass write into `shapes` what goes in and out of each part: "ridge in", "ridge out"."""
    def note(name: str):
        def hook(_, given: tuple, out: object) -> None:
            shapes[f"{name} in"] = list(given[0].shape)
            if isinstance(out, Tensor):
                shapes[f"{name} out"] = list(out.shape)
        return hook
    for name in names:
        model.get_submodule(name).register_forward_hook(note(name.split(".")[-1]))


def measure_brain_model() -> dict:
    """Weights and shapes of MindEye2 for eight subjects, three trials each, from one forward pass."""
    model, shapes = MindEye2(VOXELS).eval(), {}  # in training, autocast asks for a real device
    backbone, prior = model.backbone, model.diffusion_prior
    parts = {"tokens": backbone.backbone_linear, "retrieval": backbone.clip_proj, "prior": prior,
             "maps": nn.ModuleList([backbone.blin1, backbone.bnorm]), "upsampler": backbone.bupsampler,
             "projector": backbone.b_maps_projector}
    mixer = nn.ModuleList([backbone.mixer_blocks1, backbone.mixer_blocks2])
    watch(model, [f"ridge.linears.{i}" for i in range(len(VOXELS))] + ["backbone.backbone_linear", "backbone.bnorm"],
          shapes)
    tokens = backbone.token_shape
    out = model([torch.empty(3, voxels) for voxels in VOXELS], torch.empty(3 * len(VOXELS), *tokens))
    size = {name: weights(part) for name, part in parts.items()}
    size |= {"ridges": [weights(one) for one in model.ridge.linears], "mixer learns": weights(mixer, True),
             "mixer carried": weights(mixer, False), "shared": weights(backbone) + weights(prior)}
    return {"weights": size, "shapes": shapes | {name: list(x.shape) for name, x in out.items()},
            "blocks": len(backbone.mixer_blocks1), "layers": len(prior.net.causal_transformer.layers)}


def draw_and_refine(unclip: dict[str, nn.Module], refiner: nn.Module, tokens: Tensor,
                    word_dim: int) -> tuple[Tensor, Tensor]:
    """One step of either UNet, through the VAE, which has the same structure for both: two pictures (B, 3, H, W)."""
    batch, side, config = len(tokens), refine.SIZE // 8, unclip["unet"].config
    times, vector = torch.empty(batch), torch.empty(batch, config.projection_class_embeddings_input_dim)
    noisy = torch.empty(batch, 4, config.sample_size, config.sample_size)
    drawn = unclip["unet"](noisy, times, tokens, class_labels=vector).sample  # (B, 4, h, w)
    words, added = torch.empty(batch, 77, word_dim), {"text_embeds": torch.empty(batch, 1280),
                                                      "time_ids": torch.empty(batch, 6)}
    refined = refiner(torch.empty(batch, 4, side, side), times, words, added_cond_kwargs=added).sample  # (B, 4, h, w)
    return unclip["vae"].decode(drawn).sample, unclip["vae"].decode(refined).sample


@torch.no_grad()
def measure_frozen_networks(tokens: list[int], latents: list[int]) -> dict:
    """The same of the frozen ones: what they make of tokens (B, S, D), latents (B, 4, L, L), and of seen pictures."""
    batch, length, channels = tokens
    unclip, refiner, vae = frozen.unclip_networks(), refine.empty_part("unet"), AutoencoderKL(**frozen.SD_VAE)
    clip = frozen.FrozenCLIP(open_clip.CLIP(**open_clip.get_model_config("ViT-bigG-14")), None)
    teacher = frozen.FrozenTeacher(frozen.ConvNeXtTeacher())
    converter = frozen.CLIPConverter(length, 257, channels, 1024)  # ViT-L/14's tokens, which GIT reads
    texts = [refine.empty_part(part) for part in ("text_encoder", "text_encoder_2")]
    drawn, refined = draw_and_refine(unclip, refiner, torch.empty(tokens), sum(x.config.hidden_size for x in texts))
    seen = torch.empty(batch, 3, clip.image_size, clip.image_size)
    shapes = {"picture": drawn, "kept": resized(drawn, min(drawn.shape[-1], recon.MAX_SIZE)), "refined": refined,
              "seen": seen, "clip_target": clip.tokens(seen), "features": teacher(seen),
              "latents": frozen.encode_latents(vae, seen), "blurry": frozen.decode_latents(vae, torch.empty(latents))}
    parts = {"unclip": [unclip["unet"], unclip["vae"].decoder, unclip["vae"].post_quant_conv],
             "vae encoder": [vae.encoder, vae.quant_conv], "vae decoder": [vae.decoder, vae.post_quant_conv],
             "CLIP": [clip.clip.visual], "teacher": [teacher], "converter": [converter],
             "refiner": [refiner, *texts, unclip["vae"]]}
    return {"weights": {name: sum(map(weights, nets)) for name, nets in parts.items()},
            "shapes": {name: list(x.shape) for name, x in shapes.items()}}


def measure() -> dict:
    """All numbers of the drawing, from the networks at the paper's sizes. Takes seconds, and no memory."""
    with torch.device("meta"):
        ours = measure_brain_model()
        theirs = measure_frozen_networks(ours["shapes"]["backbone"], ours["shapes"]["blurry_latents"])
    flags = train.parse_args([])
    losses = {name: getattr(flags, name) for name in ("prior_scale", "clip_scale", "blur_scale", "mixup_pct")}
    return {"learning": ours, "frozen": theirs, "losses": losses}


# ----------------------------------------------------------------------------------------------------------------------
# The model: the drawing. Its unit is a pixel, y grows downwards
# ----------------------------------------------------------------------------------------------------------------------
WIDTH, HEIGHT = 900, 1090
LOW, FEATURES, DRAW, RETRIEVE = 92, 250, 450, 735  # x of the four columns
KINDS = {  # of box: what fills it, its edge, dashes, rounding
    "learning": ("#DCECF7", BLUE, "-", 4), "frozen": ("#F1F1F1", GRAY, (0, (4, 3)), 4),
    "tensor": ("white", "#9A9A9A", "-", 11), "loss": ("#FCE7DA", RED, "-", 11)}


def count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"


def shape(dims: list[int], batch: str = "B") -> str:
    return f"({', '.join([batch, *map(str, dims[1:])])})"


def write(axes: Axes, x: float, y: float, text: str, size: float = 11.5, **options) -> None:
    axes.text(x, y, text, fontsize=size * PX, **{"ha": "center", "va": "center_baseline", "color": INK} | options)


def box(axes: Axes, kind: str, x: float, y: float, width: float, height: float, *lines: str) -> None:
    """A box about (x, y). The first line is bold if others follow it, but for losses."""
    fill, edge, dashes, radius = KINDS[kind]
    axes.add_patch(FancyBboxPatch(
        (x - width / 2 + radius, y - height / 2 + radius), width - 2 * radius, height - 2 * radius, fc=fill, ec=edge,
        ls=dashes, lw=1.3 * PX, boxstyle=f"round,pad={radius},rounding_size={radius}"))
    for row, line in enumerate(lines):
        bold = {"weight": "bold", "size": 12} if row == 0 and len(lines) > 1 and kind != "loss" else {}
        write(axes, x, y + 16 * (row - (len(lines) - 1) / 2), line, **bold)


def arrow(axes: Axes, *corners: tuple[float, float], label: str = "", right: bool = True, at: float | None = None,
          color: str = INK, head: bool = True) -> None:
    """A line through the corners, with a head at its end. The label stands beside the last piece, at height `at`."""
    *way, before, end = corners
    bare = [*way, before] if head else [*way, before, end]  # the head brings the last piece with it
    axes.plot(*zip(*bare, strict=True), color=color, lw=1.2 * PX, solid_capstyle="projecting")
    if head:
        axes.annotate("", end, before, arrowprops={"arrowstyle": "-|>,head_width=.2,head_length=.4", "color": color,
                                                   "lw": 1.2 * PX, "shrinkA": 0, "shrinkB": 0})
    if label:
        middle = (before[1] + end[1]) / 2 - 1 if at is None else at
        write(axes, end[0] + (7 if right else -7), middle, label, 11, ha="left" if right else "right", color="#444444")


def draw_brain_model(axes: Axes, numbers: dict) -> None:
    """Voxels to tokens: what all three ways share."""
    size, shapes = numbers["learning"]["weights"], numbers["learning"]["shapes"]
    for i, ridge in enumerate(size["ridges"]):
        x = 450 + 108 * (i - (len(size["ridges"]) - 1) / 2)
        box(axes, "tensor", x, 110, 96, 42, f"subject {i + 1}", shape(shapes[f"{i} in"], "b"))
        arrow(axes, (x, 131), (x, 153))
        box(axes, "learning", x, 174, 96, 42, "ridge", count(ridge))
        arrow(axes, (x, 195), (x, 221), label=shape(shapes[f"{i} out"], "b"))
    box(axes, "tensor", 450, 236, 852, 30,
        f"shared space   {shape(shapes['backbone_linear in'])}:   B = all subjects' b trials together")
    arrow(axes, (DRAW, 251), (DRAW, 277), label=shape(shapes["backbone_linear in"]))
    box(axes, "learning", DRAW, 300, 330, 46, f"backbone: {numbers['learning']['blocks']} mixer blocks",
        f"{size['mixer learns']} weights learn, {count(size['mixer carried'])} are carried")
    arrow(axes, (DRAW, 323), (DRAW, 373), label=shape(shapes["backbone_linear in"]), at=359)
    box(axes, "learning", DRAW, 396, 210, 46, "backbone: to tokens", count(size["tokens"]))


def draw_low_level(axes: Axes, numbers: dict) -> None:
    """The first way: shared space to a blurry picture."""
    size, shapes, scale = numbers["learning"]["weights"], numbers["learning"]["shapes"], numbers["losses"]["blur_scale"]
    theirs, middle = numbers["frozen"], (LOW + FEATURES) / 2
    arrow(axes, (DRAW, 340), (middle, 340), (middle, 463), label=shape(shapes["backbone_linear in"]), at=449)
    box(axes, "learning", middle, 486, 190, 46, "low-level head", count(size["maps"]))
    for x, name in ((LOW, "upsampler"), (FEATURES, "projector")):
        arrow(axes, (middle, 509), (middle, 531), (x, 531), (x, 555))
        box(axes, "learning", x, 578, 136, 46, name, count(size[name]))
    write(axes, middle + 7, 520, shape(shapes["bnorm out"]), 11, ha="left", color="#444444")
    arrow(axes, (LOW, 601), (LOW, 685), label=shape(shapes["blurry_latents"]), at=616)
    arrow(axes, (LOW, 650), (LOW + 12, 650), color=RED, head=False)
    box(axes, "loss", LOW + 45, 650, 66, 26, f"{scale:g} × L1")
    arrow(axes, (FEATURES, 601), (FEATURES, 637), label=shape(shapes["blurry_features"]), color=RED, at=616)
    box(axes, "loss", FEATURES, 650, 112, 26, f"{scale * train.SOFT_SHARE:g} × SoftCLIP")
    box(axes, "frozen", LOW, 708, 136, 46, "VAE decoder", count(theirs["weights"]["vae decoder"]))
    arrow(axes, (LOW, 731), (LOW, 773), label=shape(theirs["shapes"]["blurry"]))
    box(axes, "tensor", LOW, 788, 136, 30, "blurry picture")


def draw_pictures(axes: Axes, numbers: dict) -> None:
    """The second way: tokens to a picture, and to a refined one, told by its caption."""
    ours, theirs, size = numbers["learning"], numbers["frozen"]["shapes"], numbers["frozen"]["weights"]
    tokens, caption = shape(ours["shapes"]["backbone"]), 700
    arrow(axes, (DRAW, 419), (DRAW, 463), label=tokens, right=False, at=449)
    box(axes, "learning", DRAW, 486, 190, 46, "diffusion prior",
        f"{ours['layers']} layers, {count(ours['weights']['prior'])}")
    arrow(axes, (DRAW, 509), (DRAW, 685), label=shape(ours["shapes"]["prior_prediction"]), right=False, at=600)
    arrow(axes, (DRAW, 560), (DRAW + 22, 560), color=RED, head=False)
    box(axes, "loss", DRAW + 88, 560, 132, 26, f"{numbers['losses']['prior_scale']:g} × squared error")
    box(axes, "frozen", DRAW, 708, 190, 46, "unCLIP decoder", count(size["unclip"]))
    arrow(axes, (DRAW, 731), (DRAW, 773), label=shape(theirs["picture"]))
    box(axes, "tensor", DRAW, 788, 190, 30, "picture")
    arrow(axes, (DRAW, 803), (DRAW, 829), label=shape(theirs["kept"]))
    box(axes, "frozen", DRAW, 852, 190, 46, "refiner (SDXL)", count(size["refiner"]))
    arrow(axes, (DRAW - 95, 852), (LOW + 68, 852))
    write(axes, (DRAW - 95 + LOW + 68) / 2, 841, shape(theirs["refined"]), 11, color="#444444")
    box(axes, "tensor", LOW, 852, 136, 30, "refined picture")
    arrow(axes, (DRAW, 640), (caption, 640), (caption, 685), label=shape(ours["shapes"]["prior_prediction"]),
          at=669)
    box(axes, "frozen", caption, 708, 190, 46, "captioner (GIT)", f"and its converter, {count(size['converter'])}")
    arrow(axes, (caption, 731), (caption, 773), label="B sentences")
    box(axes, "tensor", caption, 788, 190, 30, "caption")
    arrow(axes, (caption, 803), (caption, 852), (DRAW + 95, 852))
    write(axes, (caption + DRAW + 95) / 2, 841, "B sentences", 11, color="#444444")


def draw_retrieval(axes: Axes, numbers: dict) -> None:
    """The third way: tokens to what is compared with the tokens of pictures."""
    shapes, losses = numbers["learning"]["shapes"], numbers["losses"]
    arrow(axes, (DRAW, 431), (RETRIEVE, 431), (RETRIEVE, 463), label=shape(shapes["backbone"]), at=449)
    box(axes, "learning", RETRIEVE, 486, 190, 46, "retrieval head", count(numbers["learning"]["weights"]["retrieval"]))
    arrow(axes, (RETRIEVE, 509), (RETRIEVE, 585), label=shape(shapes["clip_voxels"]), right=False, at=530)
    arrow(axes, (RETRIEVE, 553), (RETRIEVE + 16, 553), color=RED, head=False)
    box(axes, "loss", RETRIEVE + 83, 553, 134, 44, f"{losses['clip_scale']:g} × BiMixCo, then",
        f"SoftCLIP (from {losses['mixup_pct']:.0%})")
    box(axes, "tensor", RETRIEVE, 600, 190, 30, "which picture was seen?")


def draw_targets(axes: Axes, numbers: dict) -> None:
    """What the losses compare with: frozen networks see the picture that the brain saw."""
    shapes, size = numbers["frozen"]["shapes"], numbers["frozen"]["weights"]
    box(axes, "tensor", 450, 936, 852, 30, f"the seen picture   {shape(shapes['seen'])}:   what the losses aim at")
    for x, width, name, part, target, aims in (
            (LOW, 136, "VAE encoder", "vae encoder", "latents", {LOW: "L1"}),
            (FEATURES, 136, "teacher", "teacher", "features", {FEATURES: "SoftCLIP"}),
            ((DRAW + RETRIEVE) / 2, RETRIEVE - DRAW + 190, "CLIP (ViT-bigG)", "CLIP", "clip_target",
             {DRAW: "squared error", RETRIEVE: "BiMixCo, SoftCLIP"})):
        arrow(axes, (x, 951), (x, 973))
        box(axes, "frozen", x, 996, width, 46, name, count(size[part]))
        for at, aim in aims.items():
            arrow(axes, (at, 1019), (at, 1045), color=RED, label=shape(shapes[target]))
            box(axes, "loss", at, 1058, 136, 26, aim)


def draw_model(numbers: dict) -> Figure:
    """`measure`'s numbers as the drawing of the architecture, 900 pixels wide."""
    figure = plt.figure(figsize=(WIDTH / 96, HEIGHT / 96), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.axis("off")
    size = numbers["learning"]["weights"]
    write(axes, 24, 32, "MindEye2, at the paper's sizes", 18, ha="left", weight="bold")
    write(axes, 24, 60, f"{size['shared'] / 1e9:.2f} billion weights that all share, and a ridge of "
                        f"{min(size['ridges']) / 1e6:.0f} to {max(size['ridges']) / 1e6:.0f} M for each subject",
          ha="left")
    for i, (kind, name) in enumerate((("learning", "learns"), ("frozen", "frozen"), ("tensor", "data"),
                                      ("loss", "loss"))):
        box(axes, kind, 588 + 84 * i, 32, 72, 26, name)
    for draw in (draw_brain_model, draw_low_level, draw_pictures, draw_retrieval, draw_targets):
        draw(axes, numbers)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# The claims
# ----------------------------------------------------------------------------------------------------------------------
VERDICTS = {claims.HOLDS: BLUE, claims.FAILS: RED, claims.UNKNOWN: GRAY}
CHANCE = {"recons/clip_l": .5, "enhancedrecons/clip_l": .5}  # what guessing gives; of retrieval, next to nothing


def whisker(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its interval: 0, which draws nothing, for a single seed."""
    mean, half = claims.interval(values)
    return mean, half if math.isfinite(half) else 0.


def mark(arm: str, metric: str) -> str:
    """The id by which an SVG knows the bar or the point of an arm."""
    return re.sub(r"\W+", "_", f"{arm}-{metric}")


def chance(metric: str, line: Callable) -> None:
    """A dashed line where guessing would be, by axis.axvline or axis.axhline."""
    if metric in CHANCE:
        line(CHANCE[metric], color=GRAY, lw=.8, ls=(0, (3, 3)), zorder=0)


def panels(name: str, claim: dict, metrics: list[str], height: float) -> tuple[Figure, list[Axes]]:
    """A figure of 800 x `height` pixels with a panel for each metric, headed by the claim and its verdict."""
    says = f"({claim['letter']}) {claim['says']}"
    says = textwrap.wrap(says, len(says) / math.ceil(len(says) / 96) + 6)  # lines of about the same length
    height += 18 * len(says)
    figure, axes = plt.subplots(1, len(metrics), figsize=(800 / 96, height / 96), squeeze=False, facecolor="white")
    seeds = len(next(iter(claim["arms"].values()))[metrics[0]])
    for row, line in enumerate(says):
        figure.text(16 / 800, 1 - (24 + 18 * row) / height, line, fontsize=13.5 * PX, weight="bold", color=INK)
    below = 1 - (26 + 18 * len(says)) / height
    figure.text(16 / 800, below, f"{name}: {claim['verdict']}", fontsize=12.5 * PX, weight="bold",
                color=VERDICTS[claim["verdict"]])
    note = "means, 95% intervals, dots: seeds" if seeds > 1 else "one seed"
    figure.text(784 / 800, below, note + "; dashed: chance" * any(metric in CHANCE for metric in metrics), ha="right",
                fontsize=11 * PX, color=GRAY)
    figure.subplots_adjust(top=1 - (68 + 18 * len(says)) / height, bottom=32 / height, right=784 / 800)
    for axis, metric in zip(axes[0], metrics, strict=True):
        axis.set_title(claims.METRICS[metric], fontsize=12 * PX, loc="left", color=INK)
        axis.tick_params(labelsize=11 * PX, length=3, color="#AAAAAA")
        axis.spines[["left", "bottom"]].set_color("#AAAAAA")
    return figure, list(axes[0])


def draw_bars(name: str, claim: dict) -> Figure:
    """A bar for each arm, in a panel for each metric that the claim compares; `mark` finds it in the SVG."""
    arms, metrics = claim["arms"], list(dict.fromkeys(entry["metric"] for entry in claim["compared"]))
    figure, axes = panels(name, claim, metrics, 100 + 34 * len(arms))
    figure.subplots_adjust(left=(34 + 7.2 * max(map(len, arms))) / 800, wspace=.14)
    for axis, metric in zip(axes, metrics, strict=True):
        for row, (label, numbers) in enumerate(arms.items()):
            mean, half = whisker(numbers[metric])
            axis.barh(row, mean, .62, color="#9CC8E8", gid=mark(label, metric))
            if half:
                axis.errorbar(mean, row, xerr=half, color=INK, lw=1, capsize=3, capthick=1)
            if len(numbers[metric]) > 1:
                axis.plot(numbers[metric], [row] * len(numbers[metric]), "o", ms=3.2, color=BLUE, mec="white", mew=.4)
            right = max(mean + half, *numbers[metric])
            axis.annotate(f"{mean:.3f}", (right, row), (5, 0), textcoords="offset points", va="center_baseline",
                          fontsize=11 * PX, color=INK)
        values = [x for numbers in arms.values() for x in (sum(whisker(numbers[metric])), *numbers[metric])]
        axis.set(xlim=(min(0, *values), 1.26 * max(.02, *values)), ylim=(len(arms) - .5, -.5), yticks=range(len(arms)))
        axis.xaxis.set_major_locator(FixedLocator([x for x in MaxNLocator(4).tick_values(*axis.get_xlim()) if x <= 1]))
        axis.set_yticklabels(arms if axis is axes[0] else [], fontsize=12 * PX)
        axis.tick_params(axis="y", length=0)
        chance(metric, axis.axvline)
    return figure


CURVES = {"pretrained": (BLUE, "o"), "scratch": (RED, "s")}
CURVE_METRICS = [claims.IMAGE, claims.BRAIN, claims.CLIP]


def draw_curves(name: str, claim: dict) -> Figure:
    """Arms "how, N sessions" as a curve over N for each `how`; `mark` finds its points in the SVG."""
    curves = {}
    for label in claim["arms"]:
        how, number = re.fullmatch(r"(.+), (\d+) sessions?", label).groups()
        curves.setdefault(how, {})[int(number)] = label
    figure, axes = panels(name, claim, CURVE_METRICS, 330)
    figure.subplots_adjust(left=44 / 800, wspace=.2, bottom=58 / (figure.get_figheight() * 96))
    for axis, metric in zip(axes, CURVE_METRICS, strict=True):
        for how, points in curves.items():
            color, marker = CURVES[how]
            numbers = [claim["arms"][label][metric] for label in points.values()]
            means, halves = zip(*map(whisker, numbers), strict=True)
            axis.fill_between(list(points), [m - h for m, h in zip(means, halves, strict=True)],
                              [m + h for m, h in zip(means, halves, strict=True)], color=color, alpha=.16, lw=0)
            axis.plot(list(points), means, color=color, lw=1.8)
            axis.plot([], [], f"{marker}-", color=color, lw=1.8, ms=5.5, label=how)
            for (sessions, label), mean, values in zip(points.items(), means, numbers, strict=True):
                axis.plot(sessions, mean, marker, ms=5.5, color=color, gid=mark(label, metric))
                axis.plot([sessions] * len(values), values, ".", ms=3, color=color, alpha=.6)
        axis.set_xscale("log", base=2)
        axis.set(xticks=list(points), xticklabels=list(points), ylim=(0, 1.03))  # none goes beyond 1
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("sessions of the new subject", fontsize=11 * PX, color=INK)
        chance(metric, axis.axhline)
    axes[-1].legend(frameon=False, fontsize=12 * PX, loc="lower right", labelcolor=INK)
    return figure


def draw_claim(name: str, claim: dict) -> Figure:
    return draw_curves(name, claim) if name == "sessions" else draw_bars(name, claim)


def read_results(path: Path) -> dict:
    """{claim: its numbers} of a results.json. Raises UserError if it is missing, damaged, or edited by hand."""
    again = "run `python toy.py --claims`, or name another with --results"
    try:
        results = json.loads(path.read_text())
        found, hash_ = results["claims"], results["hash"]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {again}.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no file of results: {again}.") from None
    if claims.digest(found) != hash_:
        raise UserError(f"the numbers in {path} are not those that its hash was made of: {again}.")
    return found


# ----------------------------------------------------------------------------------------------------------------------
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Draw the architecture and the claims as SVGs that carry their numbers.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("names", nargs="*", metavar="NAME",
                   help="model, or claims as claims.py names them; none: the model and all claims of --results")
    p.add_argument("--results", default="claims/results.json", help="numbers, written by `python toy.py --claims`")
    p.add_argument("--out", default="docs/figures", help="folder of the figures; those of the same name are replaced")
    p.add_argument("--png", action="store_true", help="a PNG of twice the size beside each SVG, to look at")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    found = read_results(Path(args.results)) if args.names != ["model"] else {}
    names = args.names or ["model", *found]
    if unknown := [name for name in names if name not in ("model", *found)]:
        raise UserError(f"{args.results} has no claim {unknown[0]}: it has {', '.join(found)}; `python toy.py --claims "
                        f"{unknown[0]}` makes others.")
    for name in names:
        path, numbers = Path(args.out) / f"{name}.svg", measure() if name == "model" else found[name]
        with files.replacing(path) as temporary:
            temporary.write_text(svg(name, numbers))
        if args.png:
            save_png(path.with_suffix(".png"), name, numbers)
        print(path)


if __name__ == "__main__":
    run_main(main)
