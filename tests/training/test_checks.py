"""What a model may not be spread over, in a sentence that says what to use instead."""

import types

import pytest
from tiny import make, make_config, make_trainer
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from hf_maskselect.training.checks import check_devices, check_engine


def fsdp(**changes):
    """A trainer under FSDP2, as accelerate would make it where there is a GPU."""
    plugin = {"state_dict_type": "StateDictType.FULL_STATE_DICT", "cpu_offload": OffloadPolicy()}
    plugin |= {"activation_checkpointing": False, **{k: v for k, v in changes.items() if k not in ("is_fsdp2",)}}
    state = types.SimpleNamespace(fsdp_plugin=types.SimpleNamespace(**plugin))
    accelerator = types.SimpleNamespace(state=state, is_fsdp2=changes.get("is_fsdp2", True))
    return engine(is_fsdp_enabled=True, accelerator=accelerator)


def engine(tensor=1, context=1, sequence=1, **changes):
    given = {"is_deepspeed_enabled": False, "is_fsdp_enabled": False, "model": make(), **changes}
    sizes = {"get_tp_size": lambda: tensor, "get_cp_size": lambda: context, "get_sp_size": lambda: sequence}
    return types.SimpleNamespace(**given, **sizes)


PDP = {"method": "pdp", "num_levels": None, "refit_rows": 0}
EACH_STEP = {"eval_strategy": "steps", "save_strategy": "steps"}
NM = {"pattern": "2:4", "sparsity": None, "num_levels": None}


@pytest.mark.parametrize(
    ("trainer", "changes", "expected"),
    [
        (engine(is_deepspeed_enabled=True), {}, "DeepSpeed .* use DistributedDataParallel, or FSDP2"),
        (engine(tensor=2), {}, "tensor parallelism \\(over 2 devices\\)"),
        (engine(context=2), {}, "context parallelism"),
        (fsdp(is_fsdp2=False), {}, "fsdp_config={'version': 2}"),
        (fsdp(state_dict_type="StateDictType.SHARDED_STATE_DICT"), {}, "'FULL_STATE_DICT'"),
        (fsdp(cpu_offload=CPUOffloadPolicy()), {}, "cpu_offload"),
        (fsdp(activation_checkpointing=True), {}, "gradient_checkpointing=True"),
        (fsdp(), {"method": "random"}, "num_candidates=4 .* set it to 1, or use DistributedDataParallel"),
        (fsdp(), {"method": "taylor"}, "refit_rows=256 needs whole matrices: set it to 0, or use DistributedData"),
        (fsdp(), {"level_eval_steps": 2}, "level_eval_steps"),
        (fsdp(), {"method": "gumbel", "num_levels": None, "refit_rows": 0}, "'pdp' with an N:M pattern"),
        (fsdp(), PDP, "whole matrices"),
        (
            fsdp(),
            {**PDP, **NM, "load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "best",
        ),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, trainer, changes, expected):
    with pytest.raises(ValueError, match=expected):
        check_engine(make_config(tmp_path, **changes), trainer, None)


def test_a_user_score_is_refused_on_rows_of_one_rank(tmp_path):
    with pytest.raises(ValueError, match="score_fn"):
        check_engine(make_config(tmp_path, method="random", num_candidates=1, refit_rows=0), fsdp(), lambda *_: None)


def test_what_is_supported_passes(tmp_path):
    for changes in ({}, {"method": "random", "num_candidates": 1, "refit_rows": 0}, {**PDP, **NM}, NM):
        check_engine(make_config(tmp_path, **changes), fsdp(), None)
    check_engine(make_config(tmp_path, method="random"), engine(), None)


def test_one_process_with_two_devices_is_refused(tmp_path):
    with pytest.raises(ValueError, match="accelerate launch"):
        check_devices(types.SimpleNamespace(n_gpu=2))


def test_trial_batches_are_whole_micro_batches(tmp_path):
    with pytest.raises(ValueError, match="trial_batch_size=12 .* choose 8 or 16"):
        make_trainer(tmp_path, method="random", trial_steps=2, trial_batch_size=12)
