"""Check everything that a saved pruned model promises."""

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..masking.patterns import NM, Blocks, parse_pattern
from ..masking.targets import transposed_weights
from ..surgery.structured.families import family_of
from ..surgery.structured.record import STRUCTURED, StructureRecord
from ..surgery.structured.shapes import Encoder
from .derived import check_derived
from .models import load_strictly, model_class, skeleton
from .reload import check_reloads
from .state import PruningState
from .two_of_four import check_groups
from .weights import saved_tensors


def parse_checkable(pattern: str) -> NM | Blocks:
    """Parse `"N:M"` or `"RxC"`; raises a ValueError for anything else."""
    parsed = parse_pattern(pattern)
    if not isinstance(parsed, NM | Blocks):
        raise ValueError(
            f"pattern={pattern!r} cannot be checked alone: give an N:M pattern such as '2:4', or blocks such as '1x4'"
        )
    return parsed


def check_pattern(name: str, weight: Tensor, pattern: NM | Blocks) -> None:
    """Raise a ValueError unless the zeros of a weight have the pattern."""
    if isinstance(pattern, NM):
        check_groups(name, weight, pattern.n, pattern.m)
        return
    pattern.check(name, weight.shape)
    zeros = weight == 0
    whole = pattern.whole_units(zeros) | pattern.whole_units(~zeros)
    if broken := whole.numel() - int(torch.count_nonzero(whole)):
        raise ValueError(
            f"{name} does not hold the pattern {pattern}: {broken} of its {whole.numel()} blocks have both zeros and "
            f"other weights; prune it with pattern='{pattern}', or leave it dense with exclude_modules"
        )


def check_smaller(folder: str | os.PathLike) -> StructureRecord:
    """Check a model that was made smaller: its shape, and that it reloads; return its record.

    Raises:
        ValueError: the folder has no such record, its shape is another one, or it does not reload.
    """
    cls, config = model_class(folder)
    record = StructureRecord.find(config)
    if record is None:
        raise ValueError(f"{folder}: config.json has no record of a smaller shape: save the model again")
    model = load_strictly(cls, folder, refused=("missing_keys", "unexpected_keys"), dtype="auto")
    encoder = Encoder.of(model, family_of(model))
    found = replace(encoder.full(), layers=record.shape.layers)
    if encoder.depth != len(record.shape.layers) or found != record.shape:
        raise ValueError(
            f"{folder}: the model has {encoder.full()}, but its record tells of {record.shape}: save the model again"
        )
    check_reloads(model, folder, record.timed_shape)
    return record


def verify(folder: str | os.PathLike, pattern: str | None = None) -> PruningState:
    """Check that zeros and masks agree, meet the target and its pattern, and that the model loads plainly.

    Args:
        folder: a folder that `PruningTrainer` saved.
        pattern: `"N:M"` or `"RxC"`: check also that every masked matrix holds it along its input axis.

    A model that was made smaller (`pattern="structured"`) has no zeros: its shape is checked, and that a fresh process
    loads it with the same outputs, by plain transformers unless its layers have shapes of their own.

    Returns:
        The pruning state of the folder.

    Raises:
        ValueError: the first check that failed, with the tensor or the counts.
    """
    wanted = None if pattern is None else parse_checkable(pattern)
    state = PruningState.load(folder)
    state.check_saved(folder)
    check_derived(Path(folder), state.weights)
    if wanted is not None and (transposed := sorted(transposed_weights(skeleton(folder)) & state.masks.keys())):
        raise ValueError(f"{transposed[0]} belongs to a Conv1D, which stores it transposed: it cannot hold {pattern}")
    if state.pattern == STRUCTURED:
        check_smaller(folder)
        return state
    for name, tensor in saved_tensors(folder):
        if name not in state.masks:
            continue
        if wanted is not None:
            check_pattern(name, tensor, wanted)
        nonzero, kept = int(tensor.count_nonzero()), int(state.masks[name].count_nonzero())
        if nonzero != kept:
            raise ValueError(
                f"{folder}: {name} has {nonzero} non-zero weights but its mask keeps {kept}: kept weights were still "
                "zero when they were saved, so train longer, or start from a model without zeros at these places"
            )
    pruned_to = parse_pattern(state.pattern)
    target = pruned_to.keeps([mask.shape for mask in state.masks.values()], state.sparsity)
    if state.masks.kept != target:
        raise ValueError(
            f"{folder}: {state.masks.kept} of {state.masks.total} prunable weights are kept but sparsity "
            f"{state.sparsity} with pattern {state.pattern!r} keeps {target}; the run had not reached its last level "
            f"(step {state.step}, level {state.level + 1})"
        )
    for name, mask in state.masks.items():
        pruned_to.check(name, mask.shape)
        if not pruned_to.holds(mask, state.sparsity):
            raise ValueError(
                f"{folder}: {name} keeps as many weights as pattern {state.pattern!r} at sparsity {state.sparsity:g}, "
                "but in other places; prune a dense model to it, or this one with keep_zeros=False"
            )
    load_strictly(model_class(folder)[0], folder, refused=("missing_keys", "unexpected_keys"))
    return state
