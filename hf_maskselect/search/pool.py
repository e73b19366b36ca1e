"""The proposals that a run compares at every level, and the gradient statistics that they need."""

import itertools
from collections.abc import Mapping

from ..config import PruningConfig
from ..masking.proposals import Proposal, gradient_needs, proposal_pool
from ..masking.scores import Criterion


def candidate_pool(config: PruningConfig, criteria: Mapping[str, Criterion]) -> list[Proposal]:
    """Return the proposals of every level; for a soft method its own mask and random neighbours of it."""
    settings = config.resolved()
    if settings.soft:
        others = itertools.islice(itertools.cycle(config.sampling_ratios), settings.num_candidates - 1)
        return [Proposal(settings.method, settings.scope, ratio) for ratio in (None, *others)]
    return proposal_pool(
        settings.proposals,
        "score_fn" if "score_fn" in criteria else settings.criterion,
        settings.scope,
        settings.num_candidates,
        config.sampling_ratios,
        criteria,
        layer_only=len(settings.pattern.scopes) == 1,
    )


def statistics_needed(config: PruningConfig, criteria: Mapping[str, Criterion]) -> set[str]:
    """Return the names of the gradient statistics that the pool reads."""
    return set() if config.resolved().soft else gradient_needs(candidate_pool(config, criteria), criteria)
