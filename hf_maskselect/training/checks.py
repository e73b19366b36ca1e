"""Checks before a run begins: the arguments, the model and the devices must go together.

Every check raises a `ValueError` that names what is wrong and how to mend it.
"""

from collections.abc import Mapping

import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import PreTrainedModel, Trainer
from transformers.utils import is_peft_available

from ..config import PruningConfig
from ..distillation.distiller import Distiller, FrozenTeacher
from ..fields.rules import SELECTION_LOSSES
from ..masking.base import Pattern
from ..masking.dtensors import is_sharded
from ..masking.maskset import MaskSet
from ..masking.schedule import LevelPlan
from ..masking.scores import Criterion, ScoreFn
from ..masking.targets import transposed_weights
from ..search.pool import candidate_pool
from ..storage.models import pruned_modules_of
from ..surgery.structured.families import checked_family
from .check_inputs import check_output_dir


def check_arguments(args: PruningConfig, model, score_fn: ScoreFn | None, compute_metrics) -> None:
    """Check the arguments of a trainer against each other. Runs before the trainer is set up."""
    if not isinstance(args, PruningConfig):
        raise ValueError(
            f"args must be a PruningConfig, got {type(args).__name__}: it takes every TrainingArguments field"
        )
    check_devices(args)
    check_output_dir(args)
    check_packs(args, model)
    check_batches(args)
    check_score_fn(args, score_fn)
    check_metric(args, compute_metrics)


def check_model(args: PruningConfig, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Check the arguments against a model and its prunable weights."""
    check_adapter(model)
    structure = args.resolved().structure
    if structure is not None:
        family = checked_family(model)
        if args.distill_attention and (structure.free or family.plain_heads):
            raise ValueError(
                f"distill_attention={args.distill_attention} compares the maps of all heads, and pattern="
                f"{args.pattern!r} removes heads of this model: set it to 0"
            )
    check_modules(args, model)
    check_parameters(weights)
    check_shapes(args, weights, transposed_weights(model))


def check_rows(args: PruningConfig, train, selection, draws: bool) -> None:
    """Check that there are rows to draw from and to choose on. `draws`: whether the run will make masks."""
    settings = args.resolved()
    draws = draws and (settings.searches or settings.criterion != "magnitude" or settings.refit_rows > 0)
    if draws and train is None:
        raise ValueError(
            "there is no train_dataset, and trials, gradient samples and refits draw their rows from it, whatever "
            "get_train_dataloader gives: pass it, or use method='magnitude' with refit_rows=0"
        )
    if selection is None and settings.needs_selection_split:
        raise ValueError(
            f"num_candidates={settings.num_candidates} and level_eval_steps={args.level_eval_steps} need rows to "
            "choose on, and there is no train_dataset to hold them out of: pass it, or pass selection_dataset"
        )


def check_batches(args: PruningConfig) -> None:
    """Check the batch options against trials, each of which runs on one device alone."""
    if args.resolved().searches and args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy='batch_rebalance' makes batches for several devices, but a trial runs on "
            "one: use 'group_by_length'"
        )
    rows, micro = args.trial_batch_size, args.per_device_train_batch_size
    if rows is not None and rows > micro and rows % micro:
        raise ValueError(
            f"trial_batch_size={rows} is no multiple of per_device_train_batch_size={micro}, the size of the "
            f"pieces that a device computes at once: choose {rows // micro * micro} or {-(-rows // micro) * micro}"
        )


def check_score_fn(args: PruningConfig, score_fn: ScoreFn | None) -> None:
    """Check that the method uses a `score_fn`."""
    if score_fn is not None and args.resolved().structure is not None:
        raise ValueError(
            f"score_fn has no meaning with pattern={args.pattern!r}, which scores no weights: leave it out"
        )
    settings = args.resolved()
    if score_fn is not None and settings.soft and settings.criterion == "magnitude":
        given = "gumbel_untrained=True" if args.gumbel_untrained else "criterion='magnitude'"
        raise ValueError(
            f"score_fn has no meaning with method={args.method!r} that begins from magnitudes ({given}, or fields of "
            "the papers such as pdp_tau, gumbel_prior=0 and gumbel_budget=False): leave these unset"
        )
    if score_fn is not None and not settings.soft and args.method != "random":
        raise ValueError(
            f"score_fn has no meaning with method={args.method!r}: use method='random' (num_candidates=1 for one mask)"
        )


def check_metric(args: PruningConfig, compute_metrics) -> None:
    """Check that the selection metric can be computed."""
    settings = args.resolved()
    metric = settings.selection_metric
    by_metric = metric is not None and metric not in SELECTION_LOSSES
    if settings.needs_selection_split and by_metric and compute_metrics is None:
        raise ValueError(f"selection_metric={metric!r} needs compute_metrics: pass it, or choose 'loss'")


def check_planned(trainer: Trainer, base: type[Trainer], planned: bool) -> None:
    """Refuse a subclass that leaves out `super()` where nothing else can plan its run."""
    if not planned:
        names = ("train", "_inner_training_loop", "_prepare_for_training")
        own = [name for name in names if getattr(type(trainer), name) is not getattr(base, name)]
        raise ValueError(
            f"{type(trainer).__name__} overrides {' and '.join(own)} without super(), so that nothing "
            "plans the run and no weight would be pruned: call super() in it"
        )


def selection_metric(args: PruningConfig, distiller: Distiller | FrozenTeacher | None) -> str:
    """Return the metric that candidates are scored by: "loss", "teacher", or a key of `compute_metrics`.

    Raises:
        ValueError: the user asks for "teacher", and there are no soft labels.
    """
    soft_labels = isinstance(distiller, Distiller) and args.distill_logits > 0 and not distiller.is_regression
    metric = args.resolved().selection_metric or ("teacher" if soft_labels else "loss")
    if metric == "teacher" and not soft_labels:
        raise ValueError(
            "selection_metric='teacher' needs a teacher of a classification task and distill_logits > 0: choose 'loss'"
        )
    return metric


def check_proposals(args: PruningConfig, criteria: Mapping[str, Criterion]) -> None:
    """Check that every proposal is known and that the gradients it reads are sampled.

    A `score_fn` must do with the statistics that there are.
    """
    for proposal in [] if args.resolved().soft else candidate_pool(args, criteria):
        if args.criterion_batches == 0 and proposal.criterion != "score_fn" and criteria[proposal.criterion].needs:
            raise ValueError(
                f"criterion_batches=0 but proposal '{proposal}' needs gradients: set it to 64 or more, or "
                "proposals='paper', which are votes around candidate 0"
            )


def check_parameters(weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that a parametrization computes: zeros in them do not persist."""
    for name, weight in weights.items():
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"{name} is computed from other parameters, so zeros in it do not persist: remove its "
                f"parametrization, or leave it dense with exclude_modules=[{name.removesuffix('.weight')!r}]"
            )


def check_modules(args: PruningConfig, model: nn.Module) -> None:
    """Refuse to prune more matrices of a model than it was pruned in, unless the arguments name them."""
    if args.target_modules is not None or args.exclude_modules is not None or not isinstance(model, PreTrainedModel):
        return
    pruned_in = pruned_modules_of(model)
    # The configuration is not enough: a new, dense model may have been made from it.
    if pruned_in and args.keep_zeros and MaskSet.from_zeros(model, **pruned_in).sparsity():
        fields = ", ".join(f"{name}={value!r}" for name, value in pruned_in.items())
        raise ValueError(
            f"the model was pruned with {fields}, and without that its other matrices would be pruned as well: set "
            f"{fields} to prune the same ones, or name all matrices to prune in target_modules"
        )


def check_shapes(args: PruningConfig, weights: Mapping[str, Tensor], transposed: set[str]) -> None:
    """Check the pattern against every prunable weight. `transposed`: the names of the weights of `Conv1D` layers."""
    pattern = args.resolved().pattern
    for name, weight in weights.items():
        pattern.check(name, weight.shape)
    if not pattern.transposable and (turned := sorted(transposed & weights.keys())):
        raise ValueError(
            f"pattern={args.pattern!r} does not fit {turned[0]}: Conv1D stores its weight transposed, so rows and "
            "groups would run along the wrong axis; use pattern='unstructured', or leave it out with exclude_modules"
        )


def check_adapter(model: nn.Module) -> None:
    """Refuse PEFT adapters: masks would cover their matrices, and prune those that start at zero for good."""
    if not is_peft_available():
        return
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"the {type(model).__name__} has a PEFT adapter, which cannot be pruned: merge it first "
            "(merge_adapter_with_masks), or prune the model without it"
        )


def check_packs(args: PruningConfig, model) -> None:
    """Check that `pack_on_save` can build the model from its configuration."""
    if (
        args.pack_on_save
        and model is not None
        and getattr(transformers, type(model).__name__, None) is not type(model)
    ):
        raise ValueError(
            f"pack_on_save=True needs a model class of transformers, and {type(model).__name__} is none: leave it out"
        )


def check_start(args: PruningConfig, masks: MaskSet, plan: LevelPlan) -> None:
    """Check the target and the pattern against the zeros that the model has already: pruned weights do not return."""
    settings = args.resolved()
    if settings.emergent or masks.kept == masks.total:
        return
    pattern = settings.pattern
    if masks.kept < pattern.keeps([mask.shape for mask in masks.values()], settings.sparsity):
        raise ValueError(
            f"sparsity={settings.sparsity} is less than the {masks.sparsity():.6f} that the model has already, and "
            f"pruned weights do not return: set {_same_zeros(pattern, masks)}{_returning(args)}"
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
    """The arguments that keep exactly the zeros of the model; empty where all its weights are zero."""
    if not masks.kept:
        return ""
    sparsity = masks.sparsity()
    same_count = masks.kept == pattern.keeps([mask.shape for mask in masks.values()], sparsity)
    fits = pattern.sparsity is None and same_count and masks.reaches(pattern, sparsity)
    within = "" if fits else "pattern='unstructured' and "
    return f"{within}sparsity={sparsity!r} to fine-tune it with its zeros kept, more to prune further, or "


def _shortage(pattern: Pattern, masks: MaskSet, sparsity: float) -> str:
    """Why the matrices cannot hold the pattern among their kept weights; empty if they can."""
    if masks.reaches(pattern, sparsity):  # the level changes nothing
        return ""
    found = ((name, pattern.shortage(mask, sparsity)) for name, mask in masks.items())
    if text := next((f"in {name} {text}" for name, text in found if text), ""):
        return text
    keep, left = pattern.keeps([mask.shape for mask in masks.values()], sparsity), pattern.in_whole_units(masks)
    return f"{keep} weights must stay in whole {pattern.unit}, and only {left} lie in such" if left < keep else ""


def check_devices(args: PruningConfig) -> None:
    """Refuse several GPUs in one process. Runs before accelerate is set up."""
    if args.n_gpu > 1:
        raise ValueError(
            "nn.DataParallel is not supported: start with `accelerate launch`, or show one GPU to the process"
        )


def check_engine(args: PruningConfig, trainer: Trainer, score_fn: ScoreFn | None) -> None:
    """Refuse engines that are not supported.

    Runs after accelerate is set up, because its launcher may set an engine that `args` does not.
    """
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "DeepSpeed is not supported, at no ZeRO stage: use DistributedDataParallel, or FSDP2 where memory is short"
        )
    sizes = {"tensor": trainer.get_tp_size(), "context": trainer.get_cp_size(), "sequence": trainer.get_sp_size()}
    for kind, size in sizes.items():
        if size > 1:
            raise ValueError(
                f"{kind} parallelism (over {size} devices) is not supported: use DistributedDataParallel or FSDP2"
            )
    assert trainer.model is not None
    if any(is_sharded(weight) for weight in trainer.model.parameters()):
        raise ValueError(
            "the model is sharded already: load it plainly, and let fsdp=True with fsdp_config={'version': 2} shard it"
        )
    check_fsdp(args, trainer, score_fn)
    check_later_levels(args)


def check_later_levels(args: PruningConfig) -> None:
    """Refuse levels that would replace parameters which DDP or torch.compile already hold."""
    settings = args.resolved()
    if settings.structure is None or (len(settings.levels) == 1 and not args.pruning_warmup_steps):
        return
    held = f"on {args.world_size} processes" if args.world_size > 1 else "with torch_compile=True"
    if args.world_size > 1 or args.torch_compile:
        raise ValueError(
            f"pattern={args.pattern!r} {held} can only shrink before the first step: use one level and "
            "pruning_warmup_steps=0, and train once more from the small model to go further"
        )


def check_fsdp(args: PruningConfig, trainer: Trainer, score_fn: ScoreFn | None) -> None:
    """Check the arguments against FSDP, if it is on.

    Tested are hard masks without a search, and PDP where the thresholds lie inside rows.

    Raises:
        ValueError: FSDP does not go with them.
    """
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    ddp, settings = "or use DistributedDataParallel", args.resolved()
    refused = [
        (not trainer.accelerator.is_fsdp2, "version 1 flattens weights", "set fsdp_config={'version': 2}"),
        (
            "FULL_STATE_DICT" not in str(plugin.state_dict_type),
            f"state_dict_type={plugin.state_dict_type} saves no model that from_pretrained loads",
            "set fsdp_config={'state_dict_type': 'FULL_STATE_DICT'}",
        ),
        (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "cpu_offload is not tested with masks", "leave it out"),
        (
            plugin.activation_checkpointing,
            "activation_checkpointing renames the weights",
            "set gradient_checkpointing=True instead",
        ),
        (settings.structure, f"pattern={args.pattern!r} replaces whole layers", ddp),
        (
            settings.searches,
            f"num_candidates={settings.num_candidates} but no rank has the model to run a trial",
            f"set it to 1, {ddp}, where the ranks share the trials",
        ),
        (
            settings.refit_rows,
            f"refit_rows={settings.refit_rows} needs whole matrices",
            f"set it to 0, {ddp}",
        ),
        (
            args.level_eval_steps,
            f"level_eval_steps={args.level_eval_steps} keeps whole weights",
            f"set it to 0, {ddp}",
        ),
        (score_fn is not None, "score_fn would see the rows of one rank", f"use a built-in criterion, {ddp}"),
        (
            not settings.pattern.row_local,
            f"pattern={args.pattern!r} prunes across rows, which lie on several processes",
            f"use another pattern, {ddp}",
        ),
        (
            args.method in ("gumbel", "movement"),
            f"method={args.method!r} is not supported",
            f"use 'pdp' with an N:M pattern, {ddp}",
        ),
        (
            args.method == "pdp" and settings.pattern.groups is None,
            f"method='pdp' with pattern={args.pattern!r} needs thresholds over whole matrices at every step",
            f"use an N:M pattern, whose thresholds lie inside a row, {ddp}",
        ),
        (
            args.method == "pdp" and args.load_best_model_at_end,
            "load_best_model_at_end=True would load the weights of method='pdp' without their masks",
            f"set it to False, {ddp}",
        ),
    ]
    for wrong, problem, remedy in refused:
        if wrong:
            raise ValueError(f"FSDP: {problem}: {remedy}")
