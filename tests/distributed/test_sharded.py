"""Masks over rows cut among gloo processes on the CPU are the rows of the masks of the whole."""

import multiprocessing

import pytest
import torch.multiprocessing
from sharded_ranks import RANKS, main


@pytest.mark.slow
def test_sharded_is_whole(tmp_path):
    """Every case of `sharded_ranks.CASES` in one start of the processes; the first that fails is raised here."""
    multiprocessing.set_forkserver_preload(["hf_maskselect"])  # imported once, not by every rank
    torch.multiprocessing.start_processes(main, (str(tmp_path),), nprocs=RANKS, start_method="forkserver")
