"""Whatever writes a folder leaves the old output or the new one, whole, where it is killed or the disk is full."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WRITERS = ["save_model", "checkpoint", "pack", "pack_beside", "unpack", "export", "onnx", "push"]


def kill(folder, step, *jobs):
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "killable_writers.py"), str(folder), str(step), *jobs],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.keys() == set(jobs) and all(each["old"] for each in told.values())
    return told


def test_some_kills_leave_a_whole_folder(tmp_path):
    kill(tmp_path, 9, "save_model:exchange", "checkpoint:exchange")


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_every_kill_leaves_a_whole_folder(tmp_path, writer):
    kill(tmp_path, 4, f"{writer}:full")
    modes = ("exchange",) if writer == "push" else ("exchange", "moves")
    for each in kill(tmp_path, 1, *(f"{writer}:{mode}" for mode in modes)).values():
        assert each["old"] + each["new"] == each["events"] and bool(each["new"]) == (writer != "push")
