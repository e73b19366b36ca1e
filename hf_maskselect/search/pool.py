"""Which proposals a run compares at every level, and what they read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from ..config import PruningConfig
from ..masking.proposals import Proposal, gradient_needs, proposal_pool
from ..masking.scores import Criterion


def candidate_pool(config: PruningConfig, criteria: Mapping[str, Criterion]) -> list[Proposal]:
    """The proposals of every level; those of a soft method are its own mask and random neighbours."""
    settings = config.resolved()
    if settings.soft:
        others = itertools.islice(itertools.cycle(config.sampling_ratios), settings.num_candidates - 1)
        return [
            Proposal(settings.method, settings.scope),
            *(Proposal(settings.method, settings.scope, r) for r in others),
        ]
    return proposal_pool(
        settings.proposals,
        "score_fn" if "score_fn" in criteria else settings.criterion,
        settings.scope,
        settings.num_candidates,
        config.sampling_ratios,
        criteria,
        layer_only=config.pattern != "unstructured",
    )


def statistics_needed(config: PruningConfig, criteria: Mapping[str, Criterion]) -> set[str]:
    """Which gradient statistics the pool reads."""
    return set() if config.resolved().soft else gradient_needs(candidate_pool(config, criteria), criteria)
