"""Candidates of a search: pure functions of weights, statistics, masks, level, index and seed, on any process."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils.seeds import key_seed
from .allocation import kept_count
from .base import Pattern, counted
from .dtensors import from_local_rows, gathered, local_rows, sharded_like, shards_of
from .maskset import MaskSet
from .patterns import SCOPES
from .scores import CRITERIA, Criterion, GradientStats, StoredStats, WeightStats, checked_score
from .votes import number_of_draws, rank_by_votes_

# The proposals besides candidate 0: those that differed most and did best at 16x and 50x on real data come first.
MIXED = (
    "{criterion}:global",
    "fisher:balanced",
    "{criterion}:balanced:votes",
    "fisher:global",
    "{criterion}:global:votes",
    "fisher:balanced:votes",
    "magnitude:layer:votes",
)
# For patterns with one scope. Votes swap weights in many groups at 2:4, however few draws they have.
MIXED_BY_LAYER = (
    "fisher:layer",
    "magnitude:layer",
    "{criterion}:layer:votes",
    "fisher:layer:votes",
    "magnitude:layer:votes",
)


@dataclass(frozen=True)
class Proposal:
    """One way to make a mask: a criterion, a scope, and the sampling ratio of votes (None for no votes)."""

    criterion: str
    scope: str
    ratio: float | None = None

    def __str__(self) -> str:
        return f"{self.criterion}:{self.scope}" + ("" if self.ratio is None else f":votes@{self.ratio:g}")


def parse_proposal(text: str, criteria: Sequence[str], ratio: float) -> Proposal:
    """Read `"criterion:scope"` or `"criterion:scope:votes"`, whose votes get `ratio`; a ValueError for others."""
    criterion, _, rest = text.partition(":")
    scope, _, perturbation = rest.partition(":")
    if criterion not in criteria or scope not in SCOPES or perturbation not in ("", "votes"):
        raise ValueError(
            f"proposal {text!r} is unknown: write criterion:scope or criterion:scope:votes with a criterion of "
            f"{', '.join(criteria)} and a scope of {', '.join(SCOPES)}"
        )
    return Proposal(criterion, scope, ratio if perturbation else None)


def proposal_pool(
    proposals: Sequence[str],
    criterion: str,
    scope: str,
    num_candidates: int,
    ratios: Sequence[float],
    criteria: Mapping[str, Criterion] = CRITERIA,
    layer_only: bool = False,
) -> list[Proposal]:
    """The `num_candidates` proposals of one level; candidate 0 is the deterministic `criterion:scope`.

    `proposals` is `["mixed"]`, `["paper"]`, or a list in the notation of `parse_proposal`. The list is repeated as
    often as needed, votes with the next of `ratios` each time; a deterministic proposal appears once. With
    `layer_only` every scope means "layer". Raises a ValueError for unknown proposals or too few different ones.
    """
    if list(proposals) == ["paper"]:
        texts = [f"{criterion}:{scope}:votes"]
    elif list(proposals) == ["mixed"]:
        mixed = MIXED_BY_LAYER if layer_only else MIXED
        texts = [
            text.format(criterion=criterion) for text in mixed if text.partition(":")[0] in ("{criterion}", *criteria)
        ]
        texts = list(dict.fromkeys(texts))
    else:
        texts = list(proposals)
    pool = [Proposal(criterion, scope)]
    drawn, rounds = 0, 0
    while len(pool) < num_candidates:
        before = len(pool)
        for text in texts:
            proposal = parse_proposal(text, list(criteria), ratios[drawn % len(ratios)])
            proposal = dataclasses.replace(proposal, scope="layer") if layer_only else proposal
            drawn += proposal.ratio is not None
            if (proposal.ratio is not None or proposal not in pool) and len(pool) < num_candidates:
                pool.append(proposal)
        rounds += 1
        if len(pool) == before:
            raise ValueError(
                f"proposals={list(proposals)} give only {len(pool)} different masks for "
                f"num_candidates={num_candidates}: add a ':votes' proposal or lower num_candidates"
            )
    return pool


def gradient_needs(pool: Sequence[Proposal], criteria: Mapping[str, Criterion] = CRITERIA) -> set[str]:
    """The gradient statistics that the pool reads."""
    return {need for proposal in pool for need in criteria[proposal.criterion].needs}


@torch.no_grad()
def propose(
    proposal: Proposal,
    index: int,
    *,
    weights: Mapping[str, Tensor],
    stats: GradientStats | StoredStats | None,
    masks: MaskSet,
    sparsity: float,
    level: int,
    seed: int,
    pattern: Pattern,
    criteria: Mapping[str, Criterion] = CRITERIA,
) -> MaskSet:
    """Masks of candidate `index`: the exact count, among the weights that `masks` keep; all rows, on every process.

    `seed`, `level` and `index` decide the votes. The pattern takes the scope of the proposal if it can have it.

    Raises:
        ValueError: scores with NaN or infinity, or negative scores under votes (the tensor is named).
    """
    criterion = criteria[proposal.criterion]
    pattern = pattern.scoped(proposal.scope)
    units, allowed = {}, {}  # the scores of all units, and which of them have no pruned weight
    for name, weight in weights.items():
        pattern.check(name, weight.shape)
        of_weight = WeightStats(None, None, 0) if stats is None else stats.of(name)
        units[name] = pattern.unit_scores(checked_score(criterion.score, name, local_rows(weight), of_weight))
        allowed[name] = pattern.whole_units(local_rows(sharded_like(masks[name], weight)))
    if proposal.ratio is not None:
        generator = torch.Generator(device=next(iter(weights.values())).device)
        generator.manual_seed(key_seed(seed, "votes", level, index))
        for name, score in units.items():
            if float(score.min()) < 0:
                raise ValueError(f"votes need scores >= 0 but those of {name} are negative: shift them in score_fn")
            score.masked_fill_(allowed[name].logical_not(), 0)  # what is pruned gets no vote
        pattern = _vote_(units, proposal.ratio, pattern, sparsity, criterion.vote_exponent, generator)
    shards = shards_of(weights)
    if shards is None:
        chosen = pattern.unit_masks(units, sparsity, allowed, consume=True)
    else:
        whole = {name: pattern.whole_units(masks[name]) for name in weights}
        chosen = pattern.sharded_unit_masks(units, sparsity, shards, allowed, counted(whole, whole))
    rows = {name: pattern.spread(chosen[name], local_rows(weight)) for name, weight in weights.items()}
    return MaskSet({name: gathered(from_local_rows(rows[name], weight)) for name, weight in weights.items()})


def _vote_(
    scores: dict[str, Tensor],
    ratio: float,
    pattern: Pattern,
    sparsity: float,
    exponent: float,
    generator: torch.Generator,
) -> Pattern:
    """Overwrite the scores of units by votes and return the pattern that makes a mask of them.

    Votes are drawn in every matrix, or from all matrices together where the ranking is joint.
    """
    names = list(scores)
    pools = [[name] for name in names] if pattern.scope == "layer" else [names]
    for pool in pools:
        pooled = [pattern.comparable(scores[name], consume=True) for name in pool]
        total = sum(score.numel() for score in pooled)
        keep = kept_count(total, sparsity)
        draws = number_of_draws(total - keep, ratio, matrices=len(pool))
        rank_by_votes_(pooled, keep, draws, exponent, generator)
    # The scores were made comparable before voting, so the votes are comparable too.
    return pattern.scoped("global") if pattern.scope == "balanced" else pattern
