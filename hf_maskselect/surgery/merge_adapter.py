"""PEFT adapters on pruned models (needs `peft`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..masking.maskset import MaskSet
from ..masking.targets import prunable_weights

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)


@torch.no_grad()
def merge_adapter_with_masks(model: PeftModel, masks: MaskSet | None = None) -> PreTrainedModel:
    """Fold an adapter into the pruned model under it, and keep the model's zeros.

    A low-rank update has no zeros, so plain `merge_and_unload` gives a dense model. Here what the adapter adds at
    pruned places is dropped, and the share of the update that this costs is logged. Modules that were trained whole
    beside the adapter (`modules_to_save`) take the place of those they were copied from, with the same zeros.

    Args:
        model: a `PeftModel` whose base model is pruned, such as `get_peft_model(load_pruned(path)[0], ...)`.
        masks: the masks of the base model (as `load_pruned` gives them); by default its zeros before merging.

    Returns:
        the base model, merged, with exactly the zeros of the masks.

    Raises:
        ValueError: no `PeftModel`, masks of another model, or an adapter that does not merge or is merged already;
            the model is then as it was.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    if not isinstance(model, PeftModel):
        raise ValueError(
            f"{type(model).__name__} is no PeftModel, so there is no adapter to merge: give what peft.get_peft_model "
            "or PeftModel.from_pretrained returned"
        )
    if not isinstance(model.base_model, BaseTuner):
        raise ValueError(
            f"an adapter of type {model.active_peft_config.peft_type.value} is no change of the weights and cannot be "
            "merged into them: use LoRA or another that is"
        )
    if any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer)):
        raise ValueError(
            "the adapter is merged into the weights already, which hides their zeros: call model.unmerge_adapter() "
            "first"
        )
    named = model.get_base_model().named_parameters(remove_duplicate=False)
    before = {_plain(name): p.detach().clone() for name, p in named if ".modules_to_save." not in name}
    for name, mask in sorted(masks.items()) if masks is not None else ():
        if name not in before:
            raise ValueError(
                f"the masks do not fit the model: {name} is no weight of the model under the adapter; pass the masks "
                "that load_pruned gave with it"
            )
        if mask.shape != before[name].shape:
            raise ValueError(
                f"the masks do not fit the model: {name} has shape {tuple(before[name].shape)} but its mask has "
                f"{tuple(mask.shape)}; pass the masks that load_pruned gave with it"
            )
    merged = model.merge_and_unload()
    if masks is None:
        masks = MaskSet({name: before[name] != 0 for name in prunable_weights(merged)})
    weights = dict(merged.named_parameters(remove_duplicate=False))
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
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")
