"""What README.md and docs/ say is there: names, commands, figures, headings; and the walk through one trial runs.

    python -m pytest tests/test_readme.py
"""

import argparse
import ast
import doctest
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser

import toy
import train
from claims import CLAIMS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
WALK = "## One trial, from voxel to pixel"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def pages() -> dict[Path, str]:
    return {path: path.read_text() for path in (README, *sorted((ROOT / "docs").glob("**/*.md")))}


def section(text: str, heading: str) -> str:
    """From a heading to the next of its level. Raises ValueError if there is none."""
    start = text.index(f"\n{heading}\n")
    return text[start : text.find("\n## ", start + 1)]


# ---- names

@cache
def names_in(path: Path) -> set[str]:
    """What a file defines at its top, and what is in its classes, as Class.name."""
    def of(body: list[ast.stmt], prefix: str = "") -> set[str]:
        found = set()
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found |= of(node.body, f"{node.name}.")
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                found |= {prefix + name.id for name in ast.walk(target or ast.Pass()) if isinstance(name, ast.Name)}
        return found
    return of(ast.parse(path.read_text()).body)


def missing_names(text: str) -> list[str]:
    """Those of `file.py:name`, `file.py:Class.name` and `file.name` that the repository has not."""
    named = re.findall(r"\b([\w/]+\.py):([A-Za-z_][\w.]*\w|[A-Za-z_])", text)
    modules = {path.stem for path in ROOT.glob("*.py")}
    named += [(f"{module}.py", name) for module, name in re.findall(r"`(\w+)\.(\w+)`", text)
              if module in modules and name not in ("py", "html")]
    return [f"{file}:{name}" for file, name in named
            if not (ROOT / file).is_file() or name not in names_in(ROOT / file)]


def test_a_name_that_is_not_there_is_found():
    there = "model.py:mixco, model.py:DiffusionPrior.sample, `model.WideLinear`, toy.py:SMOKE, tests/dying.py:main"
    gone = ["model.py:mixup", "model.py:DiffusionPrior.draw", "nothing.py:main", "metrics.py:fid"]
    assert missing_names(f"{there[: there.rindex(',')]}, {', '.join(gone[:3])}, `metrics.fid`.") == gone


def test_every_name_is_there():
    assert {path.name: missing for path, text in pages().items() if (missing := missing_names(text))} == {}


# ---- commands

PROGRAMS = ("python", "accelerate", "pip", "bash", "pytest")


def words_of(lines: str) -> list[list[str]]:
    """The programs that bash would start for these lines, each with its words; nothing is started."""
    stand_ins = "\n".join(f"{name}() {{ printf '%s\\x1f' {name} \"$@\"; echo; }}" for name in PROGRAMS)
    run = subprocess.run(["/bin/bash", "-euc", f"PATH=\n{stand_ins}\n{lines}"], capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stderr} in\n{lines}"
    return [line.split("\x1f")[:-1] for line in run.stdout.splitlines() if line.startswith(PROGRAMS)]


def written(text: str) -> list[list[str]]:
    """The commands of a page: of its blocks, and within its sentences."""
    blocks = [block for kind, block in FENCE.findall(text) if kind in ("", "bash", "sh")
              and re.search(rf"^({'|'.join(PROGRAMS)}) ", block, re.M)]
    spans = re.findall(r"`((?:\w+=\S+ )*(?:python|accelerate) [^`\n]*\.py[^`\n]*)`", FENCE.sub("", text))
    return words_of("\n".join([*blocks, *spans]))


def in_docstrings() -> list[list[str]]:
    """The commands that each file opens with; what follows two spaces, # or a last ... is no part of them."""
    lines = []
    for path in sorted(ROOT.glob("*.py")):
        text = re.sub(r"\\\n\s*", "", ast.get_docstring(ast.parse(path.read_text())))
        commands = re.findall(r"^    ((?:python|accelerate) .*)$", text, re.M)
        lines += [re.sub(r"( \.\.\.)?(  .*| #.*|$)", "", command, count=1) for command in commands]
    return words_of("\n".join(lines))


class Parsed(BaseException):
    """Raised in place of what a script would do with its flags."""


def parse(words: list[str], monkeypatch) -> argparse.Namespace | None:
    """Run a script until its parser has read the words. Raises SystemExit if it does not take them."""
    plain = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        raise Parsed(plain(self, args, namespace))
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", words)
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except Parsed as parsed:
            return parsed.args[0]
    raise AssertionError(f"{words[0]} reads no flags")


def check(words: list[str], monkeypatch) -> None:
    """Does a command name files that are there, and flags that they take?"""
    program, *words = ["1" if word == "N" else word for word in words]
    if program == "accelerate":
        own = launch_command_parser().parse_args(words[1:])
        assert own.config_file is None or (ROOT / own.config_file).is_file(), own.config_file
        words = [own.training_script, *own.training_script_args]
    elif words[0] == "-c":
        compile(words[1], "-c", "exec")
    if program in ("pip", "pytest") or words[0] in ("-c", "-m"):
        return
    assert (ROOT / words[0]).is_file(), words[0]
    if program != "bash" and "argparse" in (ROOT / words[0]).read_text():  # some benchmarks have no flags
        args = parse(words, monkeypatch)
        assert set(getattr(args, "claims", None) or ()) <= set(CLAIMS)


def test_a_wrong_command_is_found(monkeypatch):
    page = ('```bash\nSIZES="--hidden_dim=8\n    --n_blocks=2"\naccelerate launch train.py \\\n  $SIZES --subj=2\n```\n'
            "Or `OMP_NUM_THREADS=1 python toy.py --seed N`, or `python recon.py --steps=two`.")
    commands = written(page)
    assert commands == [["accelerate", "launch", "train.py", "--hidden_dim=8", "--n_blocks=2", "--subj=2"],
                        ["python", "toy.py", "--seed", "N"], ["python", "recon.py", "--steps=two"]]
    assert parse(["train.py", *commands[0][3:]], monkeypatch).hidden_dim == 8
    check(commands[0], monkeypatch)
    check(commands[1], monkeypatch)
    for wrong in (commands[2], ["python", "data.py", "check", "--nothing"], ["accelerate", "launch", "--nothing", "x"]):
        with pytest.raises(SystemExit):
            check(wrong, monkeypatch)
    for wrong in (["python", "nothing.py"], ["python", "toy.py", "--claims", "nothing"]):
        with pytest.raises(AssertionError):
            check(wrong, monkeypatch)


def test_every_command_is_taken(monkeypatch, capsys):
    commands = [words for text in pages().values() for words in written(text)] + in_docstrings()
    assert len(commands) > 40
    for words in commands:
        try:
            check(words, monkeypatch)
        except SystemExit as end:  # 0 after --help
            assert not end.code, f"{' '.join(words)}: {capsys.readouterr().err}"


# ---- figures, links, length

def test_what_is_shown_and_linked_is_there():
    for path, text in pages().items():
        text = FENCE.sub("", text)
        titles = re.findall(r"^#+ (.*)$", text, re.M)
        anchors = {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("#"):
                assert target in anchors, f"{path.name}: {target}"
            elif "://" not in target:
                folder = ROOT if path == README else path.parent
                assert (folder / target.partition("#")[0]).exists(), f"{path.name}: {target}"


def test_readme_can_be_read_at_one_sitting():
    text = README.read_text()
    count, unfinished = len(text.splitlines()), "{claims:" in text
    assert count <= 500 and not unfinished


# ---- the walk

class OnTheSmokeWorld(doctest.OutputChecker):
    """The page's output is the toy's. Here, shapes must be the same but for the sizes, other numbers only numbers."""
    sizes = {str(toy.World().voxels[0]): str(toy.SMOKE.voxels[0]), "256": "32"}  # voxels, hidden_dim

    def plain(self, text: str) -> str:
        text = re.sub(r"^'a .* on .*'$", "(a caption)", text.strip())
        numbers = re.compile(r"torch\.Size\(.*?\)|\s*-?\d[\d.]*(e-?\d+)?")
        return numbers.sub(lambda found: found[0] if found[0].startswith("t") else " #", text)

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        for ours, theirs in self.sizes.items():
            want = re.sub(rf"(?<=[ \[]){ours}(?=[,\]])", theirs, want)
        return self.plain(want) == self.plain(got)


def test_the_walk_from_voxel_to_pixel_runs(smoke_world, tmp_path, monkeypatch):
    recipe = toy.SMOKE_RECIPE
    train.main(f"--model_name={toy.REPORTED} --data_path={smoke_world} --train_logs={tmp_path / 'train_logs'} "
               f"{recipe.sizes} {recipe.session}".split())
    monkeypatch.chdir(tmp_path)
    Path("toy").symlink_to(smoke_world)
    lines = "\n".join(block for kind, block in FENCE.findall(section(README.read_text(), WALK)) if kind == "pycon")
    walk = doctest.DocTestParser().get_doctest(lines, {}, "the walk in README.md", None, 0)
    assert len(walk.examples) > 20 and len(lines.splitlines()) <= 60
    said = []
    with torch.enable_grad(), torch.random.fork_rng():  # it turns gradients off, and draws
        failed, _ = doctest.DocTestRunner(OnTheSmokeWorld()).run(walk, out=said.append)
    assert not failed, "".join(said)


def test_the_walks_numbers_may_differ_and_its_shapes_may_not():
    same = OnTheSmokeWorld().check_output
    assert same("torch.Size([1, 4717])\n", "torch.Size([1, 60])\n", 0)
    assert not same("torch.Size([1, 4717])\n", "torch.Size([1, 66])\n", 0)
    assert not same("torch.Size([1, 16, 64])\n", "torch.Size([16, 64])\n", 0)
    assert same("error 0.03 of 12, [ 0.5, -1.0]\n", "error 1.2e-05 of 3, [-2.0,  3.5]\n", 0)
    assert not same("error 0.03 of 12\n", "error nan of 12\n", 0) and not same("True\n", "False\n", 0)
