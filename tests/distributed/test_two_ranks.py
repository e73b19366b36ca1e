"""Two gloo processes on the CPU: evaluating before training keeps DDP, and both ranks end with the same model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_ranks.py")


def launch(folder, ranks, batch):
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), str(batch)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.slow
def test_two_ranks_are_one_run(tmp_path):
    first, second = launch(tmp_path / "two", ranks=2, batch=8)
    assert first["wrapped"] == "DistributedDataParallel"
    for key in ("masks", "chosen", "weights", "after"):
        assert first[key] == second[key], key
    (alone,) = launch(tmp_path / "one", ranks=1, batch=8)
    assert alone["before"] == pytest.approx(first["before"], rel=1e-5)  # P1: not multiplied by the ranks
    assert not list((tmp_path / "two" / "out").glob("search-*"))
