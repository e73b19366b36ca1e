"""A cut and its refit are one act: what fails half-way is undone, and the run goes on as if nothing had happened."""

import random

import numpy as np
import pytest
import torch
from tiny import losses, make, make_rows, make_trainer, same, weights_of
from transformers import TrainerCallback

DROPOUT = {"hidden_dropout_prob": 0.2}
REFIT = {"method": "magnitude", "refit_rows": 16}
AFTER_REFIT = {"method": "random", "num_candidates": 3, "refit_rows": 16}
TRAINED = {"method": "random", "num_candidates": 3, "trial_steps": 2, "refit_rows": 16}
LEVEL_BEST = {"level_eval_steps": 2, "method": "taylor", "refit_rows": 16}
SOFT = {"num_levels": None, "frozen_steps": 3}


class Broken(KeyboardInterrupt):
    """Not an `Exception`, as an interruption by the user."""


class AtStep(TrainerCallback):
    """Calls `act` before step `step`, and before a level starts there."""

    def __init__(self, trainer, step, act):
        self.step, self.act = step, act
        trainer.callback_handler.callbacks.insert(0, self)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            act, self.act = self.act, lambda: None
            act()


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def failing(owner, name, call, after=False):
    """Make the `call`-th call from now of a method raise, once; `after`: only when it has done its work."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        result = original(*args, **kwargs) if after or len(calls) != call else None
        if len(calls) == call:
            raise Broken
        return result

    setattr(owner, name, wrapped)


def everything(trainer):
    """All that a run goes on from."""
    method = trainer.run.method
    moments = {
        f"{i}.{name}": value.clone()
        for i, state in enumerate(trainer.optimizer.state_dict()["state"].values())
        for name, value in state.items()
    }
    states = {"torch": torch.get_rng_state(), "numpy": torch.tensor(np.random.get_state()[1].astype(np.int64))}
    learned = {n: t.clone() for n, t in method.state_dict().items()}
    masks = {f"mask.{name}": mask.clone() for name, mask in method.masks.items()}
    tensors = weights_of(trainer.model) | moments | states | learned | masks
    others = random.getstate(), method.level, len(trainer.run.search.history), trainer.model.training
    return tensors, others, [p.grad for p in trainer.model.parameters() if p.grad is not None]


def where(trainer, stage):
    """The owner, the method and the call that fails in each stage of the start of a level."""
    bench, method, search = trainer.run.bench, trainer.run.method, trainer.run.search
    return {
        "the first fit": (bench, "refit", 1),
        "the last fit": (bench, "refit", 3),
        "after the fit": (bench, "refit", 1, True),
        "a score": (bench.scorer, "score", 2),
        "a trial step": (method, "before_clipping", 3),
        "the choice": (search, "choose", 1),
        "after the choice": (search, "choose", 1, True),
        "the start": (method, "start_level", 1, True),
        "the cut": (method, "set_masks", 1, True),
        "the end": (method, "finalize", 1, True),
    }[stage]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


CASES = [
    (REFIT, 4, "the start"),
    (AFTER_REFIT, 4, "the first fit"),
    (LEVEL_BEST, 4, "after the fit"),
    ({**SOFT, "method": "gumbel"}, 9, "the cut"),
    slow(REFIT, 4, "the first fit"),
    slow(AFTER_REFIT, 0, "the last fit"),
    slow(AFTER_REFIT, 4, "a score"),
    slow(TRAINED, 4, "a trial step"),
    slow({**TRAINED, "selection": "survivors"}, 4, "after the choice"),
    slow({**TRAINED, "selection": "early"}, 4, "a trial step"),
    slow(LEVEL_BEST, 4, "the first fit"),
    slow(LEVEL_BEST, None, "the end"),
    slow({**SOFT, "method": "pdp", "pdp_tau": 1e-3}, 9, "the choice"),
    slow({**SOFT, "method": "gumbel", "frozen_steps": 0}, None, "the end"),
]


@pytest.mark.parametrize(("changes", "step", "stage"), CASES, ids=lambda value: str(value))
def test_a_level_that_fails_is_undone_to_the_bit(tmp_path, monkeypatch, changes, step, stage):
    """Right after the failure everything is as before the act; a further `train()` gives what it gives a run that was
    interrupted just before."""
    runs = []
    for name in ("before", "within"):
        rows = {"selection_dataset": make_rows(16, seed=2)}
        trainer = make_trainer(tmp_path / name, make(**DROPOUT), keywords=rows, **changes)
        seen = []
        if step is None:
            with monkeypatch.context() as patch:
                finalize = trainer.run.finalize

                def at_the_end(*args, trainer=trainer, seen=seen, finalize=finalize, name=name):
                    seen.append(everything(trainer))
                    if name == "before":
                        raise Broken
                    failing(trainer.run.method, *where(trainer, stage)[1:])
                    finalize(*args)

                patch.setattr(trainer.run, "finalize", at_the_end)
                with pytest.raises(Broken):
                    trainer.train()
        else:

            def now(trainer=trainer, seen=seen, name=name):
                seen.append(everything(trainer))
                if name == "before":
                    raise Broken
                failing(*where(trainer, stage))

            AtStep(trainer, step, now)
            with pytest.raises(Broken):
                trainer.train()
        (before,), after = seen, everything(trainer)
        assert same(before[0], after[0])
        assert before[1] == after[1] and not after[2]
        trainer.train()
        runs.append((losses(trainer), weights_of(trainer.model), trainer.run.method.masks.digest()))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1]) and runs[0][2] == runs[1][2]


@pytest.mark.parametrize("changes", [REFIT, slow(AFTER_REFIT)], ids=["one", "several"])
def test_a_fit_without_memory_is_made_again_with_smaller_batches(tmp_path, changes):
    """With `auto_find_batch_size` the loop runs again with smaller batches, and cuts and refits from the start."""
    rows = {"selection_dataset": make_rows(16, seed=2)}
    trainer = make_trainer(tmp_path / "tried", make(), keywords=rows, auto_find_batch_size=True, **changes)
    fits, refit = [], trainer.run.bench.refit

    def without_memory(*args):
        fits.append(trainer._train_batch_size)
        if len(fits) == 1:
            raise RuntimeError("CUDA out of memory.")
        return refit(*args)

    trainer.run.bench.refit = without_memory
    trainer.train()
    smaller = make_trainer(tmp_path / "whole", make(), keywords=rows, per_device_train_batch_size=fits[1], **changes)
    smaller.train()
    assert fits[0] == 8 and fits[1] < 8 and fits[1:] == [fits[1]] * len(fits[1:])
    assert losses(trainer) == losses(smaller)
    assert same(weights_of(trainer.model), weights_of(smaller.model))


def test_inside_an_act_on_the_cpu_trials_need_no_copy_of_their_own(tmp_path):
    trainer = make_trainer(tmp_path, keywords={"selection_dataset": make_rows(16, seed=2)}, **AFTER_REFIT)
    trainer.run.method.attach(trainer.model)
    sandbox, changed = trainer.run.bench.sandbox, trainer.model.classifier.bias
    with sandbox.undone_on_error():
        with torch.no_grad():
            changed.add_(1)
        with sandbox.untouched():
            own = {name for name, tensor in sandbox.saved.items() if tensor is not sandbox._undo[name]}
            assert own == {"classifier.bias"} and torch.equal(sandbox.saved["classifier.bias"], changed)
