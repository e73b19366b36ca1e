"""Adapters merged into pruned models."""

import pytest
import torch
from tiny import make, make_trainer, weights_of

from hf_maskselect import MaskSet, merge_adapter_with_masks, prunable_weights
from hf_maskselect.masking.patterns import Unstructured

peft = pytest.importorskip("peft")
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def adapted(seed=0, **changes):
    """A pruned model under a LoRA adapter that is not zero, and its masks."""
    model = make()
    scores = {name: weight.detach().abs() for name, weight in prunable_weights(model).items()}
    masks = MaskSet(Unstructured("layer").masks(scores, 0.75))
    masks.apply_(model)
    before = weights_of(model)
    given = {"target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS", "r": 4, **changes}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return wrapped, masks, before


@pytest.mark.parametrize("given", [True, False])
def test_merging_keeps_the_zeros_and_the_rest_of_the_update(given):
    expected = weights_of(adapted()[0].merge_and_unload())
    wrapped, masks, before = adapted()
    merged = merge_adapter_with_masks(wrapped, masks if given else None)
    found = weights_of(merged)
    assert type(merged) is type(make()) and found.keys() == before.keys()
    assert MaskSet.from_zeros(merged).digest() == masks.digest()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name] * masks[name] if name in masks else expected[name])
    assert not torch.equal(found[QUERY], before[QUERY])


def test_the_dropped_share_is_told(monkeypatch):
    wrapped, masks, before = adapted()
    change = weights_of(adapted()[0].merge_and_unload())
    whole = sum(float((change[n] - before[n]).square().sum()) for n in masks)
    dropped = sum(float(((change[n] - before[n]) * ~masks[n]).square().sum()) for n in masks)
    told = []
    monkeypatch.setattr("hf_maskselect.surgery.merge_adapter.logger.warning", told.append)
    merge_adapter_with_masks(wrapped, masks)
    assert told == [f"{dropped / whole:.1%} of the adapter's update (squared) fell on pruned weights: dropped"]


def test_masks_of_another_model_are_refused_before_anything_is_merged():
    wrapped, _, before = adapted()
    other = MaskSet.ones(prunable_weights(make("Roberta")))
    with pytest.raises(ValueError, match="roberta.* is no weight of the base model"):
        merge_adapter_with_masks(wrapped, other)
    assert torch.equal(wrapped.get_base_model().bert.encoder.layer[0].attention.self.query.weight, before[QUERY])


def test_an_adapter_that_does_not_merge_is_refused():
    wrapped = peft.get_peft_model(make(), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="of type PROMPT_TUNING does not change the weights"):
        merge_adapter_with_masks(wrapped)


def test_a_module_trained_whole_beside_the_adapter_keeps_its_zeros():
    wrapped, masks, before = adapted(modules_to_save=["intermediate.dense"])
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    with torch.no_grad():
        for known, parameter in wrapped.named_parameters():
            if ".modules_to_save." in known:
                parameter.add_(1)
    merged = merge_adapter_with_masks(wrapped)
    assert weights_of(merged).keys() == before.keys()
    assert MaskSet.from_zeros(merged).digest() == masks.digest()
    assert torch.equal(weights_of(merged)[name], (before[name] + 1) * masks[name])


@pytest.mark.parametrize("given", [make, lambda: torch.nn.Linear(3, 3), lambda: "folder"])
def test_what_carries_no_adapter_is_refused(given):
    with pytest.raises(ValueError, match="is no PeftModel.*get_peft_model"):
        merge_adapter_with_masks(given())


def test_masks_of_another_shape_are_refused_before_anything_is_merged():
    wrapped, masks, _ = adapted()
    other = MaskSet.ones(prunable_weights(make(intermediate_size=128)))
    with pytest.raises(ValueError, match=r"intermediate.dense.weight has shape \(64, 32\) .* \(128, 32\)"):
        merge_adapter_with_masks(wrapped, other)
    assert MaskSet.from_zeros(merge_adapter_with_masks(wrapped, masks)).digest() == masks.digest()


@pytest.mark.parametrize("given", [True, False])
def test_an_adapter_merged_in_place_hides_the_zeros_and_is_refused(given):
    wrapped, masks, _ = adapted()
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match=r"merged already.*unmerge_adapter\(\)"):
        merge_adapter_with_masks(wrapped, masks if given else None)
    wrapped.unmerge_adapter()
    assert MaskSet.from_zeros(merge_adapter_with_masks(wrapped, masks)).digest() == masks.digest()


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter", "prompt"])
def test_a_model_with_an_adapter_is_not_pruned(tmp_path, way):
    """An adapter begins at zero, and pruned zeros stay: it would never learn."""
    model = make()
    if way == "prompt":
        model = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    elif way == "add_adapter":
        model.add_adapter(peft.LoraConfig(target_modules=["query"]))
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    before = weights_of(model)
    with pytest.raises(ValueError, match="has a PEFT adapter.*merge_adapter_with_masks"):
        make_trainer(tmp_path / "out", model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())


def test_a_merged_model_is_pruned_on(tmp_path):
    wrapped, masks, _ = adapted()
    trainer = make_trainer(tmp_path, merge_adapter_with_masks(wrapped), sparsity=0.875)
    trainer.train()
    trainer.save_model()
    assert trainer.pruning_state().masks.overlap(masks) == 1
