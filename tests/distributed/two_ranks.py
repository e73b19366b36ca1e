"""One rank of some runs, one after the other: each evaluates, trains with a search, and writes what it ended with."""

import json
import os
import signal
import time

import torch
import torch.distributed.distributed_c10d as c10d
from tiny import losses, make, make_rows, make_trainer
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from hf_maskselect.masking.scores import GradientStats
from hf_maskselect.search.weight_files import BestRefit
from run_glue import leave_process_group


def break_something(trainer, fault):
    """At its third trial, with its gradient samples, or with the fit that it has kept."""
    trial, tried = trainer.run.bench.trial, []

    def faulty(*args):
        tried.append(1)
        if len(tried) == 3 and fault == "raise":
            raise ArithmeticError("a trial went wrong")
        if len(tried) == 3 and fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(tried) == 3 and fault == "hang":
            time.sleep(15)
        return trial(*args)

    take = GradientStats._take

    def other(self, weight):
        if "layer.1.output" in self._names[id(weight)]:
            weight.grad.abs_().add_(1)
        take(self, weight)

    fit = trainer.run.bench.refit

    def crooked(*args):
        done = fit(*args)
        for weight in trainer.run.method.weights.values():
            weight.data.mul_(1.01)
        return done

    if fault == "refit":
        trainer.run.bench.refit = crooked
    if fault == "load":
        BestRefit.load = lambda _: 1 / 0
    if fault == "statistics":
        GradientStats._take = other
    trainer.run.bench.trial = faulty
    if fault == "journal":
        trainer.run.search._journal.add = lambda *_: 1 / 0


def count_what_is_sent(search):
    """Bytes a rank sends in each search, whatever the collective: objects, each its size and its content."""
    told, choose = [], search.choose
    kinds = (
        "all_gather",
        "all_reduce",
        "broadcast",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "send",
        "isend",
    )

    def counted(*args):
        sent, plain = [], {kind: getattr(c10d, kind) for kind in kinds}

        def watched(kind):
            def call(*given, **keywords):
                tensor = given[1] if kind in ("all_gather", "all_gather_into_tensor") else given[0]
                sent.append(tensor.numel() * tensor.element_size())
                return plain[kind](*given, **keywords)

            return call

        for module in (c10d, torch.distributed):
            for kind in kinds:
                setattr(module, kind, watched(kind))
        masks = choose(*args)
        for module in (c10d, torch.distributed):
            for kind in kinds:
                setattr(module, kind, plain[kind])
        told.append(sum(sent))
        return masks

    search.choose = counted
    return told


class Terminated(TrainerCallback):
    """Sends this process a SIGTERM in the middle of an optimizer step."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def share_of_all(outputs, labels, num_items_in_batch):
    """As `compute_loss_func` is documented: the labels of all ranks and micro-batches are counted together."""
    return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def accuracy(predicted):
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def run(folder, rows=96, resume=None, fault=None, terminate=None, apart=False, own_loss=False, **changes):
    """apart: every rank has a folder of its own, as machines without a common disk; own_loss: instead of a teacher."""
    taught = {"compute_loss_func": share_of_all} if own_loss else {"teacher": make(seed=3)}
    trainer = make_trainer(
        folder / (f"out{os.environ['RANK']}" if apart else "out"),
        make(),
        make_rows(rows),
        data_seed=1,
        ddp_find_unused_parameters=False,
        keywords={"selection_dataset": make_rows(16, seed=2), "compute_metrics": accuracy, **taught},
        **changes,
    )
    rank = trainer.args.process_index
    if fault and rank == (0 if fault == "journal" else 1):
        break_something(trainer, fault)
    if terminate is not None and rank == 1:
        trainer.callback_handler.callbacks[-1].jit_manager.kill_wait = 0
        trainer.add_callback(Terminated(terminate))
    sent = count_what_is_sent(trainer.run.search)
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    found = {
        "steps": trainer.state.global_step,
        "wrapped": type(trainer.model_wrapped).__name__,
        "before": before,
        "after": trainer.evaluate()["eval_loss"],
        "losses": losses(trainer),
        "masks": trainer.pruning_state().masks.digest(),
        "chosen": [s.metrics()["search_chosen"] for s in trainer.run.search.history if len(s.candidates) > 1],
        "scores": [[c.scores for c in s.candidates] for s in trainer.run.search.history],
        "digests": [[c.digest for c in s.candidates] for s in trainer.run.search.history],
        "sent": sent,
        "bytes": sum(p.numel() * p.element_size() for p in trainer.model.parameters()),
        "equivalents": trainer.search_summary()["search_step_equivalents"],
        "weights": float(sum(p.detach().double().abs().sum() for p in trainer.model.parameters())),
    }
    folder.mkdir(exist_ok=True)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


def main(folder, runs):
    """Do every run: name -> PruningConfig's fields, and beside them the other arguments of `run`.

    "fault" is one of `break_something`.
    """
    for name, keywords in runs.items():
        run(folder / name, **keywords)
    leave_process_group()
