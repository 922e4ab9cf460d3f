"""claims.py: its flags are flags, its rule says what it says, and an experiment is run once.

    python -m pytest tests/test_claims.py
"""

import json
import math
from dataclasses import replace

import pytest

import claims
import recon
import refine
import toy
import train
from claims import ARMS, CLAIMS, FAILS, HOLDS, UNKNOWN, Claim, Expect
from model import UserError


@pytest.mark.parametrize("name", ARMS)
def test_flags_parse(name):
    arm = ARMS[name]
    for sizes in (claims.FULL, claims.SMOKE):
        flags = claims.flags_of(name, sizes)
        if arm.train is not None:
            args = train.parse_args(flags["train"].split() + (["--multisubject_ckpt=x"] if arm.start else []))
            args.data_path = "x"
            train.check_args(args)
            assert args.multi_subject == (arm.draw is None)  # what is pretrained for others, and nothing else
            assert args.ckpt_interval <= args.num_epochs or sizes is claims.SMOKE
        if arm.draw is not None:
            recon.parse(flags["recon"].split())
        if arm.refine is not None:
            refine.parse(flags["refine"].split())
    assert not arm.start or arm.start in ARMS
    assert arm.train is not None or arm.start and ARMS[arm.start].train is not None


def test_entries_are_whole():
    assert [claim.letter for claim in CLAIMS.values()] == list("abcdefghijkl")
    used = set()
    for claim in CLAIMS.values():
        assert set(claim.arms.values()) <= set(ARMS) and claim.expects and set(claim.metrics) <= set(claims.METRICS)
        for expect in claim.expects:
            labels = [label for side in (expect.a, expect.b) for label in ([side] if isinstance(side, str) else side)]
            assert set(labels) <= set(claim.arms) and expect.metric in claim.metrics
        used |= set(claim.arms.values())
    assert used | {ARMS[arm].start for arm in ARMS} - {""} == set(ARMS)  # nothing is trained for nobody
    assert all(ARMS[claim].draw is not None for claim in used)


def test_what_an_arm_starts_from_is_part_of_it():
    flags = claims.flags_of("ddim_5", claims.FULL)
    assert set(flags) == {"pretrained: train", "tuned_1s: train", "recon"} and "--prior_steps=5" in flags["recon"]
    assert claims.needed(["finetune"]) == ["pretrained", "tuned_1s", "tuned_ridge", "tuned_lora"]
    assert claims.generations(claims.needed(["captions"])) == [
        ["pretrained"], ["tuned_1s"], ["refined_captions", "refined_empty"]]


@pytest.mark.parametrize("differences, within, expected", [
    ([.10, .12, .11], None, HOLDS),  # .11 ± .025
    ([-.10, -.12, -.11], None, FAILS),
    ([.10, -.02, .05], None, UNKNOWN),  # .043 ± .15: three seeds, all but one above 0
    ([.010, .012, .011], .03, HOLDS),
    ([.10, .12, .11], .03, FAILS),
    ([-.10, -.12, -.11], .03, FAILS),
    ([.02, .03, .04], .03, UNKNOWN),
    ([.5], None, UNKNOWN), ([.0], .03, UNKNOWN),  # one seed says nothing
])  # fmt: skip
def test_verdicts(differences, within, expected):
    assert claims.verdict(differences, within) == expected


def test_intervals_are_students():
    mean, half = claims.interval([1., 2., 3.])
    assert mean == 2 and half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert claims.interval([5.]) == (5, math.inf)


def made_up(**scores) -> dict:
    claim = Claim("x", "says", "none", {"A": "scratch_1s", "B": "tuned_1s"}, (Expect("m", "A", "B"),), "why", ("m",))
    return claims.check(claim, {label: [{"m": x} for x in values] for label, values in scores.items()})


def test_a_claim_pairs_arms_by_seed(monkeypatch):
    monkeypatch.setitem(claims.METRICS, "m", "metric")
    found = made_up(A=[.3, .6, .9], B=[.2, .51, .79])  # the seeds differ by far more than the arms, always A's way
    assert found["verdict"] == HOLDS and found["compared"][0]["differences"] == pytest.approx([.1, .09, .11])
    claim = replace(CLAIMS["linear"], arms={"A": "scratch_1s", "B": "tuned_1s"}, metrics=("m",))
    other = made_up(A=[.2, .51, .79], B=[.3, .6, .9])
    assert other["verdict"] == FAILS and claims.digest(other) != claims.digest(found)
    printed = " ".join(claims.claim_text("linear", claim, other).split())
    assert "| A | 0.500 ± 0.733 |" in printed and "A - B: -0.100 ± 0.025 (claim: > 0): does not hold here" in printed
    assert "**does not hold here**. Likely why: " + claim.if_not in printed and claim.paper in printed
    gap = (Expect("m", ("A", "B"), ("B", "A")),)  # the gap A - B is larger than the gap B - A
    found = claims.check(replace(claim, expects=gap), {"A": [{"m": .3}, {"m": .4}], "B": [{"m": .1}, {"m": .2}]})
    assert found["compared"][0]["differences"] == pytest.approx([.4, .4])


def test_verdicts_of_a_claims_comparisons():
    assert claims.overall([HOLDS, HOLDS]) == HOLDS
    assert claims.overall([HOLDS, UNKNOWN]) == UNKNOWN and claims.overall([UNKNOWN, FAILS, HOLDS]) == FAILS


def test_one_claim_is_run_once(tmp_path, monkeypatch, capsys):
    """Killed after a training, it goes on; done, it does nothing; with other flags, it starts anew."""
    tiny = Claim("x", "says", "none", {"all": "tuned_1s", "ridge": "tuned_ridge"},
                 (Expect(claims.IMAGE, "all", "ridge"),), "why")
    monkeypatch.setitem(CLAIMS, "tiny", tiny)
    stages, plain = [], toy.run_stage

    def run_stage(stage, flags):
        stages.append(stage.__name__)
        if len(stages) == 3:
            raise KeyboardInterrupt
        return plain(stage, flags)
    monkeypatch.setattr(toy, "run_stage", run_stage)
    flags = ["--claims", "tiny", "--smoke", "--seed", "3", "--jobs=1", f"--data_path={tmp_path / 'out'}"]
    with pytest.raises(KeyboardInterrupt):
        toy.main(flags)
    assert stages == ["train", "train", "recon"]
    results = toy.main(flags)
    one = ["train", "recon", "evaluate"]
    assert stages[3:] == [*one, *one]  # the killed arm's training finds itself done; the pretrained one is not asked
    folder = tmp_path / "out/seed3"
    assert "100%" in (folder / "train_logs/tuned_1s/log.txt").read_text()
    printed = capsys.readouterr().out
    assert "3 of 3" in printed and "minutes left" in printed and "cannot tell" in printed
    assert json.loads((tmp_path / "out/results.json").read_text()) == results
    assert (tmp_path / "out/claims.md").read_text() in printed
    entry = results["claims"]["tiny"]
    assert entry["verdict"] == UNKNOWN and results["seeds"] == [3] and len(results["hash"]) == 16
    assert len(results["arms"]["tuned_ridge"]["seconds"]) == 1 and results["arms"]["tuned_ridge"]["flags"]["train"]
    for numbers in entry["arms"].values():
        assert all(0 <= numbers[metric][0] <= 1 for metric in (claims.IMAGE, claims.BRAIN, claims.CLIP))

    before, count = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}, len(stages)
    assert toy.main(flags) == results and len(stages) == count
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    monkeypatch.setitem(ARMS, "tuned_ridge", replace(ARMS["tuned_ridge"], train=ARMS["tuned_1s"].train))
    again = toy.main(flags)["claims"]["tiny"]["arms"]
    assert stages[count:] == one and again["ridge"][claims.IMAGE] == again["all"][claims.IMAGE]


def test_unknown_claims_are_answered_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="no claim nonsense: choose --claims from sessions, linear"):
        toy.main(["--claims", "nonsense", f"--data_path={tmp_path / 'out'}"])
    assert not list(tmp_path.iterdir())
