"""Every damaged and malicious file of test_hostile.py, and what the stage that reads it says: a table of Markdown.

    python tests/bench_hostile.py        half a minute

A last line counts the cases that end otherwise than by one sentence and exit code 2; there should be none.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from test_hostile import CASES, Case, arguments, make_shared  # noqa: E402

import model  # noqa: E402
import toy  # noqa: E402


def ending(case: Case, folder: Path) -> tuple[object, str]:
    """Exit code and error of the case's command in a copy with the damage; for data.py check the line that it found."""
    case.damage(folder)
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            model.run_main(lambda: case.stage.main(arguments(case.argv, folder)))
        except SystemExit as stop:
            code = stop.code
        except Exception as error:
            code = repr(error)
    wrong = [line for line in out.getvalue().splitlines() if "WRONG" in line and case.words[0] in line]
    said = [line.removeprefix("error: ") for line in err.getvalue().splitlines() if line.startswith("error: ")]
    return code, " ".join(wrong or said).replace(f"{folder}/", "").replace("|", "\\|").strip()


def main() -> int:
    """Print the table; the number of cases that ended otherwise."""
    other = 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            toy.build_world(root / "world", toy.SMOKE)
            (root / "shared").mkdir()
            make_shared(root / "world", root / "shared")
        os.chdir(root)
        print("| damaged file | exit code | what is said |\n|---|--:|---|")
        for case in CASES:
            folder = root / "copy"
            shutil.copytree(root / "shared", folder, copy_function=os.link)
            code, said = ending(case, folder)
            other += code != 2 or not said or (folder / "ran").exists()
            print(f"| {case.name} | {code} | {said} |", flush=True)
            shutil.rmtree(folder)
    print(f"\n{len(CASES)} cases, of which {other} ended otherwise than by a sentence and exit code 2.")
    return other


if __name__ == "__main__":
    raise SystemExit(main() > 0)
