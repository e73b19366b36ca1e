"""What one run leaves for itself counts for no other run: the digest of each part, and who takes what."""

import copy
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import make, make_rows, make_trainer, same, weights_of
from torch.utils.data import IterableDataset, Subset

from hf_maskselect import PruningTrainer
from hf_maskselect.search.contents import Contents, NoDigest, digest_of

SEARCH = {"method": "random", "num_candidates": 3, "refit_rows": 16, "criterion_batches": 2, "max_steps": 2}
FACTOR = 1.0


def rows_digest(dataset):
    contents = Contents({})
    contents.rows(dataset)
    return contents.hex()


# -- contents --------------------------------------------------------------------------------------------------------


def table(seed=0):
    rows = make_rows(40, seed=seed)
    return Dataset.from_list([{name: value.tolist() for name, value in row.items()} for row in rows])


@pytest.mark.parametrize("kind", [list, Subset, table], ids=["list", "subset", "table"])
def test_every_row_counts(kind):
    if kind is table:
        first, again, last = table(), table().select(range(40)), table().to_list()
        last[-1]["labels"] = 1 - last[-1]["labels"]
        last = Dataset.from_list(last, features=first.features)
    else:
        rows, changed = make_rows(40), make_rows(40)
        changed[-1]["labels"] = 1 - changed[-1]["labels"]
        wrap = (lambda data: Subset(data, range(40))) if kind is Subset else list
        first, again, last = wrap(rows), wrap(copy.deepcopy(rows)), wrap(changed)
    assert rows_digest(first) == rows_digest(again) != rows_digest(last)
    if kind is table:
        assert rows_digest(first) != rows_digest(first.select([1, 0, *range(2, 40)]))


def test_types_and_shapes_count():
    values = [1, 1.0, True, "1", b"1", None, [1], (1,), {1}, {1: 1}, torch.ones(2, 3), torch.ones(3, 2)]
    values += [
        np.ones((2, 3)),
        np.ones((3, 2)),
        torch.ones(2, 3).bfloat16(),
        torch.ones(2, 3).long(),
        [[1], 2],
        [1, [2]],
    ]
    assert len({digest_of(value, known={}) for value in values}) == len(values)


def test_a_stream_and_an_open_file_have_no_digest(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from make_rows(4)

    with pytest.raises(NoDigest, match="which has no length"):
        rows_digest(Stream())
    with open(tmp_path / "file", "w") as file, pytest.raises(NoDigest, match="TextIOWrapper"):
        digest_of(lambda: file, known={})


def variants():
    """Functions of which each differs from the others in one thing."""

    def with_closure(factor):
        return lambda predicted: predicted * factor

    def helped(predicted):
        return predicted * FACTOR

    class Scale:
        def __init__(self, factor):
            self.factor = factor

        def __call__(self, predicted):
            return predicted * self.factor

    class Shift(Scale):
        def __call__(self, predicted):
            return predicted + self.factor

    def default(predicted, factor=1.0):
        return predicted * factor

    def other_default(predicted, factor=2.0):
        return predicted * factor

    return [
        *(lambda x: x, lambda x: -x, lambda x: x + 1, lambda x: x + 2, lambda x: x.mean(), lambda x: x.sum()),
        *(with_closure(1.0), with_closure(2.0), with_closure([1.0]), helped, default, other_default),
        *(Scale(1.0), Scale(2.0), Shift(1.0), partial(default, factor=3.0), partial(default, factor=4.0)),
        *(Scale(1.0).__call__, Shift(1.0).__call__, torch.sum, torch.mean, np.sum, len, max),
    ]


def test_functions_count_with_code_and_all_that_they_read(monkeypatch):
    digests = [digest_of(function, known={}) for function in variants()]
    assert len(set(digests)) == len(digests)
    assert digests == [digest_of(function, known={}) for function in variants()]
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 2.0)
    changed = [digest_of(function, known={}) for function in variants()]
    assert [i for i, pair in enumerate(zip(digests, changed, strict=True)) if pair[0] != pair[1]] == [9]


def test_a_class_counts_the_same_after_one_of_its_objects_was_copied():
    class Remembering:
        def metric(self, predicted):
            return predicted

    digest = digest_of(Remembering().metric, known={})
    copy.deepcopy(Remembering())
    assert digest_of(Remembering().metric, known={}) == digest


@pytest.mark.slow
def test_the_digest_is_the_same_in_another_process():
    text = (
        "import test_identity as t; print([t.digest_of(f, known={}) for f in t.variants()], t.rows_digest(t.table()))"
    )
    here = Path(__file__)
    path = os.pathsep.join([str(here.parent), str(here.parents[1]), str(here.parents[2])])
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # another order of sets
    done = subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    digests = [digest_of(function, known={}) for function in variants()]
    assert done.stdout == f"{digests} {rows_digest(table())}\n" and len(digests) == 24


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_seconds():
    ids = torch.randint(0, 30000, (100_000, 128))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": 1} for row in ids]
    data = Dataset.from_dict({"input_ids": ids.numpy(), "attention_mask": np.ones((100_000, 128), dtype=np.int64)})
    for dataset in (rows, data):
        start = time.process_time()
        rows_digest(dataset)
        assert time.process_time() - start < 15  # 2 s on a free core


# -- the journal -----------------------------------------------------------------------------------------------------


def loss_of(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits, labels)


def twice_loss_of(outputs, labels, num_items_in_batch=None):
    return 2 * torch.nn.functional.cross_entropy(outputs.logits, labels)


def accuracy(predicted):
    return {"score": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def error(predicted):
    return {"score": float((predicted.predictions.argmax(-1) != predicted.label_ids).mean())}


class OwnLoss(PruningTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss + 1, outputs) if return_outputs else loss + 1


def frozen():
    model = make()
    model.bert.embeddings.requires_grad_(False)
    return model


def changed_rows():
    """One row differs, which no sample of 32 reads."""
    rows = make_rows(96)
    rows[61]["labels"] = 1 - rows[61]["labels"]
    return rows


HELD_OUT = {"selection_dataset": make_rows(40, seed=2)}
TRAINED = {"train_dataset": make_rows(96)}
METRIC = {"selection_metric": "score", "metric_for_best_model": "score"}


def run(folder, model=None, trainer=PruningTrainer, keywords=None, stop=False, **changes):
    """Run, or stop after the first search; returns how many trials were made in the first search."""
    keywords = {**HELD_OUT, **TRAINED, **(keywords or {})}
    made = make_trainer(folder, model, trainer=trainer, keywords=keywords, **{**SEARCH, "num_levels": 1, **changes})
    count, trial = [0], made.run.bench.trial

    def counted(*args, **kwargs):
        count[0] += 1
        return trial(*args, **kwargs)

    made.run.bench.trial = counted
    if stop:
        made.run.search._adopt = lambda winner: 1 / 0
        with pytest.raises(ZeroDivisionError):
            made.train()
    else:
        made.train()
    return count[0]


def changed_held_out():
    rows = make_rows(40, seed=2)
    rows[39]["input_ids"][0] += 1
    return rows


CHANGES = [
    ("nothing", {}, {}),
    ("train rows", {}, {"keywords": {"train_dataset": changed_rows()}}),
    ("held-out rows", {}, {"keywords": {"selection_dataset": changed_held_out()}}),
    ("functions", {"keywords": {"compute_loss_func": loss_of}}, {"keywords": {"compute_loss_func": twice_loss_of}}),
    (
        "functions",
        {"keywords": {"compute_metrics": accuracy}} | METRIC,
        {"keywords": {"compute_metrics": error}} | METRIC,
    ),
    ("functions", {}, {"trainer": OwnLoss}),
    ("trained parameters", {}, {"model": frozen}),
    ("arguments", {}, {"learning_rate": 2e-3}),
]


@pytest.mark.parametrize(
    ("part", "before", "after"),
    [
        pytest.param(*change, id=f"{i}-{change[0]}", marks=[pytest.mark.slow] if i not in (1, 4) else [])
        for i, change in enumerate(CHANGES)
    ],
)
@pytest.mark.filterwarnings("ignore:training ended")
def test_trials_of_another_run_are_made_again(tmp_path, part, before, after, recwarn):
    run(tmp_path, stop=True, **before)
    recwarn.clear()
    after = {name: value() if name == "model" else value for name, value in after.items()}
    trials = run(tmp_path, **after)
    told = [str(warning.message) for warning in recwarn if "searched afresh" in str(warning.message)]
    if part == "nothing":
        assert trials == 0 and not told
    else:
        assert trials == 3 and len(told) == 1 and part in told[0]


def test_what_has_no_digest_is_told_and_not_taken(tmp_path):
    with open(tmp_path / "log", "w") as file:

        def noted(outputs, labels, num_items_in_batch=None):
            file.write("x")
            return loss_of(outputs, labels)

        keywords = {"compute_loss_func": noted}
        with pytest.warns(UserWarning, match="functions of this run cannot be told .* TextIOWrapper.*are repeated"):
            run(tmp_path / "out", stop=True, keywords=keywords)
        with pytest.warns(UserWarning, match="cannot be told from those of another"):
            assert run(tmp_path / "out", keywords=keywords) == 3


def test_exchanged_weights_of_survivors_are_refused(tmp_path):
    changes = {"selection": "survivors", "trial_steps": 1}
    run(tmp_path, stop=True, **changes)
    first, second = sorted((tmp_path / "_survivors").iterdir())[:2]
    shutil.copy(first, second)
    with pytest.raises(ValueError, match="has the weights of another search or candidate .*delete"):
        run(tmp_path, **changes)


# -- what a resume takes ---------------------------------------------------------------------------------------------

LEVELS = {"level_eval_steps": 1, "save_strategy": "steps", "save_steps": 6}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), keywords={**HELD_OUT, "teacher": make(seed=3)}, **LEVELS)
    trainer.train()
    return trainer


def resume(whole, folder, teacher_seed=3, **keywords):
    teacher = {} if teacher_seed is None else {"teacher": make(seed=teacher_seed)}
    trainer = make_trainer(folder, make(seed=5), keywords={**HELD_OUT, **teacher, **keywords}, **LEVELS)
    trainer.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-6")
    return trainer


def test_the_same_run_goes_on(whole, tmp_path):
    again = copy.deepcopy(HELD_OUT)
    assert same(weights_of(resume(whole, tmp_path, **again).model), weights_of(whole.model))


@pytest.mark.parametrize("teacher_seed", [4, None])
def test_another_teacher_is_refused(whole, tmp_path, teacher_seed):
    with pytest.raises(ValueError, match="checkpoint-6 was written with another teacher"):
        resume(whole, tmp_path, teacher_seed)


def test_the_best_of_a_level_on_other_rows_is_refused(whole, tmp_path):
    with pytest.raises(ValueError, match="_level_best.safetensors was chosen with other held-out rows, so its score"):
        resume(whole, tmp_path, selection_dataset=changed_held_out())


class Counting:
    """A metric that remembers its calls."""

    def __init__(self):
        self.seen = []

    def compute(self, predicted):
        self.seen.append(len(predicted.label_ids))
        return {"seen": len(self.seen)}


def test_a_metric_that_remembers_its_calls_is_the_same_in_a_resumed_run(tmp_path):
    def run(**train):
        keywords = {**HELD_OUT, "compute_metrics": Counting().compute}
        make_trainer(tmp_path, keywords=keywords, selection_metric="seen", **LEVELS).train(**train)

    run()
    run(resume_from_checkpoint=f"{tmp_path}/checkpoint-6")
