"""nsd.py on a tiny raw NSD made here, against a slow computation of its own; and `check` on damaged worlds.

    python -m pytest tests/test_nsd.py
"""

import io
import re
import shutil
import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pandas
import pytest
import torch
import webdataset as wds
from scipy.io import savemat

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import nsd
from model import UserError, run_main

SHAPE, SESSIONS, TRIALS, IMAGES = (4, 5, 3), 5, 24, 40  # (X, Y, Z); two runs a session; images 4..13 are shared
SHARED = np.isin(np.arange(IMAGES), np.arange(4, 14))
VERSION = "betas_fithrf_GLMdenoise_RR"


def make_raw(root: Path, subject: int = 1, csv: bool = True, gz: bool = False, seed: int = 0) -> dict:
    """Raw NSD of the documented shapes; returns what went in."""
    rng = np.random.default_rng([seed, subject])
    n = SESSIONS * TRIALS
    image = rng.permutation(np.repeat(np.arange(IMAGES), 3))  # (120,)
    session, place = np.divmod(np.arange(n), TRIALS)
    frame = pandas.DataFrame({
        "SUBJECT": subject, "SESSION": session + 1, "RUN": place // 12 + 1, "TRIAL": place % 12 + 1,
        "73KID": image + 1, "10KID": rng.integers(1, 99, n), "TIME": session * 7 + .37 + place / 9999,
        "ISOLD": rng.integers(0, 2, n), "ISCORRECT": rng.integers(0, 2, n), "RT": rng.uniform(300, 2000, n),
        "CHANGEMIND": rng.integers(0, 2, n), "MEMORYRECENT": np.nan, "MEMORYFIRST": 5.0,
        "ISOLDCURRENT": rng.integers(0, 2, n), "ISCORRECTCURRENT": rng.integers(0, 2, n),
        "TOTAL1": rng.integers(0, 3, n), "TOTAL2": rng.integers(0, 3, n), "BUTTON": rng.integers(1, 3, n),
        "MISSINGDATA": 0,
    })
    for column in ("ISCORRECT", "RT", "CHANGEMIND", "ISOLDCURRENT", "ISCORRECTCURRENT", "TOTAL1", "TOTAL2", "BUTTON"):
        frame[column] = frame[column].astype(float).where(rng.random(n) > .1)  # a tenth without an answer
    behav = root / f"nsddata/ppdata/subj0{subject}/behav"
    behav.mkdir(parents=True)
    frame.to_csv(behav / "responses.tsv", sep="\t", index=False, na_rep="NaN")

    general = rng.integers(-1, 2, SHAPE)  # (X, Y, Z)
    general.flat[:7] = 1
    areas = rng.integers(-1, 8, SHAPE)
    areas.flat[:7] = range(1, 8)
    ncsnr = rng.random(SHAPE)
    roi, beta_folder = f"nsddata/ppdata/subj0{subject}/func1pt8mm/roi", (
        f"nsddata_betas/ppdata/subj0{subject}/func1pt8mm/{VERSION}")
    for name, volume in ((f"{roi}/nsdgeneral", general), (f"{roi}/prf-visualrois", areas),
                         (f"{beta_folder}/ncsnr", ncsnr)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(volume.astype(np.float32), np.eye(4)), root / f"{name}.nii.gz")
    code = rng.normal(size=(IMAGES, *SHAPE))
    betas = np.clip(600 * (code[image] + rng.normal(size=(n, *SHAPE))) + 200 + 90 * session[:, None, None, None],
                    -32000, 32000).astype(np.int16)  # (n, X, Y, Z)
    betas[TRIALS : 2 * TRIALS, 0, 0, 0] = 77  # a voxel that session 2 did not scan
    for s in range(SESSIONS):
        part = betas[s * TRIALS : (s + 1) * TRIALS]
        stem = root / beta_folder / f"betas_session{s + 1:02d}"
        if gz:
            nibabel.save(nibabel.Nifti1Image(np.moveaxis(part, 0, -1), np.eye(4)), f"{stem}.nii.gz")
        else:
            with h5py.File(f"{stem}.hdf5", "w") as file:  # (trials, Z, Y, X), a chunk a voxel
                file.create_dataset("betas", data=part.transpose(0, 3, 2, 1), chunks=(TRIALS, 1, 1, 1))

    design = root / "nsddata/experiments/nsd"
    design.mkdir(parents=True, exist_ok=True)
    if csv:
        info = pandas.DataFrame({"cocoId": 1, "nsdId": np.arange(IMAGES), "shared1000": SHARED})
        info.to_csv(design / "nsd_stim_info_merged.csv")
    else:
        savemat(design / "nsd_expdesign.mat", {"sharedix": np.flatnonzero(SHARED)[None] + 1.0})
    stimuli = root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"
    pictures = rng.integers(0, 256, (IMAGES, 20, 20, 3)).astype(np.uint8)
    if not stimuli.exists():
        stimuli.parent.mkdir(parents=True)
        with h5py.File(stimuli, "w") as file:
            file["imgBrick"] = pictures
    return {"frame": frame, "general": general, "areas": areas, "ncsnr": ncsnr, "betas": betas, "pictures": pictures}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    return root, make_raw(root)


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "nsd"
    return out, nsd.prepare(raw[0], out, 1)


def slow_betas(made: dict, zscore: str) -> np.ndarray:
    """Voxel by voxel and session by session, with Python's sums."""
    image = made["frame"]["73KID"].to_numpy() - 1
    rows = []
    places = [(x, y, z) for x in range(SHAPE[0]) for y in range(SHAPE[1]) for z in range(SHAPE[2])
              if made["general"][x, y, z] == 1]
    out = np.zeros((len(image), len(places)))
    for v, (x, y, z) in enumerate(places):
        for session in range(SESSIONS):
            rows = [i for i in range(len(image)) if i // TRIALS == session]
            used = [i for i in rows if zscore == "all" or not SHARED[image[i]]]
            values = [made["betas"][i, x, y, z] / 300 for i in used]
            mean = sum(values) / len(values)
            std = (sum((value - mean) ** 2 for value in values) / len(values)) ** .5
            for i in rows:
                out[i, v] = (made["betas"][i, x, y, z] / 300 - mean) / (std if std > 1e-9 else 1)
    return out


def slow_row(made: dict, i: int) -> list:
    """The 17 columns of trial i, written out."""
    line = made["frame"].iloc[i]
    filled = lambda name: -1 if np.isnan(line[name]) else line[name]  # noqa: E731
    return [line["73KID"] - 1, 1, line["SESSION"], line["RUN"], line["TRIAL"],
            (line["SESSION"] - 1) * TRIALS + i % TRIALS, int(line["TIME"]), line["ISOLD"], filled("ISCORRECT"),
            filled("RT"), filled("CHANGEMIND"), filled("ISOLDCURRENT"), filled("ISCORRECTCURRENT"), filled("TOTAL1"),
            filled("TOTAL2"), filled("BUTTON"), float(SHARED[int(line["73KID"]) - 1])]


def read_tar(path: Path) -> list[dict]:
    samples = wds.DataPipeline(wds.SimpleShardList([str(path)]), wds.tarfile_to_samples())
    return [{name: np.load(io.BytesIO(value)) if name.endswith("npy") else value for name, value in sample.items()}
            for sample in samples]


# ---- prepare


@pytest.mark.parametrize("zscore", ["train", "all"])
def test_betas_equal_the_slow_computation(raw, prepared, tmp_path, zscore):
    root, made = raw
    out = prepared[0]
    if zscore == "all":
        out = tmp_path
        shutil.copytree(prepared[0], out, dirs_exist_ok=True)
        nsd.prepare(root, out, 1, zscore="all", overwrite=True)
    with h5py.File(data.h5_path(out, "betas", 1)) as file:
        betas = file["betas"][:]
    expected = slow_betas(made, zscore)
    assert betas.dtype == np.float32 and betas.shape == expected.shape
    np.testing.assert_allclose(betas, expected, atol=2e-5)
    assert np.abs(slow_betas(made, "train") - slow_betas(made, "all")).max() > .1, "the two differ"


def test_counts_and_constant_voxels(prepared, raw):
    counts = prepared[1]
    image, session = raw[1]["frame"]["73KID"] - 1, raw[1]["frame"]["SESSION"]
    old = int((SHARED[image] & (session <= 2)).sum())  # the last three of five sessions were held back
    assert counts == {"trials": 120, "voxels": int((raw[1]["general"] == 1).sum()), "constant": 1, "train": 90,
                      "new_test": 30, "test": old}
    assert 0 < old < 30
    assert len(data.load_trials(prepared[0], 1, "test")) == old
    assert len(data.load_trials(prepared[0], 1, "new_test")) == 30


def test_tars_hold_the_17_columns_and_the_windows(prepared, raw):
    out, made = prepared[0], raw[1]
    table = np.array([slow_row(made, i) for i in range(120)], float)
    assert (table == -1).any() and not np.isnan(table).any()
    seen, count = [], 0
    for number in range(SESSIONS):
        for sample in read_tar(data.session_tar(out, 1, "train", number)):
            assert sample["__key__"] == f"sample{count:09d}", "keys count on through the sessions"
            count += 1
            i = int(sample["behav.npy"][0, 5])
            seen.append(i)
            assert i // TRIALS == number
            check_sample(sample, table, i)
    for k, sample in enumerate(read_tar(data.session_tar(out, 1, "new_test"))):
        assert sample["__key__"] == f"sample{k:09d}"
        i = int(sample["behav.npy"][0, 5])
        seen.append(i)
        assert SHARED[int(table[i, 0])]
        check_sample(sample, table, i)
    assert sorted(seen) == list(range(120))


def check_sample(sample: dict, table: np.ndarray, i: int):
    missing = np.full(17, -1.0)
    session = i // TRIALS
    np.testing.assert_array_equal(sample["behav.npy"], table[i : i + 1])
    for j in range(15):  # across a run's edge (trial 12), not across a session's
        before, after = i - 1 - j, i + 1 + j
        for member, k in (("past_behav.npy", before), ("future_behav.npy", after)):
            np.testing.assert_array_equal(sample[member][j], table[k] if k // TRIALS == session else missing)
    others = [k for k in range(120) if table[k, 0] == table[i, 0] and k != i]
    assert len(others) == 2
    np.testing.assert_array_equal(sample["olds_behav.npy"], [*table[others], missing])


def test_masks_are_in_the_order_of_the_voxels_and_others_stay(raw, prepared, tmp_path):
    root, made = raw
    areas = made["areas"][made["general"] == 1]
    masks = data.load_region_masks(prepared[0], 1)
    assert masks["nsd_general"].all() and len(masks["nsd_general"]) == len(areas)
    for region, values in {"V1": [1, 2], "V2": [3, 4], "V3": [5, 6], "V4": [7], "higher_vis": [-1, 0]}.items():
        np.testing.assert_array_equal(masks[region], np.isin(areas, values))
    data.write_region_masks(data.h5_path(tmp_path, "masks"), {1: {"V1": np.ones(3)}, 4: {"V9": np.array([1, 0])}})
    nsd.merge_masks(tmp_path, 1, masks)
    assert data.load_region_masks(tmp_path, 4)["V9"].tolist() == [True, False]
    assert set(data.load_region_masks(tmp_path, 1)) == set(masks)


def test_pictures_and_shared1000(raw, prepared):
    images = data.Images(prepared[0])
    assert len(images) == IMAGES and images.size == 224 and images._open().dtype == np.float16
    with h5py.File(raw[0] / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5") as file:
        brick = file["imgBrick"][:]
    np.testing.assert_allclose(images[[7]].mean((0, 2, 3)), brick[7].mean((0, 1)) / 255, atol=.01)  # channels in order
    top_left = images[[7]][0, :, :5, :5].mean((1, 2))  # 224 / 20 = 11 pixels a pixel
    np.testing.assert_allclose(top_left, brick[7, 0, 0] / 255, atol=.02)
    np.testing.assert_array_equal(np.load(prepared[0] / "shared1000.npy"), SHARED)
    sharp = torch.zeros(1, 3, 425, 425)
    sharp[..., ::2] = 1  # stripes of one pixel: without antialiasing they turn into broad bands
    assert nsd.shrunk(sharp, 224).astype(float)[..., 5:-5].std() < .12


def test_nifti_and_mat_give_the_same_files(raw, prepared, tmp_path):
    make_raw(tmp_path / "raw", csv=False, gz=True)
    design = tmp_path / "raw/nsddata/experiments/nsd"
    full = nsd.read_shared1000(tmp_path / "raw")  # a .mat names the shared images only: NSD's 73000 are assumed
    assert len(full) == 73000 and set(np.flatnonzero(full)) == set(np.flatnonzero(SHARED))
    shutil.copy(raw[0] / "nsddata/experiments/nsd/nsd_stim_info_merged.csv", design)
    nsd.prepare(tmp_path / "raw", tmp_path / "out", 1)
    for name in ("betas_all_subj01_fp32_renorm.hdf5", "wds/subj01/train/3.tar", "wds/subj01/test/0.tar"):
        assert (tmp_path / "out" / name).read_bytes() == (prepared[0] / name).read_bytes()


def test_ncsnr_and_fewer_sessions(raw, prepared, tmp_path):
    root, made = raw
    shutil.copy(data.h5_path(prepared[0], "images"), tmp_path)  # pictures are made once
    counts = nsd.prepare(root, tmp_path, 1, min_ncsnr=.5, sessions=3)
    good = made["ncsnr"].astype(np.float32)[made["general"] == 1] >= .5
    assert counts["voxels"] == good.sum() < good.size and counts["trials"] == 72
    with h5py.File(data.h5_path(tmp_path, "betas", 1)) as few, h5py.File(data.h5_path(prepared[0], "betas", 1)) as all_:
        np.testing.assert_array_equal(few["betas"][:], all_["betas"][:72][:, good])
    assert data.count_sessions(tmp_path, 1) == 3
    with pytest.raises(UserError, match="set --sessions between 1 and 5"):
        nsd.prepare(root, tmp_path, 1, sessions=6, overwrite=True)


def test_killed_half_way_leaves_nothing_and_goes_again(raw, prepared, tmp_path, monkeypatch):
    read, done = nsd.read_session, []

    def killed(*args):
        done.append(args)
        if len(done) == 3:
            raise KeyboardInterrupt
        return read(*args)

    shutil.copy(data.h5_path(prepared[0], "images"), tmp_path)
    monkeypatch.setattr(nsd, "read_session", killed)
    with pytest.raises(KeyboardInterrupt):
        nsd.prepare(raw[0], tmp_path, 1)
    assert len(done) == 3 and not (tmp_path / "wds").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "brain_region_masks.hdf5", "coco_images_224_float16.hdf5", "shared1000.npy"]
    monkeypatch.undo()
    nsd.prepare(raw[0], tmp_path, 1)
    assert nsd.check(tmp_path) == []


def test_command_line_prepares_two_subjects_and_checks(raw, prepared, tmp_path, capsys):
    root = tmp_path / "raw"
    shutil.copytree(raw[0], root)
    make_raw(root, subject=2)
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(data.h5_path(prepared[0], "images"), out)
    for subject in "12":
        nsd.main(["prepare", "--nsd_path", str(root), "--data_path", str(out), "--subj", subject])
    assert "120 trials" in capsys.readouterr().out
    nsd.main(["check", "--data_path", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert sum("images and betas of the same trials" in line for line in lines) == 2
    assert all(line.startswith("ok ") for line in lines[:-1]) and "as it should be" in lines[-1]
    with pytest.raises(UserError, match="is there already: pass --overwrite"):
        nsd.main(["prepare", "--nsd_path", str(root), "--data_path", str(out)])
    (out / "shared1000.npy").unlink()  # as after the original's download, which leaves it out
    nsd.main(["check", "--data_path", str(out)])
    assert "ok     shared1000.npy: not there" in capsys.readouterr().out
    (out / "shared1000.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: nsd.main(["check", "--data_path", str(out)]))
    assert stop.value.code == 2 and "1 things are wrong" in capsys.readouterr().err


RAW_DAMAGE = {
    "nsddata/ppdata/subj01/func1pt8mm/roi/nsdgeneral.nii.gz": "aws s3 cp --no-sign-request s3://natural-scenes-dataset",
    f"nsddata_betas/ppdata/subj01/func1pt8mm/{VERSION}/betas_session04.hdf5": "betas_session04.hdf5 is missing",
    "nsddata/ppdata/subj01/behav/responses.tsv": "responses.tsv is missing",
    "nsddata/experiments/nsd/nsd_stim_info_merged.csv": "nsd_stim_info_merged.csv is missing",
    "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5": "nsd_stimuli.hdf5 is missing",
}


@pytest.mark.parametrize("name", RAW_DAMAGE)
@pytest.mark.parametrize("cut", [False, True])
def test_missing_or_cut_raw_file_is_named_before_any_betas(raw, tmp_path, name, cut):
    root = tmp_path / "raw"
    shutil.copytree(raw[0], root)
    whole = (root / name).read_bytes()
    (root / name).unlink()
    if cut:
        (root / name).write_bytes(whole[: len(whole) // 2])
    expected = f"{Path(name).name} cannot be used" if cut else RAW_DAMAGE[name]
    with pytest.raises(UserError, match=expected):
        nsd.prepare(root, tmp_path / "out", 1)
    assert not list((tmp_path / "out").glob("betas*")) and not list((tmp_path / "out").glob("**/*.tmp"))


def test_betas_of_another_shape(raw, tmp_path):
    root = tmp_path / "raw"
    shutil.copytree(raw[0], root)
    path = root / f"nsddata_betas/ppdata/subj01/func1pt8mm/{VERSION}/betas_session02.hdf5"
    with h5py.File(path, "w") as file:
        file["betas"] = np.zeros((TRIALS, *SHAPE), np.int16)  # not transposed
    with pytest.raises(UserError, match=r"betas_session02.hdf5 cannot be used \(shape"):
        nsd.prepare(root, tmp_path / "out", 1)


# ---- another dataset


def make_arrays(subject: int = 9, n: int = 90, v: int = 37, pictures: int = 30, seed: int = 3):
    rng = np.random.default_rng(seed)
    row = rng.permutation(np.repeat(np.arange(pictures), n // pictures))
    voxels = 40 + 9 * (rng.normal(size=(pictures, v))[row] + .5 * rng.normal(size=(n, v)))
    images = rng.integers(0, 256, (pictures, 3, 64, 64)).astype(np.uint8)
    return dict(voxels=voxels, images=images, image_of_trial=row, session=1 + np.arange(n) // 30, is_test=row < 10)


def test_a_ninth_subject_joins_the_toy_world(world_copy):
    before = data.Images(world_copy)[[0, 107]]
    arrays = make_arrays()
    nsd.write_subject(world_copy, 9, **arrays)
    train, test = data.load_trials(world_copy, 9), data.load_trials(world_copy, 9, "new_test")
    assert len(train) == 60 and len(test) == 30 and data.count_sessions(world_copy, 9) == 3
    voxels = data.load_voxels(world_copy, train)
    assert voxels.shape == (60, 37) and data.num_voxels(world_copy, 9) == 37
    np.testing.assert_allclose(voxels.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(voxels.std(0, unbiased=False), 1, atol=1e-5)
    raw_train = arrays["voxels"][~arrays["is_test"]]
    expected = (arrays["voxels"][test.beta] - raw_train.mean(0)) / raw_train.std(0)
    np.testing.assert_allclose(data.load_voxels(world_copy, test), expected, atol=1e-4)
    np.testing.assert_array_equal(train.image, 108 + arrays["image_of_trial"][train.beta])
    np.testing.assert_array_equal(train.session, arrays["session"][train.beta])
    images = data.Images(world_copy)
    assert len(images) == 138 and torch.equal(images[[0, 107]], before)
    np.testing.assert_allclose(images[[108 + 4]][0], arrays["images"][4] / 255, atol=5e-4)
    assert data.load_region_masks(world_copy, 9)["nsd_general"].tolist() == [True] * 37
    assert set(data.load_region_masks(world_copy, 3)) >= {"V1", "higher_vis"}
    assert nsd.check(world_copy) == []


def test_a_subject_alone_and_with_pictures_that_are_there(tmp_path):
    arrays = make_arrays()
    nsd.write_subject(tmp_path, 1, **arrays, size=32)
    assert data.Images(tmp_path).size == 32
    nsd.write_subject(tmp_path, 2, **{**arrays, "images": None, "voxels": arrays["voxels"][:, :5]})
    assert len(data.Images(tmp_path)) == 30 and data.num_voxels(tmp_path, 2) == 5
    np.testing.assert_array_equal(data.load_trials(tmp_path, 2).image, data.load_trials(tmp_path, 1).image)
    assert nsd.check(tmp_path) == []


def test_a_session_only_for_testing_has_no_tar(tmp_path):
    arrays = make_arrays()
    order = np.argsort(~arrays["is_test"], kind="stable")  # the 30 test trials are session 1
    arrays |= {name: arrays[name][order] for name in ("voxels", "image_of_trial", "is_test")}
    nsd.write_subject(tmp_path, 1, **arrays, size=16)
    assert data.count_sessions(tmp_path, 1) == 2 and set(data.load_trials(tmp_path, 1).session) == {2, 3}
    assert nsd.check(tmp_path) == []


@pytest.mark.parametrize("change, match", [
    (lambda a: a.update(session=a["session"][1:]), "a row for each of 90, 89, 90 trials"),
    (lambda a: a["voxels"].__setitem__((3, 4), np.nan), "voxels hold NaN"),
    (lambda a: a.update(images=a["images"].transpose(0, 2, 3, 1)), r"not \(n, 3, H, W\)"),
    (lambda a: a.update(images=a["images"].astype(np.float32)), r"neither uint8 nor within \[0, 1\]"),
    (lambda a: a["image_of_trial"].__setitem__(5, 30), "names picture 30, there are 30"),
    (lambda a: a.update(session=a["session"][::-1]), "not in order of session"),
    (lambda a: a.update(is_test=np.zeros(90, bool)), "all for training"),
    (lambda a: a["is_test"].__setitem__(int(np.argmin(a["is_test"])), True), "for training are for testing too"),
    (lambda a: a.update(images=None), "others' training pictures"),
])
def test_wrong_arrays_write_nothing(world_copy, change, match):
    arrays = make_arrays()
    arrays["image_of_trial"], arrays["is_test"] = arrays["image_of_trial"].copy(), arrays["is_test"].copy()
    change(arrays)
    if arrays["images"] is None:
        arrays["image_of_trial"] = arrays["image_of_trial"] + 20  # the world's own: all of them are training pictures
    files = sorted(world_copy.rglob("*"))
    with pytest.raises(UserError, match=f"subject 9's .*{match}.*mend what write_subject is given"):
        nsd.write_subject(world_copy, 9, **arrays)
    assert sorted(world_copy.rglob("*")) == files and len(data.Images(world_copy)) == 108


def test_an_existing_subject_is_refused(world_copy):
    with pytest.raises(UserError, match="is there already: choose another number"):
        nsd.write_subject(world_copy, 4, **make_arrays())


# ---- check on damage


def edit_h5(name: str, member: str, change, dtype=None):
    """Rewrite one member of a world's HDF5 file: change(array) -> array."""
    def damage(world):
        with h5py.File(world / name, "a") as file:
            array = change(file[member][:])
            del file[member]
            if array is not None:
                file.create_dataset(member, data=array, dtype=dtype)
    return damage


def edit_tar(split: str, number: int, change, windows=None):
    """Rewrite a tar of subject 1: change(behav (n, 17)), windows(past, future, olds) -> the same."""
    def damage(world):
        path = data.session_tar(world, 1, split, number)
        behav = data.read_behav(path)
        full = np.concatenate([data.read_behav(p) for p in sorted((world / "wds/subj01").glob("*/?.tar"))
                               if p.parent.name != "test"])
        rows = [int(np.flatnonzero(full[:, 5] == b)[0]) for b in behav[:, 5]]
        past, future, olds = (window[rows] for window in data.behaviour_windows(full))
        kept = change(behav)
        behav, n = (behav, len(behav)) if kept is None else (kept, len(kept))
        past, future, olds = windows(past, future, olds) if windows else (past, future, olds)
        data.write_session_tar(path, behav, past[:n], future[:n], olds[:n])
    return damage


def setting(rows, column, value):
    def change(array):
        array[rows, column] = value
        return array
    return change


def swap_betas(behav):
    behav[[0, 1], 5] = behav[[1, 0], 5]


def cut(name: str, keep: float):
    def damage(world):
        whole = (world / name).read_bytes()
        (world / name).write_bytes(whole[: int(len(whole) * keep)])
    return damage


def swap_tars(world):
    first, second = (data.session_tar(world, 1, "train", k) for k in (0, 1))
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(whole)


def remove(name: str):
    return lambda world: (world / name).unlink()


BETAS, PICTURES, MASKS = "betas_all_subj01_fp32_renorm.hdf5", "coco_images_224_float16.hdf5", "brain_region_masks.hdf5"
DAMAGE = {  # what was done: how, and what must be said of which file
    "betas missing": (remove(BETAS), rf"{BETAS}.* is missing"),
    "betas cut": (cut(BETAS, .5), rf"{BETAS}.* not a whole HDF5 file"),
    "betas named otherwise": (lambda w: h5py.File(w / BETAS, "a").move("betas", "voxels"), rf"{BETAS} has no 'betas'"),
    "betas flat": (edit_h5(BETAS, "betas", np.ravel), rf"{BETAS}: float32 \(3600,\), not float32 \(trials, V\)"),
    "betas float64": (edit_h5(BETAS, "betas", lambda b: b, np.float64), rf"{BETAS}: type: float64"),
    "betas NaN": (edit_h5(BETAS, "betas", setting(17, 3, np.nan)), rf"{BETAS}: finite: NaN in 1 rows, the first is 17"),
    "betas not written": (edit_h5(BETAS, "betas", setting(slice(50, 60), slice(None), 0)),
                          rf"{BETAS}: written: 10 rows of zeros, the first is 50"),
    "betas in percent": (edit_h5(BETAS, "betas", lambda b: 5 * b + 3), rf"{BETAS}: z-scored: mean 3"),
    "betas too short": (edit_h5(BETAS, "betas", lambda b: b[:55]), "rows of betas: row 5[5-9] is named, there are 55"),
    "betas too long": (edit_h5(BETAS, "betas", lambda b: np.vstack([b, b[:4]])), "4 rows have no trial"),
    "betas shifted": (edit_h5(BETAS, "betas", lambda b: np.roll(b, 1, 0)), "rows are shifted or shuffled"),
    "voxels lost": (edit_h5(BETAS, "betas", lambda b: b[:, :50]), rf"{MASKS}: subject 1.*do not fit the 50 voxels"),
    "images missing": (remove(PICTURES), rf"{PICTURES} is missing"),
    "images cut": (cut(PICTURES, .9), rf"{PICTURES} is not a whole HDF5 file"),
    "images bytes": (edit_h5(PICTURES, "images", lambda i: (255 * i).astype(np.uint8), np.uint8), "not float"),
    "images float32": (edit_h5(PICTURES, "images", lambda i: i, np.float32), rf"{PICTURES}: type: float32"),
    "images to 255": (edit_h5(PICTURES, "images", lambda i: 255 * i), r"from \S+ to 25\S+, not within \[0, 1\]"),
    "images not written": (edit_h5(PICTURES, "images", setting(slice(80, 108), slice(None), 0)), "are of one colour"),
    "images too few": (edit_h5(PICTURES, "images", lambda i: i[:15]),
                       r"wds/subj01: images: image \d+ is named, there are 15"),
    "images not square": (edit_h5(PICTURES, "images", lambda i: i[..., :60]),
                          r"float16 \(108, 3, 64, 60\), not float \(n, 3, H, H\)"),
    "masks missing": (remove(MASKS), rf"{MASKS} is missing"),
    "masks of a subject": (lambda w: h5py.File(w / MASKS, "a").pop("subj01"), rf"{MASKS} has no 'subj01'"),
    "masks of a region": (edit_h5(MASKS, "subj01/V3", lambda m: None), "no region V3"),
    "masks too long": (edit_h5(MASKS, "subj01/V2", lambda m: np.append(m, True)), r"'V2': \(61,\)} do not fit the 60"),
    "masks empty": (edit_h5(MASKS, "subj01/V4", lambda m: m & False), r"no voxel in \['V4'\]"),
    "shared1000 damaged": (lambda w: (w / "shared1000.npy").write_bytes(b"\x93NUMPY"), "shared1000.npy is damaged"),
    "shared1000 short": (lambda w: np.save(w / "shared1000.npy", np.ones(9, bool)),
                         "shared1000.npy: has 9 rows for 108 images"),
    "shared1000 of others": (lambda w: np.save(w / "shared1000.npy", np.arange(108) < 5),
                             "trials say otherwise in column 16"),
    "tar missing": (remove("wds/subj01/train/0.tar"), "train/0.tar is missing"),
    "tar cut": (cut("wds/subj01/train/1.tar", .4), "train/1.tar is cut short or damaged"),
    "new_test missing": (remove("wds/subj01/new_test/0.tar"), "new_test/0.tar is missing"),
    "test missing": (remove("wds/subj01/test/0.tar"), "wds/subj01/test/0.tar is missing"),
    "tars swapped": (swap_tars, "column 2, the session: not one session a tar"),
    "another subject's tar": (lambda w: shutil.copy(w / "wds/subj02/train/0.tar", w / "wds/subj01/train/0.tar"),
                              r"column 1, the subject: \d+ trials of another subject"),
    "global_trial swapped": (edit_tar("train", 0, swap_betas), "order of trials: global_trial falls"),
    "global_trial twice": (edit_tar("train", 0, lambda b: np.vstack([b[:-1], b[:1]])), "belongs to 2 trials"),
    "trial lost": (edit_tar("train", 1, lambda b: b[:-1]), "a trial for each row of betas: 1 rows have no trial"),
    "test image in train": (edit_tar("train", 0, setting([0], 0, 3)), r"1 images are in train and in new_test"),
    "old test of others": (edit_tar("test", 0, setting([0], 5, 9999)), "1 trials of test are not in new_test"),
    "windows of 10": (edit_tar("train", 0, lambda b: b, lambda p, f, o: (p[:, :10], f, o)),
                      r"past_behav.npy is \(10, 17\), not \(15, 17\)"),
    "captions lost": (lambda w: torch.save(np.array(["a ball"]), w / "evals/all_captions.pt"),
                      "evals/all_captions.pt: 1"),
    "killed run": (lambda w: (w / f"{BETAS}.77.tmp").touch(), r"77.tmp: left by a killed run"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_check_names_the_damage(world_copy, name):
    damage, expected = DAMAGE[name]
    damage(world_copy)
    wrong = [f"{what}: {bad}" for what, bad in nsd.check(world_copy, [1])]
    assert any(re.search(expected, line) for line in wrong), wrong
    assert all(re.search("get it again|get them again|data_path|delete it", line) for line in wrong), "a remedy each"
    if not name.startswith(("images", "shared1000", "masks missing")):  # files of one subject: another is not accused
        assert not any("subj" in what and "subj01" not in what for what, _ in nsd.check(world_copy, [2]))


def test_a_whole_world_is_ok(smoke_world):
    assert nsd.check(smoke_world) == []
    with pytest.raises(UserError, match="has no subject"):
        nsd.check(smoke_world / "evals")


def test_nsds_own_numbers_are_asked_of_nsd(monkeypatch):
    monkeypatch.setattr(nsd, "NSD_IMAGES", 108)
    monkeypatch.setattr(nsd, "NSD_TRIALS", 15)
    monkeypatch.setattr(nsd, "NSD_SHARED", 12)
    monkeypatch.setattr(nsd, "SESSIONS", {1: 4})
    monkeypatch.setattr(nsd, "TEST_TRIALS", {"new_test": {1: 36}, "test": {1: 30}})
    everything = np.zeros((36, 17))
    good = dict(nsd.check_counts("wds/subj01", 1, 60, 4, everything, everything[:30]))
    assert set(good.values()) == {""} and len(good) == 4
    bad = list(nsd.check_counts("wds/subj01", 1, 45, 3, everything[:20], everything))
    assert [text.partition(":")[0] for _, text in bad] == [
        "NSD has 4", "NSD has 60", "the release has 36", "the release has 30"]


def test_the_releases_counts():
    assert nsd.TEST_TRIALS["new_test"] == {1: 3000, 2: 3000, 5: 3000, 7: 3000, 3: 2371, 6: 2371, 4: 2188, 8: 2188}
    assert nsd.TEST_TRIALS["test"] == {1: 2770, 2: 2770, 5: 2770, 7: 2770, 3: 2113, 6: 2113, 4: 1985, 8: 1985}
