"""gnet.py: the encoding model's arithmetic, its file, and the toy world's own.

    python -m pytest tests/test_gnet.py
"""

import pickle

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import gnet
import toy
from judges import Missing
from model import UserError

WIDTHS = (3, 5, 4, 7, 2)  # first, second, third, wide, read: all different, so that none can stand for another
NUM_VOXELS = {1: 5, 7: 3}


def released(widths=WIDTHS, num_voxels=NUM_VOXELS) -> dict:
    """What the code that wrote the release puts in its file, with random numbers; most of it is of no use here."""
    torch.manual_seed(0)
    trunk = gnet.Trunk(*widths)
    for name, x in trunk.state_dict().items():
        if x.is_floating_point():
            x.copy_(torch.rand_like(x) + .5 if "running_var" in name else torch.randn_like(x) * .3)
    features = widths[2] + 6 * widths[4]
    fwrfs = {s: {"rf0": torch.randn(v, 25, 25), "rf1": torch.randn(v, 13, 13), "w": torch.randn(v, features),
                 "b": torch.randn(v)} for s, v in num_voxels.items()}
    params = {"enc": trunk.state_dict(), "fwrfs": fwrfs}
    scores = {s: np.random.default_rng(0).random(v, np.float32) for s, v in num_voxels.items()}
    return {"num_epochs": 50, "best_params": params, "final_params": {"enc": {}, "fwrfs": {}}, "val_cc": scores,
            "hold_loss_history": [np.float32(.5), np.float64(.4)], "best_joint_cc_score": np.float32(.3),
            "input_mean": np.full((1, 3, 1, 1), .4, np.float32), "brain_nii_shape": np.array([81, 104, 83]),
            "voxel_mask": {s: np.ones(v, bool) for s, v in num_voxels.items()}}


@pytest.fixture
def folder(tmp_path):
    torch.save(released(), tmp_path / gnet.FILE)
    return tmp_path


def pictures(n: int = 3) -> torch.Tensor:
    """Patches of random colours, (n, 3, 40, 64)."""
    colours = torch.rand(n, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    colours = colours ** torch.tensor([.3, 1, 4])[:n].reshape(-1, 1, 1, 1)  # a bright one, .., a dark one
    return colours.repeat_interleave(8, 2).repeat_interleave(8, 3)


def resize_plainly(images: torch.Tensor) -> torch.Tensor:
    """One picture at a time, as the original does it: 8 bits by cutting off, then Pillow."""
    out = []
    for image in images.numpy():
        pixels = np.floor(image.astype(np.float32) * np.float32(255)).astype(np.uint8).transpose(1, 2, 0)
        out.append(np.asarray(Image.fromarray(pixels, "RGB").resize((227, 227), Image.LANCZOS)) / 255)
    return torch.tensor(np.stack(out)).permute(0, 3, 1, 2)


# ---- arithmetic

def test_pictures_are_cut_to_8_bits_and_resized_by_lanczos():
    images = pictures()
    torch.testing.assert_close(gnet.prepare(images).double(), resize_plainly(images), atol=1e-7, rtol=0)
    flat = torch.tensor([254.9 / 255, 1.0, 0.0])[:, None, None, None].expand(3, 3, 8, 8)
    assert (gnet.prepare(flat)[:, 0, 0, 0] * 255).tolist() == [254, 255, 0]
    edge = torch.zeros(1, 3, 16, 16)
    edge[..., 8:] = .5
    assert gnet.prepare(edge).max() > .51  # LANCZOS overshoots an edge; bilinear never does


def forward_plainly(file: dict, subject: int, images: torch.Tensor) -> torch.Tensor:
    """The model's formula in float64, voxel by voxel, straight from the file's tensors."""
    enc = {name: x.double() for name, x in file["best_params"]["enc"].items()}

    def norm(x, name):
        mean, var, scale, shift = (enc[f"{name}.{part}"].reshape(1, -1, 1, 1)
                                   for part in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + 1e-5) ** .5 * scale + shift

    def conv(x, name, **options):
        return F.conv2d(x, enc[f"{name}.weight"], enc[f"{name}.bias"], **options).clamp(min=0)

    def log(x):
        return torch.log(1 + x.abs()) * (x.exp() - (-x).exp()) / (x.exp() + (-x).exp())

    x = conv(resize_plainly(images) - enc["mu"], "pre.conv1.0", stride=4, padding=2)
    x = conv(F.max_pool2d(x, 3, 2), "pre.conv2.0", padding=2)
    layers = [conv(norm(x, "enc.bn1"), "enc.conv3")]
    for name in ("4a", "4b", "5a", "5b", "6a", "6b"):
        x = F.max_pool2d(layers[-1], 3, 2, 1) if name == "5a" else layers[-1]
        layers.append(conv(norm(x, f"enc.conv{name}.bn1"), f"enc.conv{name}.conv1", padding=1))
    read = layers[6].shape[1]
    maps = [torch.cat([layers[0], layers[1][:, :read], layers[2][:, :read]], 1),
            torch.cat([layer[:, :read] for layer in layers[3:]], 1)]
    own = {name: x.double() for name, x in file["best_params"]["fwrfs"][subject].items()}
    voxels = []
    for v in range(len(own["b"])):
        seen = []
        for k, m in enumerate(maps):
            field = own[f"rf{k}"][v].exp() / own[f"rf{k}"][v].exp().sum()  # (25, 25) or (13, 13)
            seen.append((log(m) * field).sum((2, 3)))
        voxels.append(log(torch.cat(seen, 1)) @ own["w"][v] + own["b"][v])
    return torch.stack(voxels, 1)


@pytest.mark.parametrize("subject", [1, 7])
def test_forward_is_the_formula_in_whatever_pieces(folder, monkeypatch, subject):
    expected = forward_plainly(released(), subject, pictures())
    model = gnet.load_gnet(folder, subject, "cpu")
    voxels = model.predict(pictures())
    assert voxels.shape == (3, NUM_VOXELS[subject]) and voxels.dtype == torch.float32
    torch.testing.assert_close(voxels.double(), expected, atol=1e-4, rtol=1e-4)
    assert expected.std(0).min() > .01  # the pictures do not all look alike to it
    monkeypatch.setattr(gnet, "IMAGES", 2)
    monkeypatch.setattr(gnet, "VOXELS", 2)
    torch.testing.assert_close(model.predict(pictures()), voxels, atol=1e-5, rtol=1e-5)


def test_the_released_widths(tmp_path):
    torch.save(released(tuple(gnet.WIDTHS.values()), {3: 2}), tmp_path / gnet.FILE)
    model = gnet.load_gnet(tmp_path, 3, "cpu")
    assert model.description == "GNet" and model.files == [tmp_path / gnet.FILE]
    assert model.predict(pictures(1)).shape == (1, 2)
    trunk = gnet.Trunk(*gnet.WIDTHS.values())
    assert [tuple(x.shape) for x in trunk(torch.zeros(1, 3, 227, 227))] == [(1, 256, 625), (1, 256, 169)]
    # The readouts of all subjects' voxels, best and final, are the 1.2 GB of the released file.
    total = 15724 + 14278 + 15226 + 13153 + 13039 + 17907 + 12682 + 14386
    assert total * (625 + 169 + 512 + 1) * 4 * 2 == pytest.approx(1.2e9, rel=.05)


# ---- the file

def test_numpy_in_the_file_is_not_run(folder):
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / gnet.FILE, weights_only=True)
    assert gnet.load_gnet(folder, 1, "cpu").description == "stand-in for GNet, 16 features instead of 512"


def without(part: dict, key: str) -> None:
    del part[key]


@pytest.mark.parametrize("damage, named", [
    (lambda best: without(best["enc"], "enc.conv5a.bn1.running_var"), r"enc\.conv5a\.bn1\.running_var is missing"),
    (lambda best: without(best["enc"], "enc.conv3.weight"), r"enc\.conv3\.weight is missing"),
    (lambda best: best["enc"].update({"enc.conv7.bias": torch.zeros(2)}), r"enc\.conv7\.bias is unknown"),
    (lambda best: best["enc"].update(mu=torch.zeros(3)), r"enc\.mu has shape \(3,\), not \(1, 3, 1, 1\)"),
    (lambda best: best["fwrfs"][1].update(w=torch.zeros(5, 9)), r"fwrfs\[1\]\.w has shape \(5, 9\), not \(5, 16\)"),
    (lambda best: without(best["fwrfs"][1], "rf1"), r"fwrfs\[1\]\.rf1 is missing"),
    (lambda best: best["fwrfs"][1].update(b=np.zeros(5)), r"fwrfs\[1\]\.b is missing"),
    (lambda best: without(best, "fwrfs"), r"best_params\.fwrfs is missing"),
])
def test_a_file_of_another_network_is_refused_by_its_first_key(folder, damage, named):
    content = released()
    damage(content["best_params"])
    torch.save(content, folder / gnet.FILE)
    with pytest.raises(UserError, match=named) as error:
        gnet.load_gnet(folder, 1, "cpu")
    assert str(folder / gnet.FILE) in str(error.value) and "--cache_dir" in str(error.value)


def test_other_files_are_refused(folder):
    file = folder / gnet.FILE
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=gnet.FILE):
        gnet.load_gnet(folder, 1, "cpu")
    for content in ({"state_dict": {}}, torch.zeros(3)):
        torch.save(content, file)
        with pytest.raises(UserError, match=r"best_params\.enc is missing"):
            gnet.load_gnet(folder, 1, "cpu")


def test_a_subject_that_is_not_there(folder):
    with pytest.raises(UserError, match="subjects 1, 7, not 2.*--subj"):
        gnet.load_gnet(folder, 2, "cpu")


def test_a_missing_file_is_named_with_its_place(tmp_path):
    with pytest.raises(Missing, match="gnet_multisubject.pt.*pscotti/mindeyev2") as error:
        gnet.load_gnet(tmp_path, 1, "cpu")
    assert str(tmp_path / gnet.FILE) in str(error.value)


# ---- the toy world's

def correlations(predicted: torch.Tensor, measured: torch.Tensor) -> torch.Tensor:
    """(n, V) and (n, V) -> (n, n): [i, j] is the correlation across voxels of picture i's prediction and brain j."""
    return torch.from_numpy(np.corrcoef(predicted, measured)[: len(predicted), len(predicted):])


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    path = tmp_path_factory.mktemp("gnet") / "toy"
    world = toy.World(sessions=(8, 1, 1, 1, 1, 1, 1, 1), trials=50, shared=30, voxels=(300,) + (40,) * 7)
    toy.build_world(path, world)
    return path


def test_right_pictures_beat_shuffled_ones(small_world):
    trials = data.load_trials(small_world, 1, "new_test")
    ids, positions = data.repeats(trials)
    measured = data.average_repeats(data.load_voxels(small_world, trials), positions)
    predicted = gnet.load_gnet(small_world, 1, "cpu").predict(data.Images(small_world)[ids])
    table = correlations(predicted, measured)
    assert table.diag().mean() > .25
    assert abs(table.roll(1, 0).diag().mean()) < .1
    assert (table.diag() > table).double().mean() * len(table) / (len(table) - 1) > .85  # two-way identification


def test_all_subjects_are_fitted(smoke_world):
    for subject, num_voxels in enumerate(toy.SMOKE.voxels, 1):
        assert gnet.load_gnet(smoke_world, subject, "cpu").predict(pictures(1)).shape == (1, num_voxels)


def test_only_training_trials_are_fitted(world_copy):
    def fit() -> torch.Tensor:
        state = torch.get_rng_state()
        toy.fit_encoding_model(world_copy, seed=0)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.load(world_copy / gnet.FILE, weights_only=True)["best_params"]["fwrfs"][1]["w"]

    before = fit()
    for split, same in (("new_test", True), ("train", False)):
        rows = np.sort(data.load_trials(world_copy, 1, split).beta)
        with h5py.File(data.h5_path(world_copy, "betas", 1), "r+") as file:
            betas = file["betas"][:]
            betas[rows] = betas[rows][::-1]
            file["betas"][:] = betas
        assert torch.equal(fit(), before) == same
