"""Run a script of the tests in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def told_by(script, *arguments, timeout):
    """Run `tests/SCRIPT` with one thread, and return the JSON in its last line; fails with its errors.

    timeout: in seconds.
    """
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(TESTS / script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
