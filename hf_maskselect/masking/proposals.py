"""Which masks to try: criterion x scope x perturbation, each a pure function of (weights, statistics, masks so far,
level, candidate, seed), so that any process can rebuild any candidate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils.seeds import key_seed
from .dtensors import like, of_parts, part, shards_of, whole
from .maskset import MaskSet
from .patterns import NM, SCOPES, Channel, Unstructured, kept_count
from .scores import CRITERIA, Criterion, GradientStats, StoredStats, WeightStats, checked_score
from .sharded import sharded_masks
from .votes import number_of_draws, rank_by_votes_

# Around candidate 0: what differed most and did best at 16x and 50x on real data comes first.
MIXED = (
    "{criterion}:global",
    "fisher:balanced",
    "{criterion}:balanced:votes",
    "fisher:global",
    "{criterion}:global:votes",
    "fisher:balanced:votes",
    "magnitude:layer:votes",
)
# Where the pattern leaves nothing to scopes. Votes swap weights in many groups at 2:4, however few draws they have.
MIXED_BY_LAYER = (
    "fisher:layer",
    "magnitude:layer",
    "{criterion}:layer:votes",
    "fisher:layer:votes",
    "magnitude:layer:votes",
)


@dataclass(frozen=True)
class Proposal:
    """One way to make a mask. ratio: sampling ratio of the votes, None for the deterministic ranking."""

    criterion: str
    scope: str
    ratio: float | None = None

    def __str__(self) -> str:
        return f"{self.criterion}:{self.scope}" + ("" if self.ratio is None else f":votes@{self.ratio:g}")


def parse_proposal(text: str, criteria: Sequence[str], ratio: float) -> Proposal:
    """`"criterion:scope"` or `"criterion:scope:votes"` -> proposal.

    Raises:
        ValueError: a part is unknown.
    """
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

    Args:
        proposals: `["mixed"]`, `["paper"]`, or a list in the notation of `parse_proposal`. The list is repeated as
            often as needed, votes with the next of `ratios` each time; a deterministic one appears once.
        layer_only: the pattern knows no joint ranking (N:M), so every scope means "layer".
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
                f"num_candidates={num_candidates}: "
                "add a ':votes' proposal or lower num_candidates"
            )
    return pool


def gradient_needs(pool: Sequence[Proposal], criteria: Mapping[str, Criterion] = CRITERIA) -> set[str]:
    """Which gradient statistics the pool reads."""
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
    pattern: Unstructured | NM | Channel,
    criteria: Mapping[str, Criterion] = CRITERIA,
) -> MaskSet:
    """The candidate's masks: exact count, nested in `masks`; whole, also where the weights are sharded.

    Raises:
        ValueError: scores with NaN or infinity, or negative scores under votes (the tensor is named).
    """
    criterion = criteria[proposal.criterion]
    if isinstance(pattern, Unstructured):
        pattern = dataclasses.replace(pattern, scope=proposal.scope)
    scores = {}
    for name, weight in weights.items():
        known = WeightStats(None, None, 0) if stats is None else stats.of(name)
        scores[name] = checked_score(criterion.score, name, part(weight), known)
    if proposal.ratio is not None:
        generator = torch.Generator(device=next(iter(weights.values())).device)
        generator.manual_seed(key_seed(seed, "votes", level, index))
        for name, score in scores.items():
            if float(score.min()) < 0:
                raise ValueError(f"votes need scores >= 0 but those of {name} are negative: shift them in score_fn")
            score.masked_fill_(masks[name].logical_not(), 0)  # a dead weight gets no vote
        pattern = _vote_(scores, proposal.ratio, pattern, sparsity, criterion.vote_exponent, generator)
    shards = shards_of(weights)
    if shards is None:
        return MaskSet(pattern.masks(scores, sparsity, masks, consume=True))
    alive = {name: part(like(masks[name], weight)) for name, weight in weights.items()}
    sizes = [weight.numel() for weight in weights.values()]
    room = [int(torch.count_nonzero(masks[name])) for name in weights]
    found = sharded_masks(pattern, scores, sparsity, shards, alive, sizes, room)
    return MaskSet({name: whole(of_parts(found[name], weight)) for name, weight in weights.items()})


def _vote_(
    scores: dict[str, Tensor],
    ratio: float,
    pattern: Unstructured | NM,
    sparsity: float,
    exponent: float,
    generator: torch.Generator,
) -> Unstructured | NM:
    """Overwrite scores by votes, per matrix or over the pool of all matrices where the ranking is joint; returns the
    pattern that turns the votes into a mask."""
    names = list(scores)
    pools = [[name] for name in names] if pattern.scope == "layer" else [names]
    for pool in pools:
        pooled = [
            scores[name] if pattern.scope == "layer" else pattern.comparable(scores[name], True) for name in pool
        ]
        total = sum(score.numel() for score in pooled)
        keep = kept_count(total, sparsity)
        draws = number_of_draws(total - keep, ratio, matrices=len(pool))
        rank_by_votes_(pooled, keep, draws, exponent, generator)
    # Scores were made comparable before voting; votes are comparable as they are.
    return dataclasses.replace(pattern, scope="global") if pattern.scope == "balanced" else pattern
