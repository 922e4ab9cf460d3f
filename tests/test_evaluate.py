"""evaluate.py on the micro world of test_recon.py, with judges of a few lines that count how often they are loaded.

    python -m pytest tests/test_evaluate.py
"""

import collections
import csv
import json
import pickle
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from test_recon import IMAGES, SUBJECT, V, make_data, make_networks  # noqa: E402

import data  # noqa: E402
import evaluate as ev  # noqa: E402
import metrics as mt  # noqa: E402
import model as m  # noqa: E402
from frozen import load_clip  # noqa: E402
from judges import Missing  # noqa: E402

N = len(IMAGES)
CAPTIONS = [f"a {colour} ball on {ground} at {time}" for colour in ("red", "blue", "white")
            for ground in ("grass", "sand", "snow") for time in ("night", "noon")][:N]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_data(folder)
    make_networks(folder)
    return folder


class Bench:
    """Where judges would sit: stand-ins whose features are the pictures, or letter counts; .loads counts loadings."""
    def __init__(self, folder: Path, missing: tuple = ()) -> None:
        self.folder, self.missing, self.loads = folder, missing, collections.Counter()
        self.antialias = set()

    def judge(self, name: str, **functions) -> SimpleNamespace:
        self.loads[name] += 1
        if name in self.missing:
            raise Missing(f"{name}.pth is not in {self.folder}: put it there.")
        file = self.folder / f"{name}.pth"
        if not file.exists():
            file.write_text(name)
        return SimpleNamespace(description=f"stand-in for {name}", files=[file], **functions)

    def load_vision(self, name: str, cache_dir: str, device: str) -> SimpleNamespace:
        def features(images, antialias=False):
            self.antialias.add(antialias)
            return {row: images.flatten(1) for row in (("alex2", "alex5") if name == "alexnet" else (name,))}
        return self.judge(name, features=features)

    def load_text(self, name: str, cache_dir: str, device: str) -> SimpleNamespace:
        def embed(texts):
            counts = torch.tensor([[text.count(letter) for letter in "abcdefghinorstw"] for text in texts]).float()
            return F.normalize(counts, dim=1)
        return self.judge(f"text {name}", embed=embed)

    def load_gnet(self, cache_dir: str, subject: int, device: str) -> SimpleNamespace:
        return self.judge(f"gnet {subject}", predict=lambda images: images.flatten(1)[:, :V])


@pytest.fixture
def bench(world, tmp_path, monkeypatch):
    bench = Bench(tmp_path)
    for place, name in ((ev.judges, "load_vision"), (ev.judges, "load_text"), (ev, "load_gnet")):
        monkeypatch.setattr(place, name, lambda *a, name=name: getattr(bench, name)(*a))
    monkeypatch.setattr(ev.nltk.data, "path", [])
    for pixels in (mt.pixcorr, mt.ssim):
        monkeypatch.setattr(pixels, "__defaults__", (32, False))  # 425 pixels would take most of the tests' time
    return bench


def save(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def write_evals(world, folder, model="micro", count=None, **change):
    """Perfect reconstructions: what was seen, its tokens and captions; returns the arguments of main."""
    seen, clip = data.Images(world)[IMAGES], load_clip(world, "cpu")
    arrays = {"recons": seen, "clipvoxels": clip.tokens(seen).half(), "blurryrecons": 1 - seen,
              "enhancedrecons": seen.sqrt(), "predcaptions": np.array(CAPTIONS)} | change
    for name, array in arrays.items():
        if array is not None:
            save(folder / model / f"{model}_all_{name}.pt", array[:count])
    for name in ("captions", "git_generated_captions"):
        save(folder / f"all_{name}.pt", np.array(CAPTIONS))
    return ["--data_path", str(world), "--evals", str(folder), "--tables", str(folder / "tables"), "--model_name",
            model, "--subj", str(SUBJECT), "--no-report"]


def record(folder, model="micro") -> dict:
    return json.loads((folder / model / f"{model}_metrics.json").read_text())


def test_perfect_reconstructions_have_perfect_rows(world, bench, tmp_path, capsys):
    found = ev.main(write_evals(world, tmp_path))
    ones = ["retrieval/image", "retrieval/brain", *(f"recons/{name}" for name in mt.PICTURES),
            *(f"captions/{name}{suffix}" for name in mt.CAPTIONS if name != "meteor" for suffix in mt.PAIRS)]
    for key in ones:
        assert found[key] == pytest.approx(0 if key in ("recons/efficientnet", "recons/swav") else 1, abs=1e-6), key
    # METEOR of seven equal words in one run is 1 - .5 / 7^3; relative to the same of GIT's it is 1.
    assert found["captions/meteor"] == pytest.approx(1 - .5 / 7**3)
    assert found["captions/meteor_relative"] == pytest.approx(1)
    assert found["blurryrecons/pixcorr"] == pytest.approx(-1) and found["blurryrecons/ssim"] < .5
    assert found["blurryrecons/alex2"] == 0 and found["blurryrecons/swav"] == pytest.approx(2)
    blend = .75 * data.Images(world)[IMAGES].sqrt() + .25 * (1 - data.Images(world)[IMAGES])
    expected = mt.pixcorr(data.Images(world)[IMAGES], blend).mean().item()
    assert found["enhancedrecons/pixcorr"] == pytest.approx(expected) and expected < .99
    assert set(found) == {key for key in mt.ROWS if not key.endswith(("_V3", "_V4", "_higher_vis"))}
    out = capsys.readouterr().out
    assert "9 rows missing (the lines above say which file brings them): Brain corr. V3, Brain corr. V4, " in out
    assert "enhancedrecons (0.75 refined, 0.25 blurry)" in out and "stand-in for gnet 2" in out


def test_brain_correlation_is_of_averaged_betas(world, bench, tmp_path):
    found = ev.main(write_evals(world, tmp_path))
    trials = data.load_trials(world, SUBJECT, "new_test")
    with h5py.File(data.h5_path(world, "betas", SUBJECT)) as file:
        betas = np.array([file["betas"][:][trials.beta[trials.image == image]].mean(0) for image in IMAGES])
    seen = data.Images(world)[IMAGES].flatten(1)[:, :V].numpy()
    masks = data.load_region_masks(world, SUBJECT)
    for region in ("nsd_general", "V1"):
        rows = [np.corrcoef(b[masks[region]], x[masks[region]])[0, 1] for b, x in zip(betas, seen, strict=True)]
        assert found[f"recons/brain_{region}"] == pytest.approx(np.mean(rows), abs=1e-5)


def test_files(world, bench, tmp_path):
    arguments = write_evals(world, tmp_path)
    found = ev.main(arguments)
    written = record(tmp_path)
    assert (written["model"], written["subject"], written["images"]) == ("micro", SUBJECT, N)
    assert written["command"].startswith("python evaluate.py --data_path") and written["versions"]["torch"]
    assert {row["key"]: row["value"] for row in written["rows"]} == found
    scores = torch.load(tmp_path / "micro" / "micro_scores.pt", weights_only=True)
    assert scores.keys() == found.keys()
    for row in written["rows"]:
        values = scores[row["key"]]
        assert values.shape == (N,) and values.mean().item() == pytest.approx(row["value"], abs=1e-6)
        assert row["low"] - 1e-6 <= row["value"] <= row["high"] + 1e-6
        assert f"{row['pictures']}/{row['metric']}" == row["key"]
    rows = {row["key"]: row for row in written["rows"]}
    assert rows["recons/swav"]["better"] == "lower" and rows["recons/swav"]["group"] == "features"
    assert rows["captions/meteor"]["judge"] == "without WordNet synonyms"
    assert "one pool of all 13" in rows["retrieval/brain"]["judge"]
    assert rows["enhancedrecons/ssim"]["paper_40"] == .430 and rows["enhancedrecons/ssim"]["paper_1"] == .433
    assert written["missing"] == [{
        "titles": ["Brain corr. V3", "Brain corr. V4", "Brain corr. higher vis."],
        "rows": [f"{name}/brain_{region}" for name in ("recons", "enhancedrecons", "blurryrecons")
                 for region in ("V3", "V4", "higher_vis")],
        "reason": f"{data.h5_path(world, 'masks')} has no such region: put the release's into --data_path."}]
    table = list(csv.DictReader(open(tmp_path / "tables" / "micro.csv")))
    assert [row["metric"] for row in table] == [row["title"] for row in written["rows"]]
    pixcorr = next(row for row in table if (row["pictures"], row["metric"]) == ("recons", "PixCorr"))
    assert pixcorr["paper 40 sessions (another dataset)"] == "0.278" and pixcorr["yours"] == "1.0"
    assert pixcorr["difference to 40 sessions (another dataset)"] == ""
    assert pixcorr["remark"] == "mean of subjects 1, 2, 5, 7"


def test_beside_the_paper_on_its_own_dataset(world, bench, tmp_path, monkeypatch, capsys):
    arguments = write_evals(world, tmp_path)
    monkeypatch.setattr(ev, "NSD_IMAGES", (40, 32))  # as if the micro world's image file were NSD's
    ev.main(arguments)
    table = list(csv.DictReader(open(tmp_path / "tables" / "micro.csv")))
    row = next(row for row in table if (row["pictures"], row["metric"]) == ("blurryrecons", "PixCorr"))
    assert float(row["difference to 40 sessions (subject 2)"]) == pytest.approx(-1 - .399)
    out = capsys.readouterr().out
    assert "paper, subject 2" in out and "0.399* -1.399" in out
    for name in ("recons", "enhancedrecons", "blurryrecons", "clipvoxels", "predcaptions"):
        array = ev.load_array(tmp_path / "micro" / f"micro_all_{name}.pt", "")
        save(tmp_path / "micro" / f"micro_all_{name}.pt", array[:6])
    ev.main([*arguments, "--num_images", "6"])  # six images are not the paper's thousand
    assert "paper, all 13 images" in capsys.readouterr().out


def test_second_call_loads_no_network(world, bench, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    arguments = [*write_evals(world, cache / "out"), "--cache_dir", str(cache)]  # the output is inside of it
    (cache / "clip").symlink_to(world / "clip")
    first = ev.main(arguments)
    assert set(bench.loads.values()) == {1} and len(bench.loads) == 5 + 3 + 1
    for name in ("pixcorr", "ssim", "two_way_identification", "correlation_distance", "retrieval"):
        monkeypatch.setattr(mt, name, lambda *a, **k: pytest.fail("computed again"))
        getattr(mt, name).__name__ = name
    monkeypatch.setattr(ev, "load_clip", lambda *a: pytest.fail("loaded again"))
    assert ev.main(arguments) == first and set(bench.loads.values()) == {1}


def test_kept_features_follow_pictures_networks_and_antialias(world, bench, tmp_path):
    arguments = write_evals(world, tmp_path)
    first = ev.main(arguments)
    seen = data.Images(world)[IMAGES]
    save(tmp_path / "micro" / "micro_all_recons.pt", seen.roll(1, 0))
    second = ev.main(arguments)
    assert second["recons/alex2"] < .9 < first["recons/alex2"] and second["recons/pixcorr"] < .2
    assert second["blurryrecons/alex2"] == first["blurryrecons/alex2"]
    assert len(list((tmp_path / "features/micro/recons").glob("alexnet-*.pt"))) == 1  # the old one is gone
    (tmp_path / "alexnet.pth").write_text("another network")
    (world / "a_new_file").write_text("")  # something changed in --cache_dir
    before = bench.loads.copy()
    ev.main(arguments)
    assert bench.loads["alexnet"] == before["alexnet"] + 1
    assert len(list((tmp_path / "features/seen").glob("alexnet-*.pt"))) == 2
    ev.main([*arguments, "--antialias"])
    assert bench.antialias == {False, True} and record(tmp_path)["antialias"]
    (world / "a_new_file").unlink()
    for file in (tmp_path / "features").rglob("*.pt"):
        file.write_bytes(file.read_bytes()[:100])  # cut short by a full disk
    assert ev.main(arguments) == second


def test_missing_networks_leave_out_their_rows(world, bench, tmp_path, capsys):
    bench.missing = ("alexnet", "text clip_b", "gnet 2")
    found = ev.main(write_evals(world, tmp_path, enhancedrecons=None, predcaptions=None))
    written = record(tmp_path)
    lost = {row: part["reason"] for part in written["missing"] for row in part["rows"]}
    assert lost.keys() == mt.ROWS.keys() - found.keys()
    assert "alexnet.pth is not in" in lost["recons/alex2"] and "alexnet.pth is not in" in lost["blurryrecons/alex5"]
    assert lost["enhancedrecons/ssim"].endswith("refine.py makes it.") and "gnet" in lost["recons/brain_V1"]
    assert lost["captions/meteor_git"].endswith("recon.py --captions makes it.")
    assert "clip_b" in lost["captions/clip_b_ground"] and found["captions/sentence_ground"] == pytest.approx(1)
    assert sum(len(part["rows"]) for part in written["missing"]) == len(lost)  # none is named twice
    out = capsys.readouterr().out
    assert "left out AlexNet(2), AlexNet(5): alexnet.pth is not in" in out and f"{len(lost)} rows missing (" in out
    bench.missing = ()  # the files were brought
    (world / "brought").write_text("")
    assert {"recons/alex2", "recons/brain_V1"} <= ev.main(write_evals(world, tmp_path)).keys()
    (world / "brought").unlink()
    bench.missing = ("alexnet",)  # and alexnet was taken away: what was kept of it is not passed off as there
    assert "recons/alex2" not in ev.main(write_evals(world, tmp_path))


def test_no_reference_captions(world, bench, tmp_path, capsys):
    arguments = write_evals(world, tmp_path)
    (tmp_path / "all_captions.pt").unlink()
    save(tmp_path / "all_git_generated_captions.pt", CAPTIONS[:4])
    found = ev.main(arguments)
    assert not any(key.startswith("captions/") for key in found)
    out = capsys.readouterr().out
    assert "all_captions.pt does not exist: put the release's evals" in out and "this test set has 13" in out


@pytest.mark.parametrize("write", [
    lambda texts: texts,                                       # a list of str
    lambda texts: np.array(texts),                             # numpy strings, as the original and recon.py write
    lambda texts: np.array(texts, dtype=object),
    lambda texts: list(np.array(texts)),                       # a list of numpy's own str
])  # fmt: skip
def test_captions_in_every_format_of_the_original(write, world, tmp_path):
    path = tmp_path / "all_captions.pt"
    torch.save(write(CAPTIONS), path)
    args = SimpleNamespace(evals=tmp_path, data_path=world, model_name="micro")
    texts = ev.read_captions(args, "captions", N, 5)
    assert texts == CAPTIONS[:5] and all(type(text) is str for text in texts)


def test_captions_of_numpy_1(world, tmp_path):
    """Files of the release were written by numpy 1, whose modules have other names."""
    path = tmp_path / "all_captions.pt"
    old = SimpleNamespace(__name__="old", Pickler=OldPickler, dumps=pickle.dumps, dump=pickle.dump)
    torch.save(np.array(CAPTIONS), path, pickle_module=old)
    assert b"numpy.core.multiarray" in path.read_bytes() and b"numpy._core" not in path.read_bytes()
    args = SimpleNamespace(evals=tmp_path, data_path=world, model_name="micro")
    assert ev.read_captions(args, "captions", N, N) == CAPTIONS


class OldPickler(pickle._Pickler):
    """Pickles numpy's functions under the names that they had in numpy 1."""
    def save_global(self, obj, name=None):
        if getattr(obj, "__module__", "").startswith("numpy._core"):
            self.write(b"c" + obj.__module__.replace("numpy._core", "numpy.core").encode() + b"\n"
                       + obj.__name__.encode() + b"\n")
            return self.memoize(obj)
        return super().save_global(obj, name)

    dispatch = pickle._Pickler.dispatch | {type(np.array([]).__reduce__()[0]): save_global}


def test_foreign_code_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))
    torch.save(Bomb(), tmp_path / "bomb.pt")
    with pytest.raises(m.UserError, match="bomb.pt cannot be read .UnpicklingError.: get it again."):
        ev.load_array(tmp_path / "bomb.pt", "get it again.")
    assert not (tmp_path / "ran").exists()


def test_half_precision_files(world, bench, tmp_path):
    seen = data.Images(world)[IMAGES]
    found = ev.main(write_evals(world, tmp_path, recons=seen.half(), blurryrecons=(1 - seen).half()))
    assert found["recons/pixcorr"] == pytest.approx(1, abs=1e-4)


def test_pictures_of_other_sizes_are_brought_to_the_reconstructions(world, bench, tmp_path):
    """As the original does: the images seen, 224 pixels, to the 256 of the reconstructions, before anything else."""
    seen = data.Images(world)[IMAGES]
    found = ev.main(write_evals(world, tmp_path, recons=data.resized(seen, 48), enhancedrecons=data.resized(seen, 96)))
    assert found["recons/pixcorr"] == pytest.approx(1) and found["recons/alex2"] == 1


def test_rows_are_compared_in_the_order_of_the_image_numbers(world, bench, tmp_path):
    seen = data.Images(world)[IMAGES]
    found = ev.main(write_evals(world, tmp_path, recons=seen.roll(1, 0), blurryrecons=None))
    assert found["recons/pixcorr"] < .2 and found["retrieval/image"] == 1 and "blurryrecons/ssim" not in found
    assert found["enhancedrecons/pixcorr"] == pytest.approx(mt.pixcorr(seen, seen.sqrt()).mean().item())  # unblended


def test_fewer_images(world, bench, tmp_path):
    arguments = write_evals(world, tmp_path, count=5)
    with pytest.raises(m.UserError, match="has 5 rows for 13 test images.*--num_images"):
        ev.main(arguments)
    assert not (tmp_path / "micro" / "micro_metrics.json").exists()
    found = ev.main([*arguments, "--num_images", "5"])
    assert found["recons/pixcorr"] == pytest.approx(1) and found["captions/rouge_1"] == 1


@pytest.mark.parametrize("zipped", [False, True])
def test_wordnet_is_read_from_the_cache_folder(zipped, bench, tmp_path):
    folder = tmp_path / "nltk_data" / "corpora" / "wordnet"
    assert ev.load_wordnet(str(tmp_path)) == (mt.NO_WORDNET, "without WordNet synonyms")
    folder.mkdir(parents=True)
    for name in ev.WordNetCorpusReader._FILES:
        (folder / name).write_text("")
    (folder / "lexnames").write_text("00\tadj.all\t3\n")
    (folder / "data.noun").write_text("00000000 00 n 02 dog 0 hound 0 000 | a pet\n")
    (folder / "index.noun").write_text("dog n 1 0 1 0 00000000\nhound n 1 0 1 0 00000000\n")
    if zipped:  # as nltk.download("wordnet") leaves it
        shutil.make_archive(str(folder), "zip", folder.parent, "wordnet")
        shutil.rmtree(folder)
    wordnet, remark = ev.load_wordnet(str(tmp_path))
    assert remark == "" and mt.meteor(["a hound"], ["a dog"], wordnet).item() == pytest.approx(1 - .5 / 2**3)


def test_compare(world, bench, tmp_path, capsys):
    seen = data.Images(world)[IMAGES]
    noise = torch.rand(seen.shape, generator=torch.Generator().manual_seed(0))
    ev.main(write_evals(world, tmp_path))
    ev.main(write_evals(world, tmp_path, model="worse", recons=.7 * seen + .3 * noise))
    capsys.readouterr()
    flags = ["--evals", str(tmp_path), "--compare", "micro", "worse"]
    found = ev.main(flags)
    scores = [torch.load(tmp_path / name / f"{name}_scores.pt", weights_only=True) for name in ("micro", "worse")]
    difference, (low, high), p = mt.paired(*(x["recons/pixcorr"] for x in scores), seed=42)
    assert found["recons/pixcorr"] == difference > 0 and found["blurryrecons/ssim"] == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("recons: PixCorr"))
    assert f"{difference:+.3f}" in line and f"[{low:+.3f}, {high:+.3f}]" in line and f"{p:.4f}" in line and p < .01
    with pytest.raises(m.UserError, match="nobody_scores.pt does not exist: run evaluate.py --model_name nobody"):
        ev.main([*flags[:-1], "nobody"])
    record = tmp_path / "worse" / "worse_metrics.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"image_rows": "others"}))  # as many, not the same
    with pytest.raises(m.UserError, match="different images"):
        ev.main(flags)
    record.write_text("{}")
    save(tmp_path / "worse" / "worse_scores.pt", {"recons/ssim": torch.ones(5)})
    with pytest.raises(m.UserError, match="different images"):
        ev.main(flags)


def test_report_gets_all_it_needs(world, bench, tmp_path, monkeypatch, capsys):
    calls = []
    report = ModuleType("report")
    report.write_report = lambda *a, **k: calls.append((a, k)) or Path("report.html")
    monkeypatch.setitem(sys.modules, "report", report)
    ev.main(write_evals(world, tmp_path)[:-1])
    (model, evals, tables, data_path, cache_dir, subj, new_test, logs), more = calls[0]
    assert (model, evals, tables) == ("micro", tmp_path, tmp_path / "tables")
    assert (data_path, cache_dir, subj, new_test, logs) == (world, world, SUBJECT, True, Path("train_logs"))
    assert torch.allclose(more["clip_images"], load_clip(world, "cpu").tokens(data.Images(world)[IMAGES]))
    assert "wrote report.html" in capsys.readouterr().out
    own = tmp_path / "micro" / "micro_all_enhancedrecons.pt"  # the original's command names it: all is as without
    ev.main([*write_evals(world, tmp_path)[:-1], "--all_recons_path", str(own)])
    assert len(calls) == 2 and "wrote report.html" in capsys.readouterr().out
    others = tmp_path / "enhancedrecons_run" / "others_all_recons.pt"  # the folder's name says nothing
    save(others, data.Images(world)[IMAGES].roll(1, 0))
    found = ev.main([*write_evals(world, tmp_path)[:-1], "--all_recons_path", str(others)])
    assert found["recons/pixcorr"] < .2 and len(calls) == 2 and "wrote no report" in capsys.readouterr().out


def test_published_refined_pictures_alone(world, bench, tmp_path):
    """The original's command: its refined pictures are of 512 pixels, judged at 256, and no others are needed."""
    arguments, big = write_evals(world, tmp_path), tmp_path / "released_all_enhancedrecons.pt"
    seen = data.Images(world)[IMAGES]
    save(big, data.resized(seen.sqrt(), 512))
    (tmp_path / "micro" / "micro_all_recons.pt").unlink()
    found = ev.main([*arguments, "--all_recons_path", str(big), "--blend", "1"])
    expected = mt.pixcorr(data.resized(seen, 256), data.resized(data.resized(seen.sqrt(), 512), 256)).mean().item()
    assert found["enhancedrecons/pixcorr"] == pytest.approx(expected) and "recons/pixcorr" not in found


@pytest.mark.parametrize("change, sentence", [
    ({"recons": None}, "micro_all_recons.pt does not exist: run recon.py first"),
    ({"recons": torch.full((N, 3, 8, 8), torch.nan)}, "micro_all_recons.pt holds NaN"),
    ({"recons": torch.ones(N, 8)}, "micro_all_recons.pt holds no recons"),
    ({"enhancedrecons": torch.ones(2, 3, 8, 8)}, "has 2 rows for 13 test images: run refine.py again"),
    ({"clipvoxels": torch.ones(N, 4, 7)}, r"tokens are \(4, 7\), CLIP's \(4, 24\).*--cache_dir"),
    ({"predcaptions": np.array(CAPTIONS[:3])}, "has 3 captions for 13 test images: run recon.py again"),
])  # fmt: skip
def test_mistakes(world, bench, tmp_path, change, sentence):
    with pytest.raises(m.UserError, match=sentence):
        ev.main(write_evals(world, tmp_path, **change))
    assert not (tmp_path / "micro" / "micro_metrics.json").exists()


@pytest.mark.parametrize("flags, sentence", [
    (["--blend", "1.5"], "--blend must be between 0 and 1, not 1.5"),
    (["--batch_size", "0"], "--batch_size must be at least 1, not 0"),
    (["--seed", "-1"], "--seed must be at least 0, not -1"),
    (["--num_images", "1"], "at least 2: raise --num_images"),
])  # fmt: skip
def test_wrong_flags(world, bench, tmp_path, flags, sentence):
    with pytest.raises(m.UserError, match=sentence):
        ev.main([*write_evals(world, tmp_path), *flags])


def test_other_brains_encoding_model(world, bench, tmp_path, monkeypatch):
    judge = bench.judge("gnet 2", predict=lambda images: images.flatten(1)[:, : V + 1])
    monkeypatch.setattr(ev, "load_gnet", lambda *a: judge)
    with pytest.raises(m.UserError, match="predicts 10 voxels, subject 2 has 9: name the --cache_dir"):
        ev.main(write_evals(world, tmp_path))


def test_network_that_says_nan(world, bench, tmp_path, monkeypatch):
    judge = bench.judge("swav", features=lambda images, antialias: {"swav": images.flatten(1) / 0})
    load = ev.judges.load_vision
    monkeypatch.setattr(ev.judges, "load_vision", lambda name, *a: judge if name == "swav" else load(name, *a))
    with pytest.raises(m.UserError, match="network swav says NaN.*--cache_dir"):
        ev.main(write_evals(world, tmp_path))


def test_damaged_file(world, bench, tmp_path):
    arguments = write_evals(world, tmp_path)
    path = tmp_path / "micro" / "micro_all_recons.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(m.UserError, match="cannot be read"):
        ev.main(arguments)
