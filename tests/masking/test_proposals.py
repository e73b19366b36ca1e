"""Pools of proposals, and the masks each proposal makes."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from hf_maskselect import MaskSet
from hf_maskselect.masking.allocation import kept_count
from hf_maskselect.masking.patterns import NM, SCOPES, Unstructured
from hf_maskselect.masking.proposals import Proposal, gradient_needs, parse_proposal, proposal_pool, propose
from hf_maskselect.masking.scores import CRITERIA, Criterion, WeightStats

RATIOS = [5e-5, 1e-4, 8e-5, 3e-4]
SHAPES = {"q": (48, 32), "k": (32, 32), "up": (64, 32), "down": (31, 64)}
SCALES = {"q": 1.0, "k": 0.05, "up": 0.6, "down": 0.3}  # so that joint rankings starve "k"
TOTAL = sum(rows * columns for rows, columns in SHAPES.values())
KINDS = [Proposal(*k) for k in itertools.product(CRITERIA, SCOPES, (None, 5e-3))]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_weights(seed=0):
    g = seeded(seed)
    return {name: torch.randn(shape, generator=g) * SCALES[name] for name, shape in SHAPES.items()}


def make_stats(weights, seed=1):
    g = seeded(seed)
    grads = {name: torch.randn(w.shape, generator=g) for name, w in weights.items()}
    known = {}
    for name, grad in grads.items():
        product = (grad * weights[name]).abs()
        known[name] = WeightStats(grad**2, product, 1, 0.15 * product, 0.05 * 0.85 * product, 1 / (0.1 + grad**2))
    return SimpleNamespace(of=known.__getitem__)


def make(proposal, index=1, **changes):
    weights = changes.pop("weights", None) or make_weights()
    given = {
        "weights": weights,
        "stats": make_stats(weights),
        "masks": MaskSet.ones(weights),
        "sparsity": 0.75,
        "level": 0,
        "seed": 42,
        "pattern": Unstructured("layer"),
    }
    return propose(proposal, index, **{**given, **changes})


def pool(proposals=("mixed",), criterion="taylor", scope="balanced", count=8, **changes):
    return proposal_pool(list(proposals), criterion, scope, count, RATIOS, **changes)


# -- pools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposals", [["mixed"], ["paper"], ["taylor:global", "magnitude:layer:votes"]])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 23])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_pool_has_its_size_starts_deterministic_and_repeats_only_votes(proposals, count, criterion):
    made = pool(proposals, criterion, count=count)
    assert len(made) == count
    assert made[0] == Proposal(criterion, "balanced", None)
    fixed = [proposal for proposal in made if proposal.ratio is None]
    assert len(set(fixed)) == len(fixed)
    drawn = [proposal.ratio for proposal in made if proposal.ratio is not None]
    assert all(ratio in RATIOS for ratio in drawn)


def test_the_papers_pool_rotates_its_ratios():
    made = pool(["paper"], "magnitude", "layer", 9)
    assert made[1:] == [Proposal("magnitude", "layer", ratio) for ratio in RATIOS * 2]


def test_the_mixed_pool_varies_criterion_scope_and_randomness():
    made = pool(count=8)
    assert len(set(made)) == 8
    assert {p.scope for p in made} == set(SCOPES) and {p.ratio is None for p in made} == {True, False}
    assert {p.criterion for p in made} == {"magnitude", "fisher", "taylor"}


def test_where_scopes_mean_nothing_every_criterion_is_tried_before_votes():
    made = pool(scope="layer", count=7, layer_only=True)
    assert [str(proposal) for proposal in made[:4]] == [
        "taylor:layer",
        "fisher:layer",
        "magnitude:layer",
        f"taylor:layer:votes@{RATIOS[0]:g}",
    ]
    assert {p.criterion for p in made[4:]} == {"magnitude", "fisher", "taylor"} and all(p.ratio for p in made[4:])
    assert [str(p) for p in pool(criterion="magnitude", scope="layer", count=2, layer_only=True)][1] == "fisher:layer"


def test_a_list_is_taken_in_its_order_and_repeated_for_its_votes():
    made = pool(["fisher:global", "taylor:balanced", "taylor:layer:votes"], count=5)
    drawn = [Proposal("taylor", "layer", ratio) for ratio in RATIOS[:3]]
    assert made == [Proposal("taylor", "balanced"), Proposal("fisher", "global"), *drawn]


def test_a_user_score_has_a_pool_of_its_own():
    criteria = {"score_fn": Criterion(lambda name, w, stats: w.abs(), (), 5.0)}
    made = pool(criterion="score_fn", criteria=criteria, count=6)
    assert len(made) == 6 and {p.criterion for p in made} == {"score_fn"}


@pytest.mark.parametrize("proposals", [["mixed"], ["paper"]])
def test_patterns_without_joint_ranking_get_no_equal_masks(proposals):
    made = pool(proposals, scope="layer", count=10, layer_only=True)
    assert {p.scope for p in made} == {"layer"}
    fixed = [p for p in made if p.ratio is None]
    assert len(fixed) == len(set(fixed))


def test_too_few_different_masks_are_refused():
    listed = ["fisher:global", "taylor:balanced"]  # the second is candidate 0
    assert len(pool(listed, count=2)) == 2
    with pytest.raises(ValueError, match="only 2 different.*num_candidates=3.*votes"):
        pool(listed, count=3)
    with pytest.raises(ValueError, match="only 2 different"):
        pool(["fisher:global", "fisher:balanced"], scope="layer", count=3, layer_only=True)


@pytest.mark.parametrize(
    "text", ["taylor", "taylor:rows", "tailor:layer", "taylor:layer:vote", "taylor:layer:votes:x", ""]
)
def test_unknown_proposals_are_refused_with_what_is_possible(text):
    with pytest.raises(ValueError, match=f"{text!r}.*magnitude, fisher, taylor.*layer, balanced, global"):
        parse_proposal(text, list(CRITERIA), 1e-4)
    with pytest.raises(ValueError, match="unknown"):
        pool([text])


def test_gradient_needs_are_those_of_the_pool():
    assert gradient_needs(pool(["paper"], "magnitude", "layer")) == set()
    assert gradient_needs([Proposal("fisher", "layer")]) == {"square"}
    assert gradient_needs([Proposal("magnitude", "layer"), Proposal("taylor", "global", 1e-4)]) == {"product"}
    assert gradient_needs(pool()) == {"square", "product"}
    assert gradient_needs(pool(criterion="platon")) == {"square", "sensitivity", "uncertainty"}


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", KINDS, ids=str)
@pytest.mark.parametrize("earlier", [None, *SCOPES])
def test_every_proposal_is_exact_and_nested_whatever_came_before(proposal, earlier):
    weights = make_weights()
    masks = MaskSet.ones(weights)
    if earlier is not None:
        masks = make(Proposal("magnitude", earlier), sparsity=0.6)
        weights = {name: w * masks[name] for name, w in make_weights(seed=5).items()}
    for level, sparsity in enumerate((0.7, 0.9, 0.9375)):
        made = make(proposal, weights=weights, masks=masks, sparsity=sparsity, level=level)
        made.check_fits(weights)
        assert made.kept == kept_count(TOTAL, sparsity)
        assert all(not (made[name] & ~masks[name]).any() for name in made)
        masks = made


@pytest.mark.parametrize("scope", SCOPES)
def test_candidate_zero_is_the_pattern_of_its_scores(scope):
    """Whatever scope the configured pattern has, a proposal brings its own."""
    weights = make_weights()
    scores = {name: w.abs() for name, w in weights.items()}
    expected = MaskSet(Unstructured(scope).masks(scores, 0.75))
    for index, seed, configured in itertools.product((0, 3), (1, 2), SCOPES):
        made = make(Proposal("magnitude", scope), index, seed=seed, pattern=Unstructured(configured))
        assert made.digest() == expected.digest()


@pytest.mark.parametrize("scope", SCOPES)
def test_votes_are_a_pure_function_of_level_candidate_and_seed(scope):
    votes = Proposal("taylor", scope, 5e-3)
    first = make(votes)
    torch.rand(7)  # other randomness in between changes nothing
    assert make(votes).digest() == first.digest()
    others = [make(votes, index=2), make(votes, level=1), make(votes, seed=43), make(Proposal("taylor", scope))]
    digests = {other.digest() for other in others}
    assert len(digests) == 4 and first.digest() not in digests
    assert first.overlap(others[-1]) > 0.7  # mild randomness around the deterministic mask


@pytest.mark.parametrize("scope", SCOPES)
def test_a_larger_sampling_ratio_stays_closer_to_the_deterministic_mask(scope):
    plain = make(Proposal("magnitude", scope))
    overlaps = [
        sum(make(Proposal("magnitude", scope, ratio), index).overlap(plain) for index in range(4)) / 4
        for ratio in (1e-3, 1e-2, 1.0)
    ]
    assert overlaps == sorted(overlaps) and overlaps[0] < 0.97 < overlaps[-1] < 1


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("starved", [1.0, 1e-3])
@pytest.mark.parametrize("ratio", [1e-9, 5e-3])
def test_votes_keep_no_hopeless_weight(scope, starved, ratio):
    """The first rows are a thousand times smaller, so draws of distinct entries never reach them: not in a single
    draw, and not in a matrix so weak that only its floor remains."""
    weights = {name: w.abs() / SCALES[name] + 0.1 for name, w in make_weights().items()}
    weights["k"] *= starved
    for w in weights.values():
        w[: len(w) // 2] *= 1e-3
    for index in range(12):
        made = make(Proposal("magnitude", scope, ratio), index, weights=weights)
        hopeless = {name: int(made[name][: len(w) // 2].sum()) for name, w in weights.items()}
        assert not any(hopeless.values()), (index, hopeless)


@pytest.mark.parametrize("scope", SCOPES)
def test_votes_on_heavy_tails_are_nearly_certain(scope):
    """Neighbours in rank differ so much that every draw takes nearly the same entries, also far below the largest."""
    weights = {name: torch.exp(6 * w / SCALES[name]) for name, w in make_weights().items()}
    drawn, plain = (make(Proposal("magnitude", scope, r), weights=weights, sparsity=0.5) for r in (5e-3, None))
    assert drawn.overlap(plain) > 0.95


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sparsity", [0.9, 0.99, 0.999])
def test_matrices_that_keep_next_to_nothing(scope, sparsity):
    weights = {"tiny": torch.randn(2, 16, generator=seeded(0)), "one": torch.ones(1, 1), **make_weights()}
    made = make(Proposal("magnitude", scope, 5e-3), weights=weights, sparsity=sparsity)
    assert made.kept == kept_count(TOTAL + 33, sparsity)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8)])
def test_votes_fill_every_group_of_an_nm_pattern(criterion, n, m):
    proposal, pattern = Proposal(criterion, "layer", 5e-3), NM(n, m)
    made = make(proposal, pattern=pattern, sparsity=1 - n / m)
    plain = make(Proposal(criterion, "layer"), pattern=pattern, sparsity=1 - n / m)
    assert all((mask.view(-1, m).sum(1) == n).all() for mask in made.values())
    assert made.digest() != plain.digest() and made.overlap(plain) > 0.6


def test_nm_votes_are_nested():
    pattern, proposal = NM(2, 8), Proposal("taylor", "layer", 5e-3)
    masks = make(proposal, pattern=pattern, sparsity=0.5)
    weights = {name: w * masks[name] for name, w in make_weights().items()}
    made = make(proposal, weights=weights, masks=masks, pattern=pattern, sparsity=0.75, level=1)
    assert all((mask.view(-1, 8).sum(1) == 2).all() for mask in made.values())
    assert all(not (made[name] & ~masks[name]).any() for name in made)


def test_a_user_score_decides_and_may_be_negative_only_without_votes():
    criteria = {"score_fn": Criterion(lambda name, w, stats: w, (), 5.0)}
    made = make(Proposal("score_fn", "global"), criteria=criteria, pattern=Unstructured(floor=0))
    weights = make_weights()
    lowest = min(float(w[made[name]].min()) for name, w in weights.items() if made[name].any())
    assert lowest >= max(float(w[~made[name]].max()) for name, w in weights.items())
    with pytest.raises(ValueError, match="votes need scores >= 0.*q"):
        make(Proposal("score_fn", "global", 1e-3), criteria=criteria)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ratio", [None, 5e-3])
def test_neither_dead_scores_nor_memory_layout_matter(scope, ratio):
    """A user's score may be large where a weight is dead, and may come transposed."""
    masks, magnitude = make(Proposal("magnitude", "layer"), sparsity=0.5), CRITERIA["magnitude"].score
    scores = [
        lambda name, w, stats: magnitude(name, w, stats) * masks[name],
        lambda name, w, stats: magnitude(name, w, stats).masked_fill(~masks[name], 1e3),
        lambda name, w, stats: (magnitude(name, w, stats) * masks[name]).t().contiguous().t(),
    ]
    proposal, level = Proposal("score_fn", scope, ratio), {"masks": masks, "sparsity": 0.75}
    made = [make(proposal, criteria={"score_fn": Criterion(score, (), 5.0)}, **level) for score in scores]
    assert made[0].digest() == made[1].digest() == made[2].digest()


def test_scores_that_cannot_be_ranked_are_refused_by_name():
    weights = make_weights()
    weights["up"][3, 4] = float("nan")
    for ratio in (None, 1e-3):
        with pytest.raises(ValueError, match="scores of up"):
            make(Proposal("magnitude", "layer", ratio), weights=weights)
