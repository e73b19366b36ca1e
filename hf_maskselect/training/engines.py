"""How a model may be spread over devices: whole on each (DistributedDataParallel) or cut by rows (FSDP2)."""

from __future__ import annotations

from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer

from ..config import PruningConfig
from ..masking.dtensors import is_cut
from ..masking.patterns import NM
from ..masking.scores import ScoreFn


def check_devices(args: PruningConfig) -> None:
    """Before accelerate is set up.

    Raises:
        ValueError: one process would use several devices.
    """
    if args.n_gpu > 1:
        raise ValueError(
            "nn.DataParallel is not supported: start with `accelerate launch`, or show one GPU to the process"
        )


def check_engine(args: PruningConfig, trainer: Trainer, score_fn: ScoreFn | None) -> None:
    """Once accelerate is set up, which its launcher may have told what the arguments do not say.

    Raises:
        ValueError: the engine is not supported, or not with these arguments.
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
    if any(is_cut(weight) for weight in trainer.model.parameters()):
        raise ValueError(
            "the model is sharded already: load it plainly, and let fsdp=True with fsdp_config={'version': 2} shard it"
        )
    if trainer.is_fsdp_enabled:
        _check_fsdp(args, trainer, score_fn)


def _check_fsdp(args: PruningConfig, trainer: Trainer, score_fn: ScoreFn | None) -> None:
    """What is tested: hard masks without a search, and PDP where the thresholds lie inside rows."""
    plugin = trainer.accelerator.state.fsdp_plugin
    ddp = "or use DistributedDataParallel"
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
        (
            args.searches,
            f"num_candidates={args.num_candidates} but no rank has the model to run a trial",
            f"set it to 1, {ddp}, where the ranks share the trials",
        ),
        (
            args.refit_rows,
            f"refit_rows={args.refit_rows} needs whole matrices",
            f"set it to 0, {ddp}",
        ),
        (
            args.level_eval_steps,
            f"level_eval_steps={args.level_eval_steps} keeps whole weights",
            f"set it to 0, {ddp}",
        ),
        (score_fn is not None, "score_fn would see the rows of one rank", f"use a built-in criterion, {ddp}"),
        (args.method == "gumbel", "method='gumbel' is not supported", f"use 'pdp' with an N:M pattern, {ddp}"),
        (
            args.method == "pdp" and not isinstance(args.mask_pattern, NM),
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
