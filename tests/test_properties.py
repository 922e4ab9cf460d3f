"""What must hold for any order of sessions and repeats, any sizes and any number of processes; cases by hypothesis.

    python -m pytest tests/test_properties.py
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

import data  # noqa: E402
from data import Trials  # noqa: E402

FEW = settings(max_examples=40, deadline=None, database=None, derandomize=True)


def table_of(sessions: list[int], images: list[int]) -> np.ndarray:
    """behav (n, 17) of trials in order of time: which image, and in which session."""
    table = np.full((len(images), len(data.BEHAV_COLUMNS)), -1.0)
    table[:, data.IMAGE], table[:, data.SESSION], table[:, data.BETA] = images, sessions, np.arange(len(images))
    return table


@st.composite
def subjects(draw) -> list[Trials]:
    """One to three people: images seen one to three times each, in any order, over some sessions in any order."""
    people = []
    for subject in range(1, 1 + draw(st.integers(1, 3))):
        counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=12))
        images = draw(st.permutations(np.repeat(np.arange(len(counts)), counts).tolist()))
        sessions = draw(st.lists(st.integers(1, 4), min_size=len(images), max_size=len(images)))
        beta = draw(st.permutations(range(len(images))))
        people.append(Trials(subject, *(np.array(values, np.int64) for values in (images, beta, sessions))))
    return people


def divisors(n: int):
    return st.sampled_from([k for k in range(1, n + 1) if n % k == 0])


def schedule(people: list[Trials], batch: int, steps: int, seed: int, epoch: int, world: int) -> list[np.ndarray]:
    """For each subject the trials (ranks, steps, batch) of an epoch."""
    ranks = [list(data.epoch_batches(people, batch, steps, seed, epoch, rank, world)) for rank in range(world)]
    return [np.array([[step[k] for step in batches] for batches in ranks]) for k in range(len(people))]


@FEW
@given(subjects(), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99), st.integers(0, 99))
def test_an_epoch_is_balanced_and_disjoint(people, batch, steps, world, seed, epoch):
    """Equally many trials of each subject in each step; none again, on any rank, before all others had their turn."""
    for trials, shown in zip(people, schedule(people, batch, steps, seed, epoch, world), strict=True):
        assert shown.shape == (world, steps, batch)  # the same for each subject, whoever has how many trials
        times = Counter(dict.fromkeys(range(len(trials)), 0))
        times.update(shown.flatten().tolist())
        assert set(times) == set(range(len(trials)))
        assert max(times.values()) - min(times.values()) <= 1


@FEW
@given(subjects(), st.integers(0, 99), st.data())
def test_an_epoch_of_all_trials_shows_each_once(people, seed, more):
    """Whenever steps, processes and batch make up just the trials of a subject."""
    trials = people[0]
    batch = more.draw(divisors(len(trials)))
    world = more.draw(divisors(len(trials) // batch))
    steps = len(trials) // batch // world
    (shown,) = schedule([trials], batch, steps, seed, 0, world)
    assert sorted(shown.flatten().tolist()) == list(range(len(trials)))
    assert np.array_equal(shown, schedule([trials], batch, steps, seed, 0, world)[0])  # a run can be resumed


@FEW
@given(st.integers(2, 6), st.integers(3, 6), st.integers(1, 3), st.integers(0, 99), st.randoms(use_true_random=False))
def test_no_batch_shows_an_image_twice_if_images_suffice(batch, more, copies, seed, random):
    """`more` times as many images as a batch shows, each `copies` times: the batches have room to part the twins."""
    images = np.repeat(np.arange(batch * more), copies)
    random.shuffle(images)
    trials = Trials(1, images, np.arange(len(images)), np.ones(len(images), int))
    (shown,) = schedule([trials], batch, len(images) // batch, seed, 0, 1)
    assert sorted(shown.flatten().tolist()) == list(range(len(images)))
    assert all(len(set(images[row])) == batch for row in shown[0])


@FEW
@given(subjects())
def test_repeats_take_each_trial_once(people):
    for trials in people:
        images, positions = data.repeats(trials)
        assert images.tolist() == sorted(set(trials.image.tolist()))
        assert sorted(np.concatenate(positions).tolist()) == list(range(len(trials)))
        for image, rows in zip(images, positions, strict=True):
            assert (trials.image[rows] == image).all() and rows.tolist() == sorted(rows.tolist())


@settings(FEW, max_examples=12)
@given(st.data())
def test_files_give_each_trial_once_in_any_order(tmp_path_factory, more):
    """Trials in any order within their session's tar; any sessions asked for, in any order."""
    folder = tmp_path_factory.mktemp("world")
    sizes = more.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    sessions = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    images = more.draw(st.lists(st.integers(0, 4), min_size=len(sessions), max_size=len(sessions)))
    table = table_of(sessions.tolist(), images)
    windows = data.behaviour_windows(table)
    for number in range(len(sizes)):
        rows = np.array(more.draw(st.permutations(np.flatnonzero(sessions == number + 1).tolist())))
        data.write_session_tar(data.session_tar(folder, 1, "train", number), table[rows], *(w[rows] for w in windows))
    data.write_betas(data.h5_path(folder, "betas", 1), np.arange(len(table))[:, None] * np.ones((1, 2)))
    asked = more.draw(st.permutations(range(len(sizes))))
    asked = asked[: more.draw(st.integers(1, len(asked)))]
    trials = data.load_trials(folder, 1, sessions=asked)
    assert Counter(trials.beta.tolist()) == Counter(np.flatnonzero(np.isin(sessions - 1, asked)).tolist())
    assert trials.image.tolist() == table[trials.beta, data.IMAGE].tolist()
    assert trials.session.tolist() == table[trials.beta, data.SESSION].tolist()
    assert list(dict.fromkeys(trials.session.tolist())) == [number + 1 for number in asked]
    voxels = data.load_voxels(folder, trials, block=more.draw(st.integers(1, 8)))
    assert voxels[:, 1].tolist() == trials.beta.tolist()


@settings(FEW, max_examples=12)
@given(st.integers(1, 3), st.integers(1, 5), st.data())
def test_a_session_twice_is_refused(tmp_path_factory, sessions, trials, more):
    folder = tmp_path_factory.mktemp("world")
    table = table_of(np.repeat(np.arange(1, sessions + 1), trials).tolist(), list(range(sessions * trials)))
    windows = data.behaviour_windows(table)
    sources = list(range(sessions))
    sources.insert(more.draw(st.integers(0, sessions)), again := more.draw(st.integers(0, sessions - 1)))
    for number, source in enumerate(sources):
        rows = slice(source * trials, (source + 1) * trials)
        data.write_session_tar(data.session_tar(folder, 1, "train", number), table[rows], *(w[rows] for w in windows))
    second = max(number for number, source in enumerate(sources) if source == again)
    with pytest.raises(data.UserError, match=rf"train/{second}\.tar: betas row {again * trials} .*twice.*--data_path"):
        data.load_trials(folder, 1)
    others = [number for number in range(len(sources)) if number != second]
    assert len(data.load_trials(folder, 1, sessions=others)) == sessions * trials
