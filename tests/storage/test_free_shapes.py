"""Models with shapes by layer: what loads them, with which outputs, and what refuses them."""

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import save_file
from small_models import BY_LAYER, make_free, rows_for
from tiny import make_rows, make_trainer, same, weights_of
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_maskselect import export_cpu, export_onnx, load_cpu, load_pruned, pack, sparsity_report, unpack, verify
from hf_maskselect.storage.configs import load_config
from hf_maskselect.storage.models import skeleton
from hf_maskselect.storage.reload import save_reloadable
from hf_maskselect.surgery.structured.batches import batches_of, rows_of
from hf_maskselect.surgery.structured.layer_shapes import LayerShapes

_FRESH = """
import copy, sys, torch
import hf_maskselect
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

for folder in sys.argv[1:]:
    tensors = load_file(folder + "/batch.safetensors")
    auto = AutoModelForImageClassification if "pixel_values" in tensors else AutoModelForSequenceClassification
    expected = tensors.pop("")
    model = copy.deepcopy(auto.from_pretrained(folder))  # mapped weights may lie at odd addresses
    with torch.no_grad():
        assert torch.equal(model(**tensors)[0], expected), folder
"""
_PLAIN = """
import sys
from transformers import AutoModelForSequenceClassification

AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
"""


def batch_of(model):
    return batches_of(rows_of(rows_for(model), model), model)[0]


@torch.no_grad()
def output(model, batch):
    return copy.deepcopy(model).eval()(**batch)[0]  # mapped weights may lie at odd addresses, and round in another way


@pytest.fixture
def small():
    return make_free()


@pytest.fixture
def folder(small, tmp_path):
    small.save_pretrained(tmp_path / "small")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(59))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def is_ordinary(model):
    flags = (getattr(model, "is_quantized", False), getattr(model.config, "_is_quantized", False))
    return not any(flags) and not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize(
    "family", [name if name in ("Bert", "MPNet") else pytest.param(name, marks=pytest.mark.slow) for name in BY_LAYER]
)
def test_every_family_comes_back(family, tmp_path):
    small = make_free(family)
    auto = AutoModelForImageClassification if family == "ViT" else AutoModelForSequenceClassification
    small.save_pretrained(tmp_path / "first")
    first, told = auto.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    first.save_pretrained(tmp_path / "second")
    second = auto.from_pretrained(tmp_path / "second")
    for again in (first, second):
        assert same(weights_of(again), weights_of(small)) and is_ordinary(again)
        assert torch.equal(output(again, batch_of(small)), output(small, batch_of(small)))
        assert LayerShapes.of(again.config) == LayerShapes.of(small.config)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    assert configs[0] == configs[1]


@pytest.mark.slow
def test_a_fresh_process_needs_the_import_alone(tmp_path):
    folders = []
    for family in BY_LAYER:
        small, path = make_free(family), tmp_path / family
        small.save_pretrained(path)
        batch = {name: value.contiguous() for name, value in batch_of(small).items()}
        save_file({"": output(small, batch).contiguous(), **batch}, path / "batch.safetensors")
        folders.append(str(path))
    subprocess.run([sys.executable, "-c", _FRESH, *folders], check=True)
    done = subprocess.run([sys.executable, "-c", _PLAIN, folders[0]], capture_output=True, text=True)
    assert done.returncode == 1 and "import hf_maskselect before this model is loaded" in done.stderr
    assert "size mismatch" in done.stderr


def test_dtypes_heads_and_configurations(folder, small):
    for options in ({"dtype": torch.bfloat16}, {"device_map": "auto"}, {"config": AutoConfig.from_pretrained(folder)}):
        model = AutoModelForSequenceClassification.from_pretrained(folder, **options)
        assert is_ordinary(model) and model.dtype == options.get("dtype", torch.float32)
    assert model.half().dtype == torch.float16
    for auto in (AutoModel, AutoModelForMaskedLM):
        assert LayerShapes.of(auto.from_pretrained(folder).config) == LayerShapes.of(small.config)


def test_training_resumes(folder, tmp_path):
    rows = make_rows(32)

    def train(name, checkpoint=None):
        args = TrainingArguments(
            str(tmp_path / name), max_steps=4, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
        )
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        trainer = Trainer(model, args, train_dataset=rows)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.model

    straight = train("straight")
    assert same(weights_of(train("resumed", tmp_path / "straight" / "checkpoint-2")), weights_of(straight))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "straight" / "checkpoint-4")
    assert same(weights_of(again), weights_of(straight))


def test_pruning_it_works_as_usual(folder, tmp_path):
    trainer = make_trainer(tmp_path, AutoModelForSequenceClassification.from_pretrained(folder))
    trainer.train()
    trainer.save_model(str(tmp_path / "pruned"))
    assert verify(tmp_path / "pruned").sparsity == 0.75
    pack(tmp_path / "pruned", tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    for name in ("pruned", "packed", "unpacked"):
        model, masks = load_pruned(tmp_path / name)
        assert same(weights_of(model), weights_of(trainer.model)) and masks.sparsity() == 0.75
    assert "32x24" in str(sparsity_report(tmp_path / "pruned"))


def test_a_pipeline_and_an_adapter(folder, small):
    assert len(pipeline("text-classification", model=str(folder))("w1 w2 w3")) == 1
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(folder), config)
    adapted.save_pretrained(folder / "adapter")
    again = peft.PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(folder), folder / "adapter"
    )
    expected = output(adapted, batch_of(small))
    assert torch.equal(output(again, batch_of(small)), expected)
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "merged")
    assert torch.allclose(output(merged, batch_of(small)), expected, atol=1e-5)


@pytest.mark.slow
def test_sentence_transformers(folder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(folder))
    model.save(str(folder / "sentences"))
    again = sentence_transformers.SentenceTransformer(str(folder / "sentences"))
    assert (model.encode(["w1 w2"]) == again.encode(["w1 w2"])).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", BY_LAYER)
def test_torch_export(family):
    small = make_free(family)
    batch = batch_of(small)
    program = torch.export.export(small, (), kwargs=dict(batch), strict=False)
    assert torch.allclose(program.module()(**batch)[0], small(**batch)[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Bert", "MPNet"])
def test_other_engines(family, tmp_path):
    small = make_free(family)
    small.save_pretrained(tmp_path / "small")
    export_onnx(tmp_path / "small", tmp_path / "onnx")  # compares the outputs
    rows = [{"input_ids": row["input_ids"]} for row in rows_for(small, 160)]
    export_cpu(tmp_path / "small", tmp_path / "cpu", rows, batch_sizes=(1,), seq_lens=(8,))
    assert torch.allclose(load_cpu(tmp_path / "cpu")(**batch_of(small))[0], small(**batch_of(small))[0], atol=0.3)


@pytest.mark.slow
def test_what_is_saved_reloads_after_the_import(small, folder, tmp_path):
    save_reloadable(small, tmp_path / "saved", batch_of(small), folder)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").num_parameters()


def test_our_readers_see_the_shapes(folder, small):
    shapes = {name: tensor.shape for name, tensor in skeleton(folder).state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in small.state_dict().items()}


def test_other_quantization_is_still_refused(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for entry in ({"quant_method": "gptq"}, {**config["quantization_config"], "bits": 4}):
        path.write_text(json.dumps({**config, "quantization_config": entry}))
        with pytest.raises(ValueError, match="masks need weights that are not quantized"):
            load_config(folder)


def test_damaged_shapes_are_refused(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["layer_shapes"]["widths"] = [40, 1 << 30]
    path.write_text(json.dumps(config))
    for load in (AutoModelForSequenceClassification.from_pretrained, skeleton):
        with pytest.raises(ValueError, match="layer 1 has 1073741824 neurons"):
            load(folder)
    del config["layer_shapes"]
    path.write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForSequenceClassification.from_pretrained(folder)
