"""Training with `keep_shape="free"`: the run resumes, and what it saves has a shape for each layer."""

import pytest
from small_models import make_free, make_model
from tiny import make_trainer, same, weights_of
from transformers import AutoModelForSequenceClassification

from hf_maskselect.surgery.structured.layer_shapes import LayerShapes

OPTIONS = {"pattern": "structured", "method": "random", "sparsity": 0.6, "num_levels": None, "keep_shape": "free"}
OPTIONS |= {"num_candidates": 2, "latency_shape": [1, 8], "refit_rows": 32, "criterion_batches": 64, "max_steps": 4}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Bert", "MPNet"])  # each layer of an MPNet reads its own position biases
def test_a_resumed_run_has_the_same_shapes(family, tmp_path):
    """The second run makes its model from the dense one, and takes shapes and weights from the checkpoint."""
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    saves = {"save_strategy": "steps", "save_steps": 2}
    straight = make_trainer(tmp_path / "straight", make_model(family, **changes), **OPTIONS, **saves)
    straight.train()
    resumed = make_trainer(tmp_path / "resumed", make_model(family, **changes), **OPTIONS, **saves)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    shapes = LayerShapes.of(straight.model.config)
    assert shapes is not None and LayerShapes.of(resumed.model.config) == shapes
    assert same(weights_of(resumed.model), weights_of(straight.model))
    straight.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert same(weights_of(loaded), weights_of(straight.model)) and LayerShapes.of(loaded.config) == shapes


def test_attention_is_not_compared_with_other_heads(tmp_path):
    with pytest.raises(ValueError, match="set distill_attention=0"):
        make_trainer(
            tmp_path,
            make_free(),
            distill_attention=1.0,
            distill_hidden=0.0,
            keywords={"teacher": make_model(num_hidden_layers=2)},
        )
