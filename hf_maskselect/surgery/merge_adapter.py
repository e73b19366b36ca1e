"""Merging of PEFT adapters into pruned models (needs `peft`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..masking.maskset import MaskSet
from ..masking.targets import prunable_weights
from ..utils.wrappers import plain_model

if TYPE_CHECKING:  # peft is optional
    from peft import PeftModel

logger = logging.get_logger(__name__)


@torch.no_grad()
def merge_adapter_with_masks(model: PeftModel, masks: MaskSet | None = None) -> PreTrainedModel:
    """Merge an adapter into its pruned base model and keep the zeros of that model.

    A low-rank update has no zeros, so plain `merge_and_unload` returns a dense model. This function drops the update
    of pruned weights, and logs the share of the update that is lost. Modules that were trained in full beside the
    adapter (`modules_to_save`) replace their originals, with the same zeros.

    Args:
        model: a `PeftModel` whose base model is pruned, such as `get_peft_model(load_pruned(path)[0], ...)`.
        masks: the masks of the base model, as `load_pruned` returns them. Defaults to its zeros before merging.

    Returns:
        The merged base model, with exactly the zeros of the masks.

    Raises:
        ValueError: `model` is no `PeftModel`, the masks belong to another model, or the adapter cannot be merged or is
            merged already. The model is unchanged then.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    model = plain_model(model)
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"{type(model).__name__} is no PeftModel, so there is no adapter to merge: pass the result of "
            "peft.get_peft_model or PeftModel.from_pretrained"
        )
    if not isinstance(model.base_model, BaseTuner):
        raise ValueError(
            f"an adapter of type {model.active_peft_config.peft_type.value} does not change the weights, so it "
            "cannot be merged: use LoRA or another that does"
        )
    if any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer)):
        raise ValueError(
            "the adapter is merged already, which hides the zeros of the weights: call model.unmerge_adapter() first"
        )
    named = model.get_base_model().named_parameters(remove_duplicate=False)
    before = {_plain(name): p.detach().clone() for name, p in named if ".modules_to_save." not in name}
    for name, mask in sorted(masks.items()) if masks is not None else ():
        if name not in before:
            raise ValueError(
                f"the masks do not fit the model: {name} is no weight of the base model; pass the masks that "
                "load_pruned returned with it"
            )
        if mask.shape != before[name].shape:
            raise ValueError(
                f"the masks do not fit the model: {name} has shape {tuple(before[name].shape)} but its mask has "
                f"{tuple(mask.shape)}; pass the masks that load_pruned returned with it"
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
    """Return the name of a parameter in the model without the adapter."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")
