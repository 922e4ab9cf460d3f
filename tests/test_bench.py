"""The benchmarks at their smallest: they must not rot between two GPUs.

    python -m pytest tests/test_bench.py
"""

import signal
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import bench_gpu  # noqa: E402
import bench_health  # noqa: E402


def test_training_is_timed_in_its_own_loop(capsys):
    results = bench_gpu.main(["--tiny"])
    assert [found.batch for found in results] == [14] * 6
    assert all(found.ms > 0 < found.loader and found.calls == 4 for found in results)  # one to warm up, two timed
    assert results[1].weights > results[0].weights > results[2].weights  # seven ridges; no low-level head
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| fine-tuning, 4096 wide | 14 |") and rows[8].startswith("| clip | ")
    assert len(rows) == 10


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_training_leaves_nothing_behind(capsys):
    ended, stopped = bench_health.main(["--steps=24"])
    assert len(ended.memory) == 24  # too few for a bound on their growth: libraries are still filling their caches
    assert bench_health.slope([900] * 10 + [1000 + .5 * step for step in range(30)]) == pytest.approx(50)
    assert not (ended.files or ended.children or ended.scratch)
    assert stopped.code == -signal.SIGINT and not (stopped.processes or stopped.scratch)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| memory: MB per 100 of 24 steps") and len(rows) == 9
