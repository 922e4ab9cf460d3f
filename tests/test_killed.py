"""Stages killed by SIGKILL while they write, and stages of which one process is killed: see dying.py.

    python -m pytest tests/test_killed.py
"""

import json
import signal
from pathlib import Path

import dying
import pytest
from test_train import ROOT, launch


@pytest.fixture(scope="module")
def happened(smoke_world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dying")
    done = launch(folder, ROOT / "tests/dying.py", folder, smoke_world)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", dying.KILLED)
def test_the_next_start_writes_the_same_files_and_no_others(happened, name):
    run = json.loads((happened / "killed.json").read_text())[name]
    kills = len(dying.KILLED[name][3])
    assert run["codes"] == [0] + [-signal.SIGKILL] * kills + [0], run["said"]
    assert run["different"] == [] and run["files"] >= 2
    assert len(run["left"]) == kills + 1 and run["left"][-1] == []
    assert all(left or place == "rows of the cache" for left, place in  # it was in the middle of writing a file
               zip(run["left"], dying.KILLED[name][3], strict=False))


def test_the_earlier_checkpoint_is_whole(happened):
    """train.py was killed when it had written its second one, but for the name."""
    assert json.loads((happened / "killed.json").read_text())["train.py"]["epoch"] == 0


@pytest.mark.parametrize("name", dying.LOST)
def test_when_one_process_is_killed_the_other_says_so(happened, name):
    run = json.loads((happened / "lost.json").read_text())[name]
    assert run["codes"] == [2, -signal.SIGKILL], run["said"]
    said = [line for line in run["said"].splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "another process of this run has ended" in said[0] and "goes on" in said[0], run["said"]
    assert "Traceback" not in run["said"] and run["seconds"] < 30


@pytest.mark.parametrize("name", dying.LOST)
def test_two_processes_started_again_write_what_one_does(happened, name):
    run = json.loads((happened / "lost.json").read_text())[name]
    assert run["again"] == [0, 0] and run["different"] == [], run["said_again"]
    if name == "unclip.py":
        decoder = happened / "logs/decoder"
        assert (decoder / "table9.csv").exists() and "PixCorr" in run["said_again"]
        assert (decoder / "state/step_00000009/random_states_1.pkl").exists()
    else:
        made = {"recon.py": ["recons", "blurryrecons", "predcaptions", "clipvoxels", "backbones", "prior_out"],
                "refine.py": ["enhancedrecons"]}[name]
        assert {f"evals/a/a_all_{kind}.pt" for kind in made} <= set(run["written"])
