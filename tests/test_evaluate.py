"""evaluate.py against the original's recorded numbers, and on the micro world of test_recon.py.

    python -m pytest tests/test_evaluate.py
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from golden_weights import golden  # noqa: E402
from test_recon import IMAGES, SUBJECT, make_data, make_networks  # noqa: E402

import data  # noqa: E402
import evaluate as ev  # noqa: E402
import model as m  # noqa: E402
from frozen import load_clip  # noqa: E402

EVAL = golden("eval")


def test_pixcorr():
    g = golden("pixcorr")
    assert ev.pixcorr(g["images"], g["brains"]) == pytest.approx(g["pixcorr"].item(), abs=1e-5)  # summed in float32
    assert ev.pixcorr(EVAL["images"], EVAL["recons"]) == pytest.approx(EVAL["pixcorr_425"].item(), abs=1e-6)
    many = torch.rand(2 * ev.CHUNK + 3, 3, 8, 8)  # more than a chunk, against numpy
    other = many + torch.rand_like(many)
    rows = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(many, other, strict=True)]
    assert ev.pixcorr(many, other, size=8) == pytest.approx(np.mean(rows), abs=1e-6)
    assert ev.pixcorr(many, torch.full_like(many, 0.5), size=8) == 0.0  # flat pictures: 0 instead of NaN


def test_ssim():
    assert ev.ssim(EVAL["images"], EVAL["recons"]) == pytest.approx(EVAL["ssim_425"].item(), abs=1e-5)
    each = [ev.ssim(EVAL["images"][i : i + 1], EVAL["recons"][i : i + 1]) for i in range(2)]
    assert each == pytest.approx(EVAL["ssim_each_425"][:2].tolist(), abs=1e-5)


def test_two_way_identification():
    ours = ev.two_way_identification(EVAL["feat_gt"], EVAL["feat_fake"])
    r = np.corrcoef(EVAL["feat_gt"].numpy(), EVAL["feat_fake"].numpy())[:12, 12:]
    by_hand = np.mean([r[i, j] < r[j, j] for j in range(12) for i in range(12) if i != j])
    assert ours == pytest.approx(by_hand)
    # The recorded number is of the pictures themselves, flattened; the other orientation gives another one.
    assert ev.two_way_identification(EVAL["images"], EVAL["recons"]) == pytest.approx(EVAL["two_way_perf"].item())


def test_retrieval():
    """The recorded `fwd` asks for each IMAGE which brain is nearest, in spite of its name: our brain retrieval."""
    image, brain = ev.retrieval(EVAL["retr_clip_voxels"], EVAL["retr_clip_image"], pool=15)
    assert brain == pytest.approx(EVAL["retr_fwd_mean"].item(), abs=1e-6)
    assert image == pytest.approx(EVAL["retr_bwd_mean"].item(), abs=1e-6)


def test_retrieval_by_hand():
    brains = torch.tensor([[1.0, 0.0], [1.0, 0.1]])[:, None]
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[:, None]
    # Both brains are nearest to image 0: one of two right. Each image is nearest to its own brain: both right.
    assert ev.retrieval(brains, images) == (0.5, 1.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_data(folder)
    make_networks(folder)
    return folder


def write_evals(world, evals, count=None, **change):
    """Perfect reconstructions: what was seen, and its tokens; returns the arguments of main."""
    seen, clip = data.Images(world)[IMAGES], load_clip(world, "cpu")
    arrays = {"recons": seen, "clipvoxels": clip.tokens(seen).half(), "blurryrecons": 1 - seen} | change
    (evals / "micro").mkdir(parents=True)
    for name, array in arrays.items():
        if array is not None:
            torch.save(array[:count], evals / "micro" / f"micro_all_{name}.pt")
    return ["--data_path", str(world), "--evals", str(evals), "--model_name", "micro", "--subj", str(SUBJECT)]


def test_perfect_reconstructions(world, tmp_path, capsys):
    metrics = ev.main(write_evals(world, tmp_path))
    perfect = ["image_retrieval", "brain_retrieval", "pixcorr", "ssim", "two_way_clip"]
    assert [metrics[name] for name in perfect] == pytest.approx([1] * 5, abs=1e-6)
    assert metrics["blurry_pixcorr"] == pytest.approx(-1) and metrics["blurry_ssim"] < 0.5
    assert json.loads((tmp_path / "micro" / "micro_metrics.json").read_text()) == metrics
    table = capsys.readouterr().out
    assert all(name in table for name in metrics) and "0.278" in table
    assert ev.PAPER.keys() == metrics.keys()


def test_rows_are_compared_in_the_order_of_the_image_numbers(world, tmp_path):
    seen = data.Images(world)[IMAGES]
    metrics = ev.main(write_evals(world, tmp_path, recons=seen.roll(1, 0), blurryrecons=None))
    assert metrics["pixcorr"] < 0.2 and metrics["image_retrieval"] == 1.0 and "blurry_ssim" not in metrics


def test_fewer_images(world, tmp_path):
    arguments = write_evals(world, tmp_path, count=5)
    with pytest.raises(m.UserError, match="has 5 rows for 13 test images.*--num_images"):
        ev.main(arguments)
    assert not (tmp_path / "micro" / "micro_metrics.json").exists()
    assert ev.main([*arguments, "--num_images", "5"])["pixcorr"] == pytest.approx(1)


@pytest.mark.parametrize("change, sentence", [
    ({"recons": None}, "micro_all_recons.pt does not exist: run recon.py first"),
    ({"recons": torch.full((13, 3, 8, 8), torch.nan)}, "micro_all_recons.pt holds NaN"),
    ({"clipvoxels": torch.ones(13, 4, 7)}, r"tokens are \(4, 7\), CLIP's \(4, 24\).*--cache_dir"),
])  # fmt: skip
def test_mistakes(world, tmp_path, change, sentence):
    with pytest.raises(m.UserError, match=sentence):
        ev.main(write_evals(world, tmp_path, **change))


def test_damaged_file(world, tmp_path):
    arguments = write_evals(world, tmp_path)
    path = tmp_path / "micro" / "micro_all_recons.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(m.UserError, match="cannot be read"):
        ev.main(arguments)
