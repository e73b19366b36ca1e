"""From scores to masks: exact counts, allocation over matrices, nesting and N:M groups, against plain oracles."""

import itertools

import pytest
import torch

from hf_maskselect.masking.allocation import allocate, kept_count
from hf_maskselect.masking.patterns import NM, SCOPES, Channel, Unstructured, parse_pattern

ODD_SHAPES = {"a": (7, 13), "b": (5, 3), "c": (1, 1), "d": (11, 17)}
SPARSITIES = [0.0, 0.01, 0.1, 1 / 3, 0.5, 0.54, 2 / 3, 0.9375, 0.99, 0.999]


def draw(shapes=ODD_SHAPES, seed=0, scales=()):
    """Positive scores; `scales` makes some matrices matter far more than others."""
    g = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(shape, generator=g) for name, shape in shapes.items()}
    return {n: s * scale for (n, s), scale in itertools.zip_longest(scores.items(), scales, fillvalue=1.0)}


def kept(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


def best(scores, k):
    """Masks of the k best of one ranking by (score, then index), in pure Python."""
    entries = [(-float(s), i, j) for i, score in enumerate(scores.values()) for j, s in enumerate(score.flatten())]
    chosen = {(i, j) for _, i, j in sorted(entries)[:k]}
    return {
        name: torch.tensor([(i, j) in chosen for j in range(score.numel())]).view(score.shape)
        for i, (name, score) in enumerate(scores.items())
    }


def assert_same(masks, expected):
    assert masks.keys() == expected.keys()
    for name in expected:
        assert torch.equal(masks[name], expected[name]), name


# -- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scales", [(), (1e-4, 1.0, 1e4, 1.0)])
def test_the_number_of_zeros_is_exact(scope, sparsity, scales):
    scores = draw(scales=scales)
    total = sum(s.numel() for s in scores.values())
    masks = Unstructured(scope).masks(scores, sparsity)
    zeros = total - sum(kept(masks).values())
    assert zeros == total - kept_count(total, sparsity) and abs(zeros - sparsity * total) <= 0.5
    assert all(mask.dtype == torch.bool and mask.shape == scores[name].shape for name, mask in masks.items())


def test_allocation_gives_fractions_to_the_largest_remainder_and_then_to_the_first():
    assert allocate(5, [10, 10, 10], [10, 10, 10]) == [2, 2, 1]
    assert allocate(3, [10, 30], [10, 30]) == [1, 2]  # 0.75 and 2.25
    with pytest.raises(ValueError, match="keep 8.*only 7"):
        allocate(8, [10, 10], [3, 4])


# -- which ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_layer_keeps_the_best_of_each_matrix_at_the_same_share(sparsity):
    scores = draw(scales=(1e-3, 1.0, 1e3, 10.0))
    masks = Unstructured("layer").masks(scores, sparsity)
    total = sum(s.numel() for s in scores.values())
    share = kept_count(total, sparsity) / total
    for name, score in scores.items():
        count = kept(masks)[name]
        assert abs(count - share * score.numel()) < 1
        assert_same({name: masks[name]}, best({name: score}, count))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("ties", [False, True])
def test_global_is_one_ranking(sparsity, ties):
    scores = {name: (s * 3).floor() if ties else s for name, s in draw(scales=(1.0, 2.0, 1.0, 0.5)).items()}
    keep = kept_count(sum(s.numel() for s in scores.values()), sparsity)
    assert_same(Unstructured("global", floor=0).masks(scores, sparsity), best(scores, keep))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9375])
def test_balanced_ranks_scores_divided_by_the_root_of_their_mean(sparsity):
    scores = draw(scales=(1e-2, 1.0, 3.0, 50.0))
    divided = {name: s.double() / s.double().mean().sqrt() for name, s in scores.items()}
    keep = kept_count(sum(s.numel() for s in scores.values()), sparsity)
    assert_same(Unstructured("balanced", floor=0).masks(scores, sparsity), best(divided, keep))


def test_balanced_lies_between_layer_and_global():
    shapes = {"weak": (20, 20), "strong": (20, 20)}
    scores = draw(shapes, scales=(1.0, 2.0))
    layer, balanced, joint = (kept(Unstructured(scope, 0).masks(scores, 0.7))["strong"] for scope in SCOPES)
    assert layer < balanced < joint


def test_what_does_not_change_a_mask():
    scores = draw(scales=(1.0, 5.0, 0.2, 1.0))
    for scope in SCOPES:
        pattern = Unstructured(scope)
        masks = pattern.masks(scores, 0.6)
        assert_same(pattern.masks({name: 1024 * s for name, s in scores.items()}, 0.6), masks)
        transposed = {name: s.t().contiguous().t() for name, s in scores.items()}  # another memory layout
        assert_same(pattern.masks(transposed, 0.6), masks)
    rescaled = {name: s * 2.0**i for i, (name, s) in enumerate(scores.items())}
    assert_same(Unstructured("layer").masks(rescaled, 0.6), Unstructured("layer").masks(scores, 0.6))


@pytest.mark.parametrize("scope", ["balanced", "global"])
@pytest.mark.parametrize("floor", [0.125, 0.5, 1.0])
@pytest.mark.parametrize("sparsity", [0.3, 0.9, 0.9375])
def test_no_matrix_falls_below_its_floor_and_the_rest_shares_one_threshold(scope, floor, sparsity):
    shapes = {"a": (20, 20), "b": (30, 10), "c": (9, 9), "d": (25, 24)}
    scores = draw(shapes, scales=(1e-9, 1e-6, 1.0, 1.5))
    pattern = Unstructured(scope, floor)
    masks = pattern.masks(scores, sparsity)
    uniform = kept(Unstructured("layer").masks(scores, sparsity))
    total = sum(s.numel() for s in scores.values())
    assert sum(kept(masks).values()) == kept_count(total, sparsity)
    free = []
    for name, count in kept(masks).items():
        assert count >= floor * uniform[name]
        if count >= floor * uniform[name] + 1:
            free.append(name)
        assert_same({name: masks[name]}, best({name: scores[name]}, count))
    ranked = {name: pattern.comparable(scores[name]) for name in free}
    worst = [float(ranked[n][masks[n]].min()) for n in free]
    dropped = [float(ranked[n][~masks[n]].max()) for n in free if not masks[n].all()]
    assert not free or not dropped or min(worst) >= max(dropped)
    assert kept(Unstructured(scope, 0).masks(scores, sparsity))["a"] < floor * uniform["a"]  # so the floor mattered


# -- levels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), list(itertools.product(SCOPES, repeat=2)))
def test_masks_are_nested_whatever_made_the_one_before(first, second):
    """The scales starve "a" in a joint ranking, so that it has fewer weights left than "layer" would keep later."""
    shapes = {"a": (16, 16), "b": (16, 16), "c": (31, 9)}
    before = Unstructured(first, 0).masks(draw(shapes, scales=(0.02, 1.0, 1.0)), 0.6)
    scores = draw(shapes, seed=1)
    scores = {name: torch.where(before[name], s, 1e3 + s) for name, s in scores.items()}  # the dead look best
    total = sum(s.numel() for s in scores.values())
    for sparsity in (0.6, 0.7, 0.95):
        after = Unstructured(second).masks(scores, sparsity, before)
        assert all(not (after[name] & ~before[name]).any() for name in after)
        assert sum(kept(after).values()) == kept_count(total, sparsity)
        before = after


@pytest.mark.parametrize("scope", SCOPES)
def test_a_sparsity_below_the_one_before_is_refused(scope):
    scores = draw()
    before = Unstructured("layer").masks(scores, 0.9)
    with pytest.raises(ValueError, match="higher sparsity"):
        Unstructured(scope).masks(scores, 0.5, before)


# -- N:M --------------------------------------------------------------------------------------------------------------


def best_of_groups(score, keep, m):
    rows = score.reshape(-1, m).tolist()
    chosen = [sorted(range(m), key=lambda i, row=row: (-row[i], i))[:keep] for row in rows]
    return torch.tensor([[i in picks for i in range(m)] for picks in chosen]).view(score.shape)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 7), (4, 8), (5, 32)])
@pytest.mark.parametrize("levels", [None, 3])
def test_every_group_keeps_its_best_with_ties_by_index(n, m, levels):
    g = torch.Generator().manual_seed(n * m)
    score = torch.rand(6, 5 * m, generator=g)
    score = score if levels is None else (score * levels).floor()
    masks = NM(n, m).masks({"w": score, "v": score.flip(0)}, 1 - n / m)
    assert_same(masks, {"w": best_of_groups(score, n, m), "v": best_of_groups(score.flip(0), n, m)})


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 7), (5, 32)])
def test_groups_shrink_level_by_level(n, m):
    g = torch.Generator().manual_seed(0)
    alive = None
    for zeros in range(m - n + 1):
        score = torch.rand(4, 3 * m, generator=g)
        masks = NM(n, m).masks({"w": score}, zeros / m, alive)
        assert (masks["w"].view(-1, m).sum(1) == m - zeros).all()
        if alive is not None:
            assert not (masks["w"] & ~alive["w"]).any()
        alive = masks


def test_groups_that_cannot_be_met_are_refused():
    with pytest.raises(ValueError, match="'2:4'.*intermediate.*770 columns.*exclude_modules"):
        NM(2, 4).masks({"intermediate": torch.rand(4, 770)}, 0.5)
    NM(2, 4).check("transposed", (770, 768))
    for sparsity in (0.3, 0.75, -0.25):
        with pytest.raises(ValueError, match=f"{sparsity}.*'2:4'.*1/4 up to 0.5"):
            NM(2, 4).check_sparsity(sparsity)


# -- names ------------------------------------------------------------------------------------------------------------


def test_patterns_by_name():
    assert parse_pattern("2:4") == NM(2, 4) and parse_pattern("11:32") == NM(11, 32)
    assert parse_pattern("unstructured", "global", 0.5) == Unstructured("global", 0.5)


@pytest.mark.parametrize("text", ["4:2", "4:4", "0:4"])
def test_n_of_m_needs_n_below_m(text):
    with pytest.raises(ValueError, match=f"'{text}'.*0 < N < M"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["", "2:4:8", "blocks", "2-4", "-1:4", " 2:4"])
def test_unknown_patterns_are_refused(text):
    with pytest.raises(ValueError, match=f"{text!r}.*'unstructured', 'channel' or 'N:M'"):
        parse_pattern(text)


def test_unknown_scopes_and_floors_are_refused():
    with pytest.raises(ValueError, match="'row'.*layer, balanced, global"):
        Unstructured("row")
    for floor in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"floor={floor}"):
            Unstructured("global", floor)


# -- convolutions and channels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 8)])
def test_groups_of_a_convolution_run_along_its_input_channels(n, m):
    score = torch.rand(5, 2 * m, 3, 3, generator=torch.Generator().manual_seed(0))
    mask = NM(n, m).masks({"w": score}, 1 - n / m)["w"]
    flat = NM(n, m).masks({"w": score.permute(0, 2, 3, 1).reshape(-1, 2 * m)}, 1 - n / m)["w"]
    assert torch.equal(mask.permute(0, 2, 3, 1).reshape(-1, 2 * m), flat) and mask.is_contiguous()
    with pytest.raises(ValueError, match=f"its {m + 1} columns are no multiple of {m}"):
        NM(n, m).check("w", (m, m + 1, m, m))


@pytest.mark.parametrize("shape", [(8, 5), (8, 5, 3, 3)])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.6, 0.99])
def test_channels_are_kept_whole_by_their_norm(shape, sparsity):
    score = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    mask = Channel().masks({"w": score}, sparsity)["w"].flatten(1)
    kept = mask.all(1)
    assert torch.equal(kept, mask.any(1)) and int(kept.sum()) == max(1, 8 - round(8 * sparsity))
    norms = score.flatten(1).square().sum(1)
    assert not (~kept).any() or norms[kept].min() > norms[~kept].max()


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("text", ["unstructured", "2:8", "channel"])
def test_a_pattern_knows_how_many_it_keeps(text, sparsity):
    pattern, scores = parse_pattern(text), draw({"a": (6, 16), "b": (3, 8), "c": (10, 8, 3, 3)})
    assert pattern.keeps([s.shape for s in scores.values()], sparsity) == sum(
        kept(pattern.masks(scores, sparsity)).values()
    )


@pytest.mark.parametrize("text", ["2:4", "channel"])
def test_what_is_dead_never_makes_up_a_count(text):
    """Whatever lives is chosen, also with the lowest scores; where too little does, nothing dead returns."""
    pattern, score = parse_pattern(text), torch.arange(1.0, 33).view(4, 8)
    alive = torch.ones_like(score, dtype=torch.bool)
    alive[2:, 2:4] = False
    mask = pattern.masks({"w": score}, 0.5, {"w": alive})["w"]
    assert int(mask.sum()) == 16 and not (mask & ~alive).any()
    alive[1, :3] = False
    with pytest.raises(ValueError, match="w cannot keep its share.*higher sparsity"):
        pattern.masks({"w": score}, 0.5, {"w": alive})
    if text == "channel":
        assert not (pattern.masks({"w": score}, 0.75, {"w": alive})["w"] & ~alive).any()


@pytest.mark.parametrize("text", ["2:4", "channel"])
def test_a_pattern_knows_its_masks(text):
    pattern, scores = parse_pattern(text), draw({"a": (6, 16), "c": (10, 8, 3, 3)})
    anywhere = Unstructured().masks(scores, 0.5)
    for name, mask in pattern.masks(scores, 0.5).items():
        assert pattern.holds(mask, 0.5) and int(mask.sum()) == int(anywhere[name].sum())
        assert not pattern.holds(anywhere[name], 0.5) and Unstructured().holds(mask, 0.5)
        fewer = mask.clone()
        fewer.view(-1)[mask.view(-1).nonzero()[0]] = False
        assert pattern.holds(fewer, 0.5) == (text == "2:4")
    assert NM(2, 4).holds(torch.ones(2, 8, dtype=torch.bool), 0.0)
    assert not NM(2, 4).holds(torch.ones(2, 8, dtype=torch.bool), 0.25)


def test_channels_of_a_later_level_lie_within_the_earlier():
    scores = draw({"a": (16, 5), "b": (9, 2, 3, 3)})
    first = Channel().masks(scores, 0.5)
    second = Channel().masks(draw({"a": (16, 5), "b": (9, 2, 3, 3)}, seed=1), 0.75, first)
    assert all(bool((first[name] | ~second[name]).all()) for name in scores)
