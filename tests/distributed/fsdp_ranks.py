"""One rank of runs under FSDP2 or DistributedDataParallel, and of masks on a model cut by `fully_shard` itself."""

import json

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from tiny import losses, make, make_config, make_rows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_maskselect import PruningTrainer, prunable_weights
from hf_maskselect.masking.dtensors import gathered
from hf_maskselect.masking.patterns import parse_pattern
from hf_maskselect.masking.proposals import Proposal, propose
from hf_maskselect.masking.schedule import LevelPlan
from hf_maskselect.methods.hard import HardMethod
from run_glue import leave_process_group

FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"], "state_dict_type": "FULL_STATE_DICT"}
FSDP |= {"reshard_after_forward": False, "cpu_ram_efficient_loading": False}


class Stop(TrainerCallback):
    """End the training after some step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def run(folder, engine, resume=None, fsdp=None, stop=None, **changes):
    engines = {"fsdp": {"fsdp": True, "fsdp_config": {**FSDP, **(fsdp or {})}}, "ddp": {}}
    config = make_config(folder / "out", **{"ddp_find_unused_parameters": False, **engines[engine], **changes})
    if engine == "fsdp":  # accelerate looks at FSDP only where it sees GPUs; everything after that runs on any device
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    rows = make_rows()
    trainer = PruningTrainer(make(), config, train_dataset=rows, eval_dataset=rows[:32], callbacks=[Stop(stop)])
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    state = trainer.pruning_state()
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "sharded": all(isinstance(weight, DTensor) for weight in trainer.model.parameters()),
        "losses": losses(trainer),
        "evaluated": [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e],
        "sparsity": [e["eval_sparsity"] for e in trainer.state.log_history if "eval_sparsity" in e],
        "masks": state.masks.digest(),
        "kept": state.masks.kept,
    }


def prune(model):
    """Two cuts and six steps of AdamW, without a trainer."""
    batch = {k: torch.stack([row[k] for row in make_rows(8)]) for k in ("input_ids", "attention_mask", "labels")}
    pattern, plan = parse_pattern("unstructured", "global"), LevelPlan.build([0.5, 0.9], 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def choose(level):
        now = {"weights": method.weights, "masks": method.masks, "sparsity": plan.levels[level], "level": level}
        return propose(Proposal("magnitude", "global"), 0, stats=None, seed=0, pattern=pattern, **now)

    method = HardMethod(prunable_weights)
    method.attach(model)
    method.begin(plan, optimizer)
    for step in range(6):
        level = method.level_due(step)
        if level is not None:
            method.start_level(level, choose(level))
        loss = model(**batch).loss
        loss.backward()
        method.before_clipping()
        optimizer.step()
        method.on_optimizer_step()
        optimizer.zero_grad()
    zeros = sum(int(gathered(weight.detach()).eq(0).sum()) for weight in method.weights.values())
    sharded = all(isinstance(keep, DTensor) for keep in method._keep.values())
    masks = {"masks": method.masks.digest(), "kept": method.masks.kept}
    return {**masks, "zeros": zeros, "loss": loss.item(), "sharded": sharded}


def direct():
    """`prune` on a model cut by `fully_shard`, beside a whole one."""
    model = make()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return {"cut": prune(model), "whole": prune(make())}


def main(root, engine, runs):
    """Do every run: name -> PruningConfig's fields and the other arguments of `run`; "direct" is `direct`.

    engine: "fsdp" or "ddp".
    """
    for name, keywords in runs.items():
        told = direct() if name == "direct" else run(root / name, engine, **keywords)
        (root / name).mkdir(exist_ok=True)
        (root / name / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(told))
    leave_process_group()
