"""Seconds of work on a machine that may be busy with other work."""

import time
from collections.abc import Callable, Mapping

import torch


def clock() -> float:
    """Return seconds: of this thread's processor time if torch uses one thread, which is steady on a busy machine."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def least_seconds(
    jobs: Mapping[str, Callable[[], object]], seconds: float, now: Callable[[], float] = clock
) -> dict[str, float]:
    """Call the jobs in turns, for about `seconds` each and at least three times; returns the least time of each."""
    least = dict.fromkeys(jobs, float("inf"))
    for job in jobs.values():
        job()
    for turn in range(50):
        for name, job in jobs.items():
            start = now()
            job()
            least[name] = min(least[name], now() - start)
        if turn >= 2 and (turn + 1) * max(least.values()) > seconds:
            break
    return least
