"""How good are the reconstructions? Metrics of the paper's Table 1 (and its appendix A.9).

    retrieval   find the seen image among 300 by its brain activity, and the brain activity by its image
    pixels      PixCorr (correlation of pixel values) and SSIM (structural similarity)
    meaning     two-way identification in CLIP space: is a picture more like its own image than like another one?

    in    evals/{model_name}/{model_name}_all_{recons,blurryrecons,clipvoxels}.pt    written by recon.py
          {data_path}/wds and images, {cache_dir}/clip                               what was seen, and CLIP
    out   evals/{model_name}/{model_name}_metrics.json     {name: number}, and the same as a table on the screen

    python evaluate.py --model_name testing --data_path toy
"""

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity
from torch import Tensor
from tqdm import tqdm

from data import Images, load_trials, repeats, replacing, resized
from frozen import load_clip
from model import UserError, run_main

CHUNK = 25  # pictures at once; at 425 pixels each takes 2 MB

# Table 1: mean of subjects 1, 2, 5 and 7, 40 sessions, pictures before the refinement by SDXL (retrieval has none);
# the blurry ones are its "low-level submodule only". Its CLIP is ViT-L/14, ours the run's own, so only alike.
PAPER = {
    "image_retrieval": 0.988, "brain_retrieval": 0.983, "pixcorr": 0.278, "ssim": 0.328, "two_way_clip": 0.945,
    "blurry_pixcorr": 0.399, "blurry_ssim": 0.539,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("evaluate.py", description=__doc__.split("\n\n")[0], formatter_class=formatter)
    add = parser.add_argument
    add("--model_name", default="testing", help="a name: folder of the reconstructions in --evals")
    add("--data_path", default="toy", help="folder of the data; NSD's in the paper")
    add("--cache_dir", help="folder of the frozen networks; None = --data_path")
    add("--evals", default="evals", help="folder of the reconstructions and of the output")
    add("--subj", type=int, default=1, choices=range(1, 9), help="number of the subject; 1, 2, 5 and 7 in the paper")
    add("--new_test", action=argparse.BooleanOptionalAction, default=True,
        help="the complete test set, as in the paper; no = its first release; as for recon.py")
    add("--num_images", type=int, help="images, as for recon.py; None = all (1000 in the paper)")
    add("--seed", type=int, default=42, help="a number, the seed of the retrieval pools; 42 in the paper's code")
    args = parser.parse_args(argv)
    args.cache_dir = args.cache_dir or args.data_path
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Metrics

def standardised(x: Tensor) -> Tensor:
    """(n, ..) -> (n, features) float64, each row with mean 0 and length 1: dot products are Pearson correlations."""
    x = x.flatten(1).double()
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)  # a constant row becomes 0: correlated with nothing


def pixcorr(images: Tensor, recons: Tensor, size: int = 425) -> float:
    """Pearson correlation of all 3 * size * size values of an image and its reconstruction, mean over n pairs.

    images, recons (n, 3, H, W), each of its own H and W. 425 is the size at which the subjects saw them.
    """
    total = 0.0
    for ours, theirs in zip(recons.split(CHUNK), images.split(CHUNK), strict=True):
        total += (standardised(resized(ours, size)) * standardised(resized(theirs, size))).sum().item()
    return total / len(images)


def ssim(images: Tensor, recons: Tensor, size: int = 425) -> float:
    """Structural similarity of grey versions (Wang et al. 2004: Gaussian window, sigma 1.5), mean over n pairs.

    images, recons (n, 3, H, W) in [0, 1]. Never compare it between papers before the settings below agree.
    """
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    values = []
    for image, recon in zip(tqdm(images, desc="SSIM", unit="image", leave=False, delay=2), recons, strict=True):
        pair = [rgb2gray(resized(x[None], size)[0].permute(1, 2, 0).numpy()) for x in (recon, image)]  # (size, size)
        values.append(structural_similarity(*pair, **settings))
    return float(np.mean(values))


def two_way_identification(real_features: Tensor, fake_features: Tensor) -> float:
    """How often a reconstruction resembles its own image more than another image does; chance .5.

    real_features, fake_features (n, ..) of images and of their reconstructions. With r[i, j] the Pearson correlation
    of image i and reconstruction j: the share of pairs i != j with r[i, j] < r[j, j]. Every image is compared with
    every reconstruction, so it judges a set: the more alike the images, the harder.
    """
    r = standardised(real_features) @ standardised(fake_features).T  # (n, n)
    wins = (r < r.diagonal()).sum()  # the diagonal is compared along the rows: one threshold for each column j
    return wins.item() / (len(r) * (len(r) - 1))


def retrieval(
    clip_voxels: Tensor, clip_images: Tensor, pool: int = 300, loops: int = 30, seed: int = 42
) -> tuple[float, float]:
    """(image retrieval, brain retrieval): how often the most similar of `pool` candidates is the right one.

    clip_voxels, clip_images (n, S, D) from brains and from the images that they saw, compared by the cosine of all
    their S * D numbers. Image retrieval: given the BRAIN, find its image. Brain retrieval: given the IMAGE, find its
    brain. Mean over `loops` random pools; if n <= pool there is only one, of all n. Chance is 1 / pool.

    The original has the two names swapped: its similarity matrix is the transpose of what its comments say. So the
    paper's 98.8% "image" is probably brain retrieval, and its 98.3% "brain" image retrieval.
    """
    brains, images = (F.normalize(x.flatten(1).float(), dim=1) for x in (clip_voxels, clip_images))  # (n, S * D)
    similarity = brains @ images.T  # (n, n), brains down, images across
    count, random = len(similarity), np.random.RandomState(seed)  # numpy's old generator draws the original's pools
    pools = [random.choice(count, pool, replace=False) for _ in range(loops)] if count > pool else [np.arange(count)]
    scores = []
    for rows in map(torch.from_numpy, pools):
        candidates, right = similarity[rows][:, rows], torch.arange(len(rows))  # (pool, pool)
        scores.append([(candidates.argmax(axis).cpu() == right).float().mean().item() for axis in (1, 0)])
    return tuple(np.mean(scores, axis=0).tolist())


# ---------------------------------------------------------------------------------------------------------------------
# The stage

def read(args: argparse.Namespace, name: str, count: int) -> Tensor:
    """One of recon.py's tensors (count, ..). Raises UserError when it is missing, damaged, or of other images."""
    path = Path(args.evals) / args.model_name / f"{args.model_name}_all_{name}.pt"
    if not path.exists():
        raise UserError(f"{path} does not exist: run recon.py first, or name another --model_name.")
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}): run recon.py again.") from None
    if len(tensor) != count:
        raise UserError(f"{path} has {len(tensor)} rows for {count} test images: run recon.py again, or pass the same "
                        f"--num_images and --new_test here.")  # fmt: skip
    if not torch.isfinite(tensor).all():
        raise UserError(f"{path} holds NaN or infinite numbers: train again, with a smaller --max_lr.")
    return tensor


def in_chunks(encode: Callable[[Tensor], Tensor], images: Tensor, device: str, label: str) -> Tensor:
    """encode(images) a chunk at a time on the device; the result (n, ..) comes back to the CPU."""
    chunks = tqdm(images.split(CHUNK), desc=label, unit="chunk", leave=False, delay=2)
    return torch.cat([encode(chunk.to(device)).float().cpu() for chunk in chunks])


def evaluate(args: argparse.Namespace) -> dict[str, float]:
    """All metrics of one model. Raises UserError when files are missing or do not belong together."""
    trials = load_trials(args.data_path, args.subj, "new_test" if args.new_test else "test")
    rows = repeats(trials)[0][: args.num_images]  # sorted row numbers of the test images: the order of recon.py
    if len(rows) < 2:
        raise UserError("the metrics compare images with each other and need at least 2: raise --num_images.")
    recons, clip_voxels = read(args, "recons", len(rows)), read(args, "clipvoxels", len(rows))
    images = Images(args.data_path)[rows]  # (n, 3, H, W)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip = load_clip(args.cache_dir, device)
    if clip_voxels.shape[1:] != (clip.seq_dim, clip.emb_dim):
        ours, theirs = tuple(clip_voxels.shape[1:]), (clip.seq_dim, clip.emb_dim)
        raise UserError(f"the model's tokens are {ours}, CLIP's {theirs}: name the --cache_dir of its training.")
    metrics = {}
    clip_images = in_chunks(clip.tokens, images, device, "CLIP tokens")  # (n, S, D)
    metrics["image_retrieval"], metrics["brain_retrieval"] = retrieval(clip_voxels, clip_images, seed=args.seed)
    metrics["pixcorr"], metrics["ssim"] = pixcorr(images, recons), ssim(images, recons)
    real, fake = (in_chunks(clip.embed, pictures, device, "CLIP") for pictures in (images, recons))  # (n, E)
    metrics["two_way_clip"] = two_way_identification(real, fake)
    if (Path(args.evals) / args.model_name / f"{args.model_name}_all_blurryrecons.pt").exists():
        blurry = read(args, "blurryrecons", len(rows))
        metrics["blurry_pixcorr"], metrics["blurry_ssim"] = pixcorr(images, blurry), ssim(images, blurry)
    return metrics


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns image_retrieval, brain_retrieval, pixcorr, ssim, two_way_clip (blurry_pixcorr, blurry_ssim if there)."""
    args = parse(argv)
    metrics = evaluate(args)
    path = Path(args.evals) / args.model_name / f"{args.model_name}_metrics.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"{args.model_name:<18}{'here':>8}{'paper':>8}    (Table 1: unrefined, 40 sessions, mean of four subjects)")
    for name, value in metrics.items():
        print(f"{name:<18}{value:8.3f}{PAPER[name]:8.3f}")
    print(f"wrote {path}")
    return metrics


if __name__ == "__main__":
    run_main(main)
