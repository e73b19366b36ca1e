"""Blocks are single weights of a smaller matrix, whose scores are sums: exact counts in every scope, kept whole."""

import itertools
import math

import pytest
import torch

from hf_maskselect import MaskSet
from hf_maskselect.masking.allocation import kept_count
from hf_maskselect.masking.patterns import NM, SCOPES, Blocks, Unstructured, parse_pattern
from hf_maskselect.masking.proposals import Proposal, propose
from hf_maskselect.masking.scores import CRITERIA

SIZES = [(1, 4), (1, 2), (2, 2), (4, 1), (1, 8), (3, 5)]
SPARSITIES = [0.0, 0.1, 1 / 3, 0.5, 0.8, 0.9, 0.9375, 0.99]


def small(rows, columns):
    """Shapes of matrices and convolutions in blocks; odd sizes too."""
    return {
        name: (out * rows, ins * columns, *kernel)
        for name, (out, ins, *kernel) in {"a": (7, 13), "b": (5, 3, 3, 3), "c": (1, 1), "d": (11, 17)}.items()
    }


def draw(shapes, seed=0, scales=(1.0, 0.05, 3.0, 1.0)):
    g = torch.Generator().manual_seed(seed)
    return {n: s * torch.rand(shape, generator=g) for (n, shape), s in zip(shapes.items(), scales, strict=True)}


def summed(score, rows, columns):
    """The scores of blocks, by loops over their members in double precision."""
    members = [score[i::rows, j::columns].double() for i, j in itertools.product(range(rows), range(columns))]
    return torch.stack(members).sum(0).float()


def grown(mask, rows, columns):
    return mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_blocks_are_single_weights_of_a_smaller_matrix(rows, columns, scope, sparsity):
    shapes = small(rows, columns)
    scores, pattern = draw(shapes), parse_pattern(f"{rows}x{columns}", scope, 0.25)
    masks = pattern.masks(scores, sparsity)
    blocks = Unstructured(scope, 0.25).masks({n: summed(s, rows, columns) for n, s in scores.items()}, sparsity)
    for name, mask in masks.items():
        assert torch.equal(mask, grown(blocks[name], rows, columns)) and mask.is_contiguous()
        assert pattern.holds(mask, sparsity)
    size, total = rows * columns, sum(math.prod(shape) for shape in shapes.values())
    zeros = total - sum(int(mask.sum()) for mask in masks.values())
    assert total - zeros == pattern.keeps(shapes.values(), sparsity) == size * kept_count(total // size, sparsity)
    assert abs(zeros - sparsity * total) <= size / 2
    assert MaskSet(masks).reaches(pattern, sparsity)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("scope", SCOPES)
def test_levels_are_nested_and_what_is_dead_never_returns(rows, columns, scope):
    pattern, before = parse_pattern(f"{rows}x{columns}", scope), None
    for seed, sparsity in enumerate((0.3, 0.6, 0.6, 0.9)):
        masks = pattern.masks(draw(small(rows, columns), seed), sparsity, before)
        assert MaskSet(masks).kept == pattern.keeps([mask.shape for mask in masks.values()], sparsity)
        assert before is None or all(not (masks[name] & ~before[name]).any() for name in masks)
        before = masks
    with pytest.raises(ValueError, match="cannot keep .* blocks: only .* are not pruned yet"):
        pattern.masks(draw(small(rows, columns)), 0.5, before)


def test_a_block_with_one_dead_weight_is_dead():
    scores = {"w": torch.ones(4, 8)}
    allowed = {"w": torch.ones(4, 8, dtype=torch.bool)}
    allowed["w"][:, 1] = False
    mask = parse_pattern("1x4").masks(scores, 0.5, allowed)["w"]
    assert mask[:, 4:].all() and not mask[:, :4].any()


def test_ties_go_to_the_lower_block():
    for scope in SCOPES:
        mask = parse_pattern("1x4", scope, 0).masks({"w": torch.ones(4, 8), "v": torch.ones(2, 4)}, 0.7)
        assert mask["w"].flatten().tolist() == [True] * 12 + [False] * 20 or scope == "layer"
        assert not mask["v"].any() or scope == "layer"


def test_the_order_in_memory_changes_nothing():
    for text, scope in itertools.product(("1x4", "2x2"), SCOPES):
        pattern = parse_pattern(text, scope)
        scores = draw({"a": (6, 16), "b": (8, 8, 3, 3), "c": (4, 4), "d": (2, 8, 2, 1)})
        expected = pattern.masks(scores, 0.6)
        other = {name: s.movedim(1, -1).contiguous().movedim(-1, 1) for name, s in scores.items()}
        assert all(map(torch.equal, pattern.masks(other, 0.6).values(), expected.values()))


def test_names_and_shapes_that_do_not_fit_are_refused():
    assert parse_pattern("1x4", "global", 0.5) == Blocks("global", 0.5, 1, 4) and str(parse_pattern("2x8")) == "2x8"
    for text in ("1x1", "0x4", "4x0"):
        with pytest.raises(ValueError, match=f"pattern '{text}' must be blocks of at least two weights"):
            parse_pattern(text)
    for text in ("1x4x4", "x4", "1x", "1X4", "-1x4", "1 x 4", "1x4.0"):
        with pytest.raises(ValueError, match="is unknown: use 'unstructured'.*'RxC' such as '1x4'"):
            parse_pattern(text)
    with pytest.raises(ValueError, match="'1x4' does not fit up: its 770 columns are no multiple of 4.*exclude_mod"):
        parse_pattern("1x4").masks({"up": torch.rand(8, 770)}, 0.5)
    with pytest.raises(ValueError, match="'4x2' does not fit conv: its 6 rows are no multiple of 4"):
        parse_pattern("4x2").check("conv", (6, 8, 3, 3))
    assert parse_pattern("1x4").row_local and not parse_pattern("2x2").row_local


SHAPES = {"q": (48, 32), "k": (32, 32), "up": (64, 32), "down": (31, 64)}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ratio", [None, 1e-4, 5e-3])
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9375])
def test_votes_are_drawn_for_blocks(scope, ratio, sparsity):
    """The votes of a block are those of one weight whose score is the sum."""
    g = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    pattern, proposal = parse_pattern("1x4", "layer"), Proposal("magnitude", scope, ratio)

    def made(weights, pattern, level=0, masks=None):
        masks = MaskSet.ones(weights) if masks is None else masks
        rest = {"stats": None, "masks": masks, "level": level, "seed": 42, "criteria": CRITERIA}
        return propose(proposal, 1, weights=weights, pattern=pattern, sparsity=sparsity, **rest)

    masks = made(weights, pattern)
    blocks = made({name: summed(w.abs(), 1, 4) for name, w in weights.items()}, Unstructured("layer"))
    assert all(torch.equal(mask, grown(blocks[name], 1, 4)) for name, mask in masks.items())
    assert masks.kept == pattern.keeps(SHAPES.values(), sparsity)
    before = MaskSet(pattern.masks({name: w.abs() for name, w in weights.items()}, sparsity / 2))
    after = made(weights, pattern, masks=before)
    assert after.kept == masks.kept and all(not (after[name] & ~before[name]).any() for name in after)


def test_two_of_four_is_no_block_pattern():
    mask = NM(2, 4).masks({"w": torch.rand(8, 16)}, 0.5)["w"]
    assert not parse_pattern("1x4").holds(mask, 0.5) and not parse_pattern("1x4").whole_units(mask).any()
