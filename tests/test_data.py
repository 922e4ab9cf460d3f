"""data.py against worlds made by hand: alignment, broken files, epochs, cached targets.

    python -m pytest tests/test_data.py
"""

import gc
import shutil
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import webdataset as wds
from torchvision.transforms.v2.functional import adjust_hue

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
from data import BEHAV_COLUMNS, TargetCache, Trials, UserError

SUBJECT, V, N_IMAGES = 3, 7, 40


def make_world(folder, sessions=2, per_session=30, seed=0):
    """Trials in random file order; betas row r holds r in every voxel, image i is i / 64 everywhere."""
    rng = np.random.default_rng(seed)
    n = sessions * per_session
    table = np.full((n, 17), -1.0)
    table[:, 0] = rng.integers(0, N_IMAGES, n)
    table[:, 1], table[:, 5] = SUBJECT, np.arange(n)
    table[:, 2] = 1 + np.arange(n) // per_session
    past, future, olds = data.behaviour_windows(table)
    for session in range(sessions):
        rows = session * per_session + rng.permutation(per_session)
        tar = data.session_tar(folder, SUBJECT, "train", session)
        data.write_session_tar(tar, table[rows], past[rows], future[rows], olds[rows], start=session * per_session)
    rows = rng.permutation(n)[:20]
    data.write_session_tar(
        data.session_tar(folder, SUBJECT, "new_test"), table[rows], past[rows], future[rows], olds[rows]
    )
    data.write_betas(data.h5_path(folder, "betas", SUBJECT), np.arange(n)[:, None] * np.ones((1, V)))
    pictures = np.arange(N_IMAGES)[:, None, None, None] / 64 * np.ones((1, 3, 16, 16))
    data.write_images(data.h5_path(folder, "images"), pictures)
    return table


@pytest.fixture
def world(tmp_path):
    make_world(tmp_path)
    return tmp_path


def trials_of(images, subject=1):
    images = np.asarray(images)
    return Trials(subject, images, np.arange(len(images)), np.ones(len(images), int))


# ---- reading


def test_columns_name_image_and_betas():
    assert len(BEHAV_COLUMNS) == len(set(BEHAV_COLUMNS)) == 17
    assert BEHAV_COLUMNS[0] == "cocoidx" and BEHAV_COLUMNS[5] == "global_trial"
    assert (data.IMAGE, data.BETA) == (0, 5)


@pytest.mark.parametrize("split", ["train", "new_test"])
def test_trials_stay_aligned_with_voxels_and_images(tmp_path, split):
    table = make_world(tmp_path)
    trials = data.load_trials(tmp_path, SUBJECT, split)
    assert len(trials) == (60 if split == "train" else 20)
    assert not np.array_equal(trials.beta, np.sort(trials.beta)), "the world is meant to be shuffled"
    for image, beta, session in zip(trials.image, trials.beta, trials.session, strict=True):
        assert (image, session) == (table[beta, 0], table[beta, 2])
    voxels = data.load_voxels(tmp_path, trials, block=16)
    assert voxels.shape == (len(trials), V) and voxels.dtype == torch.float32
    assert torch.equal(voxels[:, 3], torch.from_numpy(trials.beta).float())
    pictures = data.Images(tmp_path)[trials.image]
    assert torch.equal(pictures[:, 1, 2, 3] * 64, torch.from_numpy(trials.image).float())


def test_sessions_are_tar_numbers(world):
    assert data.count_sessions(world, SUBJECT) == 2
    second = data.load_trials(world, SUBJECT, sessions=[1])
    assert set(second.session) == {2} and set(second.beta) == set(range(30, 60))
    assert data.num_voxels(world, SUBJECT) == V


def test_duplicate_rows_and_any_order(world):
    trials = Trials(SUBJECT, np.zeros(5, int), np.array([59, 2, 2, 17, 59]), np.ones(5, int))
    assert data.load_voxels(world, trials, block=8)[:, 0].tolist() == [59, 2, 2, 17, 59]
    images = data.Images(world)
    assert len(images) == N_IMAGES and images.size == 16
    assert (images[[5, 2, 5]][:, 0, 0, 0] * 64).tolist() == [5, 2, 5]
    assert images[[]].shape == (0, 3, 16, 16) and images[np.int64(4)].shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match=r"coco_images.*40 images.*image 40.*--data_path"):
        images[[40]]


def test_images_open_the_file_again_in_another_process(world, monkeypatch):
    images = data.Images(world)
    before = images._open()
    assert images._open() is before
    monkeypatch.setattr(data.os, "getpid", lambda: -5)  # as after a fork
    assert images._open() is not before and images[[6]][0, 0, 0, 0] * 64 == 6


@pytest.mark.parametrize("keep", [0, 100, 700, 5 * 512, 17 * 512 * 3, 30_000, 100_001, 17 * 512 * 30 + 300])
def test_cut_tar(world, keep):
    tar = data.session_tar(world, SUBJECT, "train", 1)
    tar.write_bytes(tar.read_bytes()[: keep + 512])
    with pytest.raises(UserError, match=r"train/1\.tar is cut short or damaged.*--data_path"):
        data.load_trials(world, SUBJECT)


def test_tar_cut_between_samples_warns_and_zeros_are_an_error(world):
    tar = data.session_tar(world, SUBJECT, "train", 1)
    whole = tar.read_bytes()
    tar.write_bytes(whole[: 17 * 512 * 4])
    with pytest.warns(UserWarning, match=r"1\.tar lacks tar's end mark; if 4 trials"):
        assert len(data.load_trials(world, SUBJECT, sessions=[1])) == 4
    tar.write_bytes(whole[: 17 * 512 * 4] + bytes(len(whole) - 17 * 512 * 4))
    with pytest.raises(UserError, match=r"1\.tar is cut short or damaged after 4 trials"):
        data.load_trials(world, SUBJECT)


def test_a_tar_of_webdatasets_own_writer(world):
    """As the release's were written: with the time of day, so with a longer (PAX) header a member."""
    tar, rows = data.session_tar(world, SUBJECT, "train", 1), np.zeros((40, 17))
    rows[:, [data.IMAGE, data.BETA]] = np.arange(40)[:, None] + [0, 100]
    with wds.TarWriter(str(tar)) as writer:
        for i, row in enumerate(rows):
            writer.write({"__key__": f"sample{i:09d}", "behav.npy": row[None], "past_behav.npy": np.zeros((15, 17))})
    assert np.array_equal(data.read_behav(tar), rows)
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=r"1\.tar is cut short or damaged"):
        data.read_behav(tar)


def test_missing_member_and_missing_number(world):
    tar = data.session_tar(world, SUBJECT, "train", 0)
    whole = tar.read_bytes()
    assert whole.count(b"sample000000003.behav.npy") == 1
    tar.write_bytes(_rename(whole, b"sample000000003.behav.npy", b"sample000000003.bhav.npy\0"))
    with pytest.raises(UserError, match=r"train/0\.tar: .*sample000000003 has no behav\.npy.*--data_path"):
        data.load_trials(world, SUBJECT)
    table = np.full((1, 17), -1.0)
    data.write_session_tar(tar, table, *data.behaviour_windows(table))
    with pytest.raises(UserError, match=r"train/0\.tar: a trial without image"):
        data.load_trials(world, SUBJECT)


def _rename(tar, old, new):
    """Rename a member of a tar in memory, checksum included."""
    at = tar.index(old)
    header = bytearray(tar[at : at + 512].replace(old, new))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return tar[:at] + bytes(header) + tar[at + 512 :]


def test_missing_subject_sessions_and_files(world):
    with pytest.raises(UserError, match=r"subj05/train/0\.tar is missing.*--data_path.*--subj"):
        data.load_trials(world, 5)
    with pytest.raises(UserError, match=r"subj03/train has 2 sessions, not 7: .*--num_sessions.* 2"):
        data.load_trials(world, SUBJECT, sessions=range(7))
    with pytest.raises(UserError, match=r"test/0\.tar is missing.*--data_path"):
        data.load_trials(world, SUBJECT, "test")
    with pytest.raises(UserError, match=r"betas_all_subj05_fp32_renorm\.hdf5 is missing.*--data_path"):
        data.num_voxels(world, 5)
    data.session_tar(world, SUBJECT, "train", 0).unlink()
    with pytest.raises(UserError, match=r"train/0\.tar is missing"):
        data.count_sessions(world, SUBJECT)


def test_broken_betas_and_images(world):
    trials = data.load_trials(world, SUBJECT)
    path = data.h5_path(world, "betas", SUBJECT)
    with h5py.File(path, "r+") as file:
        file["betas"][33, 2], file["betas"][41, 0] = np.nan, np.inf
    with pytest.raises(UserError, match=r"betas_all_subj03.*2 rows with NaN.*row 33.*--data_path"):
        data.load_voxels(world, trials)
    first = data.load_trials(world, SUBJECT, sessions=[0])
    assert data.load_voxels(world, first).isfinite().all(), "rows nobody asked for do not matter"
    first.beta[4] = 60
    with pytest.raises(UserError, match=r"60 rows, but its tars name row 60.*--data_path"):
        data.load_voxels(world, first)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"betas_all_subj03.*not a whole HDF5"):
        data.num_voxels(world, SUBJECT)
    data.write_array("images", np.uint8, data.h5_path(world, "images"), np.zeros((2, 16, 16, 3)))
    with pytest.raises(UserError, match=r"coco_images.*uint8 .*--data_path"):
        data.Images(world)


def test_repeats_and_average():
    trials = trials_of([8, 3, 8, 5, 8, 3])
    images, positions = data.repeats(trials)
    assert images.tolist() == [3, 5, 8]
    assert [p.tolist() for p in positions] == [[1, 5], [3], [0, 2, 4]]
    values = np.array([[0.0], [10.0], [3.0], [7.0], [6.0], [20.0]])
    assert data.average_repeats(values, positions).tolist() == [[15.0], [7.0], [3.0]]
    half = data.average_repeats(torch.from_numpy(values).half(), positions)
    assert half.dtype == torch.float16 and half.tolist() == [[15.0], [7.0], [3.0]]


# ---- writing


def test_windows_against_brute_force():
    rng = np.random.default_rng(1)
    n = 50
    table = rng.normal(size=(n, 17))
    table[:, 0], table[:, 5] = rng.integers(0, 17, n), rng.permutation(n)
    table[:, 2] = 1 + table[:, 5] // 20  # sessions of 20, 20, 10 trials; the table itself is shuffled
    past, future, olds = data.behaviour_windows(table)
    assert past.shape == future.shape == (n, 15, 17) and olds.shape == (n, 3, 17)
    at = {int(row[5]): row for row in table}
    missing = np.full(17, -1.0)
    for i, row in enumerate(table):
        for step in range(1, 16):
            for window, time, place in ((past, row[5] - step, step - 1), (future, row[5] + step, step - 1)):
                neighbour = at.get(int(time))
                same = neighbour is not None and neighbour[2] == row[2]
                assert np.array_equal(window[i, place], neighbour if same else missing)
        others = [at[t] for t in range(n) if at[t][0] == row[0] and t != row[5]][:3]
        assert np.array_equal(olds[i], others + [missing] * (3 - len(others)))


def test_writers_repeat_to_the_byte_and_masks_return(tmp_path):
    make_world(tmp_path / "a"), make_world(tmp_path / "b")
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
        assert not path.name.endswith(".tmp")
    masks = {1: {"V1": np.array([True, False]), "higher_vis": np.array([False, True])}, 2: {"V1": np.ones(3, bool)}}
    data.write_region_masks(data.h5_path(tmp_path, "masks"), masks)
    read = data.load_region_masks(tmp_path, 1)
    assert set(read) == {"V1", "higher_vis"} and read["V1"].tolist() == [True, False]
    with pytest.raises(UserError, match=r"brain_region_masks.*no 'subj04'"):
        data.load_region_masks(tmp_path, 4)


# ---- epochs


def epoch(trials_list, batch=6, steps=10, seed=0, number=0, **ranks):
    return list(data.epoch_batches(trials_list, batch, steps, seed, number, **ranks))


def test_epochs_repeat_and_differ():
    trials = [trials_of(np.arange(60) // 3)]
    first, again, later = epoch(trials), epoch(trials), epoch(trials, number=1)
    assert np.array_equal(first, again) and not np.array_equal(first, later)
    assert not np.array_equal(first, epoch(trials, seed=1))
    assert not np.array_equal(first, epoch([trials_of(np.arange(60) // 3, subject=2)]))


@pytest.mark.parametrize("seed", range(5))
def test_no_twins_and_full_coverage(seed):
    trials = trials_of(np.arange(60) // 3)
    batches = epoch([trials], seed=seed)
    assert Counter(np.concatenate([b[0] for b in batches]).tolist()) == Counter(range(60))
    assert all(len(set(trials.image[b[0]])) == 6 for b in batches)
    tight = trials_of(np.arange(9) // 3)  # every batch must hold exactly the three images
    assert all(len(set(tight.image[b[0]])) == 3 for b in epoch([tight], batch=3, steps=3, seed=seed))


def test_ranks_share_out_one_permutation():
    trials = trials_of(np.arange(60) // 3)
    ranks = [epoch([trials], steps=5, rank=rank, world=2) for rank in range(2)]
    seen = [np.concatenate([b[0] for b in batches]) for batches in ranks]
    assert sorted(np.concatenate(seen)) == list(range(60))
    assert np.array_equal(ranks[1], epoch([trials], steps=5, rank=1, world=2))


def test_subjects_give_equal_numbers_and_short_ones_start_over():
    long, short = trials_of(np.arange(60) // 3, 1), trials_of(np.arange(20) // 2, 2)
    batches = epoch([long, short])
    assert all(len(a) == len(b) == 6 for a, b in batches)
    assert set(Counter(np.concatenate([b for _, b in batches]).tolist()).values()) == {3}
    assert all(len(set(short.image[b])) == 6 for _, b in batches)
    assert data.steps_per_epoch([long, short], 6) == 10 and data.steps_per_epoch([long, short], 6, world=4) == 2
    assert data.steps_per_epoch([short], 50) == 1
    few = epoch([trials_of([1, 1, 1, 2])], batch=4, steps=2)  # cannot be avoided: allowed
    assert [sorted(b[0]) for b in few] == [[0, 1, 2, 3]] * 2


def test_prefetch_keeps_order_and_passes_errors():
    for device in map(torch.device, ("cuda", "cpu")):  # in a thread, or one by one
        assert list(data.prefetch(range(20), device)) == list(range(20)) and list(data.prefetch([], device)) == []

    def broken():
        yield 1
        raise UserError("bad row")

    items = data.prefetch(broken(), torch.device("cuda"))
    assert next(items) == 1
    with pytest.raises(UserError, match="bad row"):
        next(items)
    endless = data.prefetch(iter(int, 1), torch.device("cuda"))
    assert next(endless) == 0
    endless.close()  # must return, not wait for the rest


# ---- targets


class Tiny(torch.nn.Module):
    """Stands in for clip (.tokens) and the teacher (call); counts the images it sees."""

    def __init__(self, seed=0, fail_at=None):
        super().__init__()
        torch.manual_seed(seed)
        self.linear, self.seen, self.fail_at = torch.nn.Linear(3, 5), [], fail_at

    def tokens(self, images):
        self.seen += (images[:, 0, 0, 0] * 64).tolist()
        if self.fail_at is not None and len(self.seen) > self.fail_at:
            raise KeyboardInterrupt
        return self.linear(images.flatten(2).transpose(1, 2)[:, :4])  # (B, 4, 5)

    def forward(self, images):
        return images.mean((2, 3))[:, :, None].expand(-1, -1, 512)  # (B, 3, 512)


def build(world, network, indices=range(10), name="clip", **options):
    images, networks = data.Images(world), {name: network}
    return data.cache_targets(images, world / "cache", np.array(indices), networks, batch_size=2, **options)[name]


def test_cache_equals_direct_computation(world):
    network, images = Tiny(), data.Images(world)
    cache = build(world, network, [30, 3, 3, 7])
    assert cache.path.parent == world / "cache" / "targets"
    direct = network.tokens(images[[7, 30, 7]])
    assert cache[[7, 30, 7]].shape == (3, 4, 5) and cache[[7]].dtype == torch.float16
    assert torch.equal(cache[[7, 30, 7]], direct.half())
    with pytest.raises(UserError, match=r"clip_.*npy has no target of image 4 yet.*--cache_dir"):
        cache[[3, 4]]
    assert np.load(cache.path, mmap_mode="r").shape == (N_IMAGES, 4, 5)
    with pytest.raises(UserError, match="40 images"):
        build(world, network, [40])


def test_killed_build_resumes(world, monkeypatch):
    monkeypatch.setattr(data, "FLUSH_BATCHES", 2)
    with pytest.raises(KeyboardInterrupt):
        build(world, Tiny(fail_at=7))  # one image for the shape, then three batches of two
    network = Tiny()
    cache = build(world, network)
    assert network.seen[1:] == [6, 7, 8, 9]
    assert torch.equal(cache[range(10)], network.tokens(data.Images(world)[range(10)]).half())
    network.seen = []
    build(world, network, range(12))
    assert network.seen[1:] == [10, 11]


def test_another_network_or_image_file_makes_another_cache(world):
    first, second = build(world, Tiny(0)), build(world, Tiny(1))
    assert first.path != second.path and not torch.equal(first[[1]], second[[1]])
    assert data.network_fingerprint(Tiny(0)) == data.network_fingerprint(Tiny(0).double())
    pictures = np.random.default_rng(0).random((N_IMAGES, 3, 16, 16))
    data.write_images(data.h5_path(world, "images"), pictures)
    assert build(world, Tiny(0)).path != first.path


def test_a_cache_does_not_keep_its_network(world):
    network = Tiny()
    kept, cache = weakref.ref(network), build(world, network)
    del network
    gc.collect()
    assert kept() is None and cache[[1, 2]].shape == (2, 4, 5)


def test_second_process_sees_the_rows(world):
    network, images = Tiny(), data.Images(world)
    writer = TargetCache(world / "t", "clip", lambda pictures, rows: network.tokens(pictures), (4, 5), "key")
    reader = TargetCache(world / "t", "clip", None, (4, 5), "key")
    with pytest.raises(UserError, match="clip_key.npy is missing"):
        reader[[1]]
    writer.fill(images, [1, 2])
    assert torch.equal(reader[[2, 1]], writer[[2, 1]])
    with torch.device("meta"):  # as train.set_up builds the model on a GPU and asks how large a target is
        assert torch.equal(reader[[2, 1]], writer[[2, 1]])
    writer.fill(images, [3])
    assert torch.equal(reader[[3]], writer[[3]])
    writer.path.write_bytes(writer.path.read_bytes()[:-100])
    with pytest.raises(UserError, match="clip_key.npy is damaged.*delete it"):
        TargetCache(world / "t", "clip", None, (4, 5), "key")[[1]]


def test_full_disk_is_told_before_starting(world, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=399))
    network = Tiny()
    with pytest.raises(UserError, match=r"400 bytes.*399.*--cache_dir"):
        build(world, network)  # 10 images x 4 x 5 values x 2 bytes
    assert len(network.seen) == 1
    build(world, network, range(9))


def test_network_that_gives_nan(world):
    network = Tiny()
    network.linear.bias.data[2] = torch.nan
    with pytest.raises(UserError, match=r"'clip' gives NaN.*rows 0\.\.1.*--cache_dir"):
        build(world, network)


def test_teacher_views_do_not_depend_on_order_or_global_seed(world):
    pictures = np.random.default_rng(0).random((N_IMAGES, 3, 16, 16))
    data.write_images(data.h5_path(world, "images"), pictures)
    network = Tiny()
    state = torch.get_rng_state()
    all_at_once = build(world, network, range(10), "teacher", folder=world / "a")
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"
    build(world, network, [9, 4], "teacher", folder=world / "b")
    in_parts = build(world, network, range(10), "teacher", folder=world / "b")
    assert all_at_once[[0]].shape == (1, 3, 3, 512)
    assert torch.equal(all_at_once[range(10)], in_parts[range(10)])
    clean = network(data.Images(world)[range(10)]).half()
    assert torch.equal(all_at_once[range(10)][:, 0], clean)
    changed = all_at_once[range(10)][:, 1:]
    assert all((changed[:, view] != clean).flatten(1).any(1).all() for view in range(2))
    assert not torch.equal(changed[:, 0], changed[:, 1])
    one = data.augmented(data.Images(world)[[3]], [3], 1)
    assert one.shape == (1, 3, 16, 16) and 0 <= one.min() and one.max() <= 1


def test_recolouring_a_batch_is_torchvisions_of_each_picture():
    images, turn = torch.rand(3, 3, 8, 8), torch.tensor([-.1, .03, .08])
    hues = [adjust_hue(image, float(t)) for image, t in zip(images, turn, strict=True)]
    assert (data.turned_hue(images, turn[:, None, None]) - torch.stack(hues)).abs().max() < 1e-5
    corners = data.cropped(images, .25, torch.tensor([0., 1, 1]), torch.tensor([0., 0, 1]))  # left top, right top, ..
    for corner, image, (top, left) in zip(corners, images, ((0, 0), (0, 4), (4, 4)), strict=True):
        whole = F.interpolate(image[None, :, top : top + 4, left : left + 4], (8, 8), mode="bilinear")[0]
        assert (corner - whole)[:, 1:-1, 1:-1].abs().max() < 1e-5  # at its border it sees the pixels beside, too
