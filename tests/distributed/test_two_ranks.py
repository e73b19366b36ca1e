"""Two gloo processes on the CPU: evaluating before training keeps DDP, and both ranks end with the same model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_maskselect import PruningState

SCRIPT = Path(__file__).with_name("two_ranks.py")


METHODS = [
    {"method": "random", "trial_steps": 2},
    {"method": "pdp", "num_levels": None, "frozen_steps": 3, "num_candidates": 2, "trial_steps": 2},
    {"method": "gumbel", "num_levels": None, "frozen_steps": 0},
]


def launch(folder, ranks, batch, changes):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), str(batch), json.dumps(changes)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("changes", METHODS, ids=lambda changes: changes["method"])
def test_two_ranks_are_one_run(tmp_path, changes):
    first, second = launch(tmp_path / "two", 2, 8, changes)
    assert first["wrapped"] == "DistributedDataParallel"
    for key in ("masks", "chosen", "weights", "after"):
        assert first[key] == second[key], key
    (alone,) = launch(tmp_path / "one", 1, 8, changes)
    assert alone["before"] == pytest.approx(first["before"], rel=1e-5)  # P1: not multiplied by the ranks
    assert not list((tmp_path / "two" / "out").glob("_search-*"))


@pytest.mark.slow
@pytest.mark.parametrize("changes", METHODS, ids=lambda changes: changes["method"])
def test_two_ranks_resume_to_the_bit(tmp_path, changes):
    """From the checkpoint of a run that was killed in its fifth step; the second level's search is made again."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = launch(tmp_path / "whole", 2, 8, {**changes, **saving})
    out = tmp_path / "killed" / "out"
    shutil.copytree(tmp_path / "whole" / "out" / "checkpoint-3", out / "checkpoint-3")
    (out / "_saving" / "checkpoint-6").mkdir(parents=True)  # half-written
    resumed = launch(tmp_path / "killed", 2, 8, {**changes, **saving, "resume": True})
    for first, second in zip(whole, resumed, strict=True):
        for key in ("masks", "losses", "after", "weights", "chosen"):
            assert first[key] == second[key], key
    states = [PruningState.load(tmp_path / run / "out") for run in ("whole", "killed")]
    assert states[0].weights == states[1].weights
    assert not list(out.glob("_*"))
