"""The parts of a smaller model: order of removal, Gram matrices, fit and search."""

import copy
import itertools

import pytest
import torch
from small_models import BY_LAYER, make_model, rows_for
from tiny import make, same, weights_of

from hf_maskselect.surgery.structured import fit as fit_module
from hf_maskselect.surgery.structured.batches import batches_of, real_positions, rows_of
from hf_maskselect.surgery.structured.budget import Budget
from hf_maskselect.surgery.structured.cut import Cutter
from hf_maskselect.surgery.structured.families import family_of
from hf_maskselect.surgery.structured.fit import Calls, fit
from hf_maskselect.surgery.structured.moments import Gram, Residual, consumer_grams, solve
from hf_maskselect.surgery.structured.order import removal_order
from hf_maskselect.surgery.structured.search import ShapeSearch
from hf_maskselect.surgery.structured.shapes import Encoder, Shape
from hf_maskselect.utils.judge import Judge


def gram_of(values):
    gram = Gram()
    for part in values.split(50):
        gram.add(part)
    return gram


@pytest.mark.parametrize("size", [1, 3])
def test_what_costs_least_goes_first(size):
    """The cost of a removal is the error that is left when the other columns take over."""
    torch.manual_seed(0)
    inputs, weight = torch.randn(200, 12) @ torch.randn(12, 12), torch.randn(5, 12)
    gram = gram_of(inputs)
    hessian = gram.matrix * 2 / gram.count
    hessian += 1e-2 * hessian.diagonal().mean() * torch.eye(12)

    def loss(gone):
        kept = [column for column in range(12) if column // size not in gone]
        new = torch.zeros_like(weight)
        new[:, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight.T).T
        lost = weight - new
        return float(((lost @ hessian) * lost).sum())

    order, gone = removal_order(weight, gram, size, at_once=1).tolist(), []
    assert sorted(order) == list(range(12 // size))
    for structure in order:
        costs = {other: loss([*gone, other]) for other in range(12 // size) if other not in gone}
        assert costs[structure] <= min(costs.values()) * (1 + 1e-3) + 1e-4
        gone.append(structure)


def test_a_residual_is_corrected_whatever_the_batches():
    torch.manual_seed(0)
    inputs, linear = torch.randn(400, 8), torch.nn.Linear(8, 3)
    wanted = torch.nn.Linear(8, 3)
    missing = (wanted(inputs) - linear(inputs)).detach()
    whole, parts = copy.deepcopy(linear), copy.deepcopy(linear)
    one, many = Residual(), Residual()
    one.add(inputs, missing)
    for x, y in zip(inputs.split(37), missing.split(37), strict=True):
        many.add(x, y)
    with torch.no_grad():
        one.correct(whole)
        many.correct(parts)
        left = wanted(inputs) - whole(inputs)
    assert torch.allclose(whole.weight, parts.weight, atol=1e-5) and torch.allclose(whole.bias, parts.bias, atol=1e-5)
    assert left.square().sum() < 1e-3 * missing.square().sum()


def test_padding_counts_nowhere():
    model, family = make_model(), family_of(make_model())
    rows = rows_of(rows_for(model, 12), model)
    alone = [batch for row in rows for batch in batches_of([row], model)]
    padded = batches_of(rows, model)
    assert any((batch["attention_mask"] == 0).any() for batch in padded)
    for (_, one), (_, other) in zip(
        consumer_grams(model, family, alone, False), consumer_grams(model, family, padded, False), strict=True
    ):
        assert one.count == other.count and torch.allclose(one.matrix, other.matrix, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "family",
    [
        "Bert",
        "ViT",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("DistilBert", "ModernBert", "DebertaV2")),
    ],
)
def test_the_sums_meet_those_of_the_dense_model(family):
    """Each fitted sum is nearer to the dense one than without the fit; a whole model needs no fit."""
    model = make_model(family)
    kind, rows = family_of(model), rows_of(rows_for(model, 160), model)
    batches = batches_of(rows, model)
    calls, cutter = Calls(model, kind, batches, keeps=True), Cutter(model, kind)
    judge = Judge(model.base_model, batches)
    whole = cutter.cut(cutter.encoder.full())
    fit(whole, kind, (0, 1, 2), calls)
    assert judge(whole.base_model) < 1e-8
    kept = (0, 2)
    small, again = (cutter.cut(cutter.encoder.uniform(kept, 32, 4)) for _ in range(2))
    before = judge(small.base_model)
    fit(small, kind, kept, calls)
    assert judge(small.base_model) < 0.8 * before
    fit(again, kind, kept, Calls(model, kind, batches))
    assert same(weights_of(small), weights_of(again))


@pytest.mark.parametrize("family", ["NomicBert", "ViT"])
def test_heads_go_where_the_configuration_can_say_it(family, tmp_path):
    model = make_model(family)
    kind, batches = family_of(model), batches_of(rows_of(rows_for(model), model), model)
    small = Cutter(model, kind).cut(Shape((0, 1, 2), (64,) * 3, (3,) * 3))
    assert small.config.num_attention_heads == 3 and small.config.head_dim == 8
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert all(torch.equal(small(**batch)[0], again(**batch)[0]) for batch in batches)


def test_a_head_that_does_nothing_goes_first():
    model = make_model("ViT")
    kind, batches = family_of(model), batches_of(rows_of(rows_for(model), model), model)
    for layer in model.vit.layers:
        layer.attention.o_proj.weight.data[:, 8:16] *= 1e-4
    grams = consumer_grams(model, kind, batches, True)
    orders = [
        removal_order(layer.attention.o_proj.weight, gram, 8, 1)
        for layer, (gram, _) in zip(model.vit.layers, grams, strict=True)
    ]
    assert [int(order[0]) for order in orders] == [1, 1, 1]
    cutter = Cutter(model, kind, [(order, torch.arange(64)) for order in orders], grams)
    small = cutter.cut(cutter.encoder.uniform((0, 1, 2), 64, 3))
    assert Judge(model, batches)(small) < 1e-5


def test_parameters_are_counted_as_they_are():
    for family in ("ModernBert", "NomicBert", "ViT", "Albert"):
        model = make_model(family)
        kind, encoder = family_of(model), Encoder.of(model, family_of(model))
        heads = 2 if kind.plain_heads else 4
        shape = encoder.uniform((0, 1, 2) if kind.shared else (0, 2), 40, heads)
        small = Cutter(model, kind).cut(shape)
        counted = sum(p.numel() for layer in kind.layers(small) for p in layer.parameters())
        assert encoder.parameters(shape) == counted
        for limit, width in ((counted, 40), (counted - 1, 32)):
            assert Budget(encoder, encoder.parameters, limit).width_of(shape.layers, heads) == width


def test_the_remaining_columns_take_over():
    torch.manual_seed(0)
    inputs = torch.randn(100, 3) @ torch.randn(3, 6)
    gram = inputs.T @ inputs
    lost = torch.randn(2, 6)
    taken = solve(gram[:3, :3], lost @ gram[:, :3])
    error = (inputs @ lost.T - inputs[:, :3] @ taken.T).square().sum()
    assert error < 0.3 * (inputs @ lost.T).square().sum()


class Machine:
    """Layers cost 10 and their width; what is missed of them adds up, and so does what narrow layers miss."""

    encoder = Encoder((640,) * 6, (4,) * 6, 8, (0,) * 6, 1, 0, False)
    missed = (30, 9, 20, 4, 2, 50)

    def __init__(self, target):
        self.target, self.asked = target, []

    def width_of(self, layers, heads):
        return min(640, int(max(self.target / len(layers) - 100, 0) // 8 * 8))

    def evaluate(self, shape):
        self.asked.append(shape)
        return sum(self.missed[layer] for layer in range(6) if layer not in shape.layers) + (640 - shape.width) / 10

    def search(self, count, seed=0, first_stays=False):
        return ShapeSearch(self.encoder, first_stays, False, self.width_of, self.evaluate, count, seed).run()


@pytest.mark.parametrize("target", [2000, 1200, 500])
def test_the_search_finds_the_best_set(target):
    machine = Machine(target)
    found = machine.search(30)[0]
    every = [layers for count in range(1, 7) for layers in itertools.combinations(range(6), count)]
    shapes = [machine.encoder.uniform(layers, machine.width_of(layers, 4), 4) for layers in every]
    best = min(machine.evaluate(shape) for shape in shapes if shape.width >= 8)
    assert found.divergence == best
    assert all(shape.width >= 8 for shape in machine.asked)


def test_the_search_keeps_its_bounds():
    machine = Machine(1200)
    found = machine.search(9, first_stays=True)
    tried = [candidate.shape for candidate in found]
    assert len(tried) == len(set(tried)) == 9 and all(0 in shape.layers for shape in tried)
    assert tried == [candidate.shape for candidate in Machine(1200).search(9, first_stays=True)]
    assert Machine(50).search(9) == []


def test_batches_are_taken_apart():
    model = make_model()
    rows = rows_of(rows_for(model, 16), model)
    again = rows_of(batches_of(rows[:8], model) + batches_of(rows[8:], model), model)
    assert len(again) == 16 and sum(int(row["attention_mask"].sum()) for row in again) == sum(
        len(row["input_ids"]) for row in rows
    )


def test_multiple_choice_keeps_its_choices():
    model = make_model(head="ForMultipleChoice")
    rows = [{"input_ids": row["input_ids"][:4].expand(3, 4)} for row in rows_for(model, 8)]
    (batch,) = batches_of(rows_of(rows, model), model)
    assert batch["input_ids"].shape == (8, 3, 4) and model(**batch).logits.shape == (8, 3)


def test_real_positions_leave_out_padding():
    values, batch = torch.arange(12.0).view(2, 3, 2), {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert real_positions(values, batch).tolist() == [[0, 1], [2, 3], [6, 7]]


@pytest.mark.parametrize("name", BY_LAYER)
def test_each_layer_is_fitted_on_what_the_fitted_layers_before_it_give(name, monkeypatch):
    model = make_model(name).eval()
    family, seen, plain = family_of(model), [], fit_module._seen

    def noted(layer, family, which, calls, index, number, states):
        if which == 0:
            seen.append((layer, index, number, states))
        return plain(layer, family, which, calls, index, number, states)

    monkeypatch.setattr(fit_module, "_seen", noted)
    batches = batches_of(rows_of(rows_for(model, 40), model), model)
    calls = Calls(model, family, batches)
    encoder = Encoder.of(model, family)
    shape = encoder.uniform(encoder.full().layers, 8, encoder.heads)
    small = Cutter(model, family).cut(shape)
    fit(small, family, shape.layers, calls)
    count = len(batches)
    assert len(seen) == count * encoder.depth > count
    with torch.no_grad():
        for (layer, index, number, states), (*_, later) in zip(seen, seen[count:], strict=False):
            assert torch.allclose(calls.run(layer, index, number, states), later, atol=1e-4), (index, number)


def test_padding_behind_a_row_is_cut():
    model = make_model()
    rows = rows_for(model, 12)
    padded = []
    for row in rows:
        filled = {"input_ids": torch.zeros(40, dtype=torch.long), "attention_mask": torch.zeros(40, dtype=torch.long)}
        count = len(row["input_ids"])
        filled["input_ids"][:count], filled["attention_mask"][:count] = row["input_ids"], 1
        padded.append(filled)
    for one, other in zip(rows_of(rows, model), rows_of(padded, model), strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"]) and bool(other["attention_mask"].all())


def test_of_a_language_model_some_positions_are_compared(monkeypatch):
    model = make("Bert", "ForMaskedLM").eval()
    batches = batches_of(rows_of(rows_for(model, 40), model), model)
    everything = Judge(model, batches)
    monkeypatch.setattr("hf_maskselect.utils.judge._MOST", 1000)
    some = Judge(model, batches)
    kept = sum(part.numel() for part in some._reference)
    assert 0 < kept <= 1000 + 64 * len(batches) < sum(part.numel() for part in everything._reference)
    assert some(model) == 0
