"""Two-way identification: the original's way and ours, same numbers, side by side on this CPU.

The original correlates all 2 n rows with each other by np.corrcoef, in float64, takes a quarter of the result, and
compares each number with its column's own. Timed with a loop over the n * n comparisons, with one comparison of whole
arrays, and, on few reconstructions and scaled up, with np.corrcoef called for each pair.

    OMP_NUM_THREADS=1 python tests/bench_two_way.py          # 1000 pictures, 9216 features each, two minutes
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import metrics  # noqa: E402

IMAGES, FEATURES, LOOPED = 1000, 9216, 1  # reconstructions that the loop over pairs is timed on


def whole_stack(real: np.ndarray, fake: np.ndarray, loop: bool) -> np.ndarray:
    """Wins of each reconstruction: all rows against all, then column by column against the diagonal."""
    n = len(real)
    r = np.corrcoef(real, fake)[:n, n:]  # (n, n)
    if loop:
        return np.array([sum(r[i, j] < r[j, j] for i in range(n)) for j in range(n)])
    return (r < np.diag(r)).sum(0)


def pair_by_pair(real: np.ndarray, fake: np.ndarray, count: int) -> np.ndarray:
    """Wins of the first `count` reconstructions, a call of np.corrcoef for each pair."""
    wins = []
    for j in range(count):
        own = np.corrcoef(real[j], fake[j])[0, 1]
        wins.append(sum(np.corrcoef(real[i], fake[j])[0, 1] < own for i in range(len(real)) if i != j))
    return np.array(wins)


def timed(function, *arguments, repeat: int = 1):
    """The result, and the least of `repeat` times in seconds: other programs can only make it longer."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def main(images: int = IMAGES, features: int = FEATURES, looped: int = LOOPED, repeat: int = 12) -> dict[str, float]:
    """Prints the table; returns seconds by name. Asserts that all count the same wins."""
    torch.manual_seed(0)
    real = (torch.randn(images, 60) @ torch.randn(60, features) / 8 + torch.randn(images, features)).relu()
    fake = (0.03 * real + torch.randn(images, features)).relu()
    ours, seconds = timed(metrics.two_way_identification, real, fake, repeat=repeat)
    wins = (ours * (images - 1)).round().long().numpy()
    arrays = real.numpy(), fake.numpy()
    stack, stack_seconds = timed(whole_stack, *arrays, False, repeat=repeat)
    loop, loop_seconds = timed(whole_stack, *arrays, True, repeat=repeat)
    pairs, pair_seconds = timed(pair_by_pair, *arrays, looped)
    assert (wins == stack).all() and (wins == loop).all() and (wins[:looped] == pairs).all()
    times = {f"np.corrcoef of each pair (timed on {looped})": pair_seconds * images / looped,
             "np.corrcoef of all rows, loop": loop_seconds, "np.corrcoef of all rows, no loop": stack_seconds,
             "metrics.two_way_identification": seconds}
    print(f"{images} pictures of {features} features, {torch.get_num_threads()} thread(s); identified by all four: "
          f"{ours.mean():.6f}\n\n| two-way identification | seconds | ours = 1 |\n|---|---:|---:|")
    for name, value in times.items():
        print(f"| {name} | {value:.2f} | {value / seconds:.1f} |")
    return times


if __name__ == "__main__":
    main()
