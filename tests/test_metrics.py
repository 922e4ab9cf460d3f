"""metrics.py against the original's recorded numbers, scipy, scikit-image and cases worked by hand.

    python -m pytest tests/test_metrics.py
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import correlation
from skimage.metrics import structural_similarity

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import bench_two_way  # noqa: E402
from golden_weights import golden  # noqa: E402

import metrics as mt  # noqa: E402
from data import resized  # noqa: E402

EVAL = golden("eval")


def pictures(n: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# Known answers

def test_identical_images_are_perfect():
    images = pictures(20, 32)
    features = images.flatten(1)
    assert mt.pixcorr(images, images, size=40) == pytest.approx(torch.ones(20), abs=1e-6)
    assert mt.ssim(images, images, size=40) == pytest.approx(torch.ones(20), abs=1e-6)
    assert mt.two_way_identification(features, features).tolist() == [1] * 20
    assert mt.correlation_distance(features, features) == pytest.approx(torch.zeros(20), abs=1e-9)
    for pools, rates in mt.retrieval(features[:, None], features[:, None], pool=10).values():
        assert pools.tolist() == [1] * 30 and rates.tolist() == [1] * 20


def test_shuffled_images_give_chance_within_its_interval():
    images, order = pictures(400, 6), torch.randperm(400, generator=torch.Generator().manual_seed(1))
    fake = images[order]
    for values, chance in ((mt.pixcorr(images, fake, size=6), 0), (mt.two_way_identification(images, fake), .5),
                           (mt.correlation_distance(images, fake), 1)):
        low, high = mt.bootstrap(values)
        assert low < chance < high and high - low < .1
    found = mt.retrieval(fake.flatten(2), images.flatten(2), pool=20)
    for pools, rates in found.values():
        assert abs(pools.mean() - 1 / 20) < .03 and rates.mean() == pytest.approx(pools.mean().item(), abs=.01)


# Pixels

def test_pixcorr():
    g = golden("pixcorr")
    assert mt.pixcorr(g["images"], g["brains"]).mean().item() == pytest.approx(g["pixcorr"].item(), abs=1e-5)
    assert mt.pixcorr(EVAL["images"], EVAL["recons"]).mean().item() == pytest.approx(EVAL["pixcorr_425"].item(),
                                                                                     abs=1e-6)
    many = pictures(2 * mt.CHUNK + 3)  # more than a chunk, against numpy
    other = many + pictures(len(many), seed=1)
    rows = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(many, other, strict=True)]
    assert mt.pixcorr(many, other, size=8) == pytest.approx(torch.tensor(rows), abs=1e-6)
    assert mt.pixcorr(many, torch.full_like(many, .5), size=8).tolist() == [0] * len(many)  # flat: 0, not NaN


def test_ssim():
    assert mt.ssim(EVAL["images"], EVAL["recons"]) == pytest.approx(EVAL["ssim_each_425"], abs=1e-5)
    image, fake = pictures(2, 24)
    grey = [np.tensordot([.2125, .7154, .0721], x.numpy(), 1) for x in (image, fake)]  # of the luminance, by hand
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    by_hand = structural_similarity(*grey, **settings)
    assert mt.ssim(image[None], fake[None], size=24).item() == pytest.approx(by_hand, abs=1e-6)


def test_antialias_matters_where_pictures_shrink():
    big, same = pictures(3, 64), pictures(3, 8, seed=1)
    plain, smooth = resized(big, 16), resized(big, 16, antialias=True)
    assert smooth.std() < .6 * plain.std()
    assert torch.equal(resized(same, 8, antialias=True), same) and torch.equal(resized(same, 8), same)
    assert not torch.equal(mt.pixcorr(big, big.roll(1, 0), 16), mt.pixcorr(big, big.roll(1, 0), 16, antialias=True))


# Features

def original_two_way(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    n = len(real)
    r = np.corrcoef(real.flatten(1).double().numpy(), fake.flatten(1).double().numpy())[:n, n:]
    return torch.tensor([sum(r[i, j] < r[j, j] for i in range(n)) / (n - 1) for j in range(n)])


def test_two_way_identification_is_the_originals():
    # The recorded number is of the pictures themselves, flattened; the other orientation gives another one.
    ours = mt.two_way_identification(EVAL["images"], EVAL["recons"])
    assert ours.mean().item() == pytest.approx(EVAL["two_way_perf"].item())
    assert (ours * EVAL["two_way_n_minus_1"]).round().long().tolist() == EVAL["two_way_success_count"].tolist()
    other = mt.two_way_identification(EVAL["recons"], EVAL["images"]).mean().item()
    assert other != pytest.approx(EVAL["two_way_perf"].item(), abs=1e-3)


def test_two_way_identification_by_hand():
    real = torch.tensor([[1., 2, 3], [3, 2, 1], [1, 3, 2]])
    fake = torch.tensor([[1., 2, 4], [1, 2, 3], [1, 4, 1]])
    # Correlations of the images with each: (.98, -.98, .33), (1, -1, .5), (0, 0, .87). Own ones: .98, -1, .87.
    assert mt.two_way_identification(real, fake).tolist() == [1, 0, 1]


@pytest.mark.parametrize("offset", [0, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.half])
def test_two_way_identification_decides_close_pairs_in_float64(offset, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    real = torch.randn(60, 1, 500, generator=generator).expand(60, 3, 500).flatten(1)
    real = real.repeat(1, 1)[torch.arange(60) // 2] + 1e-4 * torch.randn(60, 1500, generator=generator)  # twins
    fake = (.5 * real + torch.randn(60, 1500, generator=generator) + offset).to(dtype)
    real = (real + offset).to(dtype)
    monkeypatch.setattr(mt, "SLICE", 400)  # several slices, the last one shorter
    assert torch.equal(mt.two_way_identification(real, fake), original_two_way(real, fake))


def test_correlation_distance():
    ours = mt.correlation_distance(EVAL["feat_gt"], EVAL["feat_fake"])
    assert ours.mean().item() == pytest.approx(EVAL["correlation_distance"].item(), abs=1e-9)
    by_scipy = [correlation(a, b) for a, b in zip(EVAL["feat_gt"].numpy(), EVAL["feat_fake"].numpy(), strict=True)]
    assert ours == pytest.approx(torch.tensor(by_scipy), abs=1e-9)


def test_bench_counts_the_same_wins(capsys):
    times = bench_two_way.main(images=40, features=64, repeat=1)  # asserts that all ways count the same
    assert len(times) == 4 and capsys.readouterr().out.count("\n| ") == 5


# Brains

def test_retrieval_and_its_swapped_names():
    """The recorded `fwd` asks for each IMAGE which brain is nearest, in spite of its name: our brain retrieval."""
    found = mt.retrieval(EVAL["retr_clip_voxels"], EVAL["retr_clip_image"], pool=15)
    assert found["brain"][0] == pytest.approx(EVAL["retr_fwd"], abs=1e-6)
    assert found["image"][0] == pytest.approx(EVAL["retr_bwd"], abs=1e-6)
    # Rates of each image: hits in the recorded pools, counted by hand.
    a, b = (torch.nn.functional.normalize(EVAL[f"retr_clip_{x}"].flatten(1), dim=1) for x in ("voxels", "image"))
    hits, drawn = np.zeros(40), np.zeros(40)
    for pool in EVAL["retr_samples_npseed42"].numpy():
        nearest = pool[(a[pool] @ b[pool].T).argmax(1).numpy()]
        hits[pool] += nearest == pool
        drawn[pool] += 1
    assert found["image"][1] == pytest.approx(torch.from_numpy(hits / drawn), abs=1e-6)


def test_retrieval_by_hand():
    brains = torch.tensor([[1.0, 0.0], [1.0, 0.1]])[:, None]
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[:, None]
    # Both brains are nearest to image 0: one of two right. Each image is nearest to its own brain: both right.
    found = mt.retrieval(brains, images)
    assert found["image"][0].tolist() == [.5] and found["image"][1].tolist() == [1, 0]
    assert found["brain"][0].tolist() == [1] and found["brain"][1].tolist() == [1, 1]


def test_image_in_no_pool_counts_as_average():
    x = torch.eye(50)[:, None]
    for pools, rates in mt.retrieval(x, x, pool=2, loops=3).values():
        assert pools.tolist() == [1] * 3 and rates.tolist() == [1] * 50


def test_brain_correlation():
    g = {name: EVAL[f"brain_{name}"] for name in ("voxels", "pred", "mask", "corr_each", "corr")}
    ours = mt.brain_correlation(g["voxels"], g["pred"], g["mask"])
    assert ours == pytest.approx(g["corr_each"].double(), abs=1e-6)
    assert ours.mean().item() == pytest.approx(g["corr"].item(), abs=1e-6)


# Captions

def test_rouge_by_hand():
    reference, sentence = ["The police killed the gunman."], ["police ended; the gunman the"]
    # In common: police, the, the, gunman = 4 of 5 and 5. In order: police, the, gunman = 3.
    assert mt.rouge_1(reference, sentence).item() == pytest.approx(4 / 5)
    assert mt.rouge_l(reference, sentence).item() == pytest.approx(3 / 5)
    # 2 of 3 words, 2 of 4: 2 * (2/4) (2/3) / (2/4 + 2/3) = 4/7. A word counts once: "a a a" has one of "a dog".
    assert mt.rouge_1(["a brown dog"], ["a dog is running"]).item() == pytest.approx(4 / 7)
    assert mt.rouge_1(["a dog"], ["a a a"]).item() == pytest.approx(2 / 5)
    assert [f(["", "x"], ["x", ""]).tolist() for f in (mt.rouge_1, mt.rouge_l)] == [[0, 0], [0, 0]]


def test_rouge_stems():
    pair = ["two men riding waves"], ["a man rides the wave"]
    assert mt.rouge_1(*pair).item() == 0
    assert mt.rouge_1(*pair, stem=True).item() == pytest.approx(4 / 9)  # ride, wave
    assert mt.rouge_l(*pair, stem=True).item() == pytest.approx(4 / 9)
    assert mt.rouge_1(["his"], ["hi"], stem=True).item() == 0  # words of up to three letters stay as they are


def test_meteor_by_hand():
    reference = "a big cat sat on grass"
    words = ["A big cat sat on grass", "on grass sat a big cat", "big cat is asleep", "the dog"]
    # All match in one run; all in three (on grass, sat, a big cat); "big cat": P = 2/4, R = 2/6, one run; nothing.
    p, r = 2 / 4, 2 / 6
    expected = [1 - .5 / 6**3, 1 - .5 * (3 / 6) ** 3, p * r / (.9 * p + .1 * r) * (1 - .5 / 2**3), 0]
    assert mt.meteor([reference] * 4, words) == pytest.approx(torch.tensor(expected, dtype=torch.float64))
    stems = mt.meteor(["dogs running"], ["dog run"]).item()
    assert stems == pytest.approx(1 - .5 / 2**3)
    # A full stop is a word: it does not stick to the last one. P = 3/3, R = 3/4.
    assert mt.meteor(["a red ball."], ["a red ball"]).item() == pytest.approx(.75 / (.9 + .075) * (1 - .5 / 3**3))


def test_meteor_uses_synonyms_of_a_wordnet():
    lemma = SimpleNamespace(name=lambda: "hound")
    wordnet = SimpleNamespace(synsets=lambda word: [SimpleNamespace(lemmas=lambda: [lemma])] if word == "dog" else [])
    pair = ["a hound"], ["a dog"]
    assert mt.meteor(*pair, wordnet).item() == pytest.approx(1 - .5 / 2**3)
    assert mt.meteor(*pair).item() == pytest.approx(.5 * (1 - .5))


# Chance

def test_bootstrap():
    values = torch.randn(400, generator=torch.Generator().manual_seed(3)).double()
    low, high = mt.bootstrap(values)
    half = 1.96 * values.std().item() / 20  # the textbook's interval of a mean
    assert low == pytest.approx(values.mean().item() - half, abs=.02)
    assert high == pytest.approx(values.mean().item() + half, abs=.02)
    assert mt.bootstrap(values) == (low, high) != mt.bootstrap(values, seed=1)
    assert mt.bootstrap(torch.ones(9)) == (1, 1)


def test_paired():
    noise = torch.randn(200, generator=torch.Generator().manual_seed(4)).double()
    images = 5 * torch.randn(200, generator=torch.Generator().manual_seed(5)).double()  # some are easy for all models
    difference, (low, high), p = mt.paired(images + .3 + noise, images)
    assert difference == pytest.approx(.3 + noise.mean().item()) and low < difference < high
    assert p < .01 and low > 0
    _, (low, high), p = mt.paired(images + noise - noise.mean(), images)
    assert p > .5 and low < 0 < high
    assert mt.paired(images, images) == (0, (0, 0), 1)
    # Of four images that all win, 2 of the 16 choices of signs are as extreme.
    assert mt.paired(torch.tensor([1., 2, 3, 4]), torch.zeros(4))[2] == pytest.approx(2 / 16, abs=.02)


# The paper

def test_paper_numbers():
    assert mt.paper_numbers("enhancedrecons/pixcorr", 1) == (.374, .235, "")
    assert mt.paper_numbers("enhancedrecons/brain_higher_vis", 7) == (.309, .285, "")
    # The original's "image retrieval", 99.96 and 93.96 %, finds brains.
    assert mt.paper_numbers("retrieval/brain", 1)[:2] == (.9996, .9396)
    assert mt.paper_numbers("retrieval/image", 1) == (.9987, .7763, "printed there as brain retrieval")
    assert mt.paper_numbers("recons/clip_l", 5) == (.945, None, "mean of subjects 1, 2, 5, 7")
    assert mt.paper_numbers("blurryrecons/brain_V1", 1) == (None, None, "")
    assert mt.paper_numbers("captions/sentence_git", 1) == (.523, None, "")
    assert mt.paper_numbers("captions/sentence_git", 2) == (None, None, "")
    assert mt.paper_numbers("enhancedrecons/ssim", 3) == (None, None, "")


def test_paper_tables_agree_with_each_other():
    """The means of Tables 7 and 8 over subjects are Table 1's rows: a slip of a finger would show."""
    table_1 = {40: (.322, .431, .961, .986, .954, .930, .619, .344, .988, .983, .373, .364, .352, .342, .327, .368),
               1: (.195, .419, .842, .906, .812, .792, .810, .468, .790, .574, .348, .309, .314, .315, .300, .351)}
    for sessions, means in table_1.items():
        ours = np.mean([mt.PAPER[subject, sessions] for subject in (1, 2, 5, 7)], axis=0)
        assert ours[: len(means)] == pytest.approx(means, abs=.0011)
    assert set(mt.COLUMNS) | set(mt.PAPER_MEAN) | set(mt.PAPER_GIT) <= set(mt.ROWS)
    assert all(len(row) == len(mt.COLUMNS) for row in mt.PAPER.values())
