"""How often do the toy's captions name the right things? Prints the table that docs/measured.md quotes.

For each model that toy.py trained, its predicted captions (recon.py) against what was seen; as the ceiling, captions
of the true CLIP tokens of the same pictures. An object counts as right if it is named anywhere in the sentence.

    python tests/bench_captions.py --data_path toy          after python toy.py; seconds on a CPU
"""

import argparse
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import frozen  # noqa: E402
import toy  # noqa: E402

THING = re.compile(rf"({'|'.join(toy.SIZES)}) ({'|'.join(toy.COLOURS)}) ({'|'.join(toy.SHAPES)})")
PLACE = re.compile(rf"on ({'|'.join(toy.GROUNDS)}) ({'|'.join(toy.SKIES)})")


def read(sentence: str) -> dict[str, list[str]]:
    """What a caption names, by kind: {"ground": ["sand"], "colour": ["red", "blue"], ..}."""
    things, place = THING.findall(sentence), PLACE.findall(sentence)
    return {"ground": [g for g, _ in place], "sky": [s for _, s in place], "object": [t[2] for t in things],
            "colour": [t[1] for t in things], "both": [f"{t[1]} {t[2]}" for t in things]}


def rates(said: list[str], true: list[str]) -> dict[str, float]:
    """Share of the true captions' words, by kind, that the said captions name too; a word twice counts twice."""
    found, total = {}, {}
    for ours, theirs in zip(map(read, said), map(read, true), strict=True):
        for kind, words in theirs.items():
            total[kind] = total.get(kind, 0) + len(words)
            found[kind] = found.get(kind, 0) + sum(min(words.count(w), ours[kind].count(w)) for w in set(words))
    return {kind: found[kind] / total[kind] for kind in total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data_path", default="toy", help="folder of the toy world")
    path = Path(parser.parse_args().data_path)
    true = torch.load(path / "evals/all_captions.pt", weights_only=False).tolist()
    rows = {folder.name.removeprefix("toy_"): torch.load(file, weights_only=False).tolist()
            for folder in sorted((path / "evals").iterdir()) for file in folder.glob("*_all_predcaptions.pt")}
    clip, captioner = frozen.load_clip(path, "cpu"), frozen.load_captioner(path, "cpu")
    rows["true tokens"] = captioner.caption(clip.tokens(torch.load(path / "evals/all_images.pt", weights_only=True)))
    print(f"| {'captions from':<19} | ground |   sky | object | colour | colour and object |")
    print(f"|{'-' * 21}|-------:|------:|-------:|-------:|------------------:|")
    for name, said in rows.items():
        r = rates(said, true)
        print(f"| {name:<19} | {r['ground']:>6.3f} | {r['sky']:.3f} | {r['object']:>6.3f} | {r['colour']:>6.3f} | "
              f"{r['both']:>17.3f} |")


if __name__ == "__main__":
    main()
