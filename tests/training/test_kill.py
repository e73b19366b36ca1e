"""A run killed with SIGKILL anywhere goes on from its last whole checkpoint as if nothing had happened, to the bit."""

import pytest
from forked import returned
from killable import kill_anywhere


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("random", 3),
        ("fitted", 3),
        ("pdp", 3),
        pytest.param("random", 12, marks=pytest.mark.exhaustive),
        pytest.param("survivors", 6, marks=pytest.mark.exhaustive),
        pytest.param("gumbel", 4, marks=pytest.mark.exhaustive),
    ],
)
def test_a_killed_run_goes_on_to_the_bit(tmp_path, method, count):
    told = returned(kill_anywhere, tmp_path, method, count, 3, folder=tmp_path, limit=600)
    assert sum(told["killed"].values()) == count and min(told["killed"].values()) >= count // 3
