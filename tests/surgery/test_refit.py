import pytest
import torch
from tiny import FAMILIES, make, make_config, make_rows, make_trainer, same, weights_of
from torch import nn
from torch.nn import functional
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_maskselect import PruningTrainer
from hf_maskselect.masking.maskset import MaskSet
from hf_maskselect.masking.patterns import parse_pattern
from hf_maskselect.masking.targets import prunable_weights
from hf_maskselect.surgery import dense_outputs as dense_outputs_module
from hf_maskselect.surgery.dense_outputs import Positions, dense_outputs
from hf_maskselect.surgery.passes import refittable
from hf_maskselect.surgery.refit import refit, refit_to


def batch(count=96, length=8):
    rows = make_rows(count, length)
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}


def cut(model, share=0.5, seed=0):
    """Zero a random share of every prunable weight; returns the weights and what they were."""
    weights, generator = prunable_weights(model), torch.Generator().manual_seed(seed)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(torch.rand(weight.shape, generator=generator) > share)
    return weights, before


def zeros(weights):
    return {name: weight == 0 for name, weight in weights.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_fitted_and_stays_as_sparse(family):
    model = make(family).eval()
    inputs = batch()
    dense = model(**inputs).logits
    weights, before = cut(model)
    off, dead, rest = (model(**inputs).logits - dense).norm(), zeros(weights), weights_of(model)
    done = refit(model, weights, before, inputs)
    assert all(torch.equal(weight == 0, dead[name]) for name, weight in weights.items())
    left = set(weights) - set(done.refitted)
    if family == "Albert":  # its layers are used at every depth
        assert not done.refitted and same(weights_of(model), rest)
        return
    # DeBERTa projects distances by the same matrices
    assert not left or (family == "DebertaV2" and all("query" in name or "key" in name for name in left))
    assert all(done.refitted[name] < done.cut[name] for name in done.refitted)
    assert (model(**inputs).logits - dense).norm() < 0.8 * off
    changed = {name for name, tensor in weights_of(model).items() if not torch.equal(tensor, rest[name])}
    layers = {name.removesuffix("weight") for name in done.refitted}
    assert changed <= {f"{layer}{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(done.refitted) <= changed


def test_nothing_cut_is_nothing_to_fit():
    model = make().eval()
    weights, before = cut(model, share=0.0)
    refit(model, weights, before, batch())
    assert all(torch.allclose(weight, before[name], atol=1e-5) for name, weight in weights.items())


def test_what_others_can_make_good_is_made_good():
    """Two inputs are the same: one of them is cut, the other takes its share."""
    model = make().eval()
    intermediate, output = (
        model.bert.encoder.layer[1].get_submodule(n) for n in ("intermediate.dense", "output.dense")
    )
    with torch.no_grad():
        intermediate.weight[1], intermediate.bias[1] = intermediate.weight[0], intermediate.bias[0]
    weights, inputs = prunable_weights(model), batch()
    dense = model(**inputs).logits
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        output.weight[:, 1] = 0
    assert not torch.allclose(model(**inputs).logits, dense, atol=1e-2)
    done = refit(model, weights, before, inputs)
    assert done.refitted["bert.encoder.layer.1.output.dense.weight"] < 1e-3
    assert torch.allclose(model(**inputs).logits, dense, atol=2e-2)


def test_padding_has_no_say():
    rows = batch(64, 8)
    rows["attention_mask"][::2, 6:] = 0
    other = {**rows, "input_ids": torch.where(rows["attention_mask"].bool(), rows["input_ids"], 5)}
    fitted = []
    for inputs in (rows, other):
        model = make().eval()
        refit(model, *cut(model), inputs)
        fitted.append(weights_of(model))
    assert all(torch.allclose(fitted[0][name], fitted[1][name], atol=1e-4) for name in fitted[0])


@pytest.mark.parametrize("family", ["Bert", "ModernBert", "DebertaV2", "DistilBert"])
def test_padding_does_not_pass_through_the_matrices(family):
    """The others compute what they do in the whole model."""
    model, rows, widths = make(family).eval(), batch(32, 8), set()
    rows["attention_mask"][::2, 5:] = 0
    real, seen = rows["attention_mask"].flatten().bool(), {}
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in prunable_weights(model)}
    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.__setitem__(name, output))
        for name, module in modules.items()
    ]
    model(**rows)
    for hook in hooks:
        hook.remove()
    for module in modules.values():
        forward = module.forward
        module.forward = lambda values, forward=forward: widths.add(values.shape[:-1].numel()) or forward(values)
    weights, before = cut(model)
    dense = dense_outputs(model, weights, before, rows)
    assert len(dense.outputs) >= len(weights) - 4
    for name, outputs in dense.outputs.items():
        assert torch.allclose(outputs, seen[name].flatten(0, 1)[real], atol=1e-4), name
    assert int(real.sum()) in widths and (32 * 8 not in widths or family == "DebertaV2")


def test_frozen_parameters_stay():
    model = make().eval()
    for name, parameter in model.named_parameters():
        if "layer.0" in name or name.endswith("bias"):
            parameter.requires_grad_(False)
    weights, before = cut(model)
    start = weights_of(model)
    done = refit(model, weights, before, batch())
    assert set(done.refitted) == {name for name in weights if "layer.1" in name}
    changed = {name for name, tensor in weights_of(model).items() if not torch.equal(tensor, start[name])}
    assert changed == set(done.refitted)
    assert all(done.refitted[name] < done.cut[name] for name in done.refitted)


def test_transposed_layers_are_fitted_and_convolutions_are_left():
    model = gpt().eval()
    dense = model(**batch()).logits
    weights, before = cut(model)
    off = (model(**batch()).logits - dense).norm()
    assert set(refit(model, weights, before, batch()).refitted) == set(weights)
    assert (model(**batch()).logits - dense).norm() < 0.8 * off
    net = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).eval()
    weights, before = cut(net)
    start = weights_of(net)
    assert not refit(net, weights, before, {"pixel_values": torch.randn(4, 3, 32, 32)}).refitted
    assert same(weights_of(net), start)


class Mixed(nn.Module):
    """A convolution that is cut and not fitted, before linear layers that are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Conv2d(3, 16, 3), nn.Linear(16, 32), nn.Linear(32, 16)])
        self.between = nn.ModuleList([nn.ReLU(), nn.ReLU()])

    def forward(self, pixel_values):
        x = self.between[0](self.layers[0](pixel_values)).flatten(2).transpose(1, 2)
        return self.layers[2](input=self.between[1](self.layers[1](x)))


def gpt():
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, pad_token_id=0)
    return GPT2ForSequenceClassification(config)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "ModernBert", "DistilBert", "frozen", "gpt", "mixed"])
def test_the_aim_is_what_the_uncut_model_computes(kind):
    """Also behind matrices that are cut and not fitted."""
    inputs = {"pixel_values": torch.randn(16, 3, 8, 8)} if kind == "mixed" else batch()
    families = {"frozen": lambda: make("Bert"), "gpt": gpt, "mixed": Mixed}
    model = families.get(kind, lambda: make(kind))().eval()
    if kind == "frozen":
        for parameter in model.bert.encoder.layer[0].parameters():
            parameter.requires_grad_(False)
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.__setitem__(f"{name}.weight", output))
        for name, module in model.named_modules()
    ]
    uncut = model(**inputs)
    for hook in hooks:
        hook.remove()
    weights, before = cut(model)
    after, dead = model(**inputs), zeros(weights)
    dense = dense_outputs(model, weights, before, inputs)
    assert 0 < len(dense.outputs) < len(weights) if kind in ("frozen", "mixed") else set(dense.outputs) == set(weights)
    for name, outputs in dense.outputs.items():
        assert torch.allclose(outputs, seen[name].reshape(-1, outputs.shape[1]), atol=1e-4), name
    assert all(torch.equal(weight == 0, dead[name]) for name, weight in weights.items())
    assert set(refit_to(dense, model, weights).refitted) == set(dense.outputs)
    fitted = model(**inputs)
    if kind != "mixed":
        after, fitted, uncut = after.logits, fitted.logits, uncut.logits
    assert (fitted - uncut).norm() < 0.8 * (after - uncut).norm()


def test_the_same_outputs_serve_for_every_cut():
    """To the bit, whatever was cut when they were made."""
    model, inputs = make().eval(), batch()
    start = weights_of(model)
    before = {name: weight.detach().clone() for name, weight in prunable_weights(model).items()}
    dense, alone, shared = None, [], []
    for seed in (0, 1):
        for fitted in (alone, shared):
            model.load_state_dict(start)
            weights, _ = cut(model, seed=seed)
            if fitted is alone:
                done = refit(model, weights, before, inputs)
            else:
                dense = dense_outputs(model, weights, before, inputs) if dense is None else dense
                done = refit_to(dense, model, weights)
            fitted.append((weights_of(model), done))
    assert all(same(a, b) and first == second for (a, first), (b, second) in zip(alone, shared, strict=True))
    assert not same(alone[0][0], alone[1][0])


def test_a_sample_of_the_real_positions_is_enough(monkeypatch):
    """The sample is fixed, without padding, and larger for wider matrices."""
    mask = torch.ones(64, 8, dtype=torch.long)
    mask[::2, 5:] = 0
    count, numbers = int(mask.sum()), torch.arange(64 * 8.0).reshape(64, 8, 1)
    taken = Positions(mask).of(numbers, inputs=32)[:, 0].long()
    assert len(taken) == count and mask.flatten()[taken].all()
    monkeypatch.setattr(dense_outputs_module, "LEAST_SAMPLED", 100)
    monkeypatch.setattr(dense_outputs_module, "SAMPLED_PER_INPUT", 3)
    positions = Positions(mask)
    narrow, wide = positions.of(numbers, inputs=32)[:, 0], positions.of(numbers, inputs=50)[:, 0]
    assert len(narrow) == 100 and len(wide) == 150 and set(narrow.tolist()) < set(wide.tolist())
    assert mask.flatten()[wide.long()].all() and torch.equal(wide, wide.unique())
    assert torch.equal(wide, Positions(mask).of(numbers, inputs=50)[:, 0])
    assert len(positions.of(torch.zeros(64, 1), inputs=32)) == 64  # one position a row: the mask says nothing

    monkeypatch.setattr(dense_outputs_module, "LEAST_SAMPLED", 256)
    model, inputs = make().eval(), batch(256)
    dense = model(**inputs).logits
    weights, before = cut(model)
    off = (model(**inputs).logits - dense).norm()
    assert set(refit(model, weights, before, inputs).refitted) == set(weights)
    assert (model(**inputs).logits - dense).norm() < 0.5 * off


def test_an_input_that_changed_in_place_is_read_again():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

        def forward(self, x):
            x = x.clone()
            x += self.layers[0](x)
            return self.layers[1](x)

    model, inputs = Residual().eval(), {"x": torch.randn(64, 4, 16)}
    uncut = model(**inputs)
    weights = {f"layers.{i}.weight": layer.weight for i, layer in enumerate(model.layers)}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        weights["layers.0.weight"][:, ::2] = 0
    done = refit(model, weights, before, inputs)
    left = (model(**inputs) - uncut).square().sum() / (uncut - uncut.mean((0, 1))).square().sum()
    assert done.refitted["layers.1.weight"] == pytest.approx(left.item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_little(dtype):
    """The matrices are fitted in full precision, and what follows them sees how they were fitted."""
    inputs, logits = batch(), []
    for enabled in (False, True):
        model = make().eval()
        dense = model(**inputs).logits
        weights, before = cut(model)
        off = (model(**inputs).logits - dense).norm()
        model.forward = torch.autocast("cpu", dtype=dtype, enabled=enabled)(model.forward)  # as accelerate has it
        refit(model, weights, before, inputs)
        del model.forward
        logits.append(model(**inputs).logits)
    assert (logits[0] - dense).norm() < 0.5 * off and (logits[1] - dense).norm() < 0.5 * off
    assert (logits[1] - logits[0]).norm() < 0.1 * off


def test_what_cannot_be_fitted_stays_as_cut():
    """Not finite, or too few positions."""
    model = make().eval()
    model.bert.embeddings.LayerNorm.bias.data[0] = float("inf")
    weights, before = cut(model)
    start = weights_of(model)
    assert not refit(model, weights, before, batch()).refitted
    assert same(weights_of(model), start)
    model = make().eval()
    weights, before = cut(model)
    start = weights_of(model)
    assert not refit(model, weights, before, batch(4)).refitted
    assert same(weights_of(model), start)


def test_tied_matrices_stay_as_cut():
    """A fit to what the one layer reads would not be one to what the other does."""
    model = make().eval()
    first, second = (model.bert.encoder.layer[i].attention.self for i in range(2))
    second.query.weight = first.query.weight
    fits = refittable(model, prunable_weights(model), batch())
    assert len(fits) == 10 and not any("query" in name for name in fits)


def test_multiple_choice_is_fitted():
    model = make(head="ForMultipleChoice").eval()
    inputs = {name: torch.stack([value[:48], value[48:]], 1) for name, value in batch().items()}
    dense = model(**inputs).logits
    weights, before = cut(model)
    off = (model(**inputs).logits - dense).norm()
    assert set(refit(model, weights, before, inputs).refitted) == set(weights)
    assert (model(**inputs).logits - dense).norm() < 0.8 * off


@pytest.mark.parametrize("pattern", ["2:4", "channel"])
def test_patterns_are_kept(pattern):
    model = make().eval()
    weights = prunable_weights(model)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    scores = {name: weight.abs() for name, weight in before.items()}
    masks = MaskSet(parse_pattern(pattern).masks(scores, 0.5, MaskSet.ones(weights)))
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(masks[name])
    dead = zeros(weights)
    assert refit(model, weights, before, batch()).refitted
    assert all(torch.equal(weight == 0, dead[name]) for name, weight in weights.items())


def test_training_mode_is_refused():
    model = make()
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        refit(model, *cut(model), batch())


@pytest.mark.parametrize(
    ("mangle", "expected"),
    [
        (lambda model, w, b: (w, {n: b[n] for n in list(b)[1:]}), "before lacks bert.encoder.layer.0.*query.weight: "),
        (lambda model, w, b: (w, {n: t[:1] for n, t in b.items()}), r"shape \(32, 32\) but \(1, 32\) before the cut"),
        (lambda model, w, b: ({n.removesuffix(".weight"): t for n, t in w.items()}, b), "query is no weight of a lin"),
        (lambda model, w, b: (dict(model.named_parameters()), b), "embeddings.weight is no weight of a linear"),
        (lambda model, w, b: ({n: t for n, t in model.named_parameters() if "query" in n}, b), "query.bias is no wei"),
        (lambda model, w, b: (dict(make().named_parameters()), b), "is no weight of a linear"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(mangle, expected):
    model = make().eval()
    weights, before = mangle(model, *cut(model))
    kept = weights_of(model)
    with pytest.raises(ValueError, match=expected):
        refit(model, weights, before, batch())
    assert same(weights_of(model), kept)


def test_modules_are_left_as_they_were():
    model = make().eval()
    dense = model.bert.encoder.layer[0].output.dense
    own = dense.forward
    dense.forward = lambda values: own(values)  # as wrappers have it
    wrapped = dense.forward
    refit(model, *cut(model), batch())
    assert dense.forward is wrapped
    assert "forward" not in vars(model.bert.encoder.layer[1].output.dense)


def test_half_precision_is_fitted():
    model = make().eval().to(torch.bfloat16)
    dense = model(**batch()).logits
    weights, before = cut(model)
    off, dead = (model(**batch()).logits - dense).norm(), zeros(weights)
    refit(model, weights, before, batch())
    assert (model(**batch()).logits - dense).norm() < 0.8 * off
    assert all(torch.equal(weight == 0, dead[name]) for name, weight in weights.items())
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())


# -- in a run --------------------------------------------------------------------------------------------------------


def test_the_defaults(tmp_path):
    rows = {
        method: make_config(tmp_path, method=method, **changes).resolved().refit_rows
        for method, changes in (
            ("magnitude", {}),
            ("taylor", {}),
            ("fisher", {}),
            ("random", {}),
            ("pdp", {"num_levels": None}),
            ("gumbel", {"num_levels": None}),
        )
    }
    assert rows == {"magnitude": 0, "taylor": 256, "fisher": 256, "random": 256, "pdp": 256, "gumbel": 256}
    assert make_config(tmp_path, method="random", proposals=["paper"]).resolved().refit_rows == 0
    assert make_config(tmp_path, refit_rows=32).resolved().refit_rows == 32


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"refit_rows": -1}, "refit_rows=-1"),
        ({"refit_rows": 1.5}, "whole number"),
        (
            {"method": "gumbel", "num_levels": None, "refit_rows": 8, "frozen_steps": 0},
            "set frozen_steps, such as 0.7",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, changes, expected):
    with pytest.raises(ValueError, match=expected):
        make_config(tmp_path, **changes)


@pytest.mark.parametrize("selection", ["halving", "survivors"])
def test_a_search_tries_what_the_run_goes_on_from(tmp_path, selection, monkeypatch):
    """Where trials train, the fit of the winner's trial is that of the run, to the bit; survivors are not fitted
    again."""
    trainer = make_trainer(tmp_path, method="random", num_levels=1, selection=selection, refit_rows=32, trial_steps=2)
    fitted = {}
    fit = trainer.run.bench.refit

    def written_down(before, level):
        done = fit(before, level)
        fitted.setdefault(trainer.run.method.masks.digest(), []).append(weights_of(trainer.model))
        return done

    monkeypatch.setattr(trainer.run.bench, "refit", written_down)
    trainer.train()
    chosen = next(c for c in trainer.run.search.history[0].candidates if c.chosen)
    found = fitted[chosen.digest]
    assert len(found) == (len(chosen.scores) + 1 if selection == "halving" else 1)
    assert all(same(found[0], other) for other in found)
    assert len(fitted) == len(trainer.run.search.history[0].candidates)


@pytest.mark.parametrize(
    ("family", "changes", "steps"),
    [
        ("Bert", {}, 0),
        ("DebertaV2", {}, 0),  # some of its matrices are not fitted
        ("Albert", {}, 4),  # none is: a third of the level
        ("Albert", {"trial_steps": 0}, 0),
        ("Bert", {"trial_learning_rate": 1e-3}, 4),
    ],
    ids=str,
)
def test_masks_that_cannot_be_fitted_are_trained_before_they_are_compared(tmp_path, family, changes, steps):
    trainer = make_trainer(tmp_path, make(family), method="random", num_candidates=2, num_levels=1, **changes)
    trainer.train()
    (search,) = trainer.run.search.history
    assert [candidate.steps for candidate in search.candidates] == [steps] * len(search.candidates)


def test_masks_are_compared_as_they_are_fitted(tmp_path, monkeypatch, capsys):
    """trial_steps=0: one score each and no training; the run goes on from the best, to the bit."""
    keywords = {"method": "random", "num_candidates": 3, "num_levels": 1, "refit_rows": 32, "trial_steps": 0}
    trainer = make_trainer(tmp_path, **keywords)
    assert trainer.run.search.rungs(trainer.run.settings.plan(8), 0) == [(3, 0)]
    scored, score = [], trainer.run.bench.score

    def written_down():
        scored.append((trainer.run.method.masks.digest(), weights_of(trainer.model), score()))
        return scored[-1][-1]

    refit = trainer.run.search._refit

    def refit_and_kept(winner, masks, *others):
        refit(winner, masks, *others)
        found = {digest: weights for digest, weights, _ in scored}
        assert same(weights_of(trainer.model), found[masks.digest()])

    monkeypatch.setattr(trainer.run.bench, "score", written_down)
    monkeypatch.setattr(trainer.run.search, "_refit", refit_and_kept)
    trainer.train()
    (search,) = trainer.run.search.history
    told = capsys.readouterr().out
    assert all(part in told for part in ("3 x refit", "; 3 masks are scored after their refit", "after refit  steps"))
    assert [candidate.steps for candidate in search.candidates] == [0] * 3
    assert [candidate.scores for candidate in search.candidates] == [[value] for _, _, value in scored]
    chosen = next(candidate for candidate in search.candidates if candidate.chosen)
    assert chosen.scores[0] == min(value for _, _, value in scored)
    held_out = len(trainer.selection_dataset)
    assert search.step_equivalents == pytest.approx(4 + (1 / 3 + 3) * 32 / 8 + 3 * held_out / (3 * 8))


def test_long_rows_are_fewer(tmp_path, monkeypatch):
    """As many as their tokens allow; the search counts those."""
    monkeypatch.setattr("hf_maskselect.search.bench.MOST_POSITIONS", 8 * 32)
    cost = {}
    for rows in (32, 256):
        trainer = make_trainer(tmp_path / f"{rows}", method="taylor", num_levels=1, refit_rows=rows)
        trainer.train()
        cost[rows] = trainer.run.search.history[0].step_equivalents, weights_of(trainer.model)
    assert cost[32][0] == cost[256][0] == pytest.approx(4 + (1 / 3 + 1) * 32 / 8)  # gradient samples, refit
    assert same(cost[32][1], cost[256][1])


def test_nothing_fitted_costs_nothing(tmp_path):
    trainer = make_trainer(tmp_path, make("Albert"), method="taylor", num_levels=1)
    trainer.train()
    (search,) = trainer.run.search.history
    assert search.step_equivalents == 4 and search.refit_error is None


def test_labels_are_not_looked_at(tmp_path):
    """Those of a loss of the user's own may be nothing that the model's loss knows."""
    rows = [{**row, "labels": torch.tensor([0.5, 1.5, 2.5])} for row in make_rows()]

    def loss(outputs, labels, num_items_in_batch=None):
        return (outputs.logits.sum(1) - labels.sum(1)).square().mean()

    trainer = make_trainer(tmp_path, rows=rows, method="taylor", keywords={"compute_loss_func": loss})
    trainer.train()
    assert all(search.refit_error < search.cut_error for search in trainer.run.search.history)


@pytest.mark.parametrize("loss", [None, lambda outputs, labels, num_items_in_batch=None: outputs[-1].square().mean()])
def test_a_model_of_the_users_own_gets_what_it_gets_in_training(tmp_path, loss):
    """Labels, which its forward pass may not do without, unless the loss is computed outside."""

    class Own(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None, labels=None):
            assert (labels is None) == (loss is not None)
            logits = self.classifier(self.bert(input_ids, attention_mask)[1])
            return (logits,) if labels is None else (functional.cross_entropy(logits, labels), logits)

    trainer = make_trainer(tmp_path, Own(make().config), method="taylor", keywords={"compute_loss_func": loss})
    trainer.train()
    assert all(search.refit_error < search.cut_error for search in trainer.run.search.history)


def test_a_model_that_takes_no_labels_gets_none(tmp_path):
    class Own(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None):
            return self.classifier(self.bert(input_ids, attention_mask)[1])

    class Outside(PruningTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            logits = model(**inputs)
            loss = functional.cross_entropy(logits, labels)
            return (loss, (loss, logits)) if return_outputs else loss

    keywords = {"eval_dataset": None}
    config = {"method": "taylor", "label_names": ["labels"]}
    trainer = make_trainer(tmp_path, Own(make().config), trainer=Outside, keywords=keywords, **config)
    trainer.train()
    assert all(search.refit_error < search.cut_error for search in trainer.run.search.history)


def test_rows_without_length_are_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(make_rows())

    with pytest.raises(ValueError, match="refit_rows=0"):
        make_trainer(tmp_path, rows=[], refit_rows=8, keywords={"train_dataset": Stream()})


def test_a_run_without_it_cuts_alone(tmp_path):
    trainer = make_trainer(tmp_path, method="taylor", refit_rows=0)
    trainer.train()
    assert all(search.refit_error is None for search in trainer.run.search.history)
