"""ONNX: the graph has the zeros, takes other shapes and computes the same."""

import importlib.util

import pytest
import torch
from tiny import make, save_pruned
from transformers import GPT2Config, GPT2ForSequenceClassification, ResNetConfig, ResNetForImageClassification

from hf_maskselect import export_onnx
from hf_maskselect.cli import main
from hf_maskselect.export import onnx as module
from hf_maskselect.storage.pack import pack

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the onnx extra",
)


@needs_onnx
@pytest.mark.parametrize("family", ["Bert", pytest.param("ModernBert", marks=pytest.mark.slow)])
def test_zeros_and_outputs_are_kept(tmp_path, family):
    import onnxruntime

    model, masks = save_pruned(tmp_path / "in", family=family)
    model.train()
    report = export_onnx(model, tmp_path / "out")
    assert report.zeros == masks.total - masks.kept and not report.folded and report.difference < 1e-5
    assert model.training
    ids = torch.randint(5, 64, (5, 13))
    rows = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    (found,) = onnxruntime.InferenceSession(str(report.path)).run(None, rows)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)


@pytest.mark.slow
@needs_onnx
def test_the_console_exports_a_folder(tmp_path, capsys):
    _, masks = save_pruned(tmp_path / "in")
    assert main(["export", str(tmp_path / "in"), "--format", "onnx", "--output", str(tmp_path / "out")]) == 0
    assert f"{masks.total - masks.kept:,} zeros kept" in capsys.readouterr().out
    assert {"model.onnx", "config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


@needs_onnx
def test_a_packed_folder_is_to_be_unpacked_first(tmp_path):
    save_pruned(tmp_path / "in")
    pack(tmp_path / "in", tmp_path / "packed")
    with pytest.raises(ValueError, match="packed holds a packed model: .*hf-maskselect unpack"):
        export_onnx(tmp_path / "packed", tmp_path / "out")


@pytest.mark.slow
@needs_onnx
def test_a_graph_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_compare", lambda *_: (float("nan"), 1.0))
    with pytest.raises(ValueError, match=r"computes something else .*by up to nan"):
        export_onnx(make(), tmp_path)
    assert not list(tmp_path.iterdir())


@needs_onnx
@pytest.mark.slow
def test_a_saved_bfloat16_model_is_read_as_float32(tmp_path):
    save_pruned(tmp_path / "in", dtype=torch.bfloat16)
    assert export_onnx(tmp_path / "in", tmp_path / "out").difference < 1e-5


@needs_onnx
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: make().bfloat16(), "the model is torch.bfloat16"),
        (lambda: torch.nn.Linear(2, 2), "Linear is not a transformers model"),
        (
            lambda: ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
            "takes pixel_values: pass a batch of that as inputs",
        ),
    ],
)
def test_models_that_cannot_be_exported_as_they_are(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(model(), tmp_path)


@pytest.mark.slow
@needs_onnx
def test_a_decoder_is_compared_by_the_names_of_its_outputs(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, pad_token_id=0)
    assert export_onnx(GPT2ForSequenceClassification(config), tmp_path).difference < 1e-4


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PACKAGES", ("onnx", "a_package_nobody_has"))
    with pytest.raises(ValueError, match="a_package_nobody_has: pip install -U 'hf_maskselect.onnx.'"):
        export_onnx(make(), tmp_path)
