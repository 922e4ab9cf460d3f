"""report.py on the micro world of test_recon.py, with files as recon.py, refine.py and evaluate.py write them.

    python -m pytest tests/test_report.py
"""

import base64
import io
import json
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from test_recon import IMAGES, SIDE, SUBJECT, D, S, make_data, make_networks  # noqa: E402

import data  # noqa: E402
import model as m  # noqa: E402
import report  # noqa: E402

N, CAPTION = len(IMAGES), "<b>a cat</b> & dog"
BEST, WORST = 7, 2  # rows of these images


class Page(HTMLParser):
    """What a browser would make of it: .tags [(name, attributes)], .text; fails if a tag is left open."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br", "path", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += "" if self.open and self.open[-1] in ("style", "script") else text

    def all(self, tag: str, kind: str | None = None) -> list[dict]:
        return [a for name, a in self.tags if name == tag and (kind is None or kind in (a.get("class") or "").split())]


def pixels(src: str) -> torch.Tensor:
    """The picture (3, H, W) inside a data: address."""
    assert src.startswith("data:image/jpeg;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(src.split(",")[1])))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_data(folder)
    make_networks(folder)
    return folder


def row(key: str, value: float, title: str, group: str, **more) -> dict:
    return dict(key=key, pictures=key.split("/")[0], metric=key.split("/")[1], title=title, group=group, value=value,
                low=value - 0.0625, high=value + 0.0625, better="higher", judge="", paper_40=None, paper_1=None) | more


ROWS = [
    row("enhancedrecons/clip_l", 0.8125, "CLIP ViT-L/14", "features", judge="stand-in, 1/8 as wide", paper_40=0.936),
    row("recons/pixcorr", 0.4375, "PixCorr", "pixels"),
    row("recons/brain_V1", 0.25, "Brain corr. V1", "brain"),
    row("recons/brain_higher_vis", 0.125, "Brain corr. higher vis.", "brain"),
    row("retrieval/image", 0.625, "Image retrieval", "retrieval", paper_40=0.9987, paper_1=0.7763,
        paper_remark="printed there as brain retrieval"),
]


@pytest.fixture
def stage(world, tmp_path, monkeypatch):
    """Writes the inputs; .run() -> the Page. UMAP, which compiles for ten seconds, is replaced; .maps: its inputs."""
    evals, g = tmp_path / "evals", torch.Generator().manual_seed(0)
    folder = evals / "micro"
    folder.mkdir(parents=True)
    seen = data.Images(world)[IMAGES]
    tokens = report.image_tokens(world, seen, SIDE)
    noise = torch.randn(tokens.shape, generator=g)
    arrays = {"recons": seen * 0.5, "enhancedrecons": seen * 0.8, "blurryrecons": 1 - seen,
              "clipvoxels": (tokens + 0.1 * noise).half(), "backbones": (tokens + 9).half(), "prior_out": tokens.half(),
              "predcaptions": np.array([f"{CAPTION} {i}" for i in range(N)])}
    for name, array in arrays.items():
        torch.save(array, folder / f"micro_all_{name}.pt")
    ranks = torch.linspace(0.1, 0.9, N)
    ranks[[BEST, WORST]] = torch.tensor([0.99, 0.01])
    torch.save({"enhancedrecons/clip_l": ranks, "recons/pixcorr": 1 - ranks}, folder / "micro_scores.pt")
    missing = [{"titles": ["AlexNet(2)", "AlexNet(5)"], "reason": "alexnet.pth <brings> the network."}]
    metrics = {"model": "micro", "subject": SUBJECT, "images": N, "command": "python evaluate.py --model_name micro",
               "versions": {"torch": "9.9.9"}, "commit": "abc1234", "blend": 0.75,
               "paper_unlike": "another dataset", "rows": ROWS, "missing": missing}
    (folder / "micro_metrics.json").write_text(json.dumps(metrics))
    maps = []

    def umap_points(between):
        maps.append(between)
        return np.random.default_rng(0).random((len(between), 2))

    monkeypatch.setattr(report, "umap_points", umap_points)

    class Stage:
        flags = ["--model_name", "micro", "--data_path", str(world), "--evals", str(evals), "--subj", str(SUBJECT),
                 "--tables", str(tmp_path / "tables"), "--train_logs", str(tmp_path / "logs")]  # fmt: skip

        def run(self, *flags):
            path = report.main([*self.flags, *flags])
            assert path == folder / "report.html" and [p.name for p in folder.glob("*.tmp")] == []
            return Page(path.read_text(encoding="utf-8"))

    stage = Stage()
    stage.folder, stage.seen, stage.arrays, stage.maps, stage.logs = folder, seen, arrays, maps, tmp_path / "logs"
    stage.tables, stage.tokens = tmp_path / "tables", tokens
    return stage


def test_page(stage):
    stage.tables.mkdir()
    (stage.tables / "micro.csv").write_text("a,b\n1,2\n")
    page = stage.run()
    assert [a["id"] for a in page.all("section")] == [
        "numbers", "pictures", "retrieval", "embeddings", "training", "regions", "reproduce"]
    # Nothing is asked of the network: every address is inside the file or in the page, and the policy forbids others.
    addresses = [a[key] for _, a in page.tags for key in ("src", "href") if key in a]
    assert addresses and all(a.startswith(("data:", "#")) for a in addresses)
    assert "default-src 'none'" in page.all("meta")[2]["content"] and "url(" not in report.STYLE + report.SCRIPT
    assert all(a.get("alt") for a in page.all("img"))
    assert (stage.folder / "report.html").stat().st_size < 20 * 2**20
    # The table: values, intervals, the paper's columns, who judged, what is missing, all of it as a file.
    for text in (".812", ".750 to .875", ".936", ".438", ".999", ".776", "AlexNet(2); AlexNet(5)",
                 "printed there as brain retrieval", "0.75 of it and 0.25 of the blurry one", "is not the paper's",
                 "alexnet.pth <brings> the network.", "another dataset", "abc1234", "9.9.9",
                 "python evaluate.py --model_name micro"):
        assert text in page.text, text
    assert len(page.all("span", "mark")) == 1 and len(page.all("tr")) == 1 + 3 + len(ROWS)
    csv = next(a for a in page.all("a") if "download" in a)
    assert csv["download"] == "micro.csv" and base64.b64decode(csv["href"].split(",")[1]) == b"a,b\n1,2\n"
    # Captions are text, not tags.
    assert page.text.count(CAPTION) == 3 * (N // 3) and CAPTION not in (stage.folder / "report.html").read_text()


def test_best_and_worst(stage):
    page = stage.run()
    cells = [a["src"] for a in page.all("img") if a["alt"].split(":")[0] in ("seen", "blurry", "drawn", "refined")]
    cells = cells[-4 * 3 * (N // 3):]  # without the first pictures, above
    best, worst = cells[:4], cells[-4 * (N // 3):][:4]
    for group, i in ((best, BEST), (worst, WORST)):
        expected = [stage.seen, *(stage.arrays[kind] for kind in ("blurryrecons", "recons", "enhancedrecons"))]
        for src, pictures in zip(group, expected, strict=True):
            errors = [(pixels(src) - other).abs().mean() for other in pictures]
            assert pixels(src).shape == (3, SIDE, SIDE) and int(torch.stack(errors).argmin()) == i
    assert page.text.index("Best") < page.text.index("Middle") < page.text.index("Worst")


def test_examples_of():
    scores, ties = torch.tensor([0.5, 1, 1, 0.2, float("nan"), 0.7]), torch.tensor([0.0, 1, 2, 0, 0, 0])
    assert report.examples_of(scores, ties) == {"Best": [2, 1], "Middle": [5, 0], "Worst": [4, 3]}
    many = report.examples_of(torch.rand(100), torch.rand(100))
    assert [len(rows) for rows in many.values()] == [8, 8, 8] and len({i for rows in many.values() for i in rows}) == 24


def test_found_and_missed():
    similarity = torch.tensor([[0.9, 0.1, 0.0, 0.2],   # found by .7
                               [0.5, 0.6, 0.0, 0.0],   # found by .1
                               [0.8, 0.7, 0.3, 0.4],   # place 4
                               [0.0, 0.0, 0.9, 0.8]])  # place 2
    found, missed, places = report.found_and_missed(similarity)
    assert (found, missed, places.tolist()) == ([0, 1], [3, 2], [1, 1, 4, 2])
    assert report.spread(list(range(9)), 3) == [0, 4, 8] and report.spread([5], 4) == [5] and report.spread([], 4) == []


def test_retrieval(stage):
    """Each direction's matrix is its own: the clear case is right in both, in the cut case the right one is framed."""
    tokens = stage.arrays["clipvoxels"].clone()
    tokens[0] = tokens[1]  # brain 0 seems to have seen image 1
    torch.save(tokens, stage.folder / "micro_all_clipvoxels.pt")
    page = stage.run()
    alts = [a["alt"] for a in page.all("img")]
    query = alts.index(f"query: brain {IMAGES[0]}")
    assert alts[query + 1] == f"image {IMAGES[1]}, wrong"
    assert sum("query: brain" in alt for alt in alts) == 4 + 1 and "Missed 1 of 13" in page.text
    assert len(page.all("span", "right")) == sum("the right one" in alt for alt in alts) >= 8


def test_distances():
    a, b = torch.randn(5, S, D).half(), torch.randn(5, S, D).half()
    flat = torch.cat((a, b)).flatten(1).double()
    products = report.gram([a, b])
    torch.testing.assert_close(report.distances(products), torch.cdist(flat, flat), atol=1e-4, rtol=1e-5)
    unit = flat / flat.norm(dim=1, keepdim=True)
    torch.testing.assert_close(report.distances(products, unit_length=True), torch.cdist(unit, unit), atol=1e-5, rtol=0)


def test_umap():
    """The real one: two far clusters stay two, and a second call gives the same points."""
    pytest.importorskip("umap")
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    x[20:] += 50
    between = torch.cdist(x, x).double()
    points = report.umap_points(between)
    assert points.shape == (40, 2) and (points == report.umap_points(between)).all()
    spread = max(np.ptp(points[:20], axis=0).max(), np.ptp(points[20:], axis=0).max())
    assert np.linalg.norm(points[:20].mean(0) - points[20:].mean(0)) > spread


def test_embeddings(stage):
    page = stage.run()
    (between,) = stage.maps
    flat = torch.cat([stage.tokens, *(stage.arrays[name] for name in ("backbones", "clipvoxels", "prior_out"))])
    flat = flat.flatten(1).double()
    torch.testing.assert_close(between, torch.cdist(flat, flat), atol=2e-3, rtol=1e-4)
    points = np.random.default_rng(0).random((4 * N, 2)).reshape(4, N, 2)
    for cloud, paper in zip(points[1:], ("4.83", "3.83", "0.41"), strict=True):
        assert f"{np.linalg.norm(cloud - points[0], axis=1).mean():.2f} on the map (paper: {paper})" in page.text
    assert "0.00 in the full space" in page.text and len(page.all("path", "brains")) == 3  # the prior's are CLIP's own
    unit = stage.tokens.flatten(1).double()
    unit = unit / unit.norm(dim=1, keepdim=True)
    apart = torch.pdist(unit).mean()
    assert f"two different images are {apart:.2f} apart" in page.text


def test_little_is_there(stage):
    """Only what evaluate.py requires: fewer columns, no bars, sorted by PixCorr, and each gap says so."""
    for name in ("enhancedrecons", "blurryrecons", "predcaptions", "backbones", "prior_out"):
        (stage.folder / f"micro_all_{name}.pt").unlink()
    metrics = json.loads((stage.folder / "micro_metrics.json").read_text())
    metrics |= {"rows": ROWS[1:2], "missing": [], "paper_unlike": ""}
    (stage.folder / "micro_metrics.json").write_text(json.dumps(metrics))
    page = stage.run()
    assert "regions" not in [a["id"] for a in page.all("section")] and len(page.all("a")) == 6
    assert report.RANKED_BY["pixcorr"] in page.text and "Not computed" not in page.text and CAPTION not in page.text
    assert len(page.all("figure")) == 3 * (N // 3) + 1  # examples, and the retrieval head's cloud
    assert "has no log and no checkpoint" in page.text and "refine.py" not in page.text
    assert "another dataset" not in page.text and "is not the paper's" not in page.text


def test_without_umap(stage, monkeypatch):
    def absent(between):
        raise ImportError

    monkeypatch.setattr(report, "umap_points", absent)
    assert "pip install umap-learn" in stage.run().text


def write_checkpoint(folder: Path, **flags) -> None:
    folder.mkdir(parents=True)
    defaults = {"model_name": folder.name, "num_epochs": 150, "blurry_recon": True, "use_image_aug": False,
                "multisubject_ckpt": None, "num_sessions": 1, "num_processes": 1, "mixed_precision": "no"}
    torch.save({"model_state_dict": {}, "flags": defaults | flags, "train_losses": [3.0, 1.0, 1.25],
                "test_losses": [0.5], "lrs": [1e-3]}, folder / "last.pth")


def test_training(stage):
    """From last.pth alone; then, from the log, every split's line and last value; both models' exact commands."""
    write_checkpoint(stage.logs / "before", blurry_recon=False, num_sessions=40)
    write_checkpoint(stage.logs / "micro", multisubject_ckpt=str(stage.logs / "before"), num_epochs=7, num_processes=2,
                     mixed_precision="bf16")
    page = stage.run()
    assert "train 1.25" in page.text and "test 0.5" in page.text
    commands = page.text[page.text.index("How to make this again"):]
    first = "python train.py --model_name=before --num_sessions=40 --no-blurry_recon"
    words = commands.replace("\\\n", " ").split()
    assert words.count("launch") == words.count("--num_processes=2") == words.count("--mixed_precision=bf16") == 1
    assert set(first.split()) <= set(words) and "--no-use_image_aug" not in words and "--blurry_recon" not in words
    assert words.index("--model_name=before") < words.index("--model_name=micro") and "--num_epochs=7" in words
    assert f"--multisubject_ckpt={stage.logs / 'before'}" in words and "--num_epochs=150" not in words

    with SummaryWriter(stage.logs / "micro") as log:
        for step in (10, 20):
            log.add_scalar("test/image_retrieval", step / 100, step)
            log.add_scalar("val/image_retrieval", step / 50, step)
    page = stage.run()
    assert "image retrieval val 0.4 test 0.2" in page.text or "image retrieval test 0.2 val 0.4" in page.text
    lines = [a["points"].split() for a in page.all("polyline")]
    assert sorted(len(line) for line in lines) == [2, 2, 3]  # two of the log, and last.pth's losses of each step


def test_curves_without_a_log(tmp_path, monkeypatch):
    """Of our last.pth its own history; of the release's, a rate a step and the whole test loss an epoch."""
    ours = {"history": {"test/loss_prior": [(30., .5)], "train/loss": [(30., 9.)]}, "train_losses": [4., 2.],
            "test_losses": [.5], "lrs": [1e-3]}
    assert report.read_curves(tmp_path, "a", ours) == {"loss_prior": {"test": [(30, .5)]},
                                                       "loss": {"train": [(1, 4), (2, 2)]}}
    theirs = {"train_losses": [4.] * 6, "test_losses": [9., 8.], "lrs": [1e-3] * 6}
    curves = report.read_curves(tmp_path, "a", theirs)
    assert curves["loss"]["test"] == [(3, 9), (6, 8)] and len(curves["lr"]["train"]) == 6 and "loss_prior" not in curves
    monkeypatch.chdir(tmp_path)  # a model from scratch has no start: not even one that lies here
    torch.save({"model_state_dict": {}, "flags": {"model_name": "other"}}, tmp_path / "last.pth")
    assert len(report.training_commands({"flags": {"model_name": "a"}})) == 1


def test_thinned():
    assert report.thinned([4.0, 2.0]) == [(1, 4.0), (2, 2.0)]
    thin = report.thinned(list(map(float, range(1001))))
    assert len(thin) <= 200 and thin[0] == (6, 2.5) and thin[-1][0] == 1001


def test_curves_picture(stage):
    stage.logs.joinpath("micro").mkdir(parents=True)
    stage.logs.joinpath("micro/curves.png").write_bytes(b"a png")
    whole = stage.run().all("img", "whole")
    assert [base64.b64decode(a["src"].split(",")[1]) for a in whole] == [b"a png"]


def test_number():
    assert [report.number(x) for x in (0.5, -0.25, 1.0, 12.5, None, float("nan"), 0)] == [
        ".500", "-.250", "1.000", "12.500", "–", "–", ".000"]


def test_command_line():
    flags = {"a": 1, "b": None, "c": False, "d": True, "e": "x y", "f": 2, "g": [2, 5], "h": Path("toy")}
    words = report.command_line("s.py", flags, {"a": 1, "c": True, "d": False, "e": "", "f": 1, "g": None, "h": "toy"})
    assert words == "python s.py --no-c --d '--e=x y' --f=2 --g 2 5"
    long = report.folded(["python", *[f"--flag{i}=1234567" for i in range(20)]])
    assert max(map(len, long.splitlines())) <= 96 and long.replace(" \\\n  ", "").split() == [
        "python", *[f"--flag{i}=1234567" for i in range(20)]]


def test_captions_of_numpy_1(tmp_path):
    """numpy 2 renamed the module that such files name; a file that would run code is refused."""
    torch.save(np.array(["one", "two"]), tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            assert not name.endswith("data.pkl") or b"numpy._core.multiarray" in content or np.__version__ < "2"
            old.writestr(name, content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    for name in ("old.pt", "new.pt"):
        assert report.read_captions(tmp_path / name, 2) == ["one", "two"]

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save([Evil()], tmp_path / "evil.pt")
    with pytest.raises(m.UserError, match="evil.pt cannot be read"):
        report.read_captions(tmp_path / "evil.pt", 1)
    assert not (tmp_path / "ran").exists()


def spoil(name: str, content: object):
    def change(folder: Path):
        path = folder / f"micro_{name}"
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
    return change


@pytest.mark.parametrize("change, flags, message", [
    (spoil("metrics.json", None), [], "run evaluate.py first"),
    (spoil("metrics.json", b'{"pixcorr": 1.0}'), [], "older version"),
    (spoil("metrics.json", b'{"rows": ['), [], "metrics.json cannot be read"),
    (spoil("scores.pt", b"PK"), [], "scores.pt cannot be read"),
    (spoil("scores.pt", {"recons/pixcorr": torch.rand(N - 1)}), [], "12 rows"),
    (spoil("scores.pt", {"recons/ssim": torch.rand(N)}), [], "neither clip_l nor pixcorr"),
    (spoil("all_recons.pt", None), [], "all_recons.pt does not exist"),
    (spoil("all_recons.pt", ["a"]), [], "holds no tensor"),
    (spoil("all_blurryrecons.pt", torch.rand(3, 3, 8, 8)), [], "all_blurryrecons.pt has 3 rows"),
    (spoil("all_predcaptions.pt", np.array(["a"])), [], "all_predcaptions.pt has 1 rows"),
    (spoil("all_prior_out.pt", torch.full((N, S, D), float("nan"))), [], "all_prior_out.pt holds NaN"),
    (spoil("all_clipvoxels.pt", torch.rand(N, S, D + 1)), [], "--cache_dir"),
    (lambda folder: None, ["--no-new_test"], "is missing"),
])  # fmt: skip
def test_errors(stage, change, flags, message, capsys):
    """One sentence, exit code 2, and no page."""
    change(stage.folder)
    with pytest.raises(SystemExit) as stop:
        m.run_main(lambda: report.main([*stage.flags, *flags]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.strip().splitlines()) == 1
    assert not (stage.folder / "report.html").exists()
