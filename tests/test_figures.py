"""figures.py: figures are of the numbers that they hold, and those are the model's and the results'.

    python -m pytest tests/test_figures.py
"""

import json
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

import claims
import figures
from claims import CLAIMS, METRICS
from model import UserError

REPOSITORY = Path(__file__).parents[1]
COMMITTED = sorted((REPOSITORY / "docs" / "figures").glob("*.svg"))
AGAIN = "this figure is out of date: run `python figures.py {}`"


def ids(text: str) -> list[str]:
    return [element.get("id", "") for element in ElementTree.fromstring(text).iter()]


def texts(text: str) -> str:
    """All that can be read in it: lines are joined, for titles are wrapped."""
    return " ".join("".join(element.itertext()) for element in ElementTree.fromstring(text).iter()
                    if element.tag.endswith("}text"))


def made_up(name: str, seeds: int = 3) -> dict:
    """A claim's numbers, where each arm is .1 better than the one before."""
    scores = {label: [{metric: .2 + .1 * arm + .01 * seed for metric in METRICS} for seed in range(seeds)]
              for arm, label in enumerate(CLAIMS[name].arms)}
    return claims.check(CLAIMS[name], scores)


def write_results(path: Path, found: dict) -> Path:
    claims.write_json(path, {"seeds": [0, 1, 2], "hash": claims.digest(found), "claims": found, "arms": {}})
    return path


def assert_redrawn(path: Path, numbers: dict) -> None:
    if f"Matplotlib v{matplotlib.__version__}," not in path.read_text():
        pytest.skip(f"{path.name} was drawn by another matplotlib, which writes other bytes for the same figure")
    assert figures.svg(path.stem, numbers) == path.read_text(), AGAIN.format(path.stem)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_figures_match_their_hash_and_the_tables(path):
    about = figures.shown(path)
    assert claims.digest(about["numbers"]) == about["hash"]
    assert "<image" not in path.read_text()
    if path.stem == "model":
        return
    text = claims.claim_text(path.stem, CLAIMS[path.stem], about["numbers"])
    assert text in (REPOSITORY / "docs" / "claims.md").read_text()
    line = claims.table({path.stem: about["numbers"]}, []).splitlines()[2]
    assert line in (REPOSITORY / "README.md").read_text()
    assert_redrawn(path, about["numbers"])


def test_drawing_is_of_the_model_that_is_there():
    path = REPOSITORY / "docs" / "figures" / "model.svg"
    numbers = figures.measure()
    assert numbers == figures.shown(path)["numbers"], AGAIN.format("model")
    assert_redrawn(path, numbers)


def test_numbers_are_the_papers():
    """Weights as the original code counts them, for subject 1; shapes of the released files."""
    ours = figures.shown(REPOSITORY / "docs" / "figures" / "model.svg")["numbers"]["learning"]
    assert ours["weights"]["shared"] + ours["weights"]["ridges"][0] == 2_227_294_844
    assert ours["weights"]["ridges"][0] == 64_409_600 and ours["weights"]["prior"] == 259_865_216
    assert ours["shapes"]["0 in"] == [3, 15724] and ours["shapes"]["0 out"] == [3, 4096]
    assert ours["shapes"]["clip_voxels"] == [24, 256, 1664] and ours["shapes"]["blurry_latents"] == [24, 4, 28, 28]


def test_a_changed_digit_shows(tmp_path):
    text, found = figures.svg("linear", made_up("linear")), made_up("linear")
    path = tmp_path / "linear.svg"
    path.write_text(text.replace(".2, ", ".3, ", 1))
    about = figures.shown(path)
    assert about["numbers"] != found and claims.digest(about["numbers"]) != about["hash"]


@pytest.mark.parametrize("name", CLAIMS)
def test_a_mark_for_each_arm_and_metric(name):
    found = made_up(name)
    text = figures.svg(name, found)
    metrics = figures.CURVE_METRICS if name == "sessions" else {expect.metric for expect in CLAIMS[name].expects}
    wanted = {figures.mark(arm, metric) for arm in CLAIMS[name].arms for metric in metrics}
    assert len(wanted) == len(CLAIMS[name].arms) * len(metrics)
    assert [ids(text).count(mark) for mark in sorted(wanted)] == [1] * len(wanted)
    assert found["verdict"] in texts(text) and CLAIMS[name].says in texts(text)
    assert "95% intervals" in texts(text) and all(METRICS[metric] in texts(text) for metric in metrics)


def test_bars_are_as_long_as_their_means():
    """The second arm's mean of .31 against the first's .21, in the SVG's own units."""
    root = ElementTree.fromstring(figures.svg("linear", made_up("linear")))
    def length(arm: str) -> float:
        group = next(g for g in root.iter() if g.get("id") == figures.mark(arm, claims.IMAGE))
        numbers = [float(x) for x in next(iter(group)).get("d").replace("\n", " ").split() if x not in "MLz"]
        return max(numbers[::2]) - min(numbers[::2])
    assert length("MLP") / length("linear") == pytest.approx(.31 / .21, rel=1e-3)


def test_one_seed_has_no_interval():
    text = figures.svg("linear", made_up("linear", seeds=1))
    assert "one seed" in texts(text) and "intervals" not in texts(text)


def test_main_writes_what_the_results_hold(tmp_path, capsys):
    results = write_results(tmp_path / "results.json", {"mixing": made_up("mixing"), "linear": made_up("linear")})
    figures.main(["mixing", "linear", "--png", f"--results={results}", f"--out={tmp_path / 'out'}"])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "linear.png", "linear.svg", "mixing.png", "mixing.svg"]
    assert figures.shown(tmp_path / "out" / "mixing.svg")["numbers"] == made_up("mixing")
    assert str(tmp_path / "out" / "mixing.svg") in capsys.readouterr().out


def test_errors_name_the_command(tmp_path):
    out, path = f"--out={tmp_path / 'out'}", tmp_path / "results.json"
    with pytest.raises(UserError, match="results.json cannot be read .*toy.py --claims"):
        figures.main([f"--results={path}", out])
    path.write_text("[]")
    with pytest.raises(UserError, match="is no file of results"):
        figures.main([f"--results={path}", out])
    write_results(path, {"linear": made_up("linear")})
    with pytest.raises(UserError, match="has no claim mixing: it has linear"):
        figures.main(["mixing", f"--results={path}", out])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hash": "0" * 16}))
    with pytest.raises(UserError, match="not those that its hash was made of"):
        figures.main([f"--results={path}", out])
    path.write_text("<svg/>")
    with pytest.raises(UserError, match="is no figure with its numbers"):
        figures.shown(path)
    assert not (tmp_path / "out").exists()
