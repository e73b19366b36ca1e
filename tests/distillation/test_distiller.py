"""The distiller's loss, against a float64 recomputation and on every supported family."""

import copy

import pytest
import torch
from tiny import FAMILIES, make
from torch.testing import assert_close

from hf_maskselect.distillation.distiller import Distiller


def make_batch(rows=4, length=9, labels=3, seed=0):
    """Rows of different lengths, the first one full."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.linspace(length, 3, rows).long()
    mask = (torch.arange(length) < real[:, None]).long()
    ids = torch.randint(3, 64, (rows, length), generator=generator) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.randint(labels, (rows,), generator=generator),
    }


def distil(distiller, student, batch):
    outputs = student(**batch, **distiller.student_kwargs)
    return distiller.loss(batch, outputs, outputs.get("loss"))


def only(**weights):
    """Distiller weights that are 0 but for those given."""
    return {"logits": 0.0, "hidden": 0.0, "attention": 0.0, **weights}


def reference_terms(teacher, student, batch, ratio=1, temperature=1.0):
    """Every term in float64, example by example, on tensors cut to their real tokens."""
    kwargs = {"output_hidden_states": True, "output_attentions": True}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        t, s = teacher(**inputs, **kwargs), student(**inputs, **kwargs)
    rows = range(len(batch["input_ids"]))
    hidden, attention, logits = [], [], []
    for b in rows:
        n = int(batch["attention_mask"][b].sum())
        layers = range(len(s.attentions))
        hidden.append(
            sum(
                ((s.hidden_states[i][b, :n].double() - t.hidden_states[i * ratio][b, :n].double()) ** 2).mean()
                for i in (0, *(i + 1 for i in layers))
            )
        )
        attention.append(
            sum(
                (
                    (s.attentions[i][b, :, :n, :n].double() - t.attentions[(i + 1) * ratio - 1][b, :, :n, :n].double())
                    ** 2
                ).mean()
                for i in layers
            )
        )
        soft = torch.softmax(t.logits[b].double() / temperature, -1)
        entropy = -(soft * torch.log(torch.softmax(s.logits[b].double() / temperature, -1))).sum()
        logits.append(entropy / len(soft) * temperature**2)
    return {
        "hidden": float(sum(hidden) / len(rows)),
        "attention": float(sum(attention) / len(rows)),
        "logits": float(sum(logits) / len(rows)),
    }


class TestTerms:
    @pytest.mark.parametrize("term", ["hidden", "attention", "logits"])
    def test_each_term_equals_a_float64_recomputation(self, term):
        teacher, student, batch = make(num_labels=3, seed=1), make(num_labels=3), make_batch()
        distiller = Distiller(teacher, student, temperature=2.0, **only(**{term: 0.5}))
        for model in (teacher, student):
            model.set_attn_implementation("eager")  # for the maps of the reference
        expected = 0.5 * reference_terms(teacher, student, batch, temperature=2.0)[term]
        assert expected > 1e-4
        assert_close(distil(distiller, student, batch).item(), expected, rtol=1e-5, atol=0)

    def test_the_loss_is_the_weighted_sum(self):
        teacher, student, batch = make(num_labels=3, seed=1), make(num_labels=3), make_batch()
        weights = {"logits": 0.5, "hidden": 2.0, "attention": 3.0}
        distiller = Distiller(teacher, student, hard_label=0.25, **weights)
        terms = reference_terms(teacher, student, batch)
        expected = sum(weights[name] * terms[name] for name in weights) + 0.25 * student(**batch).loss.item()
        assert_close(distil(distiller, student, batch).item(), expected, rtol=1e-5, atol=0)

    def test_zero_weights_are_not_asked_of_the_student(self):
        teacher, student = make(seed=1), make()
        assert Distiller(teacher, student, hidden=0.0).student_kwargs == {}
        assert Distiller(teacher, student).student_kwargs == {"output_hidden_states": True}
        assert student.config._attn_implementation == "sdpa"
        assert Distiller(teacher, student, **only(attention=1.0)).student_kwargs == {"output_attentions": True}
        assert student.config._attn_implementation == teacher.config._attn_implementation == "eager"

    def test_a_teacher_with_the_students_weights_costs_nothing(self):
        student = make()
        distiller = Distiller(copy.deepcopy(student), student, **only(hidden=1.0, attention=1.0))
        assert distil(distiller, student, make_batch(labels=2)).item() == 0.0

    def test_padding_never_counts(self):
        teacher, student, batch = make(num_labels=3, seed=1), make(num_labels=3), make_batch()
        distiller = Distiller(teacher, student, attention=1.0)
        outputs = student(**batch, **distiller.student_kwargs)
        expected = distiller.loss(batch, outputs, None)
        padding = batch["attention_mask"] == 0
        outputs.hidden_states = tuple(h.masked_fill(padding[:, :, None], 1e3) for h in outputs.hidden_states)
        outputs.attentions = tuple(
            a.masked_fill(padding[:, None, None, :], 1e3).masked_fill(padding[:, None, :, None], 1e3)
            for a in outputs.attentions
        )
        assert_close(distiller.loss(batch, outputs, None), expected, rtol=0, atol=0)

    def test_without_a_mask_every_position_counts(self):
        teacher, student, batch = make(num_labels=3, seed=1), make(num_labels=3), make_batch(rows=1)
        distiller = Distiller(teacher, student, attention=1.0)
        expected = distil(distiller, student, batch)
        del batch["attention_mask"]
        assert_close(distil(distiller, student, batch), expected)

    def test_float32_under_autocast(self):
        teacher, student, batch = make(num_labels=3, seed=1), make(num_labels=3), make_batch()
        distiller = Distiller(teacher, student, attention=1.0, hard_label=1.0)
        exact = distil(distiller, student, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = distil(distiller, student, batch)
        assert loss.dtype == torch.float32
        assert_close(loss, exact, rtol=0.05, atol=0)

    def test_a_deeper_teacher_skips_layers(self):
        teacher, student = make(num_labels=3, num_hidden_layers=4, seed=1), make(num_labels=3)
        batch = make_batch()
        distiller = Distiller(teacher, student, attention=1.0)
        expected = sum(reference_terms(teacher, student, batch, ratio=2).values())
        assert_close(distil(distiller, student, batch).item(), expected, rtol=1e-5, atol=0)

    def test_multi_label_is_a_binary_entropy_per_label(self):
        kind = {"num_labels": 3, "problem_type": "multi_label_classification"}
        teacher, student, batch = make(seed=1, **kind), make(**kind), make_batch()
        batch["labels"] = torch.nn.functional.one_hot(batch["labels"], 3).float()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            p = torch.sigmoid(teacher(**inputs).logits.double() / 2)
            q = torch.sigmoid(student(**inputs).logits.double() / 2)
        expected = 4 * -(p * q.log() + (1 - p) * (1 - q).log()).mean().item()
        loss = distil(Distiller(teacher, student, temperature=2.0, **only(logits=1.0)), student, batch)
        assert_close(loss.item(), expected, rtol=1e-5, atol=0)

    def test_token_logits_count_real_tokens_only(self):
        models = [make(head="ForTokenClassification", num_labels=3, seed=seed) for seed in (1, 0)]
        batch = make_batch()
        del batch["labels"]
        with torch.no_grad():
            t, s = (model(**batch).logits.double() for model in models)
        entropy = -(t.softmax(-1) * s.log_softmax(-1)).mean(-1)
        lengths = batch["attention_mask"].sum(1).tolist()
        expected = sum(entropy[b, :n].mean() for b, n in enumerate(lengths)) / len(lengths)
        assert_close(distil(Distiller(*models, **only(logits=1.0)), models[1], batch).double(), expected)


class TestRegression:
    def test_the_prediction_term_is_the_mse_to_the_labels(self):
        teacher, student, batch = make(num_labels=1, seed=1), make(num_labels=1), make_batch()
        batch["labels"] = torch.tensor([0.5, 2.0, 4.5, 1.0])
        distiller = Distiller(teacher, student, temperature=3.0, **only(logits=2.0))
        teacher.forward = None  # labels alone need no teacher forward
        expected = 2 * ((student(**batch).logits[:, 0] - batch["labels"]) ** 2).mean()
        assert_close(distil(distiller, student, batch), expected)

    @pytest.mark.parametrize("labels, message", [(None, "has none"), (torch.zeros(3), "one number for each output")])
    def test_labels_must_be_there_and_fit(self, labels, message):
        teacher, student, batch = make(num_labels=1, seed=1), make(num_labels=1), make_batch()
        del batch["labels"]
        distiller = Distiller(teacher, student)
        outputs = student(**batch, **distiller.student_kwargs)
        if labels is not None:
            batch["labels"] = labels
        with pytest.raises(ValueError, match=message):
            distiller.loss(batch, outputs, None)


class TestGradients:
    def test_sixteen_rows_are_the_mean_of_two_times_eight(self):
        """Loss and gradients, with the halves padded to their own longest row."""
        teacher, student = make(num_labels=3, seed=1), make(num_labels=3)
        distiller = Distiller(teacher, student, attention=1.0, hard_label=0.5)
        batch = make_batch(rows=16, length=12)
        halves = []
        for rows in (slice(0, 8), slice(8, 16)):
            longest = int(batch["attention_mask"][rows].sum(1).max())
            halves.append({k: v[rows, :longest] if v.dim() == 2 else v[rows] for k, v in batch.items()})
        assert halves[0]["input_ids"].shape[1] > halves[1]["input_ids"].shape[1] + 3

        def run(batches):
            student.zero_grad()
            losses = [distil(distiller, student, each) / len(batches) for each in batches]
            sum(losses).backward()
            return sum(losses).detach(), {n: p.grad.clone() for n, p in student.named_parameters()}

        (whole, gradient), (halved, accumulated) = run([batch]), run(halves)
        assert_close(whole, halved)
        for name in gradient:
            assert_close(gradient[name], accumulated[name], rtol=1e-4, atol=1e-6)

    def test_they_reach_the_student_and_never_the_teacher(self):
        teacher, student = make(seed=1), make()
        distil(Distiller(teacher, student, attention=1.0), student, make_batch(labels=2)).backward()
        assert not teacher.training and student.training
        assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


class TestFamilies:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_term_runs(self, family):
        teacher, student, batch = make(family, num_labels=3, seed=1), make(family, num_labels=3), make_batch()
        distiller = Distiller(teacher, student, attention=1.0, hard_label=1.0)
        loss = distil(distiller, student, batch)
        loss.backward()
        expected = sum(reference_terms(teacher, student, batch).values()) + student(**batch).loss.item()
        assert_close(loss.item(), expected, rtol=1e-5, atol=0)

    def test_a_teacher_gets_only_what_its_forward_takes(self):
        teacher, student = make("DistilBert", seed=1), make("Bert")
        batch = make_batch(labels=2) | {"token_type_ids": torch.zeros(4, 9, dtype=torch.long)}
        distiller = Distiller(teacher, student, attention=1.0)
        assert not distiller.teacher_arguments & {"token_type_ids", "labels", "kwargs"}
        distil(distiller, student, batch).backward()
        assert "token_type_ids" in Distiller(make("Bert"), make("DistilBert")).teacher_arguments

    def test_to_moves_the_teacher(self):
        teacher = make()
        Distiller(teacher, make(seed=1)).to("meta")
        assert teacher.device.type == "meta"


class TestErrors:
    @pytest.mark.parametrize(
        "weights, message",
        [
            ({"logits": -1.0}, "distill_logits=-1.0"),
            ({"hidden": float("nan")}, "distill_hidden=nan"),
            ({"attention": float("inf")}, "distill_attention=inf"),
            ({"hard_label": -0.1}, "hard_label_weight=-0.1"),
            ({"temperature": 0.0}, "distill_temperature=0.0"),
            (only(), "are all 0, so there is nothing to learn from"),
        ],
    )
    def test_weights(self, weights, message):
        with pytest.raises(ValueError, match=message):
            Distiller(make(seed=1), make(), **weights)

    @pytest.mark.parametrize(
        "changes, weights, message",
        [
            ({"num_labels": 3}, {}, "3 labels and the student 2"),
            ({"problem_type": "regression"}, {}, "problem type is 'regression'"),
            ({"id2label": {0: "No", 1: "yes"}}, {}, "orders the labels"),
            ({"vocab_size": 65}, only(logits=1.0), "vocab_size=65"),
            ({"hidden_size": 16}, {}, "hidden_size=16 .* set distill_hidden=0"),
            ({"num_attention_heads": 4}, only(attention=1.0), "num_attention_heads=4 .* set distill_attention=0"),
            ({"num_hidden_layers": 3}, {}, "3 layers, .* student's 2: set distill_hidden=0 and distill_attention=0"),
            ({"num_hidden_layers": 1}, only(attention=1.0), "1 layers, .* student's 2"),
        ],
    )
    def test_a_teacher_that_does_not_fit(self, changes, weights, message):
        student = make(id2label={0: "yes", 1: "no"}, problem_type="single_label_classification")
        teacher = make(seed=1, **changes)
        with pytest.raises(ValueError, match=message):
            Distiller(teacher, student, **weights)
        assert teacher.training and all(p.requires_grad for p in teacher.parameters())  # left as it was

    def test_what_is_not_compared_may_differ(self):
        teacher = make(seed=1, hidden_size=16, num_attention_heads=4, num_hidden_layers=3)
        student = make()
        distil(Distiller(teacher, student, **only(logits=1.0)), student, make_batch(labels=2)).backward()
        assert all(layer.output.dense.weight.grad.abs().sum() > 0 for layer in student.bert.encoder.layer)

    def test_a_teacher_must_be_a_copy(self):
        student = make()
        shares_a_part = make(seed=1)
        shares_a_part.bert = student.bert
        for teacher in (student, shares_a_part):
            with pytest.raises(ValueError, match="shares its parameters"):
                Distiller(teacher, student)
        assert all(p.requires_grad for p in student.parameters())

    def test_heads_without_labels(self):
        with pytest.raises(ValueError, match="teacher is a BertModel, which has no logits over labels"):
            Distiller(make(head="Model"), make())
        answering = make(head="ForQuestionAnswering"), make(head="ForQuestionAnswering", seed=1)
        with pytest.raises(ValueError, match="distill_logits=0"):
            Distiller(*answering)
        batch = make_batch()
        batch |= {"start_positions": batch["labels"], "end_positions": batch.pop("labels")}
        distil(Distiller(*answering, **only(hidden=1.0)), answering[1], batch).backward()

    def test_heads_of_different_shape(self):
        student = make()
        distiller = Distiller(make(head="ForTokenClassification", seed=1), student)
        with pytest.raises(ValueError, match="teacher with the student's head"):
            distil(distiller, student, make_batch(labels=2))

    @pytest.mark.parametrize("key, field", [("hidden_states", "hidden"), ("attentions", "attention")])
    def test_states_that_are_missing_or_of_another_shape(self, key, field):
        student, batch = make(), make_batch(labels=2)
        distiller = Distiller(make(seed=1), student, **only(**{field: 1.0}))
        outputs = student(**batch, **distiller.student_kwargs)
        states = outputs[key]
        for wrong, message in [
            (None, f"student returned 0 {key}"),
            (states[1:], f"student returned {len(states) - 1} {key} .* set distill_{field}=0"),
            ([s[:, 1:] for s in states], f"student's {key} have shape"),
        ]:
            with pytest.raises(ValueError, match=message):
                distiller.loss(batch, {key: wrong}, None)

    def test_a_mask_of_another_shape(self):
        student, batch = make(), make_batch(labels=2)
        distiller = Distiller(make(seed=1), student)
        batch["attention_mask"] = batch["attention_mask"][:, None, None, :].bool()
        with pytest.raises(ValueError, match="attention_mask has shape"):
            distil(distiller, student, batch)

    def test_choices_are_distilled_by_their_logits_alone(self):
        teacher, student = (make(head="ForMultipleChoice", seed=seed) for seed in range(2))
        for weights in ({}, only(attention=1.0)):
            with pytest.raises(
                ValueError, match="BertForMultipleChoice.*set distill_hidden=0 and distill_attention=0"
            ):
                Distiller(teacher, student, **weights)
        batch = make_batch(labels=2)
        batch |= {name: torch.stack([batch[name]] * 2, 1) for name in ("input_ids", "attention_mask")}
        distil(Distiller(teacher, student, **only(logits=1.0)), student, batch).backward()

    def test_a_missing_label_loss(self):
        student, batch = make(), make_batch(labels=2)
        del batch["labels"]
        with pytest.raises(ValueError, match="no label loss"):
            distil(Distiller(make(seed=1), student, hard_label=1.0), student, batch)
