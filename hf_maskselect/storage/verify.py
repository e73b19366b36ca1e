"""Check everything that a saved pruned model promises."""

from __future__ import annotations

import os

from ..masking.patterns import NM, parse_pattern
from ..masking.targets import transposed_weights
from .models import load_strictly, model_class, skeleton
from .state import PruningState
from .two_of_four import check_groups
from .weights import saved_tensors


def parse_groups(pattern: str) -> NM:
    """The N:M pattern that a text names.

    Raises:
        ValueError: it names another, or none.
    """
    groups = parse_pattern(pattern)
    if not isinstance(groups, NM):
        raise ValueError(f"pattern={pattern!r} is not checked by itself: give an N:M pattern such as '2:4'")
    return groups


def verify(folder: str | os.PathLike, pattern: str | None = None) -> PruningState:
    """Everything a user may rely on: the zeros are the masks, their count is the target's and their places are those
    of the pattern that the folder was pruned to, the model loads plainly.

    Args:
        pattern: `"N:M"`; every masked matrix must hold it along its input axis, whatever it was pruned to.

    Returns:
        the pruning state of the folder.

    Raises:
        ValueError: the first thing that does not hold, with the tensor or the counts.
    """
    groups = None if pattern is None else parse_groups(pattern)
    state = PruningState.load(folder)
    state.check_saved(folder)
    if groups is not None and (turned := sorted(transposed_weights(skeleton(folder)) & state.masks.keys())):
        raise ValueError(f"{turned[0]} belongs to a Conv1D, which stores it transposed: it cannot hold {pattern}")
    for name, tensor in saved_tensors(folder):
        if name not in state.masks:
            continue
        if groups is not None:
            check_groups(name, tensor, groups.n, groups.m)
        found, kept = int(tensor.count_nonzero()), int(state.masks[name].count_nonzero())
        if found != kept:
            raise ValueError(
                f"{folder}: {name} has {found} non-zero weights but its mask keeps {kept}: weights that are kept were "
                "still zero when they were saved, so train longer, or start from a model without zeros at these places"
            )
    pruned_to = parse_pattern(state.pattern)
    wanted = pruned_to.keeps([mask.shape for mask in state.masks.values()], state.sparsity)
    if state.masks.kept != wanted:
        raise ValueError(
            f"{folder}: {state.masks.kept} of {state.masks.total} prunable weights are kept but sparsity "
            f"{state.sparsity} with pattern {state.pattern!r} keeps {wanted}; the run had not reached its last level "
            f"(step {state.step}, level {state.level + 1})"
        )
    for name, mask in state.masks.items():
        pruned_to.check(name, mask.shape)
        if not pruned_to.holds(mask, state.sparsity):
            raise ValueError(
                f"{folder}: {name} keeps as many weights as pattern {state.pattern!r} at sparsity {state.sparsity:g}, "
                "but in other places; prune a dense model to it, or this one with keep_zeros=False"
            )
    cls, _ = model_class(folder)
    load_strictly(cls, folder, folder, ("missing_keys", "unexpected_keys"))
    return state
