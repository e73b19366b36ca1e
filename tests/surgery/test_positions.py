"""The memory of a refit is limited by positions, whatever the inputs are: tokens, patches or frames."""

import pytest
import torch
import transformers
from tiny import FAMILIES, make, make_rows, make_trainer

from hf_maskselect.surgery.passes import positions_of_row

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def vit():
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=2)
    return transformers.ViTForImageClassification(config).eval()


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        **SIZES, conv_dim=[16, 16], conv_kernel=[4, 4], conv_stride=[4, 4], num_feat_extract_layers=2, num_labels=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=8,
    )  # fmt: skip
    return transformers.Wav2Vec2ForSequenceClassification(config).eval()


IMAGES = [{"pixel_values": torch.randn(3, 16, 16), "labels": torch.tensor(i % 2)} for i in range(48)]
SOUNDS = [{"input_values": torch.randn(320), "labels": torch.tensor(i % 2)} for i in range(48)]
CHOICES = {"input_ids": torch.randint(3, 64, (5, 4, 8)), "attention_mask": torch.ones(5, 4, 8, dtype=torch.long)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_text_has_its_tokens(family):
    rows = make_rows(3, length=12)
    inputs = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    assert positions_of_row(make(family).eval(), inputs) == 12


def test_a_row_of_images_sounds_and_choices_is_measured():
    assert positions_of_row(vit(), {"pixel_values": torch.randn(3, 3, 16, 16)}) == 17  # patches, and the class token
    assert positions_of_row(wav2vec2(), {"input_values": torch.randn(3, 320)}) == 20  # frames
    assert positions_of_row(make(head="ForMultipleChoice").eval(), CHOICES) == 32
    model, first = make().eval(), {name: value[:, 0] for name, value in CHOICES.items()}
    assert positions_of_row(model, {"pair": [first]}, lambda inputs: model(**inputs["pair"][0])) == 8
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("make_model", "rows", "positions"), [(vit, IMAGES, 17), (wav2vec2, SOUNDS, 20)])
def test_a_refit_of_images_or_sounds_has_no_more_positions_than_its_limit(
    tmp_path, monkeypatch, make_model, rows, positions
):
    monkeypatch.setattr("hf_maskselect.search.bench.MOST_POSITIONS", 10 * positions + 1)
    seen = []
    trainer = make_trainer(tmp_path, make_model(), rows, method="taylor", refit_rows=32)
    trainer.model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(len(next(iter(inputs.values())))), with_kwargs=True
    )
    bench = trainer.run.bench
    bench.method.attach(trainer.model)
    before = {name: weight.detach().clone() for name, weight in bench.method.weights.items()}
    trainer.model.train()
    assert bench.refit(before, 0).refitted and trainer.model.training
    assert seen[-2:] == [10, 10]  # the uncut and the cut model
    assert bench.steps_of_refit(0) == pytest.approx(10 / bench.batches.rows_of_training())
