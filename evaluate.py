"""How good are the reconstructions? Every number of the paper's Tables 1, 2 and 3, beside the paper's own.

    pixels      PixCorr and SSIM                                                           metrics.py
    features    two-way identification and distances, as five networks see the pictures    judges.py
    retrieval   find the seen image among 300 by its brain activity, and the reverse       the run's CLIP, frozen.py
    brain       would the picture cause what the image caused, region by region?           gnet.py
    captions    the brain's caption against COCO's, and against GIT's of the image         judges.py

    in    evals/{model_name}/{model_name}_all_{recons,clipvoxels}.pt           written by recon.py, or the release's
                             .._all_{blurryrecons,predcaptions}.pt             likewise, optional
                             .._all_enhancedrecons.pt                          written by refine.py, optional
          {evals or data_path/evals}/all_{captions,git_generated_captions}.pt  (n,) str: COCO's, GIT's; optional
          {data_path}/wds, images, betas, masks and {cache_dir}/...            what was seen, and the networks
    out   evals/{model_name}/{model_name}_metrics.json      the rows of the table and what they were made with
                             .._scores.pt                   {"recons/pixcorr": (n,) ..}, a number for each image
          tables/{model_name}.csv                           yours, 95% interval, the paper's, the difference
          evals/{model_name}/report.html                    see report.py
          evals/features                                    what the networks said, for the next call: features.py

A network that is not there leaves out its rows, with a line that says which file brings it.

    python evaluate.py --model_name toy_1session_pretrained --data_path toy
    python evaluate.py --model_name final_subj01_pretrained_40sess_24bs --data_path DATA --subj 1     NSD, on one GPU
    python evaluate.py --compare toy_1session_pretrained toy_1session_scratch       is one better, or is it the images?
"""

import argparse
import csv
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nltk
import numpy as np
import torch
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from torch import Tensor

import judges
import metrics
from arrays import load_array, load_scores, load_texts
from checkpoints import reading
from data import (
    Images,
    average_repeats,
    data_folder,
    h5_path,
    load_region_masks,
    load_trials,
    load_voxels,
    num_voxels,
    repeats,
    resized,
)
from features import digest, hear, identified, kept
from files import replacing, save
from frozen import load_clip
from gnet import load_gnet
from judges import Missing
from metrics import CAPTIONS, PICTURES, REGIONS, ROWS
from model import UserError, run_main

NSD_IMAGES = (73000, 224)  # number and side of the pictures in NSD's file: others are of another dataset
JUDGE_ROWS = {"alexnet": ("alex2", "alex5"), "inception": ("inception",), "clip_l": ("clip_l",),
              "efficientnet": ("efficientnet",), "swav": ("swav",)}
JUDGED_SIZE = 256  # pixels, as in the original; smaller pictures are not enlarged
KINDS = ("recons", "enhancedrecons", "blurryrecons")
MADE_BY = {"recons": "recon.py", "blurryrecons": "recon.py --blurry_recon", "enhancedrecons": "refine.py",
           "predcaptions": "recon.py --captions"}  # optional file: the stage that writes it


def parse(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("evaluate.py", description=__doc__.split("\n\n")[0], formatter_class=formatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model_name", default="testing", help="a name: folder of the reconstructions in --evals")
    add("--all_recons_path", help="file of pictures to judge in place of the model's _all_recons.pt, or of its "
        "_all_enhancedrecons.pt if that is part of the name")
    add("--compare", nargs=2, metavar=("MODEL_A", "MODEL_B"), help="instead of evaluating, compare two models that "
        "were evaluated: mean difference of each row over the same images, its 95%% interval, and how likely chance "
        "alone makes one as large")
    add("--data_path", default=data_folder(), help="folder of the data; NSD's in the paper")
    add("--cache_dir", help="folder of the frozen networks; None = --data_path")
    add("--evals", default="evals", help="folder of the reconstructions and of the output")
    add("--tables", default="tables", help="folder of the table, a .csv file")
    add("--train_logs", default="train_logs", help="folder of the checkpoints: the report shows their curves")
    add("--subj", type=int, default=1, help="number of the subject, 1 to 8 in NSD; 1, 2, 5 and 7 in the paper")
    add("--new_test", action=switch, default=True, help="the complete test set, as in the paper; no = its first "
                                                        "release; as for recon.py")
    add("--blend", type=float, default=0.75, help="share of the refined picture in enhancedrecons, the rest is the "
        "blurry one, 0 to 1; .75 in the released code, 4:1 = .8 in the paper's text")
    add("--antialias", action=switch, default=False, help="smooth before pictures are made smaller; off for the "
        "paper's numbers: its torchvision did not")
    add("--batch_size", type=int, default=32, help="pictures at once in a network; changes the speed only")
    add("--num_images", type=int, help="images, as for recon.py; None = all (1000 in the paper)")
    add("--report", action=switch, default=True, help="also write report.html")
    add("--seed", type=int, default=42, help="a number, the seed of the retrieval pools; 42 in the paper's code")
    args = parser.parse_args(argv)
    if not 0 <= args.blend <= 1:
        raise UserError(f"--blend must be between 0 and 1, not {args.blend}.")
    for name, low in {"batch_size": 1, "num_images": 1, "seed": 0}.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise UserError(f"--{name} must be at least {low}, not {getattr(args, name)}.")
    args.cache_dir = args.cache_dir or args.data_path
    return args


# ---------------------------------------------------------------------------------------------------------------------
# What to judge

def needed(args: argparse.Namespace) -> str:
    """The kind of pictures that must be there, and whose place --all_recons_path takes."""
    return "enhancedrecons" if "enhancedrecons" in Path(args.all_recons_path or "").name else "recons"


def own(args: argparse.Namespace, name: str) -> Path:
    """Where recon.py, refine.py and we put a file of the model, name = "all_recons.pt" or another."""
    return Path(args.evals) / args.model_name / f"{args.model_name}_{name}"


def output(args: argparse.Namespace, name: str) -> Path:
    """The same, but for the file that --all_recons_path replaces."""
    given = args.all_recons_path and name == f"all_{needed(args)}.pt"
    return Path(args.all_recons_path) if given else own(args, name)


def judges_own_pictures(args: argparse.Namespace) -> bool:
    """Whether the report, which shows what recon.py and refine.py wrote for the model, shows what was judged."""
    name = f"all_{needed(args)}.pt"
    return own(args, "all_recons.pt").exists() and output(args, name).resolve() == own(args, name).resolve()


def read(args: argparse.Namespace, name: str, count: int) -> Tensor:
    """One of recon.py's or refine.py's tensors (count, ..). Raises UserError: missing, damaged, or of other images."""
    path, stage = output(args, f"all_{name}.pt"), MADE_BY.get(name, "recon.py")
    if not path.exists():
        raise UserError(f"{path} does not exist: run {stage} first, or name another --model_name.")
    tensor = load_array(path, f"run {stage} again.")
    pictures = name != "clipvoxels"
    if not isinstance(tensor, Tensor) or tensor.ndim != 3 + pictures or pictures and tensor.shape[1] != 3:
        raise UserError(f"{path} holds no {name}: run {stage} again.")
    if len(tensor) != count:
        raise UserError(f"{path} has {len(tensor)} rows for {count} test images: run {stage} again, or pass the same "
                        f"--num_images and --new_test here.")  # fmt: skip
    if not tensor.numel():
        raise UserError(f"{path} is empty, {tuple(tensor.shape)}: run {stage} again.")
    if not torch.isfinite(tensor).all():
        raise UserError(f"{path} holds NaN or infinite numbers: train again, with a smaller --max_lr.")
    return tensor


def read_captions(args: argparse.Namespace, name: str, total: int, count: int) -> list[str]:
    """The first `count` captions of the `total` test images: "predcaptions", "captions" (COCO's) or
    "git_generated_captions". Raises Missing without the file, UserError if it is damaged or of other images."""
    if name == "predcaptions":
        places, mend, total = [output(args, "all_predcaptions.pt")], f"{MADE_BY[name]} makes it.", count
    else:
        places = [Path(folder) / f"all_{name}.pt" for folder in (args.evals, Path(args.data_path) / "evals")]
        mend = "put the release's evals folder into --data_path."
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise Missing(f"{places[-1]} does not exist: {mend}")
    texts = [text.strip() for text in load_texts(path, mend)]
    if len(texts) != total and name == "predcaptions":
        raise UserError(f"{path} has {len(texts)} captions for {count} test images: run recon.py again, or pass the "
                        "same --num_images and --new_test here.")  # fmt: skip
    if len(texts) != total:
        raise Missing(f"{path} has {len(texts)} captions, which are of other images: this test set has {total}.")
    return texts[:count]


def check_references(args: argparse.Namespace, total: int, count: int) -> None:
    """Read what the last scores will need: that a file is damaged should be said before the others are computed."""
    for name in ("predcaptions", "captions", "git_generated_captions"):
        with suppress(Missing):
            read_captions(args, name, total, count)
    read_masks(args)


def read_masks(args: argparse.Namespace) -> dict[str, np.ndarray] | None:
    """{region: (V,) bool} of the subject; None without the file."""
    if not h5_path(args.data_path, "masks").exists():
        return None
    return load_region_masks(args.data_path, args.subj, num_voxels(args.data_path, args.subj))


def read_pictures(args: argparse.Namespace, rows: np.ndarray) -> tuple[SimpleNamespace, dict[str, SimpleNamespace]]:
    """The images seen, and {"recons": .., ..} whichever there are: `identified` pictures (n, 3, H, H) in [0, 1].

    All get the size of the reconstructions, at most 256: the original makes the images larger, from 224, and published
    refined pictures smaller, from 512, before anything else, CLIP's tokens included.
    """
    pictures = {name: read(args, name, len(rows)) for name in KINDS
                if name == needed(args) or output(args, f"all_{name}.pt").exists()}
    reconstructions = pictures.get("recons", pictures[needed(args)])
    seen, size = Images(args.data_path)[rows], min(JUDGED_SIZE, reconstructions.shape[-1])
    seen, *others = (resized(x, size, args.antialias) for x in (seen, *pictures.values()))
    pictures = dict(zip(pictures, others, strict=True))
    if "enhancedrecons" in pictures and "blurryrecons" in pictures:  # section 2.5: the blurry one adds low-level truth
        pictures["enhancedrecons"] = torch.lerp(pictures["blurryrecons"], pictures["enhancedrecons"], args.blend)
    elif "enhancedrecons" in pictures and args.blend < 1:
        print("enhancedrecons are judged unblended, for there are no blurryrecons.")
    return identified(seen), {name: identified(x) for name, x in pictures.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The scores. result.scores {row: (n,)}; .judges {row: who judged}; .values {row: the number to print, if not the mean};
# .missing [{titles, rows, reason}]; .images = n; .image_rows, a hash of which; .clip_images (n, S, D); .unlike: of what
# the paper's numbers are, if not of these very images ("another dataset", "all 1000 images"), else "".

def skip(result: SimpleNamespace, rows: list[str], reason: object) -> None:
    titles = list(dict.fromkeys(ROWS[row][0] for row in rows))
    result.missing.append({"titles": titles, "rows": rows, "reason": str(reason)})
    print(f"left out {', '.join(titles)}: {reason}")


def score_folder(args: argparse.Namespace, pictures: str) -> Path:
    return Path(args.evals) / "features" / args.model_name / pictures


def score_pixels(args: argparse.Namespace, result: SimpleNamespace, seen: SimpleNamespace, pictures: dict) -> None:
    for name, fake in pictures.items():
        for metric in (metrics.pixcorr, metrics.ssim):
            key = digest(seen.hash, fake.hash, args.antialias)
            result.scores[f"{name}/{metric.__name__}"] = kept(
                score_folder(args, name), metric.__name__, key,
                partial(metric, seen.items, fake.items, antialias=args.antialias))


def score_features(args: argparse.Namespace, result: SimpleNamespace, seen: SimpleNamespace, pictures: dict) -> None:
    """Table 1: does a judge see in the reconstruction what it sees in the image?"""
    for judge, rows in JUDGE_ROWS.items():
        try:
            heard = hear(args, judge, partial(judges.load_vision, judge, args.cache_dir, args.device),
                         lambda network, x: network.features(x, antialias=args.antialias), {"seen": seen, **pictures})
        except Missing as reason:
            skip(result, [f"{name}/{row}" for name in pictures for row in rows], reason)
            continue
        for name, fake in pictures.items():
            for row in rows:
                pair = [heard.features[label][row] for label in ("seen", name)]  # (n, F) each
                result.scores[f"{name}/{row}"] = kept(
                    score_folder(args, name), f"score_{row}", digest(heard.key, seen.hash, fake.hash),
                    partial(metrics.compare_features(row), *pair))
                result.judges[f"{name}/{row}"] = heard.description


def score_retrieval(args: argparse.Namespace, result: SimpleNamespace, seen: SimpleNamespace, voxels: Tensor) -> None:
    """Find the image by the brain, and the brain by the image, in the space of the run's own CLIP (section 3.3)."""
    def check(theirs: tuple[int, int]) -> None:
        if (ours := tuple(voxels.shape[1:])) != tuple(theirs):
            raise UserError(f"the model's tokens are {ours}, CLIP's {theirs}: name the --cache_dir of its training.")

    def load() -> SimpleNamespace:
        clip = load_clip(args.cache_dir, args.device)
        check((clip.seq_dim, clip.emb_dim))  # before they are made
        files = sorted((Path(args.cache_dir) / "clip").glob("*"))  # none: the published one, downloaded
        return SimpleNamespace(tokens=clip.tokens, files=files, description="the run's CLIP")

    heard = hear(args, "clip", load, lambda clip, x: {"tokens": clip.tokens(x)}, {"seen": seen})
    result.clip_images = heard.features["seen"]["tokens"]                                        # (n, S, D)
    check(tuple(result.clip_images.shape[1:]))  # they may have been kept by another model's call
    key = digest(heard.key, seen.hash, identified(voxels).hash, args.seed)
    found = kept(score_folder(args, "clipvoxels"), "retrieval", key,
                 partial(metrics.retrieval, voxels, result.clip_images, seed=args.seed))
    for name, (pools, rates) in found.items():
        row, count = f"retrieval/{name}", len(pools)
        result.scores[row], result.values[row] = rates, pools.mean().item()
        how = f"one pool of all {len(voxels)}"
        if count > 1:  # the interval that the original prints: how far the choice of pools moves the mean
            how = f"{count} pools of 300, which alone give +-{1.96 * pools.std().item() / count**0.5:.4f}"
        result.judges[row] = f"{heard.description}; {how}"


def score_brain(args: argparse.Namespace, result: SimpleNamespace, pictures: dict, trials, positions: list) -> None:
    """Table 3: an encoding model says what a picture would cause in this brain; is it what the image caused?"""
    rows = [f"{name}/brain_{region}" for name in pictures for region in REGIONS]
    masks_file, masks = h5_path(args.data_path, "masks"), read_masks(args)
    if masks is None:
        return skip(result, rows, f"{masks_file} does not exist: put the release's into --data_path.")
    try:
        heard = hear(args, f"gnet_subj0{args.subj}", partial(load_gnet, args.cache_dir, args.subj, args.device),
                     lambda network, x: {"voxels": network.predict(x)}, pictures)
    except Missing as reason:
        return skip(result, rows, reason)
    regions = {region: torch.from_numpy(masks[region]) for region in REGIONS if region in masks}
    if absent := [row for row in rows if row.partition("/brain_")[2] not in regions]:
        skip(result, absent, f"{masks_file} has no such region: put the release's into --data_path.")
    betas = average_repeats(load_voxels(args.data_path, trials), positions)                      # (n, V)
    for name in pictures:
        predicted = heard.features[name]["voxels"].float()                                       # (n, V)
        if predicted.shape != betas.shape:
            raise UserError(f"the encoding model predicts {predicted.shape[1]} voxels, subject {args.subj} has "
                            f"{betas.shape[1]}: name the --cache_dir that belongs to --data_path.")
        for region, mask in regions.items():
            result.scores[f"{name}/brain_{region}"] = metrics.brain_correlation(betas, predicted, mask)
            result.judges[f"{name}/brain_{region}"] = heard.description


def load_wordnet(cache_dir: str) -> tuple[object, str]:
    """METEOR's synonyms from cache_dir/nltk_data or nltk's own places; and a remark if they are in neither."""
    place = str(Path(cache_dir, "nltk_data").absolute())
    if place not in nltk.data.path and Path(place).is_dir():
        nltk.data.path.insert(0, place)  # nltk reads from no place that is not on its list
    for name in ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"):
        try:
            found = nltk.data.find(name)
        except LookupError:
            continue
        with reading(Path(str(found)), "--cache_dir", must_exist=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it knows English only
            return WordNetCorpusReader(found, None), ""
    return metrics.NO_WORDNET, "without WordNet synonyms"


def score_captions(args: argparse.Namespace, result: SimpleNamespace, total: int, count: int) -> None:
    """Table 2. "Absolute": the brain's caption against COCO's, and against GIT's of the image. "Ground": GIT's of the
    image against COCO's, the ceiling, for the brain's is GIT's as well. "Relative": absolute / ground. (The original
    divides brain against GIT by the ground, two numbers with different references.)"""
    texts, absent = {}, {}
    for who, name in (("brain", "predcaptions"), ("COCO", "captions"), ("GIT", "git_generated_captions")):
        try:
            texts[who] = read_captions(args, name, total, count)
        except Missing as reason:
            absent[who] = reason
    needed = {"": ("COCO", "brain"), "_git": ("GIT", "brain"), "_ground": ("COCO", "GIT"),
              "_relative": ("COCO", "brain", "GIT")}
    for who, reason in absent.items():
        lost = [suffix for suffix, pair in needed.items() if who in pair]
        if lost:
            skip(result, [f"captions/{metric}{suffix}" for metric in CAPTIONS for suffix in lost], reason)
        needed = {suffix: pair for suffix, pair in needed.items() if suffix not in lost}
    pairs = {suffix: pair for suffix, pair in needed.items() if suffix != "_relative"}
    wordnet, remark = load_wordnet(args.cache_dir)
    words = {"meteor": lambda a, b: metrics.meteor(a, b, wordnet), "rouge_1": metrics.rouge_1,
             "rouge_l": metrics.rouge_l}
    sets = {f"captions_{who}": identified(texts[who]) for who in {who for pair in pairs.values() for who in pair}}
    for metric in CAPTIONS if pairs else ():
        if metric in words:
            for suffix, pair in pairs.items():
                result.scores[f"captions/{metric}{suffix}"] = words[metric](*(texts[who] for who in pair))
                result.judges[f"captions/{metric}{suffix}"] = remark if metric == "meteor" else ""
        else:
            try:
                heard = hear(args, f"text_{metric}", partial(judges.load_text, metric, args.cache_dir, args.device),
                             lambda network, x: {"text": network.embed(x)}, sets)
            except Missing as reason:
                skip(result, [f"captions/{metric}{suffix}" for suffix in needed], reason)
                continue
            for suffix, pair in pairs.items():
                a, b = (heard.features[f"captions_{who}"]["text"].double() for who in pair)      # (n, E), length 1
                result.scores[f"captions/{metric}{suffix}"] = (a * b).sum(1)
                result.judges[f"captions/{metric}{suffix}"] = heard.description
        if "_relative" in needed:
            ceiling = result.scores[f"captions/{metric}_ground"].mean().clamp(min=1e-12)
            result.scores[f"captions/{metric}_relative"] = result.scores[f"captions/{metric}"] / ceiling
            result.judges[f"captions/{metric}_relative"] = result.judges[f"captions/{metric}"]


def evaluate(args: argparse.Namespace) -> SimpleNamespace:
    """All scores of one model. Raises UserError when files are missing or do not belong together."""
    trials = load_trials(args.data_path, args.subj, "new_test" if args.new_test else "test")
    ids, positions = repeats(trials)  # sorted row numbers of the test images: the order of recon.py
    total, rows = len(ids), ids[: args.num_images]
    if len(rows) < 2:
        raise UserError("the metrics compare images with each other and need at least 2: raise --num_images.")
    voxels = read(args, "clipvoxels", len(rows))
    seen, pictures = read_pictures(args, rows)
    check_references(args, total, len(rows))
    result = SimpleNamespace(scores={}, judges={}, values={}, missing=[], images=len(rows),
                             image_rows=digest(rows.tolist()), unlike="")
    images = Images(args.data_path)
    if (len(images), images.size) != NSD_IMAGES:
        result.unlike = "another dataset"
    elif len(rows) < total:
        result.unlike = f"all {total} images"
    for name in KINDS:
        if name not in pictures:
            absent = [f"{name}/{metric}" for metric in (*PICTURES, *(f"brain_{region}" for region in REGIONS))]
            skip(result, absent, f"{output(args, f'all_{name}.pt')} does not exist: {MADE_BY[name]} makes it.")
    score_retrieval(args, result, seen, voxels)
    score_pixels(args, result, seen, pictures)
    score_features(args, result, seen, pictures)
    score_brain(args, result, pictures, trials, positions[: args.num_images])
    score_captions(args, result, total, len(rows))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Output

def make_rows(args: argparse.Namespace, result: SimpleNamespace) -> list[dict]:
    """The table, a dict a row: mean, its bootstrap interval, and the paper's numbers."""
    rows = []
    for key in (key for key in ROWS if key in result.scores):
        (pictures, metric), (title, group, better), values = key.split("/"), ROWS[key], result.scores[key]
        low, high = metrics.bootstrap(values, seed=args.seed)
        paper_40, paper_1, remark = metrics.paper_numbers(key, args.subj)
        rows.append({
            "key": key, "pictures": pictures, "metric": metric, "title": title, "group": group,
            "value": result.values.get(key, values.mean().item()), "low": low, "high": high, "better": better,
            "judge": result.judges.get(key, ""), "paper_40": paper_40, "paper_1": paper_1, "paper_remark": remark})
    return rows


def versions() -> dict[str, str]:
    names = ("torch", "torchvision", "numpy", "scikit-image", "open_clip_torch", "transformers", "nltk")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def commit() -> str:
    """The commit of this code, with -dirty if it was changed since; "" outside a repository."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        return ""


def write(args: argparse.Namespace, argv: list[str], result: SimpleNamespace, rows: list[dict]) -> None:
    """{model}_scores.pt, {model}_metrics.json and the .csv file."""
    save(output(args, "scores.pt"), {row["key"]: result.scores[row["key"]].float() for row in rows})
    record = {"model": args.model_name, "subject": args.subj, "images": result.images,
              "image_rows": result.image_rows, "command": f"python evaluate.py {shlex.join(argv)}",
              "versions": versions(), "commit": commit(), "antialias": args.antialias, "blend": args.blend,
              "paper_unlike": result.unlike, "rows": rows, "missing": result.missing}
    with replacing(output(args, "metrics.json")) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    where = result.unlike or f"subject {args.subj}"
    with replacing(table_file(args)) as temporary, open(temporary, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["pictures", "metric", "yours", "95% low", "95% high",
                        *(f"{what} ({where})" for hours in ("40 sessions", "1 session")
                          for what in (f"paper {hours}", f"difference to {hours}")), "remark", "judge"])
        for row in rows:
            numbers = [row["value"], row["low"], row["high"], *beside_the_paper(row, result.unlike)]
            table.writerow([row["pictures"], row["title"],
                            *("" if x is None else round(x, 6) for x in numbers), row["paper_remark"], row["judge"]])


def table_file(args: argparse.Namespace) -> Path:
    return Path(args.tables) / f"{args.model_name}.csv"


def beside_the_paper(row: dict, unlike: str) -> list[float | None]:
    """The paper's number with 40 sessions, ours minus it, and the same for one session; no difference if unlike."""
    return [x for paper in (row["paper_40"], row["paper_1"])
            for x in (paper, None if unlike or paper is None else row["value"] - paper)]


def print_table(args: argparse.Namespace, result: SimpleNamespace, rows: list[dict]) -> None:
    """The table on the screen: each row with its interval, and how far the paper's two numbers are from it."""
    head = f"paper, {result.unlike or f'subject {args.subj}'}"
    print(f"\n{args.model_name}: {result.images} images of subject {args.subj}\n"
          f"{'':<38}{'yours':>7}{'95% interval':>16}    {head:<33}judged by\n"
          f"{'':<65}40 h{'diff':>8}{'1 h':>8}{'diff':>8}")
    last = None
    for row in rows:
        if row["pictures"] != last:
            last = row["pictures"]
            blended = last == "enhancedrecons" and args.blend < 1
            print(last + (f" ({args.blend:g} refined, {1 - args.blend:g} blurry)" if blended else ""))
        star = "*" if row["paper_remark"].startswith("mean") else " "
        beside = beside_the_paper(row, result.unlike)
        cells = [f"{'-' if x is None else format(x, '+.3f' if i % 2 else '.3f'):>7}{star if i == 0 else ' '}"
                 for i, x in enumerate(beside)]
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        print(f"  {row['title']:<36}{row['value']:7.3f}{interval:>18}{''.join(cells)} {row['judge']}".rstrip())
    print("* mean of subjects 1, 2, 5 and 7. EfficientNet-B1 and SwAV are distances: less is better. Image retrieval "
          "finds images;\n  the paper prints ours as \"brain retrieval\" and the other way round.")
    if count := sum(len(entry["rows"]) for entry in result.missing):
        titles = dict.fromkeys(title for entry in result.missing for title in entry["titles"])
        print(f"{count} rows missing (the lines above say which file brings them): {', '.join(titles)}")


def compare(args: argparse.Namespace) -> dict[str, float]:
    """--compare: the mean difference A - B of every row that both models have, by images. Raises UserError."""
    scores, image_rows = [], set()
    for name in args.compare:
        path = Path(args.evals) / name / f"{name}_scores.pt"
        if not path.exists():
            raise UserError(f"{path} does not exist: run evaluate.py --model_name {name} first.")
        scores.append(load_scores(path, f"run evaluate.py --model_name {name} again."))
        record = path.with_name(f"{name}_metrics.json")
        with reading(record, f"--compare, or run evaluate.py --model_name {name} again"):
            image_rows.add(json.loads(record.read_text()).get("image_rows"))
    a, b = scores
    shared = [key for key in ROWS if key in a and key in b]
    counts = {len(x[key]) for x in scores for key in shared}
    if len(counts) != 1 or len(image_rows - {None}) > 1:  # None: written before they were noted
        raise UserError(f"{' and '.join(args.compare)} were evaluated on different images, or share no row: evaluate "
                        "both with the same --num_images and --new_test.")
    print(f"A = {args.compare[0]}, B = {args.compare[1]}, {counts.pop()} images\n"
          f"{'':<46}{'A':>7}{'B':>8}{'A - B':>9}{'95% interval':>20}{'p':>9}")
    out = {}
    for key in shared:
        out[key], (low, high), p = metrics.paired(a[key], b[key], seed=args.seed)
        name = f"{key.split('/')[0]}: {ROWS[key][0]}"
        means = f"{a[key].mean():7.3f}{b[key].mean():8.3f}{out[key]:+9.3f}"
        print(f"{name:<46}{means}    [{low:+.3f}, {high:+.3f}]{p:9.4f}")
    print(f"p: how often chance alone makes a difference as large. Of {len(shared)} rows of two equal models, "
          f"{len(shared) / 20:.0f} would have p < .05.")
    return out


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns {row: value}, such as "recons/pixcorr" or "retrieval/image"; the differences with --compare."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.compare:
        return compare(args)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    result = evaluate(args)
    rows = make_rows(args, result)
    write(args, argv, result, rows)
    print_table(args, result, rows)
    print(f"wrote {output(args, 'metrics.json')}, {output(args, 'scores.pt')} and {table_file(args)}")
    if args.report and not judges_own_pictures(args):
        print("wrote no report: it would show other pictures than --all_recons_path's, or needs recon.py's.")
    elif args.report:
        from report import write_report  # only here, for it draws with libraries that the numbers do not need
        print("wrote", write_report(args.model_name, Path(args.evals), Path(args.tables), Path(args.data_path),
                                    Path(args.cache_dir), args.subj, args.new_test, Path(args.train_logs),
                                    clip_images=result.clip_images))
    return {row["key"]: row["value"] for row in rows}


if __name__ == "__main__":
    run_main(main)
