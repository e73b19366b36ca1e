"""What would fail in the middle of a run is refused before it, in one sentence; what trains is not."""

import random
import time

import datasets
import numpy as np
import pytest
import torch
from tiny import losses, make, make_rows, make_trainer, same, weights_of
from torch import nn
from torch.utils.data import Dataset

from hf_maskselect import PruningTrainer
from hf_maskselect.training.check_values import CheckedIndices, check_values


class OfRows(Dataset):
    """A user's map-style dataset."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def with_value(rows, index, **changes):
    return [{**row, **changes} if i == index else row for i, row in enumerate(rows)]


def as_lists(rows):
    return [{name: value.tolist() for name, value in row.items()} for row in rows]


def refused(trainer, message):
    """`train` raises one sentence, before a weight, a random state or the folder has changed."""
    before, state = weights_of(trainer.model), torch.get_rng_state()
    with pytest.raises(ValueError, match=message) as caught:
        trainer.train()
    assert "\n" not in str(caught.value) and same(before, weights_of(trainer.model))
    assert torch.equal(state, torch.get_rng_state()) and trainer.model.training and trainer.state.global_step == 0
    assert trainer.model.config.problem_type is None


# -- the output folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["file", "file/below", "file/below/further", "x" * 300, "null\0character"])
def test_an_output_dir_that_cannot_be_written_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("content")
    with pytest.raises(ValueError, match="output_dir=.* cannot be written .*choose"):
        make_trainer(tmp_path / name)
    assert (tmp_path / "file").read_text() == "content"


def test_an_output_dir_set_between_two_runs_is_checked(tmp_path):
    (tmp_path / "file").write_text("content")
    trainer = make_trainer(tmp_path / "first")
    trainer.args.output_dir = str(tmp_path / "file")
    refused(trainer, "output_dir=.* cannot be written")


def test_a_folder_that_is_only_read_serves_an_evaluation(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", dir)

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert make_trainer(tmp_path).evaluate()["eval_loss"] > 0
    refused(make_trainer(tmp_path), "output_dir=.* cannot be written .Permission denied")


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"method": "gumbel", "num_levels": None, "frozen_steps": 3}])
def test_a_model_frozen_everywhere_is_refused(tmp_path, changes):
    refused(
        make_trainer(tmp_path, make().requires_grad_(False), **changes), "no parameter of Bert.* requires a gradient"
    )


def test_a_frozen_encoder_is_pruned_and_its_head_trained(tmp_path):
    model = make()
    model.bert.requires_grad_(False)
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    assert trainer.run.method.masks.sparsity() == pytest.approx(0.75, abs=1e-3)


def test_a_frozen_model_may_have_a_loss_that_learns(tmp_path):
    scale = nn.Parameter(torch.ones(()))

    class Scaled(PruningTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs) * scale
            return (loss, {}) if return_outputs else loss

    optimizer = torch.optim.SGD([scale], lr=0.1)
    keywords = {"optimizers": (optimizer, None)}
    make_trainer(tmp_path, make().requires_grad_(False), trainer=Scaled, keywords=keywords).train()
    assert scale != 1


def shared():
    """A model whose two layers share a weight, which its class does not say."""
    model = make()
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    second.query.weight = first.query.weight
    return model


def test_shared_weights_that_cannot_be_saved_are_refused(tmp_path):
    with pytest.raises(RuntimeError):  # what the first save would say
        shared().save_pretrained(tmp_path / "plain")
    refused(
        make_trainer(tmp_path, shared(), save_strategy="steps", save_steps=6), "query.* are one tensor, which cannot"
    )


def test_shared_weights_that_are_never_saved_are_trained(tmp_path):
    with pytest.warns(UserWarning, match="are one tensor, which cannot be saved"):
        make_trainer(tmp_path, shared()).train()


def test_declared_ties_are_saved(tmp_path):
    rows = [{**row, "labels": row["input_ids"]} for row in make_rows()]
    make_trainer(tmp_path, make(head="ForMaskedLM"), rows, save_strategy="steps", save_steps=6).train()
    assert (tmp_path / "checkpoint-12").is_dir()


# -- labels, ids and lengths ------------------------------------------------------------------------------------------

IDS = torch.randint(3, 64, (8,), generator=torch.Generator().manual_seed(0))
LONG = {"input_ids": torch.ones(65, dtype=torch.long), "attention_mask": torch.ones(65, dtype=torch.long)}
WRONG = [
    ({"labels": torch.tensor(2)}, "labels=2, and Bert.* knows 0 to 1: .* num_labels=3"),
    ({"labels": torch.tensor(-1)}, "labels=-1, and Bert.* knows 0 to 1"),
    ({"input_ids": IDS + 60}, r"input_ids=\d+, and Bert.* knows 0 to 63: .*resize_token_embeddings"),
    ({"input_ids": IDS - 60}, "input_ids=-"),
    ({"input_ids": torch.full((8,), -100)}, "input_ids=-100"),
    ({"token_type_ids": torch.full((8,), 2)}, "token_type_ids=2, and Bert.* knows 0 to 1"),
]


@pytest.mark.parametrize("kind", ["list", "lists", "torch", "dict", "arrow"])
@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_value_that_the_model_does_not_know_is_refused(tmp_path, changes, message, kind):
    rows = [{**row, "token_type_ids": torch.zeros(8, dtype=torch.long)} for row in make_rows()]
    rows = with_value(rows, 70, **changes)
    make_of = {
        "list": lambda rows: rows,
        "lists": as_lists,
        "torch": OfRows,
        "dict": lambda rows: dict(enumerate(rows)),
        "arrow": lambda rows: datasets.Dataset.from_list(as_lists(rows)),
    }[kind]
    refused(make_trainer(tmp_path, rows=make_rows(), keywords={"train_dataset": make_of(rows)}), f"row 70 .*{message}")


def test_a_position_that_the_model_does_not_have_is_refused(tmp_path):
    rows = [{**row, "position_ids": torch.arange(8)} for row in make_rows()]
    make_trainer(tmp_path, rows=rows, max_steps=2, num_levels=1).train()
    rows = with_value(rows, 70, position_ids=torch.arange(57, 65))
    keywords = {"train_dataset": rows}
    refused(make_trainer(tmp_path, keywords=keywords), "row 70 .*position_ids=64, and Bert.* knows 0 to 63")


class Padding:
    """A collator that pads to the longest row."""

    def __call__(self, rows):
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad([row["input_ids"] for row in rows], batch_first=True),
            "attention_mask": pad([row["attention_mask"] for row in rows], batch_first=True),
            "labels": torch.stack([row["labels"] for row in rows]),
        }


@pytest.mark.parametrize(("family", "most"), [("Bert", 64), ("Roberta", 63), ("DistilBert", 512)])
def test_a_row_longer_than_the_positions_is_refused(tmp_path, family, most):
    def rows(length):
        ids = torch.full((length,), 5)
        return with_value(make_rows(16), 9, input_ids=ids, attention_mask=torch.ones_like(ids))

    changes = {"data_collator": Padding()}
    model = make(family)
    refused(
        make_trainer(tmp_path, model, rows(most + 1), keywords=changes), f"row 9 .*has {most + 1} .* max_length={most}"
    )
    make_trainer(tmp_path, model, rows(most), keywords=changes, max_steps=2, num_levels=1).train()


def test_evaluation_and_held_out_rows_are_checked_where_they_are_used(tmp_path):
    good, bad = make_rows(32), with_value(make_rows(32), 20, labels=torch.tensor(7))
    keywords = {"train_dataset": good, "eval_dataset": bad}
    make_trainer(tmp_path, keywords=keywords, max_steps=2, num_levels=1).train()
    refused(make_trainer(tmp_path, keywords=keywords, eval_strategy="epoch"), "row 20 of eval_dataset has labels=7")
    keywords["eval_dataset"] = {"matched": good, "mismatched": bad}
    refused(make_trainer(tmp_path, keywords=keywords, eval_strategy="epoch"), r"of eval_dataset\['mismatched'\]")
    keywords = {"train_dataset": good, "selection_dataset": bad}
    refused(make_trainer(tmp_path, keywords=keywords, method="random"), "row 20 of selection_dataset")


@pytest.mark.parametrize("label", [0.5, float("nan"), None])
def test_labels_of_a_classification_that_are_no_whole_numbers_are_refused(tmp_path, label):
    rows = [{**row, "labels": float(row["labels"])} for row in as_lists(make_rows(32))]
    rows[5]["labels"] = label
    refused(make_trainer(tmp_path, rows=rows), "row . of train_dataset has .*labels")


def test_a_regression_without_a_number_is_refused(tmp_path):
    rows = with_value(make_rows(regression=True), 3, labels=torch.tensor(float("nan")))
    refused(make_trainer(tmp_path, make(num_labels=1), rows), "row 3 .*no finite number in labels")


def test_all_labels_may_be_wrong(tmp_path):
    rows = [{**row, "labels": torch.tensor(-1)} for row in make_rows(32)]
    refused(make_trainer(tmp_path, rows=rows), "row 0 of train_dataset has labels=-1")


# -- what trains is left alone ----------------------------------------------------------------------------------------


class LabelsFromOne(PruningTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "labels": inputs["labels"] - 1}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def fold(rows):
    """A collator that knows more ids than the model."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "input_ids": batch["input_ids"] % 64}


def own_loss(outputs, labels, num_items_in_batch=None):
    return outputs.logits.square().mean() * labels.float().mean()


def changed(**values):
    return [{**row, **{n: f(row) for n, f in values.items()}} for row in make_rows(32)]


GOOD = {
    "regression": (make_rows(32, regression=True), {"num_labels": 1}, {}),
    "ignored labels": (with_value(make_rows(32), 4, labels=torch.tensor(-100)), {}, {}),
    "several labels": (changed(labels=lambda row: torch.tensor([0.0, 1.0, 1.0])), {"num_labels": 3}, {}),
    "labels from one": (changed(labels=lambda row: row["labels"] + 1), {}, {"trainer": LabelsFromOne}),
    "a collator's ids": (changed(input_ids=lambda row: row["input_ids"] + 64), {}, {"data_collator": fold}),
    "an own loss": (changed(labels=lambda row: torch.tensor(9.5)), {}, {"compute_loss_func": own_loss}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_what_trains_is_not_refused_and_ends_in_the_same_bits(tmp_path, monkeypatch, name):
    rows, model, keywords = GOOD[name]
    keywords = {"eval_dataset": rows, **keywords}
    kind = keywords.pop("trainer", PruningTrainer)
    results = []
    for checks in (True, False):
        if not checks:
            monkeypatch.setattr("hf_maskselect.training.check_inputs.check_values", lambda *args: None)
        changes = {"max_steps": 2, "num_levels": 1, "eval_strategy": "epoch"}
        trainer = make_trainer(tmp_path, make(hidden_dropout_prob=0.2, **model), rows, kind, dict(keywords), **changes)
        trainer.train()
        results.append((losses(trainer), weights_of(trainer.model)))
    assert results[0][0] == results[1][0] and same(results[0][1], results[1][1])


def test_a_resized_embedding_knows_more_ids(tmp_path):
    model = make()
    model.resize_token_embeddings(80)
    rows = changed(input_ids=lambda row: row["input_ids"] + 16)
    make_trainer(tmp_path, model, rows, max_steps=2, num_levels=1).train()


def test_rows_of_a_dataset_that_draws_are_left_alone(tmp_path):
    class Drawing(OfRows):
        def __init__(self, rows):
            super().__init__(rows)
            self.generator, self.read = random.Random(0), []

        def __getitem__(self, index):
            self.read.append(index)
            self.generator.random()
            return super().__getitem__(index)

    dataset = Drawing(make_rows(32))
    trainer = make_trainer(tmp_path, rows=make_rows(32), keywords={"train_dataset": dataset})
    check_values(trainer, trainer.run.bench)
    assert not dataset.read


def test_rows_that_draw_from_the_global_generators_do_not_move_them(tmp_path):
    class Drawing(OfRows):
        def __getitem__(self, index):
            random.random(), np.random.random(), torch.rand(1)
            return super().__getitem__(index)

    trainer = make_trainer(tmp_path, rows=make_rows(32), keywords={"train_dataset": Drawing(make_rows(32))})
    before = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    check_values(trainer, trainer.run.bench)
    assert (random.getstate(), np.random.get_state()[2]) == before[:2] and torch.equal(
        torch.get_rng_state(), before[2]
    )


class DuringRun(PruningTrainer):
    """Has its own names of the classes, 5 and 6, and a loss that only a run can compute."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels") - 5
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, labels)
        loss *= 1 + self.state.global_step / self.state.max_steps
        return (loss, outputs) if return_outputs else loss


def test_a_loss_that_needs_a_run_is_not_tried_before_it(tmp_path):
    rows = changed(labels=lambda row: row["labels"] + 5)
    make_trainer(tmp_path, rows=rows, trainer=DuringRun, max_steps=2, num_levels=1).train()
    rows = changed(labels=lambda row: row["labels"] + 9)
    refused(make_trainer(tmp_path, rows=rows, trainer=DuringRun), "has labels=10, and Bert.* knows 0 to 1")


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_about_a_second(tmp_path):
    ids = np.random.default_rng(0).integers(3, 64, (100_000, 128))
    rows = datasets.Dataset.from_dict({"input_ids": list(ids), "labels": ids[:, 0] % 2})
    rows = rows.select(np.random.default_rng(1).permutation(100_000))  # read through indices, as after a split
    trainer = make_trainer(tmp_path, make(max_position_embeddings=128), keywords={"train_dataset": rows})
    start = time.perf_counter()
    check_values(trainer, trainer.run.bench)
    assert time.perf_counter() - start < 10


LOOKUPS = {
    "embedding": lambda index: nn.functional.embedding(index, torch.zeros(4, 2)),
    "cross-entropy": lambda index: nn.functional.cross_entropy(torch.zeros(len(index), 4), index),
    "of tokens": lambda index: nn.functional.cross_entropy(torch.zeros(1, 4, len(index), 1), index[None, :, None]),
    "label smoothing": lambda index: torch.zeros(len(index), 4).gather(1, index[:, None]),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_an_index_is_checked_before_a_gpu_sees_it(name):
    with CheckedIndices():
        LOOKUPS[name](torch.tensor([0, 3]))
        for index in (4, -1):
            with pytest.raises(IndexError, match="indices from"):
                LOOKUPS[name](torch.tensor([0, index]))
