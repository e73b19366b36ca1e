"""Whole models with fast layers: the same outputs, in every family."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from block_weights import blocks
from tiny import COMMON, FAMILIES, make
from torch import nn

from hf_maskselect.runtime.kernels import INT8_KINDS, missing, quantized_rows
from hf_maskselect.runtime.linears import Choice, CpuLinear, Int8Plan
from hf_maskselect.runtime.model import Attention, ExactPlan, install, layers_of, linear_names
from hf_maskselect.runtime.quantize import RANGES, batches_of, observe
from hf_maskselect.utils.judge import Judge

MPNET = {
    **COMMON,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "bos_token_id": 0,
    "pad_token_id": 1,
}


@pytest.fixture(autouse=True)
def mpnet(monkeypatch):
    monkeypatch.setitem(FAMILIES, "MPNet", MPNET)


def make_sparse(family, sparsity=0.75, **changes):
    model = make(family, **changes).eval()
    for seed, name in enumerate(linear_names(model)):
        linear = model.get_submodule(name)
        linear.weight.data = blocks(*linear.weight.shape, sparsity, seed) * 0.2
    return model


def batches(rows=3, length=10, count=4):
    generator = torch.Generator().manual_seed(0)
    masks = torch.ones(rows, length, dtype=torch.long)
    masks[-1, 6:] = 0
    return [
        {"input_ids": torch.randint(3, 64, (rows, length), generator=generator), "attention_mask": masks}
        for _ in range(count)
    ]


def int8_plans(model, kind="int8", how="minmax"):
    names = linear_names(model)
    seen, plans = observe(model, names, batches()), {}
    centred = {six[task] for six in layers_of(model).values() for task in ("query", "key", "value")}
    for name in names:
        linear, (inputs, outputs) = model.get_submodule(name), seen[name]
        step = outputs.centred(how) if name in centred else outputs.units()
        pair = quantized_rows(linear.weight.detach())
        plans[name] = Int8Plan(Choice.always(kind), *pair, linear.bias.detach(), inputs.step(how), step)
    return plans


def states(model, batch):
    with torch.no_grad():
        output = model.base_model(**batch)[0]
    return output * batch["attention_mask"][..., None]  # what padding gets does not count


def relative(output, expected):
    return float((output - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["Bert", "Albert", "DistilBert", "DebertaV2", "ModernBert", "MPNet"])
@pytest.mark.parametrize("kind", ["dense", "csr"])
def test_exact_kinds_leave_the_outputs_of_every_family(family, kind):
    model, plans = make_sparse(family), {}
    for name in linear_names(model):
        linear = model.get_submodule(name)
        plans[name] = ExactPlan(Choice.always(kind), linear.weight, linear.bias)
    changed = install(copy.deepcopy(model), plans, Attention())
    expected = nn.Linear if kind == "dense" else CpuLinear
    assert all(isinstance(changed.get_submodule(name), expected) for name in plans)
    for batch in batches():
        torch.testing.assert_close(states(changed, batch), states(model, batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", INT8_KINDS)
@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra", "MPNet", "DistilBert"])
def test_int8_stays_near_the_model_fused_or_not(family, kind):
    if reason := missing(kind):
        pytest.skip(reason)
    model = make_sparse(family)
    plans, batch = int8_plans(model, kind), batches()[0]
    expected = states(model, batch)
    for attention in (Attention(False), Attention(True, 1), Attention(True, 11), Attention(True, 0)):
        changed = install(copy.deepcopy(model), plans, attention)
        # 8 bits of six layers in a row; large random weights make the softmax steep, which the bound allows for.
        assert relative(states(changed, batch), expected) < 0.12, attention
    fused = [module for module in changed.modules() if type(module).__name__.startswith("Fused")]
    assert len(fused) == (0 if family == "DistilBert" else 2)


@pytest.fixture(scope="module")
def fused():
    model = make_sparse("Bert")
    return model, install(copy.deepcopy(model), int8_plans(model), Attention(True, 0))


def test_a_fused_model_treats_rows_and_masks_alone(fused):
    _, model = fused
    batch = batches()[0]
    together = states(model, batch)
    for row in range(3):
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        torch.testing.assert_close(states(model, alone), together[row : row + 1], atol=0.05, rtol=0.05)
    short = {name: tensor[2:, :6] for name, tensor in batch.items()}
    torch.testing.assert_close(states(model, short), together[2:, :6], atol=0.05, rtol=0.05)
    empty = {name: tensor[:0] for name, tensor in batch.items()}
    assert states(model, empty).shape == (0, 10, 32)


def test_a_fused_model_records_hidden_states_and_refuses_attentions(fused):
    dense, model = fused
    with torch.no_grad():
        output = model(**batches()[0], output_hidden_states=True)
        assert len(output.hidden_states) == len(dense(**batches()[0], output_hidden_states=True).hidden_states)
        layer = next(module for module in model.modules() if type(module).__name__ == "FusedBertLayer")
        with pytest.raises(ValueError, match="output_attentions"):
            layer(torch.randn(1, 4, 32), output_attentions=True)


def test_a_model_of_packed_weights_is_not_saved_without_them(fused, tmp_path):
    with pytest.raises(ValueError, match="cannot be saved"):
        fused[1].save_pretrained(tmp_path)
    assert not any(tmp_path.glob("*.safetensors"))


def test_threads_give_the_same_answers(fused, monkeypatch):
    _, model = fused
    for module in ("threads", "layers"):  # so that threads share such short rows
        monkeypatch.setattr(f"hf_maskselect.runtime.{module}.PIECE", 4)
    batch, one = batches()[0], {name: tensor[:1] for name, tensor in batches()[0].items()}
    expected, expected_one = states(model, batch), states(model, one)
    with ThreadPoolExecutor(4) as pool:
        for output in pool.map(lambda _: states(model, batch), range(8)):
            assert torch.equal(output, expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.testing.assert_close(states(model, batch), expected, atol=0.05, rtol=0.05)
        torch.testing.assert_close(states(model, one), expected_one, atol=0.05, rtol=0.05)
    finally:
        torch.set_num_threads(threads)


def test_ranges_and_the_judge():
    model = make_sparse("Bert")
    judge = Judge(model, batches())
    assert judge(model) == 0
    for how in RANGES:
        changed = install(copy.deepcopy(model), int8_plans(model, how=how), Attention(False))
        assert 0 < judge(changed) < 0.5
    seen = observe(model, ["bert.encoder.layer.0.attention.self.query"], batches())
    inputs, _ = next(iter(seen.values()))
    assert inputs.ends("minmax") == (inputs.low, inputs.high) and inputs.low < 0 < inputs.high
    inputs.samples = torch.cat([torch.linspace(-1, 1, 1001).repeat(100), torch.tensor([50.0])])
    inputs.low, inputs.high = -1.0, 50.0
    assert inputs.ends("percentile")[1] < 2 and inputs.ends("mse")[1] <= 50
    score = make_sparse("Bert", num_labels=1)
    assert Judge(score, batches())(score) == 0


def test_outliers_of_one_channel_cost_the_others_nothing():
    """Encoders have channels of the residual that are a hundred times as large as others."""
    model = make_sparse("Bert")
    model.bert.encoder.layer[0].output.dense.weight.data[3] *= 100
    expected, plans = states(model, batches()[0]), int8_plans(model)
    error = relative(states(install(copy.deepcopy(model), plans, Attention(True, 0)), batches()[0]), expected)
    name = "bert.encoder.layer.0.output.dense"
    _, outputs = observe(model, [name], batches())[name]
    plans[name] = dataclasses.replace(plans[name], output=outputs.step("minmax"))
    one_step = relative(states(install(model, plans, Attention(True, 0)), batches()[0]), expected)
    assert error < one_step / 2


def test_calibration_rows_are_checked():
    model = make("Bert")
    row = {"input_ids": [3, 4, 5], "attention_mask": [1, 1, 1], "labels": 1}
    batch = batches_of([row, row], model)[0]
    assert batch["input_ids"].shape == (1, 3) and "labels" not in batch
    with pytest.raises(ValueError, match="0 rows"):
        batches_of([], model)
    with pytest.raises(ValueError, match="token id 99"):
        batches_of([{"input_ids": [99]}] * 2, model)
    with pytest.raises(ValueError, match="without input_ids"):
        batches_of([{"text": "x"}] * 2, model)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError):
        linear_names(nn.Sequential(nn.Conv1d(1, 1, 1)))
