"""Masks over rows cut among gloo processes on the CPU are the rows of the masks of the whole."""

import pytest
from forked import finish, start
from sharded_ranks import RANKS, main


@pytest.mark.slow
def test_sharded_is_whole(tmp_path):
    """Every case of `sharded_ranks.CASES` in one start of the processes; the first that fails is told here."""
    logs = [tmp_path / f"rank{rank}.log" for rank in range(RANKS)]
    processes = [start(main, rank, str(tmp_path), log=log) for rank, log in enumerate(logs)]
    assert finish(processes, 300) == [0] * RANKS, [log.read_text()[-3000:] for log in logs]
