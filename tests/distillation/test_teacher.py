"""Loading a teacher, and its frozen forward pass."""

import json

import pytest
import torch
import transformers
from tiny import FAMILIES, make
from torch.testing import assert_close
from transformers import BertConfig

from hf_maskselect.distillation.losses import DistillWeights
from hf_maskselect.distillation.teacher import Teacher, load_teacher


def test_a_teacher_is_frozen_and_gives_what_has_a_weight():
    model = make()
    attention = model.config._attn_implementation
    teacher = Teacher(model, DistillWeights(attention=1.0))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    ids = torch.randint(3, 64, (2, 5))
    outputs = teacher({"input_ids": ids, "labels": torch.tensor([0, 1]), "unknown": 1})
    assert len(outputs["hidden_states"]) == 3 and len(outputs["attentions"]) == 2 and outputs.get("loss") is None
    teacher.release()
    assert model.config._attn_implementation == attention
    assert teacher.arguments >= {"input_ids", "attention_mask", "token_type_ids"}
    assert Teacher(make(), DistillWeights(hidden=0.0)).outputs == {}


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_from_a_folder(family, tmp_path):
    saved = make(family).bfloat16()
    saved.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), make(seed=1))
    assert type(teacher) is type(saved) and teacher.dtype == torch.float32
    for name, parameter in saved.state_dict().items():
        assert_close(teacher.state_dict()[name], parameter.float(), rtol=0, atol=0)


def test_a_model_is_returned_as_it_is():
    teacher = make()
    assert load_teacher(teacher, make(seed=1)) is teacher


@pytest.mark.parametrize(
    "architectures, message",
    [
        (["NoSuchModel"], "'NoSuchModel', which transformers does not have"),
        (["TrainingArguments"], "which transformers does not have"),
        (["AutoModelForSequenceClassification"], "which transformers does not have"),
        ([], "which transformers does not have"),
        (["RobertaForSequenceClassification"], "model_type is 'bert'"),
        (["BertForTokenClassification"], None),
    ],
)
def test_the_architecture_of_the_config(architectures, message, tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    if message is None:
        assert type(load_teacher(tmp_path, make())).__name__ == architectures[0]
    else:
        with pytest.raises(ValueError, match=message):
            load_teacher(tmp_path, make())


def test_a_teacher_whose_head_would_be_random(tmp_path):
    config = BertConfig(**FAMILIES["Bert"], architectures=["BertForSequenceClassification"])
    transformers.BertModel(config).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text().replace('"BertModel"', '"BertForSequenceClassification"')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="2 missing keys in BertForSequenceClassification, such as 'classifier"):
        load_teacher(tmp_path, make())


def test_no_pickle(tmp_path):
    model = make()
    model.config.architectures = ["BertForSequenceClassification"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_teacher(tmp_path, make())
