"""One of three ranks that hold the rows of matrices: runs every case of CASES among all three and among the first
two."""

from datetime import timedelta

import torch
import torch.distributed as dist

from hf_maskselect.masking import ranking, sharded
from hf_maskselect.masking.patterns import NM, SCOPES, Channel, Unstructured, parse_pattern
from hf_maskselect.masking.sharded import Shards

RANKS = 3
INF = float("inf")
SHAPES = [(167, 400), (37, 64), (5, 16), (1, 3), (7, 8, 3, 3)]  # together more than ranking's short path takes
DATA = {
    "gaussian": lambda n, g: torch.randn(n, generator=g),
    "few values": lambda n, g: torch.randn(n, generator=g).round(),
    "constant": lambda n, g: torch.full((n,), -0.7),
    "zeros of both signs": lambda n, g: torch.randint(-1, 2, (n,), generator=g) * 0.0,
    "zeros among numbers": lambda n, g: torch.where(
        torch.rand(n, generator=g) < 0.5, torch.randn(n, generator=g), -0.0
    ),
    "nearly all dead": lambda n, g: torch.where(torch.rand(n, generator=g) < 0.1, torch.randn(n, generator=g), -INF),
    "infinities": lambda n, g: torch.tensor([-INF, -2.0, 3.0, INF])[torch.randint(0, 4, (n,), generator=g)],
    "subnormal": lambda n, g: torch.randn(n, generator=g) * 1e-42,
}
CUTS = {
    "as FSDP2": lambda rows, size: [min(rows, -(-rows // size) * rank) for rank in range(size)],
    "uneven": lambda rows, size: [0, rows // 7, rows // 2][:size],
    "first empty": lambda rows, size: [0, 0, rows // 3][:size],
    "last has all": lambda rows, size: [0] * size,
}


class Ranks(Shards):
    """Shards that cut whole tensors, and note the bytes of every all-reduce."""

    def __init__(self, group, cut):
        super().__init__(group)
        self.cut = CUTS[cut]
        self.messages = []

    def _summed(self, counts):
        self.messages.append(counts.nbytes)
        return super()._summed(counts)

    def mine(self, whole):
        """The rows of this rank."""
        starts = [*self.cut(len(whole), self._size), len(whole)]
        return whole[starts[self._rank] : starts[self._rank + 1]].clone()

    def named(self, whole):
        return None if whole is None else {name: self.mine(t) for name, t in whole.items()}


def make(kind, seed=0, shapes=SHAPES):
    parts = [torch.Size(shape).numel() for shape in shapes]
    flat = DATA[kind](sum(parts), torch.Generator().manual_seed(seed))
    return [part.view(shape) for part, shape in zip(flat.split(parts), shapes, strict=True)]


def make_scores(kind="gaussian", shapes=SHAPES):
    """By name; each matrix's scores are smaller than those before, so that floors bind."""
    return {str(i): t.abs() / 4**i for i, t in enumerate(make(kind, shapes=shapes))}


def same(ranks, found, whole):
    pairs = list(zip(found, whole, strict=True))
    assert all(torch.equal(mask, ranks.mine(expected)) for mask, expected in pairs)


def one_pool(group):
    for kind in DATA:
        tensors = make(kind)
        total = sum(t.numel() for t in tensors)
        for cut, k in zip(
            [*CUTS, *CUTS], (0, 1, total // 16, total // 2, total // 3, total - 1, total, 7), strict=True
        ):
            ranks = Ranks(group, cut)
            (found,), (counts,) = ranks.top_k_masks([[ranks.mine(t) for t in tensors]], [k])
            same(ranks, found, whole := ranking.top_k_masks(tensors, k))
            assert counts == [int(mask.sum()) for mask in whole]
            assert len(ranks.messages) <= 4 and max(ranks.messages) <= 65536, ranks.messages


def one_pool_of_many_tensors(group):
    for kind in ("gaussian", "few values"):
        tensors = make(kind, shapes=[(9, 16)] * 512)
        ranks = Ranks(group, "uneven")
        (found,), _ = ranks.top_k_masks([[ranks.mine(t) for t in tensors]], [30_001])
        same(ranks, found, ranking.top_k_masks(tensors, 30_001))
        assert len(ranks.messages) <= 4 and max(ranks.messages) <= 65536, ranks.messages


def many_pools(group):
    for number, cut in enumerate(CUTS):
        ranks = Ranks(group, cut)
        pools = [make(kind, number)[1:] for kind in DATA] + [[t] for t in make("few values", number)]
        totals = [sum(t.numel() for t in pool) for pool in pools]
        for share in (0, 0.1, 0.5, 1):
            ks = [round(share * total) for total in totals]
            found, _ = ranks.top_k_masks([[ranks.mine(t) for t in pool] for pool in pools], ks)
            for masks, pool, k in zip(found, pools, ks, strict=True):
                same(ranks, masks, ranking.top_k_masks(pool, k))


def messages_do_not_grow_with_pools(group):
    for kind in DATA:
        for pools in (2, 72):
            ranks = Ranks(group, "uneven")
            ranks.top_k_masks([[ranks.mine(t)] for t in make(kind, shapes=[(9, 8)] * pools)], [31] * pools)
            assert len(ranks.messages) <= 4, ranks.messages


def wide_counters(group):
    before, sharded._WIDE = sharded._WIDE, 0
    try:
        for kind in DATA:
            tensors = make(kind)
            ranks = Ranks(group, "uneven")
            (found,), _ = ranks.top_k_masks([[ranks.mine(t) for t in tensors]], [20_000])
            same(ranks, found, ranking.top_k_masks(tensors, 20_000))
    finally:
        sharded._WIDE = before


def nothing_to_rank(group):
    ranks = Ranks(group, "uneven")
    assert ranks.top_k_masks([], []) == ([], [])
    assert Unstructured("layer").sharded_masks({}, 0.5, ranks) == {}
    assert Unstructured("global").sharded_masks({}, 0.5, ranks) == {}
    empty = [torch.empty(0, 4)]
    assert [mask.shape for mask in ranks.top_k_masks([empty], [0])[0][0]] == [(0, 4)]
    ((first,), (second,)), _ = ranks.top_k_masks([empty, [ranks.mine(torch.arange(8.0).view(8, 1))]], [0, 3])
    same(ranks, [first, second], [torch.empty(0, 4, dtype=torch.bool), torch.arange(8).view(8, 1) > 4])


def nan_on_one_rank(group):
    ranks = Ranks(group, "as FSDP2")
    mine = [ranks.mine(t) for t in make("infinities")]
    bits = torch.tensor([0x7FC00000, 0x7F800001, -0x00400000, -0x007FFFFF], dtype=torch.int32)
    for bad in range(dist.get_world_size(group)):
        for nan in bits.view(torch.float32):
            tensors = [t.clone() for t in mine]
            if ranks._rank == bad:
                tensors[1][0, 0] = nan
                assert tensors[1].isnan().any()
            for pools, ks in (([tensors], [9]), ([[t] for t in tensors], [0] * 5)):
                message = error(lambda pools=pools, ks=ks: ranks.top_k_masks(pools, ks))  # noqa: B023
                assert message.startswith("NaN among the values to rank")
    assert ranks.sums([1]) == [dist.get_world_size(group)]  # nobody was left behind


def impossible_counts(group):
    ranks = Ranks(group, "first empty")
    tensors = [ranks.mine(t) for t in make("gaussian", shapes=[(4, 4)] * 2)]
    assert error(lambda: ranks.top_k_masks([tensors], [33])).startswith("k must lie in 0..32")
    assert error(lambda: ranks.top_k_masks([tensors], [-1])).startswith("k must lie in 0..32")
    scores = dict(zip("ab", tensors, strict=True))
    alive = {name: torch.zeros_like(t, dtype=torch.bool) for name, t in scores.items()}
    for scope in ("layer", "global", "balanced"):
        message = error(lambda scope=scope: Unstructured(scope).sharded_masks(scores, 0.5, ranks, alive))
        assert message.startswith("cannot keep 16 weights: only 0 are not pruned yet")
    alive["a"][:] = True
    for pattern, words in ((NM(2, 4), "groups of 4 have fewer than 2"), (Channel(), "2 of its rows must stay whole")):
        message = error(lambda pattern=pattern: pattern.sharded_masks(scores, 0.5, ranks, alive))
        assert message.startswith("b cannot keep its share") and words in message


def error(call):
    try:
        call()
    except ValueError as raised:
        return str(raised)
    raise AssertionError("nothing was raised")


def check_pattern(group, pattern, scores, first=0.5, second=0.75):
    """From all alive to `first`, and from there to `second`."""
    for cut in CUTS:
        ranks = Ranks(group, cut)
        alive = None
        for sparsity in (first, second):
            whole = pattern.masks(scores, sparsity, alive)
            found = pattern.sharded_masks(ranks.named(scores), sparsity, ranks, ranks.named(alive))
            assert list(found) == list(whole)
            same(ranks, found.values(), whole.values())
            assert alive is None or not any((found[name] & ~ranks.mine(alive[name])).any() for name in found)
            alive = whole


def layer(group):
    for kind in ("gaussian", "few values", "zeros among numbers"):
        check_pattern(group, Unstructured("layer"), make_scores(kind))


def jointly(group):
    for floor in (0, 0.125, 0.9):
        check_pattern(group, Unstructured("global", floor), make_scores(), 0.5, 0.9)
    check_pattern(group, Unstructured("global", 0.9), make_scores("few values"))
    scores, ranks = make_scores(), Ranks(group, "uneven")
    sizes = [score.numel() for score in scores.values()]
    Unstructured("global", 0).sharded_masks(ranks.named(scores), 0.9, ranks, None, (sizes, sizes))
    assert len(ranks.messages) <= 4 and max(ranks.messages) <= 65536, ranks.messages  # a whole level
    free, bound = (Unstructured("global", floor).masks(make_scores(), 0.9) for floor in (0, 0.9))
    assert sum(int(free[name].sum()) != int(bound[name].sum()) for name in free) > 2


def balanced(group):
    """To the bit where the means are (sums of few whole numbers); else to a few entries, with the same count."""
    whole_numbers = {str(i): t.abs() for i, t in enumerate(make("few values"))}
    check_pattern(group, Unstructured("balanced"), {"zeros": torch.zeros(8, 8), **whole_numbers})
    scores = make_scores()
    pattern = Unstructured("balanced", 0.9)
    whole = pattern.masks(scores, 0.8, alive := pattern.masks(scores, 0.5))
    for cut in CUTS:
        ranks = Ranks(group, cut)
        found = pattern.sharded_masks(ranks.named(scores), 0.8, ranks, ranks.named(alive))
        kept = ranks.sums([int(mask.sum()) for mask in found.values()])
        assert sum(kept) == sum(int(mask.sum()) for mask in whole.values())
        other = ranks.sums([int((found[name] != ranks.mine(whole[name])).sum()) for name in found])
        assert sum(other) <= 8, other


def groups_of_rows(group):
    for pattern in (NM(2, 4), NM(1, 8)):
        scores = make_scores("few values", [(37, 64), (1, 16), (7, 8, 3, 3)])
        check_pattern(group, pattern, scores, 0.25, pattern.sparsity)


def channels(group):
    for kind in ("gaussian", "few values", "constant"):
        check_pattern(group, Channel(), make_scores(kind))


def blocks_within_rows(group):
    shapes = [(37, 64), (5, 16), (7, 8, 3, 3)]
    for scope in SCOPES:  # whole numbers, whose means are exact
        scores = {str(i): t.abs() for i, t in enumerate(make("few values", shapes=shapes))}
        check_pattern(group, parse_pattern("1x4", scope), scores)
    for scope in ("layer", "global"):
        check_pattern(group, parse_pattern("1x4", scope), make_scores(shapes=shapes))
    ranks = Ranks(group, "uneven")
    message = error(lambda: parse_pattern("2x2").sharded_masks(ranks.named(make_scores(shapes=[(4, 4)])), 0.5, ranks))
    assert message.startswith("2x2 prunes across rows")


CASES = (
    one_pool,
    one_pool_of_many_tensors,
    many_pools,
    messages_do_not_grow_with_pools,
    wide_counters,
    nothing_to_rank,
    nan_on_one_rank,
    impossible_counts,
    layer,
    jointly,
    balanced,
    groups_of_rows,
    channels,
    blocks_within_rows,
)


def main(rank, folder):
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=RANKS)
    pair = dist.new_group([0, 1])
    for case in CASES:
        case(None)
        if rank < 2:
            case(pair)
    dist.destroy_process_group()
