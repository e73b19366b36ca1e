"""What `PruningConfig` does not go with among the trainer's other arguments: refused before the run begins."""

from __future__ import annotations

from collections.abc import Mapping

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from ..config import PruningConfig
from ..fields.rules import SELECTION_LOSSES
from ..masking.base import Pattern
from ..masking.maskset import MaskSet
from ..masking.schedule import LevelPlan
from ..masking.scores import Criterion, ScoreFn
from ..search.pool import candidate_pool
from ..storage.models import pruned_modules_of


def check_rows(args: PruningConfig, train, selection, draws: bool) -> None:
    """The rows that a run draws from must be there when it begins; draws: whether it is to make masks."""
    if draws and train is None and (args.searches or args.criterion != "magnitude" or args.refit_rows):
        raise ValueError(
            "there is no train_dataset, and trials, gradient samples and refits draw their rows from it, whatever "
            "get_train_dataloader gives: pass it, or use method='magnitude' with refit_rows=0"
        )
    if selection is None and args.needs_selection_split:
        raise ValueError(
            f"num_candidates={args.num_candidates} and level_eval_steps={args.level_eval_steps} need rows to choose "
            "on, and none were held out when the PruningTrainer was made: make a new one, or pass selection_dataset"
        )


def check_batches(args: PruningConfig) -> None:
    """What trials, which one device runs alone, do not go with."""
    if args.searches and args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy='batch_rebalance' makes batches for several devices, but a trial runs on "
            "one: use 'group_by_length'"
        )
    rows, micro = args.trial_batch_size, args.per_device_train_batch_size
    if rows is not None and rows > micro and rows % micro:
        raise ValueError(
            f"trial_batch_size={rows} is no multiple of per_device_train_batch_size={micro}, in pieces of which a "
            f"device runs it: choose {rows // micro * micro} or {-(-rows // micro) * micro}"
        )


def check_score_fn(args: PruningConfig, score_fn: ScoreFn | None) -> None:
    """A user's scores are those of a random mask."""
    if score_fn is not None and args.method != "random":
        raise ValueError(
            f"score_fn has no meaning with method={args.method!r}: use method='random' (num_candidates=1 for one mask)"
        )


def check_metric(args: PruningConfig, compute_metrics) -> None:
    """What masks are chosen by must be there to be computed."""
    metric = args.selection_metric
    by_metric = metric is not None and metric not in SELECTION_LOSSES
    if args.needs_selection_split and by_metric and compute_metrics is None:
        raise ValueError(f"selection_metric={metric!r} needs compute_metrics: pass it, or choose 'loss'")
    if args.needs_selection_split and by_metric and (args.batch_eval_metrics or args.include_for_metrics):
        field = "batch_eval_metrics" if args.batch_eval_metrics else "include_for_metrics"
        raise ValueError(
            f"selection_metric={metric!r} does not go with {field}: for a trial compute_metrics gets predictions and "
            "labels of the whole selection split and nothing else; choose 'loss'"
        )


def check_proposals(args: PruningConfig, criteria: Mapping[str, Criterion]) -> None:
    """Refuse proposals that are unknown or too few, or that read gradients where no samples of them are taken. A
    score_fn reads what there is."""
    for proposal in [] if args.soft else candidate_pool(args, criteria):
        if args.criterion_batches == 0 and proposal.criterion != "score_fn" and criteria[proposal.criterion].needs:
            raise ValueError(
                f"criterion_batches=0 but proposal '{proposal}' needs gradients: set it to 64 or more, or "
                "proposals='paper', which are votes around candidate 0"
            )


def check_parameters(weights: Mapping[str, Tensor]) -> None:
    """What a mask has no hold on, though a module of the model multiplies by it."""
    for name, weight in weights.items():
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"{name} is no parameter but computed from others, so zeros in it do not last: remove its "
                f"parametrization, or leave it dense with exclude_modules=[{name.removesuffix('.weight')!r}]"
            )


def check_modules(args: PruningConfig, model: nn.Module) -> None:
    """A model that was pruned in part goes on in part, unless it is told otherwise."""
    if args.target_modules is not None or args.exclude_modules is not None or not isinstance(model, PreTrainedModel):
        return
    told = pruned_modules_of(model)
    # A configuration alone says nothing of the weights: a fresh model may have been made from it.
    if told and args.keep_zeros and MaskSet.from_zeros(model, **told).sparsity():
        fields = ", ".join(f"{name}={value!r}" for name, value in told.items())
        raise ValueError(
            f"the model was pruned with {fields}, and without that a run would cut its other matrices as well: set "
            f"{fields} to go on with those it was pruned in, or name all that are to be pruned in target_modules"
        )


def check_shapes(args: PruningConfig, weights: Mapping[str, Tensor], transposed: set[str]) -> None:
    """What the pattern does not go with among the model's prunable weights; transposed: names of those of Conv1D."""
    for name, weight in weights.items():
        args.mask_pattern.check(name, weight.shape)
    if not args.mask_pattern.transposable and (turned := sorted(transposed & weights.keys())):
        raise ValueError(
            f"pattern={args.pattern!r} does not fit {turned[0]}: Conv1D stores its weight transposed, so rows and "
            "groups would run along the wrong axis; use pattern='unstructured', or leave it out with exclude_modules"
        )


def check_adapter(model: nn.Module) -> None:
    """Masks would cover an adapter's own matrices, and keep shut those that begin at zero."""
    if not is_peft_available():
        return
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"the {type(model).__name__} has a PEFT adapter, and adapters are not pruned: merge it first "
            "(merge_adapter_with_masks), or prune the model without it"
        )


def check_packs(args: PruningConfig, model) -> None:
    """Packing needs a model that can be built from its configuration."""
    if (
        args.pack_on_save
        and model is not None
        and getattr(transformers, type(model).__name__, None) is not type(model)
    ):
        raise ValueError(
            f"pack_on_save=True needs a model class of transformers, and {type(model).__name__} is none: leave it out"
        )


def check_start(args: PruningConfig, masks: MaskSet, plan: LevelPlan) -> None:
    """Refuse a target below the zeros that the model has already, and a pattern whose exact count needs some of their
    places: pruned weights do not return."""
    if args.emergent or masks.kept == masks.total:
        return
    pattern = args.mask_pattern
    if masks.kept < pattern.keeps([mask.shape for mask in masks.values()], args.sparsity):
        raise ValueError(
            f"sparsity={args.sparsity} is less than the {masks.sparsity():.6f} that the model has already, and pruned "
            f"weights do not return: set {_same_zeros(pattern, masks)}{_returning(args)}"
        )
    found = ((level, _shortage(pattern, masks, level)) for level in plan.levels)
    short = {level: text for level, text in found if text}
    if short:
        level, target = next(iter(short)), plan.levels[-1]
        in_one = "" if target in short else f", or go to {target:g} in one level (num_levels=1)"
        raise ValueError(
            f"pattern={args.pattern!r} at sparsity {level:g} needs places of zeros that the model has already, and "
            f"pruned weights do not return: {short[level]}; set {_returning(args)}, start from a denser "
            f"model{in_one}"
        )


def _returning(args: PruningConfig) -> str:
    if args.keep_zeros:
        return "keep_zeros=False to let them return"
    return "requires_grad=True for weights that are frozen, whose zeros stay in any case"


def _same_zeros(pattern: Pattern, masks: MaskSet) -> str:
    """The arguments under which the model goes on with the zeros it has; none where nothing else is left."""
    if not masks.kept:
        return ""
    sparsity = masks.sparsity()
    same_count = masks.kept == pattern.keeps([mask.shape for mask in masks.values()], sparsity)
    fits = pattern.sparsity is None and same_count and masks.reaches(pattern, sparsity)
    within = "" if fits else "pattern='unstructured' and "
    return f"{within}sparsity={sparsity!r} to fine-tune it with its zeros kept, more to prune further, or "


def _shortage(pattern: Pattern, masks: MaskSet, sparsity: float) -> str:
    """What the first matrix that cannot hold the pattern among the weights alive lacks; empty if there is none."""
    if masks.reaches(pattern, sparsity):  # the level leaves them as they are
        return ""
    found = ((name, pattern.shortage(mask, sparsity)) for name, mask in masks.items())
    return next((f"in {name} {text}" for name, text in found if text), "")
