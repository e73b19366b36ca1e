"""How work is dealt out among ranks."""

import random

import pytest

from hf_maskselect.utils.processes import Processes, deal


def test_shares_differ_by_at_most_one_and_nothing_is_lost():
    draw = random.Random(0)
    for _ in range(500):
        ranks, work = draw.randint(1, 9), draw.sample(range(40), draw.randint(0, 20))
        holders = {piece: draw.sample(range(ranks), draw.randint(1, ranks)) for piece in work}
        shares = deal(work, holders, ranks)
        assert sorted(piece for share in shares for piece in share) == sorted(work)
        sizes = [len(share) for share in shares]
        assert len(sizes) == ranks and max(sizes) - min(sizes) <= 1
        assert shares == deal(work, holders, ranks)


def test_who_holds_a_piece_gets_it():
    holders = {index: [index % 4] for index in range(8)}
    assert deal(list(range(8)), holders, 4) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert deal([0, 4], holders, 4) == [[0], [4], [], []]  # both were drawn by rank 0, which has room for one
    assert deal([0, 5], {0: [0, 1], 5: [1]}, 2) == [[0], [5]]


def test_one_process_needs_nobody():
    alone = Processes()
    alone.open(1)
    assert (alone.rank, alone.count) == (0, 1)
    assert alone.gather("a") == ["a"] and alone.first("b") == "b" and alone.together(lambda: "c") == ["c"]
    alone.agree(lambda: pytest.fail("nobody to compare with"), "masks")
    with pytest.raises(ZeroDivisionError):
        alone.together(lambda: 1 / 0)
