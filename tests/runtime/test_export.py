"""Export to the CPU runtime and back: files, choices, accuracy bounds, bad input."""

import json
import math
import shutil

import pytest
import torch
from block_weights import sparse_model, time_quickly
from tiny import make_rows
from transformers import AutoTokenizer, BertTokenizerFast, T5Config, T5ForConditionalGeneration, pipeline

from hf_maskselect import export_cpu, load_cpu
from hf_maskselect.cli import main
from hf_maskselect.runtime.embeddings import Int8Embedding
from hf_maskselect.runtime.files import Runtime
from hf_maskselect.runtime.kernels import INT8_KINDS, missing
from hf_maskselect.runtime.linears import Unsaved
from hf_maskselect.runtime.model import Attention
from hf_maskselect.runtime.timing import time_jobs
from hf_maskselect.storage.derived import CPU_FILE, CPU_JSON
from hf_maskselect.utils.files import read_json, write_json

ROWS = make_rows(24)
FAST = {"batch_sizes": [1, 2], "seq_lens": [8]}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    time_quickly(monkeypatch)


def one_output_of_all_products(monkeypatch):
    """Hide the one product of 8 bits that does not round its outputs: what is fastest then changes no output."""
    monkeypatch.setattr(
        "hf_maskselect.runtime.choose.missing", lambda kind: "hidden" if kind == "numba-1x4" else missing(kind)
    )
    monkeypatch.setattr("hf_maskselect.runtime.export._Search._fastest_attention", lambda *_: Attention(True, 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sparse_model().save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(59))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("cpu")
    with pytest.MonkeyPatch.context() as patch:
        time_quickly(patch)
        patch.setattr("hf_maskselect.runtime.export._Search._fastest_attention", lambda *_: Attention(True, 0))
        return output, export_cpu(folder, output, ROWS, **FAST)


def logits(model, rows=ROWS):
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model(**batch).logits


def test_exact_export_gives_the_same_outputs(tmp_path):
    for family in ("Bert", "Albert", "DebertaV2"):
        model = sparse_model(family, 0.9)
        report = export_cpu(model, tmp_path / family, int8=False, **FAST)
        loaded = load_cpu(tmp_path / family, retime=False)
        assert type(loaded) is type(model) and not loaded.training
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-4)
        assert not any(record.input for record in report.runtime.layers.values())


def test_int8_export_stays_near_and_runs_in_a_pipeline(folder, exported):
    output, report = exported
    loaded = load_cpu(output, retime=False)
    dense = type(loaded).from_pretrained(folder).eval()
    assert (logits(loaded) - logits(dense)).norm() < 0.05 * logits(dense).norm()
    assert report.runtime.divergence is None or report.runtime.divergence < 1e-2
    assert report.bytes < report.dense_bytes and str(report).count("\n1 x 8") == 1
    classify = pipeline("text-classification", model=loaded, tokenizer=AutoTokenizer.from_pretrained(output))
    assert classify(["w1 w2 w3", "w7"], batch_size=2)[0]["score"] > 0


def test_memory_is_below_dense(folder, exported):
    loaded = load_cpu(exported[0], retime=False)
    kept = sum(parameter.numel() for parameter in loaded.parameters())
    assert kept < sum(parameter.numel() for parameter in type(loaded).from_pretrained(folder).parameters()) / 2


@pytest.mark.skipif(bool(missing("int8")), reason="no int8 product")
def test_a_bound_keeps_layers_exact(folder, tmp_path, monkeypatch):
    one_output_of_all_products(monkeypatch)
    free = export_cpu(folder, tmp_path / "free", ROWS, **FAST)
    kl = free.runtime.divergence
    assert all(record.input for record in free.runtime.layers.values()) and kl > 0
    bound = export_cpu(folder, tmp_path / "bound", ROWS, max_kl=kl * 0.6, **FAST)
    exact = [name for name, record in bound.runtime.layers.items() if record.input is None]
    exact += [name for name, kind in bound.runtime.embeddings.items() if kind != free.runtime.embeddings[name]]
    assert 0 < len(exact) < 12 and bound.runtime.divergence <= kl * 0.6
    torch.testing.assert_close(logits(load_cpu(tmp_path / "bound")), logits(sparse_model()), atol=0.1, rtol=0.1)
    drop = export_cpu(folder, tmp_path / "drop", ROWS, max_drop=0.0, evaluate=lambda model: _exactness(model), **FAST)
    assert all(record.input is None for record in drop.runtime.layers.values())


def _exactness(model):
    return -sum(type(module).__name__ in ("Int8Linear", "FusedBertLayer") for module in model.modules())


def test_another_cpu_is_timed_anew_and_the_result_is_kept(folder, tmp_path, monkeypatch):
    one_output_of_all_products(monkeypatch)
    report = export_cpu(folder, tmp_path, ROWS, **FAST)
    content = read_json(tmp_path / CPU_JSON, "")
    write_json(tmp_path / CPU_JSON, {**content, "cpu": "another"})
    expected = logits(load_cpu(tmp_path, retime=False))
    assert Runtime.load(tmp_path).cpu == "another"
    torch.testing.assert_close(logits(load_cpu(tmp_path)), expected, atol=1e-4, rtol=1e-4)
    again = Runtime.load(tmp_path)
    assert again.cpu == report.runtime.cpu and not again.times[0].ms
    shapes = [[(each.batch, each.length) for each in times] for times in (again.times, report.runtime.times)]
    assert shapes[0] == shapes[1]


def test_a_missing_product_is_replaced(exported, folder, monkeypatch):
    dense = sparse_model()
    for gone in ({"1x4", "numba-1x4", "csr", "onednn"}, {*INT8_KINDS, "csr", "onednn", "numba"}):
        monkeypatch.setattr("hf_maskselect.runtime.load.missing", lambda kind, gone=gone: "gone" * (kind in gone))
        loaded = load_cpu(exported[0], retime=False)
        assert (logits(loaded) - logits(dense)).norm() < 0.05 * logits(dense).norm()
        if "int8" in gone:  # plain linear layers are left where nothing else works
            changed = [module for module in loaded.modules() if isinstance(module, Unsaved)]
            assert all(isinstance(module, Int8Embedding) for module in changed)


def test_bad_input_is_one_sentence(folder, exported, tmp_path):
    with pytest.raises(ValueError, match="calibration has 0 rows"):
        export_cpu(folder, tmp_path / "a", **FAST)
    with pytest.raises(ValueError, match="pass evaluate as well"):
        export_cpu(folder, tmp_path / "a", ROWS, max_drop=0.1)
    with pytest.raises(ValueError, match="65 exceeds the 64 positions"):
        export_cpu(folder, tmp_path / "a", ROWS, seq_lens=[65])
    for ids, told in (([], "0 tokens"), ([5] * 65, "65 tokens"), ([10**6], "own tokenizer")):
        with pytest.raises(ValueError, match=told):
            export_cpu(folder, tmp_path / "a", [{"input_ids": ids}] * 2, **FAST)
    for option, told in (
        ({"threads": 0}, "threads=0"),
        ({"max_kl": -1.0}, "max_kl=-1"),
        ({"max_kl": math.nan}, "nan"),
    ):
        with pytest.raises(ValueError, match=told):
            export_cpu(folder, tmp_path / "a", ROWS, **option)
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        size = {"d_model": 8, "num_layers": 1, "d_kv": 4, "num_heads": 2, "d_ff": 8, "vocab_size": 20}
        export_cpu(T5ForConditionalGeneration(T5Config(**size)), tmp_path / "a", ROWS)
    with pytest.raises(ValueError, match="no cpu_model.safetensors"):
        load_cpu(folder)
    with pytest.raises(ValueError, match="not a transformers model"):
        export_cpu(torch.nn.Linear(2, 2), tmp_path / "a", ROWS)
    assert not (tmp_path / "a").exists()


def test_changed_and_damaged_files_are_refused(folder, exported, tmp_path):
    for path in (*exported[0].iterdir(), *folder.glob("model*")):
        shutil.copy(path, tmp_path)
    load_cpu(tmp_path, retime=False)
    sparse_model(sparsity=0.7).save_pretrained(tmp_path)
    shutil.copy(exported[0] / "config.json", tmp_path)
    with pytest.raises(ValueError, match="made from other weights"):
        load_cpu(tmp_path, retime=False)
    for path in tmp_path.glob("model*"):
        path.unlink()
    good = read_json(tmp_path / CPU_JSON, "")
    name = next(iter(good["layers"]))
    for change in (
        {"weights": "0"},
        {"layers": {**good["layers"], "nothing": {"kinds": [[0, "dense"]]}}},
        {"layers": {**good["layers"], name: {**good["layers"][name], "kinds": [[0, "fast"]]}}},
        {"layers": {**good["layers"], name: {"kinds": [[0, "int8"]], "input": [0.0, 3], "output": [1.0, 3]}}},
        {"layers": {"bert.pooler.dense": good["layers"][name]}},
        {"times": [{"batch": 1}]},
        {"times": [{"batch": 1, "length": 8, "ms": {"dense fp32": [1.0]}}]},
        {"times": [{"batch": 1, "length": 8, "ms": {"dense fp32": [float("nan"), 1.0]}}]},
        {"fused": 3},
    ):
        write_json(tmp_path / CPU_JSON, {**good, **change})
        with pytest.raises(ValueError):
            load_cpu(tmp_path, retime=False)
    (tmp_path / CPU_JSON).write_text(json.dumps(good))
    with pytest.raises(ValueError, match="damaged"):
        load_cpu(tmp_path, retime=False)


def test_a_folder_with_an_earlier_export_is_exported_anew(tmp_path):
    model = sparse_model("Bert", 0.9)
    model.save_pretrained(tmp_path / "model")
    export_cpu(tmp_path / "model", tmp_path / "model", int8=False, **FAST)
    torch.testing.assert_close(logits(load_cpu(tmp_path / "model")), logits(model), atol=1e-5, rtol=1e-4)
    changed = sparse_model("Bert", 0.8)
    changed.save_pretrained(tmp_path / "model")
    export_cpu(tmp_path / "model", tmp_path / "other", int8=False, **FAST)
    torch.testing.assert_close(logits(load_cpu(tmp_path / "other")), logits(changed), atol=1e-5, rtol=1e-4)


def test_times_are_of_each_model_and_shape():
    model = sparse_model()
    times = time_jobs({"a": model, "b": model}, [(1, 4), (2, 8)], 64, 0.01)
    assert times.keys() == {(1, 4), (2, 8)}
    assert all(0 < median <= late for each in times.values() for median, late in each.values())


def test_the_file_is_smaller_than_int8_dense(exported):
    assert (exported[0] / CPU_FILE).stat().st_size < exported[1].dense_bytes


def test_the_command_exports(folder, tmp_path, capsys):
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(json.dumps({"sentence": f"w{i} w{i + 1}", "label": 0}) for i in range(12)))
    shapes = ["--batch-sizes", "1", "--seq-lens", "8", "--threads", "1"]
    output = str(tmp_path / "cpu")
    assert (
        main(["export", str(folder), "--format", "cpu", "--output", output, "--calibration", str(text), *shapes]) == 0
    )
    assert "times faster" in capsys.readouterr().out
    assert logits(load_cpu(output)).shape == (24, 2)
    command = ["export", str(folder), "--format", "cpu", "--output", str(tmp_path / "exact"), "--dtype", "fp32"]
    assert main([*command, *shapes]) == 0
    torch.testing.assert_close(logits(load_cpu(tmp_path / "exact")), logits(sparse_model()), atol=1e-5, rtol=1e-4)
    for wrong in (["--dtype", "int8"], ["--dtype", "int8", "--calibration", str(tmp_path / "no.jsonl")]):
        assert main([*command[:-2], *wrong, *shapes]) == 1
        assert "calibration" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(folder), "--format", "onnx", "--output", output, "--threads", "2"])
    with pytest.raises(SystemExit):
        main(["export", str(folder), "--output", output, "--dtype", "fp32"])
