"""A run killed with SIGKILL anywhere goes on from its last whole checkpoint as if nothing had happened, to the bit."""

import pytest
from told import told_by


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "count"), [("random", 24), ("fitted", 6), ("survivors", 12), ("pdp", 6), ("gumbel", 6)]
)
def test_a_killed_run_goes_on_to_the_bit(tmp_path, method, count):
    told = told_by("training/killable.py", tmp_path, method, count, 3, timeout=600)
    assert sum(told["killed"].values()) == count and min(told["killed"].values()) >= count // 3
