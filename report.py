"""One page about one model: its numbers, its best and worst pictures, its embeddings, its training. For a person.

The page is one file that asks nothing of the network: pictures are inside it as JPEG, plots as SVG, and it reads well
on a phone and in the dark. evaluate.py writes it at its end; alone, this script makes it again from the same files.

    in    evals/{m}/{m}_metrics.json, {m}_scores.pt            written by evaluate.py: the table, and a score an image
                    {m}_all_{recons,clipvoxels}.pt             written by recon.py, or the release's, as are
                    .._all_{blurryrecons,predcaptions,backbones,prior_out}.pt    each may be missing
                    .._all_enhancedrecons.pt                   written by refine.py, may be missing
          {data_path}/wds and images, {cache_dir}/clip         what was seen, and CLIP
          train_logs/{m}                                       TensorBoard's log and last.pth, for the curves
    out   evals/{m}/report.html                                1 to 10 MB

    python report.py --model_name testing --data_path toy                     half a minute, most of it UMAP
"""

import argparse
import base64
import html
import io
import json
import math
import shlex
import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from string import Template
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from arrays import load_array, load_scores, load_texts
from checkpoints import reading, torch_load
from data import Images, data_folder, load_trials, repeats, resized
from files import replacing
from frozen import load_clip
from model import UserError, run_main

EXAMPLES = 8  # best, middle and worst each
QUERIES, TOP = 4, 5  # retrieval: found and missed each; candidates in a row
LARGE, SMALL = 256, 160  # pixels: of the examples, of the retrieval rows
CHUNK = 25  # images at once through CLIP

# Order and names of the table's parts.
PARTS = {"enhancedrecons": "Refined pictures", "recons": "Reconstructions, not refined",
         "blurryrecons": "Blurry pictures (low-level head alone)", "retrieval": "Retrieval", "captions": "Captions"}
# In words, and the paper's mean distance to CLIP's points on a UMAP (A.10, Fig. 10: subject 1, 40 sessions).
SPACES = {"backbones": ("Backbone", 4.83), "clipvoxels": ("Retrieval head", 3.83), "prior_out": ("Prior", 0.41)}
CURVES = {"loss": "loss, all of it", "clip": "loss: retrieval head", "prior": "loss: prior",
          "lowlevel": "loss: low-level head", "lr": "learning rate", "loss_prior": "prior's error",
          "loss_latents": "low-level head's error"}  # train.py's names, in words
RANKED_BY = {  # the first of these that was computed decides what is best
    "clip_l": "how often the picture, as CLIP sees it, is more like its own original than like another one",
    "pixcorr": "the correlation of its pixel values with the original's",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("report.py", description=__doc__.split("\n\n")[0], formatter_class=formatter)
    add = parser.add_argument
    add("--model_name", default="testing", help="a name: folder in --evals, whose files are read")
    add("--data_path", default=data_folder(), help="folder of the data; NSD's in the paper")
    add("--cache_dir", help="folder of the frozen networks; None = --data_path")
    add("--evals", default="evals", help="folder of the reconstructions, the scores and the report")
    add("--tables", default="tables", help="folder of evaluate.py's CSV tables")
    add("--train_logs", default="train_logs", help="folder of the checkpoints")
    add("--subj", type=int, default=1, help="number of the subject, 1 to 8 in NSD; 1, 2, 5 and 7 in the paper")
    add("--new_test", action=argparse.BooleanOptionalAction, default=True,
        help="the complete test set, as in the paper; no = its first release; as for recon.py")
    args = parser.parse_args(argv)
    args.cache_dir = args.cache_dir or args.data_path
    return args


# ---------------------------------------------------------------------------------------------------------------------
# What is read

def read_tensor(path: Path, count: int | None = None, required: bool = False) -> Tensor | None:
    """A tensor (n, ..) of recon.py or refine.py; None when it is not there. Raises UserError."""
    if not path.exists() and not required:
        return None
    again = "run recon.py again, and refine.py after it."
    if not path.exists():
        raise UserError(f"{path} does not exist: {again}")
    tensor = load_array(path, again)
    if not isinstance(tensor, Tensor) or not tensor.ndim or not tensor.numel():
        raise UserError(f"{path} holds no tensor (n, ..): {again}")
    if path.stem.endswith("recons") and (tensor.ndim != 4 or tensor.shape[1] != 3):
        raise UserError(f"{path} holds no pictures (n, 3, H, W): {again}")
    check_count(path, len(tensor), count or len(tensor))
    if not torch.isfinite(tensor).all():
        raise UserError(f"{path} holds NaN or infinite numbers: train again, with a smaller --max_lr.")
    return tensor


def read_captions(path: Path, count: int) -> list[str] | None:
    """n captions, from a numpy array of strings as the original writes it; None when the file is not there."""
    if not path.exists():
        return None
    captions = load_texts(path, "run recon.py again.")
    check_count(path, len(captions), count)
    return captions


def check_count(path: Path | str, rows: int, count: int) -> None:
    if rows != count:
        raise UserError(f"{path} has {rows} rows, the reconstructions have {count}: run recon.py, refine.py and "
                        "evaluate.py again, all with the same --num_images and --new_test.")


def read_metrics(path: Path) -> dict:
    """What evaluate.py found. Raises UserError when it is not there, damaged, or an older version's."""
    if not path.exists():
        raise UserError(f"{path} does not exist: run evaluate.py first, or name another --model_name.")
    with reading(path, "--model_name, or run evaluate.py again"):
        metrics = json.loads(path.read_text())
        if not isinstance(metrics, dict) or "rows" not in metrics:
            raise UserError(f"{path} has no rows, so it is an older version's: run evaluate.py again.")
        check_metrics(metrics)
    return metrics


def check_metrics(metrics: dict) -> None:
    """Raise ValueError, or another error, if something in it is not of the kind that the page shows it as."""
    def check(part: dict, kind: type | tuple, *names: str) -> None:
        for name in names:
            if not isinstance(part.get(name), kind):
                raise ValueError(f"{name} is {part.get(name)!r}"[:99])

    none = type(None)
    check(metrics, (str, none), "command", "commit", "paper_unlike")
    check(metrics, (dict, none), "versions")
    check(metrics, (int, float, none), "blend")
    shlex.split(metrics.get("command") or "")
    for row in metrics["rows"]:
        check(row, (int, float), "value")
        check(row, (int, float, none), "low", "high", "paper_40", "paper_1")
        check(row, str, "title")
        check(row, (str, none), "judge", "paper_remark", "better", "group")
        if row["pictures"] not in PARTS:
            raise ValueError(f"rows of {row['pictures']!r}"[:99])
    for part in metrics.get("missing", []):
        check(part, str, "reason")
        check(dict(enumerate(part["titles"])), str, *range(len(part["titles"])))


@torch.no_grad()
def image_tokens(cache_dir: Path, images: Tensor, size: int) -> Tensor:
    """(n, 3, H, W) -> CLIP's tokens (n, S, D) in half precision, of the images at the reconstructions' size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip = load_clip(cache_dir, device)
    chunks = tqdm(images.split(CHUNK), desc="CLIP tokens", unit="chunk", leave=False, delay=2)
    return torch.cat([clip.tokens(resized(chunk.to(device), size)).half().cpu() for chunk in chunks])


def load(model: str, evals: Path, data_path: Path, cache_dir: Path, subj: int, new_test: bool,
         clip_images: Tensor | None) -> SimpleNamespace:
    """All that the sections need; of n test images, in ascending order of their row numbers."""
    prefix = evals / model / model
    metrics = read_metrics(Path(f"{prefix}_metrics.json"))
    recons = read_tensor(Path(f"{prefix}_all_recons.pt"), required=True)
    n = len(recons)
    ids = repeats(load_trials(data_path, subj, "new_test" if new_test else "test"))[0]
    if n > len(ids):
        raise UserError(f"{prefix}_all_recons.pt has {n} rows, the test set {len(ids)}: pass the same --subj and "
                        "--new_test as for recon.py.")
    found = {name: read_tensor(Path(f"{prefix}_all_{name}.pt"), n, required=name == "clipvoxels")
             for name in ("enhancedrecons", "blurryrecons", *SPACES)}
    scores = load_scores(Path(f"{prefix}_scores.pt"), "run evaluate.py again.")
    for key, values in scores.items():
        check_count(f"{prefix}_scores.pt ({key})", len(values), n)
    seen = Images(data_path)[ids[:n]]  # (n, 3, H, W)
    tokens = image_tokens(cache_dir, seen, recons.shape[-1]) if clip_images is None else clip_images
    for name in SPACES:
        if found[name] is not None and found[name][0].numel() != tokens[0].numel():
            raise UserError(f"{prefix}_all_{name}.pt has tokens of {found[name][0].numel()} numbers, CLIP's have "
                            f"{tokens[0].numel()}: name the --cache_dir of the training.")
    return SimpleNamespace(model=model, metrics=metrics, scores=scores, ids=ids[:n], seen=seen, recons=recons, n=n,
                           tokens=tokens.reshape(found["clipvoxels"].shape),  # (n, S, D)
                           captions=read_captions(Path(f"{prefix}_all_predcaptions.pt"), n), subject=subj,
                           data_path=data_path, **found)


# ---------------------------------------------------------------------------------------------------------------------
# Small parts of a page

def number(value: float | None) -> str:
    """.123 without its leading zero; a dash for nothing."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def escaped(text: object) -> str:
    """Text as HTML: no tags, and a sign in place of each character that nobody sees or that no page may hold."""
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(text)))


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def jpeg(image: Tensor, size: int) -> str:
    """(3, H, W) in [0, 1] -> the address of a JPEG, at most `size` pixels wide, whose colours are not coarsened."""
    image = resized(image[None], size, antialias=True)[0] if image.shape[-1] > size else image.float()
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()  # (H, W, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85, subsampling=0)
    return data_uri(buffer.getvalue(), "image/jpeg")


def cell(image: Tensor, alt: str, label: str, size: int, kind: str = "") -> str:
    """A picture with a small label below; labels of examples show only when enlarged (in the style sheet)."""
    return (f'<span class="cell {kind}"><img src="{jpeg(image, size)}" alt="{escaped(alt)}" loading="lazy">'
            f"<small>{escaped(label)}</small></span>")


def section(name: str, title: str, *parts: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>\n' + "\n".join(parts) + "\n</section>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{text}</p>' if kind else f"<p>{text}</p>"


# ---------------------------------------------------------------------------------------------------------------------
# The sections, top to bottom

def introduction(r: SimpleNamespace) -> str:
    """For someone who comes cold; and the first pictures, which nobody chose."""
    final = r.recons if r.enhancedrecons is None else r.enhancedrecons
    pairs = "".join(
        f'<button class="strip pair">{cell(r.seen[i], f"seen: image {r.ids[i]}", "seen", LARGE)}'
        f'{cell(final[i], f"drawn from brain activity for image {r.ids[i]}", "read from the brain", LARGE)}</button>'
        for i in range(min(EXAMPLES, r.n)))
    unlike = "" if r.metrics.get("paper_unlike") != "another dataset" else (
        f" The data here, <code>{escaped(str(r.data_path))}</code>, is not the paper's Natural Scenes Dataset: "
        "the paper's numbers stand beside these for orientation, not for comparison.")
    return f"""<header><p class="kicker">MindEye2 · evaluation report</p><h1>{escaped(r.model)}</h1>
<p class="lead">A person looked at pictures while their brain activity was recorded. This model had learned, from other
pictures, to tell from such activity what was seen. Here are {r.n} pictures that it was never trained on: what it drew
from the brain of subject {r.subject} alone, how good that is in numbers, and where it fails.{unlike}</p>
<div class="pairs">{pairs}</div>
<p class="note">Above, what was seen; below, what was read from the brain. These are the first {min(EXAMPLES, r.n)} of
the test pictures, not chosen. Tap a picture to enlarge it.</p></header>"""


def interval_plot(row: dict) -> str:
    """A line from 0 to 1, the 95% interval and the value on it, and the paper's value as a tick."""
    def x(value: float) -> float:
        return 100 * min(1.0, max(0.0, value))

    paper = row.get("paper_40")
    tick = f'<path class="paper" d="M{x(paper):.1f} 1v12"/>' if paper is not None else ""
    low, high = (row[end] if row.get(end) is not None else row["value"] for end in ("low", "high"))
    if not all(map(math.isfinite, (low, high, row["value"]))):
        return ""
    return (f'<svg class="interval" viewBox="-4 0 108 14" aria-hidden="true"><path d="M0 7h100"/>{tick}'
            f'<path class="bar" d="M{x(low):.1f} 7H{x(high):.1f}"/><circle cx="{x(row["value"]):.1f}" cy="7" r="3.2"/>'
            "</svg>")


def is_stand_in(row: dict) -> bool:
    return "stand-in" in (row.get("judge") or "").lower()


def table_row(row: dict, remarks: list[str]) -> str:
    """One metric: value, interval, and the paper's numbers, marked by the number of their remark in the foot."""
    arrow = {"higher": "↑", "lower": "↓"}.get(row.get("better"), "")
    mark = '&nbsp;<span class="mark" title="a stand-in judged">◇</span>' if is_stand_in(row) else ""

    def paper(value: float | None) -> str:
        remark = remarks.index(row["paper_remark"]) + 1 if row.get("paper_remark") and value is not None else "&nbsp;"
        return f"<td>{number(value)}<sup>{remark}</sup></td>"

    return (f'<tr><th scope="row">{escaped(row["title"])}<span class="arrow">&nbsp;{arrow}{mark}</span></th>'
            f'<td class="value">{number(row["value"])}</td>'
            f'<td class="range">{number(row.get("low"))} to {number(row.get("high"))}</td>'
            f"<td>{interval_plot(row)}</td>"
            f'{paper(row.get("paper_40"))}{paper(row.get("paper_1"))}</tr>')


def parts_of(rows: list[dict]) -> list[str]:
    """Those of PARTS that rows are of, in its order."""
    return [part for part in PARTS if any(row["pictures"] == part for row in rows)]


def table(r: SimpleNamespace, csv: Path) -> str:
    """Every number with its interval beside the paper's; then what could not be computed, and why."""
    rows, missing = r.metrics["rows"], r.metrics.get("missing", [])
    kinds = parts_of(rows)
    remarks, bodies = list(dict.fromkeys(row["paper_remark"] for row in rows if row.get("paper_remark"))), []
    for kind in kinds:
        lines = "\n".join(table_row(row, remarks) for row in rows if row["pictures"] == kind)
        bodies.append(f'<tbody><tr><th colspan="6" scope="rowgroup">{PARTS[kind]}</th></tr>\n{lines}</tbody>')
    gaps = "".join(f"<li><b>{escaped('; '.join(part['titles']))}</b>: {escaped(part['reason'])}</li>"
                   for part in missing)
    remarked = "; ".join(f"<sup>{i}</sup> {escaped(remark)}" for i, remark in enumerate(remarks, 1))
    judges = {row["title"]: row["judge"] for row in rows if row.get("judge")}
    judged = "".join(f"<li>{escaped(title)}: {escaped(judge)}</li>" for title, judge in judges.items())
    stand_ins = " ◇: judged by a stand-in, a small network in the place of the published one. Such a row tells which "\
                "of two models is better, and cannot be compared with the paper." if any(map(is_stand_in, rows)) else ""
    whose = f"<small>{escaped(r.metrics['paper_unlike'])}</small>" if r.metrics.get("paper_unlike") else ""
    download = ""
    if csv.exists():
        download = (f' The same as a file: <a download="{escaped(csv.name)}" href="'
                    f'{data_uri(csv.read_bytes(), "text/csv")}">{escaped(csv.name)}</a>.')
    return section(
        "numbers", "In numbers",
        paragraph(f"Means over {r.n} test images. The 95 % interval is where a mean would lie had other images been "
                  "drawn for the test. Arrows say which way is better. On the line from 0 to 1, the dot is the value "
                  f"here and the thin tick the paper's with 40 sessions.{stand_ins}{download}"),
        '<div class="scroll"><table><thead><tr><th scope="col">metric</th><th scope="col">here</th>'
        '<th scope="col">95 % interval</th><th scope="col">0 <span class="to">to</span> 1</th>'
        f'<th scope="col">paper, 40 h{whose}</th><th scope="col">paper, 1 h{whose}</th></tr></thead>\n'
        f'{"".join(bodies)}</table></div>',
        paragraph(f"The paper's numbers: {remarked}", "note") if remarks else "",
        f'<h3>Not computed</h3><ul class="note">{gaps}</ul>' if gaps else "",
        f"<details><summary>Who judged what</summary><ul>{judged}</ul></details>" if judged else "")


def ranking(r: SimpleNamespace) -> tuple[Tensor, str]:
    """Scores (n,) that decide which reconstructions are the best, and the metric's name."""
    for metric in RANKED_BY:
        for kind in ("enhancedrecons", "recons"):
            if f"{kind}/{metric}" in r.scores and getattr(r, kind) is not None:
                return r.scores[f"{kind}/{metric}"].double(), metric
    raise UserError(f"the scores of {r.model} have neither {' nor '.join(RANKED_BY)}: run evaluate.py again.")


def examples_of(scores: Tensor, ties: Tensor) -> dict[str, list[int]]:
    """Rows of the best, middle and worst images, of which no image is in two if n >= 3; equal scores go by `ties`."""
    scores, ties = scores.nan_to_num(nan=-math.inf), ties.nan_to_num(nan=-math.inf)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i].item(), -ties[i].item(), i))
    count = max(1, min(EXAMPLES, len(order) // 3))
    middle = (len(order) - count) // 2
    return {"Best": order[:count], "Middle": order[middle : middle + count], "Worst": order[::-1][:count]}


def examples(r: SimpleNamespace) -> str:
    """What was seen, and the ways there: blurry, reconstruction, refined, caption."""
    scores, metric = ranking(r)
    kinds = {"seen": r.seen, "blurry": r.blurryrecons, "drawn": r.recons, "refined": r.enhancedrecons}
    kinds = {label: pictures for label, pictures in kinds.items() if pictures is not None}

    def example(i: int) -> str:
        caption = escaped(r.captions[i]) if r.captions else f"image {r.ids[i]}"
        cells = "".join(cell(pictures[i], f"{label}: image {r.ids[i]}", label, LARGE)
                        for label, pictures in kinds.items())
        return (f'<figure><button class="strip">{cells}</button>'
                f"<figcaption><span>{caption}</span><b>{number(scores[i].item())}</b></figcaption></figure>")

    labels = "".join(f"<span>{label}</span>" for label in kinds)
    legend = f'<div class="strip legend" aria-hidden="true">{labels}</div>'
    parts = [f'<h3>{title}</h3>\n<div class="examples">{legend}{legend}'
             + "\n".join(map(example, rows)) + "</div>"
             for title, rows in examples_of(scores, r.scores.get("recons/pixcorr", scores)).items()]
    blend = r.metrics.get("blend", 1)
    blended = f" (which the table judges blended, {blend:g} of it and {1 - blend:g} of the blurry one)" * (blend < 1)
    meaning = {"seen": "what was seen", "blurry": "the low-level head's guess",
               "drawn": "the reconstruction from predicted CLIP tokens",
               "refined": f"the same after refinement{blended}"}
    ways = "From left to right: " + "; ".join(f"<b>{label}</b>, {meaning[label]}" for label in kinds) + "."
    captioned = "The sentence below is the model's own caption, made from the brain as well. " if r.captions else ""
    return section("pictures", "Best, middle, worst", paragraph(
        f"{ways} {captioned}The number is what the pictures are sorted by: "
        f"{RANKED_BY[metric]}. Equal ones are in the order of their pixel correlation."), *parts)


def spread(items: list, count: int) -> list:
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    return [items[round(k)] for k in np.linspace(0, len(items) - 1, min(count, len(items)))]


def found_and_missed(similarity: Tensor) -> tuple[list[int], list[int], Tensor]:
    """Of queries (n, candidates n), candidate i being right for query i: the found, from the clearest to the narrowest;
    the missed, from the narrowest to the worst; and for each query the place (n,) of its right one, from 1."""
    right = similarity.diagonal()
    places = (similarity > right[:, None]).sum(1) + 1  # (n,)
    others = similarity.masked_fill(torch.eye(len(similarity), dtype=torch.bool), -2).amax(1)  # (n,)
    order = sorted(range(len(right)), key=lambda i: (places[i].item(), (others[i] - right[i]).item()))
    found = sum(places == 1).item()
    return order[:found], order[found:], places


def retrieval_rows(r: SimpleNamespace, similarity: Tensor, rows: list[int], places: Tensor, from_brain: bool) -> str:
    """A query and its nearest candidates. A brain is shown as the picture that it saw, cut round."""
    query, candidate = ("brain", "") if from_brain else ("", "brain")
    lines = []
    for i in rows:
        cells = [cell(r.seen[i], f"query: {query or 'image'} {r.ids[i]}", "brain" if from_brain else "image", SMALL,
                      f"query {query}")]
        for j in similarity[i].topk(min(TOP, r.n)).indices.tolist():
            alt = f"{candidate or 'image'} {r.ids[j]}, {'the right one' if i == j else 'wrong'}"
            cells.append(cell(r.seen[j], alt, number(similarity[i, j].item()), SMALL,
                              f"{candidate}{' right' if i == j else ''}"))
        place = places[i].item()
        note = "" if place <= TOP else f'<p class="note">Right one: place {place} of {r.n}.</p>'
        lines.append(f'<button class="strip">{"".join(cells)}</button>{note}')
    return "\n".join(lines) or paragraph("none", "note")


def retrieval(r: SimpleNamespace) -> str:
    """Which picture belongs to this brain, and which brain to this picture, among all n."""
    brains, images = (F.normalize(x.flatten(1).float(), dim=1) for x in (r.clipvoxels, r.tokens))  # (n, S * D)
    by_brain = brains @ images.T  # (n brains, n images)
    parts = []
    for title, similarity, from_brain in (("From a brain to its picture", by_brain, True),
                                          ("From a picture to its brain", by_brain.T, False)):
        found, missed, places = found_and_missed(similarity)
        halves = "".join(f'<div class="half"><h4>{name} <span>{len(rows)} of {r.n}</span></h4>'
                         + retrieval_rows(r, similarity, spread(rows, QUERIES), places, from_brain) + "</div>"
                         for name, rows in (("Found", found), ("Missed", missed)))
        parts.append(f'<h3>{title}</h3><div class="halves">{halves}</div>')
    return section("retrieval", "Finding the picture", paragraph(
        f"The first of each row is the query; right of it are the {min(TOP, r.n)} nearest of all {r.n}, with their "
        "cosine similarity. Round is a brain, shown as the picture that it saw; square is a picture; the right one is "
        "framed. The found are spaced evenly from the clearest to the narrowest, the missed from the narrowest to the "
        "worst."
        + (" The table's shares are higher, as its pools have only 300 candidates." if r.n > 300 else "")), *parts)


def gram(clouds: Iterable[Tensor]) -> Tensor:
    """Dot products (k n, k n) of all vectors of k clouds (n, S, D), each flattened; a token at a time, to save memory.

    All that follows needs distances only, and |a - b|² = aa + bb - 2 ab. 1000 images of 256 x 1664 numbers are 3.4 GB
    in four clouds of half precision; as float32, and a copy of it inside UMAP, they would be 14.
    """
    clouds, device = list(clouds), "cuda" if torch.cuda.is_available() else "cpu"
    total = 0
    for token in tqdm(range(clouds[0].shape[1]), desc="distances", unit="token", leave=False, delay=2):
        vectors = torch.cat([cloud[:, token] for cloud in clouds]).to(device).float()  # (k n, D)
        total = total + (vectors @ vectors.T).double().cpu()  # (k n, k n)
    return total


def distances(products: Tensor, unit_length: bool = False) -> Tensor:
    """Euclidean distances (m, m) from dot products (m, m); of the vectors scaled to length 1 if so wished."""
    if unit_length:
        length = products.diagonal().clamp(min=1e-12).sqrt()
        products = products / length / length[:, None]
    squares = products.diagonal()
    out = (squares + squares[:, None] - 2 * products).clamp(min=0).sqrt()
    return out.fill_diagonal_(0)  # not 1e-8, which rounding leaves


def umap_points(between: Tensor) -> np.ndarray:
    """Points (m, 2) whose neighbours are those of the distances (m, m) (McInnes et al. 2020); the same on each call."""
    import numba  # here, as umap: they take seconds to load, and ten to compile themselves on their first call
    numba.config.THREADING_LAYER = "workqueue"  # another one is PyTorch's, too: it would change its number of threads
    import umap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot invert a map of given distances, and will not use threads
        mapping = umap.UMAP(random_state=42, n_neighbors=min(15, len(between) - 1), metric="precomputed")
        return mapping.fit_transform(between.float().numpy())


def cloud_plot(images: np.ndarray, brains: np.ndarray, all_points: np.ndarray) -> str:
    """Two clouds (n, 2) on the scale of all, with a line from each image to its brain's embedding."""
    low, spans = all_points.min(0), np.ptp(all_points, axis=0)
    scale = 290 / max(float(spans.max()), 1e-6)  # one for both axes: distances must not be distorted
    width, height = (spans * scale + 10).round()
    images, brains = ((cloud - low) * scale + 5 for cloud in (images, brains))
    pairs = zip(images, brains, strict=True)
    lines = "".join(f"M{a[0]:.1f} {a[1]:.1f}L{b[0]:.1f} {b[1]:.1f}" for a, b in pairs)
    dots = ["".join(f"M{x:.1f} {y:.1f}h0" for x, y in cloud) for cloud in (images, brains)]
    return (f'<svg class="clouds" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
            'aria-label="two clouds of points">'
            f'<path class="link" d="{lines}"/><path class="images" d="{dots[0]}"/><path class="brains" d="{dots[1]}"/>'
            "</svg>")


def embeddings(r: SimpleNamespace) -> str:
    """A.10: does the prior close the gap between what brains and what pictures look like to CLIP?"""
    title, names = "Embeddings", [name for name in SPACES if getattr(r, name) is not None]
    if not names or r.n < 4:
        return section("embeddings", title, paragraph("Needs recon.py's embeddings of at least four images."))
    n = r.n
    products = gram([r.tokens] + [getattr(r, name) for name in names])
    try:
        points = umap_points(distances(products))  # (k n, 2)
    except ImportError:
        return section("embeddings", title, paragraph("Not drawn: <code>pip install umap-learn</code>."))
    near = distances(products, unit_length=True)
    apart = near[:n, :n].sum().item() / (n * (n - 1))  # of two images
    figures = []
    for k, name in enumerate(names, 1):
        cloud, (label, paper) = slice(k * n, (k + 1) * n), SPACES[name]
        on_map = np.linalg.norm(points[cloud] - points[:n], axis=1).mean()
        in_space = near[cloud, :n].diagonal().mean().item()
        figures.append(
            f"<figure>{cloud_plot(points[:n], points[cloud], points)}<figcaption><b>{label}</b><br>"
            f'<span class="big">{on_map:.2f}</span> on the map <span class="quiet">(paper: {paper})</span><br>'
            f"{in_space:.2f} in the full space</figcaption></figure>")
    return section("embeddings", title, paragraph(
        "Each image is two points, joined by a line: <span class=\"key images\">CLIP's own embedding of it</span>, and "
        '<span class="key brains">what the model made of the brain that saw it</span>. Decoding needs the two to '
        "coincide. The diffusion prior is there to bring them together (paper A.10, Fig. 10)."),
        f'<div class="panels">{"".join(figures)}</div>', paragraph(
        "The large number is the mean euclidean distance between the two points of an image on this map, one UMAP of "
        "all clouds. The paper gives such distances for subject 1, 40 sessions, 1000 images. A UMAP has no unit of "
        "length, so compare their order, not their size. The number below is the mean euclidean distance of the whole "
        f"embeddings, each scaled to length 1: two different images are {apart:.2f} apart there.", "note"))


def thinned(values: list[float], most: int = 200) -> list[tuple[float, float]]:
    """[(step, value), ..] of a value a step; when there are many, means of equally many."""
    size = max(1, math.ceil(len(values) / most))
    return [(i + min(size, len(values) - i), float(np.mean(values[i : i + size]))) for i in range(0, len(values), size)]


def read_checkpoint(path: Path) -> dict:
    """All but the weights of last.pth: flags, train_losses, ..; {} when it is not there. Mapped: takes moments."""
    if not path.is_file():
        return {}
    checkpoint = torch_load(path, "--train_logs")
    with reading(path, "--train_logs"):
        logged = {name: checkpoint.get(name, []) for name in ("train_losses", "test_losses", "lrs")}
        logged = {name: [float(x) for x in values] for name, values in logged.items()}
        history = {str(tag): [(float(step), float(x)) for step, x in points]
                   for tag, points in dict(checkpoint.get("history", {})).items()}
        return logged | {"history": history, "flags": dict(checkpoint.get("flags", {}))}


def read_curves(train_logs: Path, model: str, checkpoint: dict) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{what: {train, val or test: [(step, value), ..]}}, from TensorBoard's log if there is one, else last.pth's."""
    def put(tag: str, points: list[tuple[float, float]]) -> None:
        split, _, what = tag.rpartition("/")
        curves.setdefault(what, {})[split or "train"] = points

    curves = {}
    logs = sorted((train_logs / model).glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
    if logs:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        log = EventAccumulator(str(logs[-1]), size_guidance={"scalars": 0}).Reload()
        for tag in log.Tags()["scalars"]:
            put(tag, [(event.step, event.value) for event in log.Scalars(tag)])
    elif checkpoint.get("history"):
        for tag, points in checkpoint["history"].items():
            put(tag, points)
    else:  # the released ones: a learning rate each step; each epoch the whole test loss, not the prior's alone
        if checkpoint.get("lrs"):
            put("train/lr", thinned(checkpoint["lrs"]))
        if losses := checkpoint.get("test_losses"):
            epoch = len(checkpoint["train_losses"]) / len(losses)  # steps
            put("test/loss", [(epoch * i, x) for i, x in enumerate(losses, 1)])
    if checkpoint.get("train_losses"):
        put("train/loss", thinned(checkpoint["train_losses"]))
    return curves


def line_plot(title: str, series: dict[str, list[tuple[float, float]]]) -> str:
    """One small plot: a line for each of train, val and test, labelled with its last value."""
    series = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    points = np.array([p for line in series.values() for p in line]).reshape(-1, 2)
    if not len(points):
        return ""
    low, span = points.min(0), np.maximum(np.ptp(points, axis=0), 1e-9)
    lines = []
    for name, line in series.items():
        places = (np.array(line).reshape(-1, 2) - low) / span * [193, -80] + [42, 88]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        shape = f'<circle cx="{places[0, 0]:.1f}" cy="{places[0, 1]:.1f}" r="2.5"/>' if len(line) == 1 else ""
        lines.append(f'<g class="{escaped(name)}"><polyline points="{path}"/>{shape}</g>' if line else "")
    last = " ".join(f'<span class="key {escaped(name)}">{escaped(name)} {line[-1][1]:.3g}</span>'
                    for name, line in series.items() if line)
    bottom, top = low[1], low[1] + span[1]
    return (f'<figure><figcaption><b>{escaped(title)}</b> {last}</figcaption>'
            f'<svg class="curve" viewBox="0 0 240 108" role="img" aria-label="{escaped(title)} against steps">'
            f'<path class="axis" d="M42 8V88H235"/>{"".join(lines)}'
            f'<text x="37" y="12" text-anchor="end">{top:.2g}</text>'
            f'<text x="37" y="90" text-anchor="end">{bottom:.2g}</text>'
            f'<text x="235" y="102" text-anchor="end">step {points[:, 0].max():.0f}</text></svg></figure>')


def training(train_logs: Path, model: str, checkpoint: dict) -> str:
    """Curves of what train.py logged; its picture of them when nothing else is there."""
    title, curves = "Training", read_curves(train_logs, model, checkpoint)
    if curves:
        plots = "".join(line_plot(CURVES.get(name, name.replace("_", " ")), curves[name])
                        for name in sorted(curves, key=lambda name: (name != "loss", "retrieval" not in name, name)))
        return section("training", title, paragraph(
            "Each against the steps of the optimiser; beside the title, the last value. The test images are only "
            "watched here: no choice was made by them."), f'<div class="curves">{plots}</div>')
    picture = train_logs / model / "curves.png"
    if picture.exists():
        return section("training", title, f'<div class="scroll"><img class="whole" alt="training curves" src="'
                                          f'{data_uri(picture.read_bytes(), "image/png")}"></div>')
    return section("training", title, paragraph(
        f"<code>{escaped(str(train_logs / model))}</code> has no log and no checkpoint: name its place by "
        "<code>--train_logs</code>."))


def regions(r: SimpleNamespace) -> str:
    """Table 3: how well an encoding model, shown the reconstruction, foretells the brain that it came from."""
    rows = [row for row in r.metrics["rows"] if row.get("group") == "brain" and math.isfinite(row["value"])]
    if not rows:
        return ""
    most = max(1e-3, *(row["value"] for row in rows))
    kinds = parts_of(rows)
    parts = []
    for title in dict.fromkeys(row["title"] for row in rows):
        lines = "".join(
            f'<div class="measure k{kinds.index(row["pictures"])}"><i style="width:{max(0, row["value"]) / most:.1%}">'
            f'</i><span>{number(row["value"])}</span></div>' for row in rows if row["title"] == title)
        region = escaped(title.removeprefix("Brain corr. "))
        parts.append(f"<dt>{region}</dt><dd>{lines}</dd>")
    keys = " ".join(f'<span class="key k{k}">{PARTS[kind].lower()}</span>' for k, kind in enumerate(kinds))
    return section("regions", "Brain correlation by region", paragraph(
        "Shown a reconstruction, an encoding model foretells brain activity; this is its correlation with what was "
        "measured, across the voxels of a region (Table 3)."), paragraph(keys, "note"),
        f'<dl class="bars">{"".join(parts)}</dl>')


def command_line(script: str, flags: dict, defaults: dict, start: Sequence[str] = ("python",)) -> str:
    """`python train.py --a=b --no-c`: the flags that are not at their defaults."""
    words = [*start, script]
    for name, value in flags.items():
        if value is None or name in defaults and str(defaults[name]) == str(value):  # a path equals its text
            continue
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}")
    return folded(words)


def folded(words: list[str], width: int = 96) -> str:
    """The words as a shell command, in lines of at most `width`, if no word is longer."""
    lines = [""]
    for word in map(shlex.quote, words):
        if len(lines[-1]) + len(word) >= width - 2:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def training_commands(checkpoint: dict) -> list[str]:
    """How the model was trained, and before it the model that it started from, as far as their files tell."""
    import train  # for the defaults of its flags

    commands, defaults = [], vars(train.parse_args([]))
    while checkpoint.get("flags"):
        flags = checkpoint["flags"]
        own = {name: flags[name] for name in flags if name in defaults}
        alone = {"num_processes": 1, "mixed_precision": "no"}  # the launcher's flags, not train.py's
        launch = {name: flags.get(name, value) for name, value in alone.items()}
        launcher = ["accelerate", "launch", *(f"--{name}={value}" for name, value in launch.items())]
        commands.insert(0, command_line("train.py", own, defaults, ["python"] if launch == alone else launcher))
        start = Path(str(flags.get("multisubject_ckpt") or ""))
        if start == Path() or len(commands) == 5:  # trained from scratch; or files that name each other
            break
        checkpoint = read_checkpoint(start if start.suffix == ".pth" else start / "last.pth")
    return commands


def reproduction(r: SimpleNamespace, checkpoint: dict, command: str) -> str:
    """Commands, commit, versions, date."""
    commands = training_commands(checkpoint) or ["# train.py: its checkpoint is not here, or does not tell its flags"]
    drawn = {"model_name": r.model, "data_path": r.data_path, "subj": r.subject}
    scripts = ["recon.py"] if r.enhancedrecons is None else ["recon.py", "refine.py"]
    commands += [f"# {' and '.join(scripts)}: add the flags that you gave, which their files do not tell"]
    commands += [command_line(script, drawn, {}) for script in scripts]
    commands += [folded(shlex.split(r.metrics.get("command") or "python evaluate.py")), command]
    facts = {"commit": r.metrics.get("commit") or "unknown", "subject": r.subject, "images": r.n,
             "written": datetime.now().strftime("%Y-%m-%d %H:%M"), **r.metrics.get("versions", {})}
    listed = "".join(f"<dt>{escaped(str(name))}</dt><dd>{escaped(str(value))}</dd>"
                     for name, value in facts.items())
    return section("reproduce", "How to make this again",
                   f'<pre class="scroll"><code>{escaped(chr(10).join(commands))}</code></pre>',
                   f'<dl class="facts">{listed}</dl>')


# ---------------------------------------------------------------------------------------------------------------------
# The page

STYLE = """
:root { color-scheme: light dark; --paper: #fcfbf8; --ink: #1e1d1a; --quiet: #6d6a63; --rule: #e2dfd7; --wash: #f3f1eb;
  --accent: #b5452c; --images: #2f6db3; --brains: #d07a16; --shade: #000b;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
@media (prefers-color-scheme: dark) { :root { --paper: #161513; --ink: #ece9e2; --quiet: #9c978c; --rule: #34312c;
  --wash: #201e1b; --accent: #f0805f; --images: #6ea8ea; --brains: #f2a94a; } }
* { box-sizing: border-box }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100% }
body { margin: 0 auto; padding: 0 16px 80px; max-width: 1120px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 var(--sans); font-variant-numeric: tabular-nums; overflow-wrap: break-word }
h1, h2, h3 { font-family: var(--serif); font-weight: 600; line-height: 1.15; text-wrap: balance }
h1 { font-size: clamp(1.9rem, 6vw, 3.2rem); margin: 0 0 .35em; overflow-wrap: anywhere }
h2 { font-size: clamp(1.5rem, 4vw, 2rem); margin: 0 0 .5em }
h3 { font-size: 1.2rem; margin: 2em 0 .7em }
h4 { font-size: .95rem; margin: 0 0 .7em; font-weight: 600 } h4 span, .quiet, .note { color: var(--quiet) }
h4 span { font-weight: 400 }
p { max-width: 44rem; margin: 0 0 1.2em }
header { padding-top: clamp(28px, 6vw, 72px) }
.kicker { margin: 0 0 .6em; color: var(--accent); font-size: .85rem; letter-spacing: .04em }
.lead { font: 1.15rem/1.55 var(--serif); max-width: 46rem }
.note { font-size: .875rem }
section { margin-top: clamp(56px, 8vw, 96px); padding-top: 24px; border-top: 1px solid var(--rule) }
nav { margin: 32px -16px 0; padding: 0 16px; overflow-x: auto; white-space: nowrap; font-size: .9rem }
nav a { margin-right: 1.4em; color: var(--quiet); text-decoration: none }
a { color: var(--accent) } a:hover { text-decoration: underline }
code, pre { font: .85rem/1.6 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace }
pre { background: var(--wash); padding: 16px; border-radius: 6px; margin: 0 0 1.5em }
details { margin-top: 1em; font-size: .9rem; color: var(--quiet) } summary { cursor: pointer }
.scroll { overflow-x: auto; max-width: 100% }
figure { margin: 0 }

img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 3px; background: var(--wash) }
img.whole { aspect-ratio: auto; width: auto }
button.strip { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 4px; width: 100%;
  margin: 0; padding: 0; border: 0; background: none; color: inherit; font: inherit; cursor: zoom-in }
button:focus-visible, a:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px }
.cell { display: block; min-width: 0 } .cell small { display: none }
.pairs { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 10px; margin: 32px 0 10px }
button.pair { grid-auto-flow: row }
.examples { display: grid; gap: 20px 32px }
.legend { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 4px; margin-bottom: -14px;
  font-size: .75rem; color: var(--quiet) }
.legend + .legend { display: none }
figcaption { display: flex; gap: 12px; justify-content: space-between; align-items: baseline; margin-top: 6px;
  font-size: .875rem; line-height: 1.4; color: var(--quiet) }
.examples figcaption span { font-family: var(--serif); font-style: italic; color: var(--ink) }
figcaption b { font-weight: 500 }

table { border-collapse: collapse; width: 100%; font-size: .925rem }
th, td { padding: 4px 16px 4px 0; text-align: right; vertical-align: middle; font-weight: 400;
  border-bottom: 1px solid var(--rule) }
th:first-child { text-align: left; min-width: 9.8rem }
thead th { color: var(--quiet); font-size: .8rem; white-space: nowrap; vertical-align: bottom }
th:nth-child(4) { text-align: center } .to { padding: 0 2.6em } thead small { font-size: .7rem }
tbody th { position: sticky; left: 0; background: var(--paper) }
tbody th[colspan] { padding-top: 26px; font: 600 1rem var(--serif); border-bottom-color: var(--quiet) }
th small { display: block; color: var(--quiet); white-space: nowrap }
.value { font-weight: 600 } .range { color: var(--quiet); font-size: .85rem; white-space: nowrap }
sup { display: inline-block; width: .8em; font-size: .65rem; line-height: 0; text-align: left; color: var(--quiet) }
.scroll + p { margin-top: 12px } ul { padding-left: 1.1em; max-width: 60rem } li { margin-bottom: .4em }
li b { font-weight: 500; color: var(--ink) }
.arrow { color: var(--quiet); white-space: nowrap }
.mark { color: var(--accent); cursor: help }

svg { display: block; width: 100% }
.interval { width: 176px; height: 23px; margin: auto } .interval path { stroke: var(--rule); fill: none }
.interval .paper { stroke: var(--ink); stroke-width: 1.2 } .interval circle { fill: var(--accent) }
.interval .bar { stroke: var(--accent); stroke-width: 2.4; stroke-linecap: round }
.clouds { background: var(--wash); border-radius: 6px; max-height: 70vh }
.clouds path { fill: none; stroke-linecap: round; stroke-width: 3.4; stroke-opacity: .75 }
.clouds .images { stroke: var(--images) } .clouds .brains { stroke: var(--brains) }
.clouds .link { stroke: var(--quiet); stroke-width: .4; stroke-opacity: .16 }
.curve { overflow: visible } .curve .axis { stroke: var(--rule); fill: none }
.curve polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke: currentColor }
.curve circle { fill: currentColor } .curve text { font: 9px var(--sans); fill: var(--quiet) }
.train { color: var(--quiet) } .val { color: var(--images) } .test { color: var(--accent) }
.key { white-space: nowrap } .key::before { content: ""; display: inline-block; width: .6em; height: .6em;
  margin: 0 .35em 0 0; border-radius: 50%; background: currentColor }
.key.images::before { background: var(--images) } .key.brains::before { background: var(--brains) }
.key.images, .key.brains { white-space: normal }
.panels, .curves { display: grid; gap: 28px 32px; margin-bottom: 1.5em }
.panels figcaption { display: block; color: var(--ink) } .panels b { font-weight: 600 }
.big { font: 600 1.3rem var(--serif); }
.curves { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)) }
.curves figure { align-self: end }
.curves figcaption { flex-wrap: wrap; gap: 0 10px; justify-content: flex-start; margin: 0 0 4px; font-size: .8rem }
.curves b { color: var(--ink) }

.halves { display: grid; gap: 32px 40px } .half button { margin-bottom: 16px; gap: 6px }
.half button { grid-template-columns: minmax(0, 1fr) 10px repeat(5, minmax(0, 1fr)); grid-auto-flow: row }
.half .query { grid-column: 1 } .half .query + .cell { grid-column: 3 }
.half .cell small { display: block; font-size: .7rem; line-height: 1.6; color: var(--quiet); text-align: center }
.brain img { border-radius: 50% } .half .right img { outline: 3px solid var(--accent); outline-offset: 1px }
.half .right small { color: var(--accent); font-weight: 600 } .half .note { margin: -10px 0 18px; font-size: .8rem }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: 10px 16px; max-width: 44rem; margin: 0 }
.bars dd, .facts dd { margin: 0 } .measure { display: flex; align-items: center; gap: 8px; font-size: .8rem }
.measure { padding-right: 3rem } .measure i { height: 11px; border-radius: 0 2px 2px 0; background: currentColor }
.measure span { color: var(--ink); margin-right: -3rem }
.bars dt { padding-top: 1px }
.k0 { color: var(--accent) } .k1 { color: var(--images) } .k2 { color: var(--quiet) }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 20px; font-size: .875rem }
.facts dt { color: var(--quiet) } .facts dd { overflow-wrap: anywhere }

dialog { width: min(94vw, 1060px); max-height: 94vh; padding: 14px; border: 0; border-radius: 8px; overflow: auto;
  background: var(--paper); color: var(--ink); cursor: zoom-out }
dialog::backdrop { background: var(--shade) }
dialog .strip { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; grid-auto-flow: row }
dialog .cell { grid-column: auto } dialog .cell small { display: block; font-size: .8rem; color: var(--quiet) }
dialog .right img { outline: 3px solid var(--accent); outline-offset: 1px }

@media (min-width: 760px) {
  .pairs { grid-template-columns: repeat(8, minmax(0, 1fr)) }
  .examples, .halves { grid-template-columns: repeat(2, minmax(0, 1fr)) } .legend + .legend { display: grid }
  .panels { grid-template-columns: repeat(3, minmax(0, 1fr)) }
  .curves { grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)) }
  dialog .strip { grid-template-columns: repeat(var(--columns), minmax(0, 1fr)) }
}
@media print { nav { display: none } section { break-before: auto } }
"""

SCRIPT = """
const large = document.querySelector("dialog");
addEventListener("click", event => {
  if (large.open) { large.close(); return; }
  const strip = event.target.closest("button.strip");
  if (!strip) return;
  const cells = document.createElement("div"), text = strip.parentElement.querySelector(":scope > figcaption");
  cells.className = "strip";
  cells.style.setProperty("--columns", strip.children.length > 4 ? 3 : strip.children.length);
  cells.append(...[...strip.children].map(cell => cell.cloneNode(true)));
  large.replaceChildren(cells, ...(text ? [text.cloneNode(true)] : []));
  large.showModal();
});
"""

# The policy makes the browser refuse what the page does not do anyway: ask the network for anything.
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
 script-src 'unsafe-inline'">
<title>$title</title>
<link rel="icon" href="data:,">
<style>$style</style>
</head>
<body>
$body
<dialog aria-label="enlarged pictures"></dialog>
<script>$script</script>
</body>
</html>
""")


def navigation(sections: dict[str, str]) -> str:
    return "<nav>" + "".join(f'<a href="#{name}">{title}</a>' for name, title in sections.items()) + "</nav>"


def write_report(
    model: str, evals: Path, tables: Path, data_path: Path, cache_dir: Path, subj: int, new_test: bool,
    train_logs: Path, clip_images: Tensor | None = None,
) -> Path:
    """Write {evals}/{model}/report.html and return its path. The folders are those of the stages' flags.

    clip_images (n, S, D) or (n, S * D), CLIP's tokens of the test images, spare their computation if they are at hand.
    Raises UserError when a file is missing or damaged, or when files do not belong together.
    """
    evals, tables, data_path, cache_dir, train_logs = map(Path, (evals, tables, data_path, cache_dir, train_logs))
    r = load(model, evals, data_path, cache_dir, subj, new_test, clip_images)
    checkpoint = read_checkpoint(train_logs / model / "last.pth")
    flags = {"model_name": model, "data_path": data_path, "cache_dir": cache_dir, "evals": evals, "tables": tables,
             "train_logs": train_logs, "subj": subj, "new_test": new_test}  # fmt: skip
    command = command_line("report.py", flags, vars(parse([])) | {"cache_dir": data_path})
    steps: list[tuple[str, str, Callable[[], str]]] = [
        ("numbers", "numbers", lambda: table(r, tables / f"{model}.csv")),
        ("pictures", "pictures", lambda: examples(r)),
        ("retrieval", "retrieval", lambda: retrieval(r)),
        ("embeddings", "embeddings", lambda: embeddings(r)),
        ("training", "training", lambda: training(train_logs, model, checkpoint)),
        ("regions", "regions", lambda: regions(r)),
        ("reproduce", "how to", lambda: reproduction(r, checkpoint, command)),
    ]
    parts = {name: make() for name, _, make in tqdm(steps, desc="report", unit="section", leave=False, delay=2)}
    links = navigation({name: title for name, title, _ in steps if parts[name]})
    page = PAGE.substitute(title=escaped(f"{model}: MindEye2 report"), style=STYLE, script=SCRIPT,
                           body="\n".join([introduction(r), links, "<main>", *parts.values(), "</main>"]))
    path = evals / model / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> Path:
    args = parse(argv)
    path = write_report(args.model_name, args.evals, args.tables, args.data_path, args.cache_dir, args.subj,
                        args.new_test, args.train_logs)
    print(f"wrote {path}, {path.stat().st_size / 2**20:.1f} MB: open it in a browser.")
    return path


if __name__ == "__main__":
    run_main(main)
