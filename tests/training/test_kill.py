"""A run killed with SIGKILL anywhere goes on from its last whole checkpoint as if nothing had happened, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "count"), [("random", 24), ("fitted", 6), ("survivors", 12), ("pdp", 6), ("gumbel", 6)]
)
def test_a_killed_run_goes_on_to_the_bit(tmp_path, method, count):
    path = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "killable.py"), str(tmp_path), method, str(count), "3"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert sum(told["killed"].values()) == count and min(told["killed"].values()) >= count // 3
