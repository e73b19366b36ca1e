"""Run functions of the tests in processes of their own, without the seconds that each would need for its imports.

A server process imports the package once. Every process is a fork of it, which has computed nothing before.
"""

import gc
import json
import multiprocessing
import os
import time
from multiprocessing.connection import wait
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hf_maskselect", "transformers.models.bert.modeling_bert"])


def start(function, *arguments, log, **environment):
    """Start `function(*arguments)` with one thread and return its process.

    Args:
        function: One of a module that the new process can import.
        log: File for what the process prints.
        environment: Variables of the new process, besides those of this one.
    """
    process = CONTEXT.Process(target=_run, args=(function, arguments, log, environment), daemon=True)
    process.start()
    return process


def _run(function, arguments, log, environment):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    gc.freeze()  # collections, of which each training makes one, need not look through all that is imported
    function(*arguments)


def finish(processes, limit, alone=False):
    """Wait for the end of all processes and return their exit codes.

    Args:
        limit: In seconds; the test fails where a process takes longer.
        alone: Whether the processes go on when one of them has failed. Otherwise the rest is killed.
    """
    end = time.monotonic() + limit
    try:
        while running := [process for process in processes if process.is_alive()]:
            assert wait([process.sentinel for process in running], end - time.monotonic()), f"no end after {limit} s"
            if not alone and any(process.exitcode for process in processes):
                break
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [process.exitcode for process in processes]


def returned(function, *arguments, folder, limit):
    """Run `function(*arguments)` and return what it returns, sent as JSON; fails with its errors.

    Args:
        folder: For the log and the answer.
    """
    log, answer = Path(folder) / "log", Path(folder) / "answer.json"
    codes = finish([start(_answer, function, arguments, answer, log=log)], limit)
    assert codes == [0], log.read_text()[-4000:]
    return json.loads(answer.read_text())


def _answer(function, arguments, path):
    path.write_text(json.dumps(function(*arguments)))
