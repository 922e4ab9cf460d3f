"""The benchmarks at their smallest: they must not rot between two GPUs.

    python -m pytest tests/test_bench.py
"""

import sys
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import bench_gpu  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402


def test_training_is_timed_in_its_own_loop(capsys):
    with mock.patch.object(train, "test", wraps=train.test) as test:
        results = bench_gpu.main(["--tiny"])
    assert [len(call.args[1].trials) for call in test.call_args_list] == [10] * 3
    assert [found.batch for found in results] == [14] * 3
    assert all(found.ms > 0 < found.loader and found.calls == 4 for found in results)  # one to warm up, two timed
    assert results[1].weights > results[0].weights > results[2].weights  # seven ridges; no low-level head
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| fine-tuning, 4096 wide | 14 |") and rows[5].startswith("| clip | ")
    assert len(rows) == 7


def test_its_world_of_many_trials_is_whole(tmp_path):
    """More trials than it draws voxels for: no row of betas belongs to two of them."""
    bench_gpu.write_world(tmp_path, bench_gpu.TINY, 400)
    for subject in range(1, 9):
        trials = data.load_trials(tmp_path, subject)
        assert data.load_voxels(tmp_path, trials).shape == (400, 20)
