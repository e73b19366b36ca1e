"""The proposals that a run compares at every level, and the gradient statistics that they need."""

import itertools
from collections.abc import Mapping

from ..config import PruningConfig
from ..masking.proposals import Proposal, gradient_needs, proposal_pool
from ..masking.scores import Criterion


def criterion_of(config: PruningConfig, criteria: Mapping[str, Criterion]) -> str:
    """Return the criterion of candidate 0, or the one that a soft phase starts from: a `score_fn` if there is one."""
    return "score_fn" if "score_fn" in criteria else config.resolved().criterion


def candidate_pool(config: PruningConfig, criteria: Mapping[str, Criterion]) -> list[Proposal]:
    """Return the proposals of every level; for a soft method its own mask and random neighbours of it."""
    settings = config.resolved()
    if settings.soft:
        others = itertools.islice(itertools.cycle(config.sampling_ratios), settings.num_candidates - 1)
        return [Proposal(settings.method, settings.scope, ratio) for ratio in (None, *others)]
    return proposal_pool(
        settings.proposals,
        criterion_of(config, criteria),
        settings.scope,
        settings.num_candidates,
        config.sampling_ratios,
        criteria,
        layer_only=len(settings.pattern.scopes) == 1,
    )


def statistics_needed(config: PruningConfig, criteria: Mapping[str, Criterion]) -> set[str]:
    """Return the names of the gradient statistics that the pool reads, or a soft method when it begins."""
    if config.resolved().soft:
        return set(criteria[criterion_of(config, criteria)].needs)
    return gradient_needs(candidate_pool(config, criteria), criteria)
