"""PEFT adapters on pruned models (needs `peft`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .masking.maskset import MaskSet
from .masking.targets import prunable_weights

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)


@torch.no_grad()
def merge_adapter_with_masks(model: PeftModel, masks: MaskSet | None = None) -> PreTrainedModel:
    """Fold an adapter into the pruned model under it, and keep the model's zeros.

    A low-rank update has no zeros, so plain `merge_and_unload` gives a dense model. Here what the adapter adds at
    pruned places is dropped, and the share of the update that this costs is logged.

    Args:
        model: a `PeftModel` whose base model is pruned, such as `get_peft_model(load_pruned(path)[0], ...)`.
        masks: the masks of the base model (as `load_pruned` gives them); by default its zeros before merging.

    Returns:
        the base model, merged, with exactly the zeros of the masks.

    Raises:
        ValueError: the masks are of another model, or the adapter is none that merges.
    """
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(model.base_model, BaseTuner):
        raise ValueError(
            f"an adapter of type {model.active_peft_config.peft_type.value} is no change of the weights and cannot be "
            "merged into them: use LoRA or another that is"
        )
    before = {_plain(name): p.detach().clone() for name, p in model.get_base_model().named_parameters()}
    if masks is not None and (unknown := masks.keys() - before.keys()):
        raise ValueError(
            f"the masks do not fit the model: {sorted(unknown)[0]} is no weight of the model under the adapter; pass "
            "the masks that load_pruned gave with it"
        )
    merged = model.merge_and_unload()
    if masks is None:
        masks = MaskSet({name: before[name] != 0 for name in prunable_weights(merged)})
    weights = dict(merged.named_parameters())
    dropped = whole = 0.0
    for name, mask in masks.items():
        change = (weights[name] - before[name]).float()
        whole += float(change.square().sum())
        dropped += float(change.masked_fill(mask.to(change.device), 0).square().sum())
    masks.apply_(merged)
    if whole:
        logger.warning(f"{dropped / whole:.1%} of the adapter's update (squared) fell on pruned weights: dropped")
    return merged


def _plain(name: str) -> str:
    """The name that a parameter of an adapted layer has in the model without the adapter."""
    return name.replace(".base_layer.", ".")
