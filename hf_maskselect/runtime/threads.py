"""Share pieces of work among threads, for kernels that use one thread only."""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
_LOCK = threading.Lock()
PIECE = 256  # tokens: for fewer, handing the interpreter's lock over costs more than a second thread gains


def share(work: Callable[[T], object], pieces: Sequence[T]) -> None:
    """Call `work` with every piece, in `torch.get_num_threads()` threads; torch's operators release Python's lock.

    The threads have gradients off and the caller's inference mode, and each of them uses one thread of torch.

    Raises:
        Exception: the first error of `work`.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(pieces) < 2:
        for piece in pieces:
            work(piece)
        return
    inference = torch.is_inference_mode_enabled()

    def quietly(piece: T) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(piece)

    with _LOCK:
        pool = _pool(os.getpid(), threads)
    for _ in pool.map(quietly, pieces):
        pass


def pieces_of(count: int, tokens: int = 1) -> list[slice]:
    """Cut `count` rows of so many tokens each into slices of nearly equal size, with at least 256 tokens.

    >>> pieces_of(600)
    [slice(0, 300, None), slice(300, 600, None)]
    """
    size = max(1, -(-count // max(1, count * tokens // PIECE)))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Start a pool; a forked process has none of its parent's threads, so the pool belongs to one process."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="hf-maskselect")
    together = threading.Barrier(threads)

    def start(_: int) -> None:
        torch.set_num_threads(1)
        together.wait()

    list(pool.map(start, range(threads)))
    torch.set_num_threads(threads)  # the workers have also lowered what later threads of the process would get
    return pool
