"""What the paper's tables measure (Tables 1-3, appendix A.9), as pure functions of arrays.

    pixels      pixcorr, ssim                                      an image against its reconstruction
    features    two_way_identification, correlation_distance       the same as a network sees them
    retrieval   retrieval                                          brains against images, in CLIP space
    brain       brain_correlation                                  a brain against what a picture should cause in it
    captions    meteor, rouge_1, rouge_l                           a sentence against another
    chance      bootstrap, paired                                  how far each mean, or difference, is to be trusted
    the paper   ROWS, paper_numbers                                what the tables call them, and their numbers

Every metric gives one number for each image, (n,) float64: the paper prints the mean. The mean alone would hide how
much of a difference is the choice of images.

    from metrics import pixcorr; pixcorr(images, reconstructions).mean()
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from nltk.stem import PorterStemmer
from nltk.tokenize import word_tokenize
from nltk.translate.meteor_score import single_meteor_score
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity
from torch import Tensor
from tqdm import tqdm

from data import resized

CHUNK = 25  # pictures at once; at 425 pixels each takes 2 MB
SLICE = 2**14  # features at once: AlexNet's second layer has 185,000 of each picture


# ---------------------------------------------------------------------------------------------------------------------
# Pixels

def pearson(a: Tensor, b: Tensor) -> Tensor:
    """sum((a - mean a)(b - mean b)) / (|a - mean a| |b - mean b|) of each row of a (n, ..) and that of b -> (n,)."""
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (a, b))  # (n, features)
    products, *squares = ((x * y).sum(1).double() for x, y in ((a, b), (a, a), (b, b)))
    return products / (squares[0] * squares[1]).sqrt().clamp(min=1e-30)  # a constant row is correlated with nothing: 0


def pixcorr(images: Tensor, recons: Tensor, size: int = 425, antialias: bool = False) -> Tensor:
    """Pearson correlation of all 3 * size * size values of an image and its reconstruction -> (n,) in [-1, 1].

    images, recons (n, 3, H, W), each of its own H and W. 425 is the size at which the subjects saw them.
    """
    pairs = zip(images.split(CHUNK), recons.split(CHUNK), strict=True)
    return torch.cat([pearson(*(resized(x, size, antialias) for x in pair)) for pair in pairs])


def ssim(images: Tensor, recons: Tensor, size: int = 425, antialias: bool = False) -> Tensor:
    """Structural similarity of grey versions -> (n,) in [-1, 1]; images, recons (n, 3, H, W) in [0, 1].

    Mean over all positions of (2 mx my + .01^2)(2 sxy + .03^2) / ((mx^2 + my^2 + .01^2)(sx^2 + sy^2 + .03^2)), where
    means m and (co)variances s are of a Gaussian window of sigma 1.5, 11 pixels wide (Wang et al. 2004).
    Never compare it between papers before the settings below agree.
    """
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    values = []
    for pair in zip(tqdm(images, desc="SSIM", unit="image", leave=False, delay=2), recons, strict=True):
        grey = [rgb2gray(resized(x[None], size, antialias)[0].permute(1, 2, 0).numpy()) for x in pair]  # (size, size)
        values.append(structural_similarity(*grey, **settings))
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Features

def _correlations(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pearson correlation of every row of a (n, F) and every row of b (m, F) -> (n, m) float64.

    (mean(x y) - mean x mean y) / (deviation x deviation y), from one pass over the features in `dtype`. Also, for each
    row of b, how far its correlations can be off if dtype is float32 (m,): much, where a mean dwarfs its deviation.
    """
    sums, squares, r = [0, 0], [0, 0], torch.zeros(len(a), len(b), dtype=torch.float64)
    for parts in zip(a.split(SLICE, 1), b.split(SLICE, 1), strict=True):
        parts = [part.to(dtype) for part in parts]
        sums = [total + part.sum(1).double() for total, part in zip(sums, parts, strict=True)]
        squares = [total + part.norm(dim=1).double() ** 2 for total, part in zip(squares, parts, strict=True)]
        r += parts[0] @ parts[1].T                                                                # (n, m)
    means = [total / a.shape[1] for total in sums]                                                # (n,), (m,)
    variances = [total / a.shape[1] - mean**2 for total, mean in zip(squares, means, strict=True)]
    left, right = (variance.masked_fill(variance <= 1e-12 * (variance + mean**2), torch.inf).sqrt()
                   for variance, mean in zip(variances, means, strict=True))                      # constant rows: r = 0
    r.div_(a.shape[1]).sub_(means[0][:, None] * means[1]).div_(left[:, None]).div_(right)
    ratios = [mean**2 / variance.clamp(min=1e-30) for mean, variance in zip(means, variances, strict=True)]
    return r, 1e-6 * (1 + ratios[0].max()) * (1 + ratios[1])


def two_way_identification(real: Tensor, fake: Tensor) -> Tensor:
    """How often a reconstruction resembles its own image more than another image does -> (n,) in [0, 1]; chance .5.

    real, fake (n, ..): features of images and of their reconstructions. With r[i, j] the Pearson correlation of image
    i and reconstruction j: for each j, the share of the n - 1 others i with r[i, j] < r[j, j]. Every image is compared
    with every reconstruction, so it judges a set: the more alike the images, the harder.
    """
    real, fake = real.flatten(1), fake.flatten(1)
    r, error = _correlations(real, fake, torch.float32)                       # (n, n), images down
    # The original correlates all 2 n rows with each other, in float64: four times the products, each at twice the cost.
    # Few pairs are too close for float32; those are correlated again in float64, and so the numbers are the same.
    close = (r - r.diagonal()).abs_() < error                                 # (n, n), the diagonal among them
    columns = close.sum(0) > 1
    rows = close[:, columns].any(1)
    if columns.any():
        r[rows.nonzero(), columns.nonzero().T] = _correlations(real[rows], fake[columns], torch.float64)[0]
    wins = (r < r.diagonal()).sum(0)                                          # (n,): one threshold for each column j
    return wins.double() / (len(r) - 1)


def correlation_distance(real: Tensor, fake: Tensor) -> Tensor:
    """1 - Pearson correlation of the features (n, ..) of an image and of its reconstruction -> (n,), 0 = the same."""
    return 1 - pearson(real, fake)


def compare_features(row: str) -> Callable[[Tensor, Tensor], Tensor]:
    """How the paper compares a judge's features of images and reconstructions: by distance where lower is better."""
    return correlation_distance if PICTURES[row][2] == "lower" else two_way_identification


# ---------------------------------------------------------------------------------------------------------------------
# Brains

def retrieval(
    clip_voxels: Tensor, clip_images: Tensor, pool: int = 300, loops: int = 30, seed: int = 42
) -> dict[str, tuple[Tensor, Tensor]]:
    """How often the most similar of `pool` candidates is the right one; chance 1 / pool.

    clip_voxels, clip_images (n, S, D) from brains and from the images that they saw, compared by the cosine of all
    their S * D numbers. Returns {"image": .., "brain": ..}: image retrieval, given the BRAIN, finds its image; brain
    retrieval, given the IMAGE, finds its brain. Each is a pair: the share of hits in each of `loops` random pools
    (loops,), whose mean the paper prints, and each image's share of hits in the pools that it was in (n,). If
    n <= pool there is one pool, of all n.

    The original has the two names swapped: its similarity matrix is the transpose of what its comments say. What it
    prints as fwd or "image retrieval" is brain retrieval here, what it prints as bwd or "brain retrieval" is image
    retrieval here.
    """
    brains, images = (x.flatten(1) for x in (clip_voxels, clip_images))                            # (n, S * D)
    lengths = [sum(part.float().square().sum(1) for part in x.split(SLICE, 1)).sqrt() for x in (brains, images)]
    parts = zip(brains.split(SLICE, 1), images.split(SLICE, 1), strict=True)
    products = sum(b.float() @ i.float().T for b, i in parts)                                      # (n, n)
    similarity = products / lengths[0][:, None] / lengths[1]                                       # brains down
    count, random = len(similarity), np.random.RandomState(seed)  # numpy's old generator draws the original's pools
    pools = [random.choice(count, pool, replace=False) for _ in range(loops)] if count > pool else [np.arange(count)]
    drawn, results = torch.zeros(count), {}
    for rows in pools:
        drawn[rows] += 1
    for name, axis in (("image", 1), ("brain", 0)):
        hits, scores = torch.zeros(count), []
        for rows in map(torch.from_numpy, pools):
            right = similarity[rows][:, rows].argmax(axis) == torch.arange(len(rows))              # (pool,)
            hits[rows] += right.float()
            scores.append(right.double().mean())
        rates = (hits / drawn).double()
        rates[drawn == 0] = rates[drawn > 0].mean()  # an image that no pool drew counts as an average one
        results[name] = torch.stack(scores), rates
    return results


def brain_correlation(betas: Tensor, predicted: Tensor, mask: Tensor) -> Tensor:
    """Pearson correlation across a region's voxels of a brain and of what an encoding model predicts -> (n,).

    betas (n, V): the responses to the images seen, averaged over repetitions. predicted (n, V): what the model says
    that the reconstructions would cause. mask (V,) bool. Of single images, unlike the usual correlation of a voxel
    across images: it asks whether the pattern is right.
    """
    return pearson(betas[:, mask], predicted[:, mask])


# ---------------------------------------------------------------------------------------------------------------------
# Captions

NO_WORDNET = SimpleNamespace(synsets=lambda word: [])  # METEOR's dictionary of synonyms without any


def meteor(references: list[str], sentences: list[str], wordnet: object = NO_WORDNET) -> Tensor:
    """METEOR (Banerjee & Lavie 2005) of each sentence against its reference -> (n,) in [0, 1].

    Words are matched one to one, the last ones first: equal ones, then of equal Porter stem, then synonyms. With m
    matches, P = m / words of the sentence, R = m / words of the reference:
    P R / (.9 P + .1 R) * (1 - .5 (chunks / m)^3), where chunks is the number of runs of matches that lie side by side.
    Words are lower case, split by nltk's word_tokenize (a full stop is a word), as in the original.
    """
    split = [[word_tokenize(text.lower(), preserve_line=True) for text in texts] for texts in (references, sentences)]
    # preserve_line: do not look for the ends of sentences, which would need a file; a caption is one sentence.
    scores = [single_meteor_score(*pair, wordnet=wordnet) for pair in zip(*split, strict=True)]
    return torch.tensor(scores, dtype=torch.float64)


@cache
def _stem(word: str) -> str:
    return PorterStemmer().stem(word) if len(word) > 3 else word


def _words(text: str, stem: bool) -> list[str]:
    """Lower-case runs of letters and digits of a text, as ROUGE counts them."""
    words = re.findall("[a-z0-9]+", text.lower())
    return [_stem(word) for word in words] if stem else words


def _f_measure(matches: int, reference: list[str], sentence: list[str]) -> float:
    """2 P R / (P + R) with P = matches / words of the sentence, R = matches / words of the reference."""
    return 2 * matches / (len(reference) + len(sentence)) if matches else 0.0


def rouge_1(references: list[str], sentences: list[str], stem: bool = False) -> Tensor:
    """ROUGE-1 (Lin 2004), F-measure: matches = words in common, each as often as in the poorer of the two -> (n,).

    stem: count words of equal Porter stem as equal, rouge_score's use_stemmer. The original leaves it off.
    """
    scores = []
    for pair in zip(references, sentences, strict=True):
        words = [_words(text, stem) for text in pair]
        common = Counter(words[0]) & Counter(words[1])
        scores.append(_f_measure(common.total(), *words))
    return torch.tensor(scores, dtype=torch.float64)


def rouge_l(references: list[str], sentences: list[str], stem: bool = False) -> Tensor:
    """ROUGE-L (Lin 2004), F-measure: matches = longest series of words in common, gaps allowed -> (n,)."""
    scores = []
    for pair in zip(references, sentences, strict=True):
        reference, sentence = (_words(text, stem) for text in pair)
        longest = [0] * (len(sentence) + 1)  # longest[k]: of the reference's words so far and sentence[:k]
        for word in reference:
            before = longest.copy()
            for k, other in enumerate(sentence, 1):
                longest[k] = before[k - 1] + 1 if word == other else max(before[k], longest[k - 1])
        scores.append(_f_measure(longest[-1], reference, sentence))
    return torch.tensor(scores, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Chance

def bootstrap(values: Tensor, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of values (n,): the middle 95% of the means of `draws` samples of n, with replacement.

    It says how far the mean would move with other images of the same kind; not with another training or another brain.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(values), (draws, len(values)), generator=generator)  # (draws, n)
    low, high = values.double()[rows].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def paired(a: Tensor, b: Tensor, draws: int = 5000, seed: int = 0) -> tuple[float, tuple[float, float], float]:
    """Is the mean of a (n,) another than that of b (n,), of the same images? -> (mean of a - b, 95% interval, p).

    p is of a sign-flip permutation test, two-sided: were the models alike, each image's difference could as well have
    the other sign; p is the share of `draws` random choices of signs whose mean difference is as large as ours (ours
    counted among them, so it is never 0).
    """
    difference = a.double() - b.double()                                          # (n,)
    generator = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(2, (draws, len(difference)), generator=generator).double() - 1     # (draws, n)
    flipped, ours = (signs @ difference / len(difference)).abs(), difference.mean().abs()
    p = (1 + (flipped >= ours - 1e-12).sum().item()) / (1 + draws)
    return difference.mean().item(), bootstrap(difference, seed=seed), p


# ---------------------------------------------------------------------------------------------------------------------
# The paper's tables

PICTURES = {  # rows of each set of pictures: title, group, whether more is better
    "pixcorr": ("PixCorr", "pixels", "higher"), "ssim": ("SSIM", "pixels", "higher"),
    "alex2": ("AlexNet(2)", "features", "higher"), "alex5": ("AlexNet(5)", "features", "higher"),
    "inception": ("InceptionV3", "features", "higher"), "clip_l": ("CLIP ViT-L/14", "features", "higher"),
    "efficientnet": ("EfficientNet-B1", "features", "lower"), "swav": ("SwAV", "features", "lower"),
}
REGIONS = {"nsd_general": "visual cortex", "V1": "V1", "V2": "V2", "V3": "V3", "V4": "V4", "higher_vis": "higher vis."}
CAPTIONS = {"meteor": "METEOR", "rouge_l": "ROUGE-L", "rouge_1": "ROUGE-1", "sentence": "SentenceTransformer",
            "clip_b": "CLIP-B", "clip_l": "CLIP-L"}
PAIRS = {"": "brain vs COCO", "_git": "brain vs GIT", "_ground": "GIT vs COCO", "_relative": "relative"}  # suffixes

ROWS = {  # every row of the table, in its order: title, group, whether more is better
    "retrieval/image": ("Image retrieval", "retrieval", "higher"),
    "retrieval/brain": ("Brain retrieval", "retrieval", "higher"),
    **{f"{pictures}/{name}": row for pictures in ("recons", "enhancedrecons", "blurryrecons") for name, row in (
        *PICTURES.items(),
        *((f"brain_{area}", (f"Brain corr. {title}", "brain", "higher")) for area, title in REGIONS.items()))},
    **{f"captions/{name}{suffix}": (f"{title} ({pair})", "captions", "higher")
       for suffix, pair in PAIRS.items() for name, title in CAPTIONS.items()},
}

# Tables 7 and 8: of each subject, with 40 sessions and with one, refined pictures. The two retrieval columns stand in
# the paper's order, which names them the other way round (see `retrieval`).
COLUMNS = [*(f"enhancedrecons/{name}" for name in PICTURES), "retrieval/brain", "retrieval/image",
           *(f"enhancedrecons/brain_{name}" for name in REGIONS), *(f"captions/{name}" for name in CAPTIONS)]
PAPER = {
    (1, 40): (.374, .439, .9782, .9910, .9615, .9356, .609, .338, .9996, .9987,
              .374, .389, .381, .367, .337, .361, .248, .326, .353, .4795, .7374, .6376),
    (2, 40): (.328, .430, .9701, .9883, .9490, .9166, .631, .347, .9988, .9984,
              .387, .391, .353, .362, .374, .380, .245, .321, .349, .4669, .7315, .6296),
    (5, 40): (.301, .432, .9532, .9854, .9652, .9432, .600, .335, .9839, .9694,
              .413, .354, .359, .340, .321, .424, .250, .327, .354, .4940, .7422, .6414),
    (7, 40): (.283, .423, .9425, .9797, .9409, .9236, .638, .357, .9689, .9653,
              .317, .321, .314, .299, .278, .309, .240, .319, .347, .4697, .7316, .6286),
    (1, 1): (.235, .428, .8802, .9333, .8356, .8075, .798, .459, .9396, .7763,
             .347, .318, .337, .341, .316, .345, .200, .278, .299, .3352, .6722, .5544),
    (2, 1): (.200, .433, .8500, .9213, .8186, .7939, .807, .467, .9053, .6718,
             .350, .306, .296, .323, .336, .357, .200, .272, .293, .3236, .6598, .5400),
    (5, 1): (.175, .405, .8311, .9100, .8433, .8253, .781, .444, .6694, .4696,
             .404, .328, .336, .323, .304, .415, .207, .280, .300, .3512, .6763, .5619),
    (7, 1): (.170, .408, .8070, .8590, .7490, .7429, .854, .504, .6444, .3777,
             .294, .283, .285, .272, .243, .285, .189, .260, .279, .2800, .6315, .5060),
}
# Tables 1 and 3, 40 sessions, mean of the four subjects only: before the refinement, and the low-level pictures.
PAPER_MEAN = {
    **dict(zip([f"recons/{name}" for name in PICTURES], (.278, .328, .952, .990, .964, .945, .622, .343), strict=True)),
    **dict(zip([f"recons/brain_{name}" for name in REGIONS], (.384, .385, .366, .353, .339, .373), strict=True)),
    **dict(zip([f"blurryrecons/{name}" for name in PICTURES], (.399, .539, .705, .651, .529, .572, .984, .673),
               strict=True)),
}
# Table 2, 40 sessions, subject 1 only: against the captions that GIT gives the images seen.
PAPER_GIT = dict(zip([f"captions/{name}_git" for name in CAPTIONS], (.344, .427, .455, .523, .754, .671),
                     strict=True))


def paper_numbers(key: str, subject: int) -> tuple[float | None, float | None, str]:
    """What the paper gives for a row such as "recons/ssim": with 40 sessions, with one, and a remark.

    None where it gives nothing: for subjects other than 1, 2, 5 and 7, and for rows of our own.
    """
    if key in COLUMNS and (subject, 40) in PAPER:
        remark = {"retrieval/image": "printed there as brain retrieval", "retrieval/brain": "there as image retrieval"}
        column = COLUMNS.index(key)
        return PAPER[subject, 40][column], PAPER[subject, 1][column], remark.get(key, "")
    if key in PAPER_MEAN and (subject, 40) in PAPER:
        return PAPER_MEAN[key], None, "mean of subjects 1, 2, 5, 7"
    return (PAPER_GIT.get(key) if subject == 1 else None), None, ""
