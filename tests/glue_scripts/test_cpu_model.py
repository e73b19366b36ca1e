"""The scripts end with a fast CPU model: exported with train rows, scored like the pruned model, and timed."""

import json

import pytest
import torch
from short import FLAGS
from tiny import make
from transformers import AutoModel

import cpu_model
import run_glue
from arguments import parse_arguments
from demo_data import demo_tokenizer
from hf_maskselect import load_cpu, verify
from hf_maskselect.runtime.files import Runtime
from job import prepare

EXPORT = ["--cpu_batch_sizes", "2", "--cpu_seq_lens", "8", "--cpu_calibration_rows", "8"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("hf_maskselect.runtime.export._SECONDS", 0.01)
    monkeypatch.setattr("hf_maskselect.runtime.choose._SECONDS", 0.001)


@pytest.fixture
def call(data_dir):
    """Return a function that runs the script with these flags."""
    return lambda *flags: run_glue.run(*parse_arguments([str(f) for f in ("--data_dir", data_dir, *flags, *EXPORT)]))


@pytest.fixture
def pruned(tmp_path):
    """A saved model of the mnli task, half of whose blocks are zero."""
    model = make(num_labels=3, vocab_size=len(demo_tokenizer()))
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.output.dense.weight[:, ::8] = 0
    model.save_pretrained(tmp_path / "pruned")
    demo_tokenizer().save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def test_one_command_prunes_and_exports(tmp_path, start, call):
    out = tmp_path / "out"
    results = call(
        *("--task_name", "sst2", "--model_name_or_path", start, "--output_dir", out, "--method", "magnitude"),
        *("--pattern", "1x4", *FLAGS, "--num_candidates", "1", "--export_cpu", "True"),
    )
    assert results.items() <= json.loads((out / "all_results.json").read_text()).items()
    assert results["eval_sparsity"] == 0.9375 and abs(results["cpu_eval_accuracy"] - results["eval_accuracy"]) < 0.2
    assert results["cpu_times_faster_2x8"] == results["dense_ms_2x8"] / results["cpu_ms_2x8"]
    assert 0 < results["cpu_mb"] < results["dense_mb"]
    assert verify(out, "1x4") and load_cpu(out / "cpu").config.pruning["pattern"] == "1x4"


@pytest.mark.slow
def test_one_command_shrinks_prunes_and_exports(tmp_path, start, call, monkeypatch):
    monkeypatch.setattr("hf_maskselect.surgery.structured.latency._SECONDS", 0.0)
    deep = AutoModel.from_pretrained(start).config
    deep.num_hidden_layers, deep.intermediate_size = 4, 1024
    AutoModel.from_config(deep).save_pretrained(tmp_path / "deep")
    demo_tokenizer().save_pretrained(tmp_path / "deep")
    flags = ["--task_name", "sst2", "--model_name_or_path", tmp_path / "deep", "--output_dir", tmp_path / "out"]
    flags += ["--method", "magnitude", "--pattern", "1x4", *FLAGS, "--num_candidates", "1", "--export_cpu", "True"]
    results = call(*flags, "--shrink_speedup", "1.3")
    small = AutoModel.from_pretrained(tmp_path / "out" / "small").config
    assert (small.num_hidden_layers, small.intermediate_size) != (4, 1024)
    final = load_cpu(tmp_path / "out" / "cpu").config
    assert final.intermediate_size == small.intermediate_size and final.pruning["pattern"] == "1x4"
    assert final.pruning["structure"]["target"] == "speedup=1.3" and results["eval_sparsity"] == 0.9375
    with pytest.raises(ValueError, match="was made with speedup=1.3 and not with speedup=1.4"):
        call(*flags, "--shrink_speedup", "1.4")


def test_a_pruned_model_is_exported_without_training(tmp_path, pruned, call):
    flags = ["--task_name", "mnli", "--model_name_or_path", pruned, "--output_dir", tmp_path / "out"]
    results = call(*flags, "--do_train", "False", "--export_cpu", tmp_path / "cpu", "--cpu_max_drop", "1")
    assert load_cpu(tmp_path / "cpu").num_labels == 3 and "train_steps" not in results
    assert not list((tmp_path / "out").glob("*.safetensors"))
    for name in ("eval_accuracy", "eval_accuracy_mm"):
        assert abs(results[f"cpu_{name}"] - results[name]) < 0.1


@pytest.mark.slow
def test_layers_stay_exact_until_the_bound_holds(tmp_path, pruned, call):
    """No rounding meets this bound: an accuracy that rises by two."""
    flags = ["--task_name", "mnli", "--model_name_or_path", pruned, "--output_dir", tmp_path]
    results = call(*flags, "--do_eval", "--export_cpu", tmp_path / "cpu", "--cpu_max_drop=-2")
    assert {layer.input is None for layer in Runtime.load(tmp_path / "cpu").layers.values()} == {True}
    assert results["cpu_eval_accuracy"] == results["eval_accuracy"]


def test_calibration_rows_are_of_train_and_none_is_held_out(start, data_dir, tmp_path):
    flags = ["--task_name", "sst2", "--data_dir", data_dir, "--output_dir", str(tmp_path), "--use_cpu"]
    parsed = parse_arguments(
        [*flags, "--model_name_or_path", start, "--method", "magnitude", "--cpu_max_drop", "0.01"]
    )
    job = prepare(*parsed)
    rows = cpu_model.calibration_rows(job, 50, seed=1)
    ids = {tuple(row["input_ids"]) for row in rows}
    assert len(rows) == 50 and all("label" not in row for row in rows)
    assert ids <= {tuple(row) for row in job.train["input_ids"]}
    for others in (job.selection, *job.evaluation.values()):
        assert len(others) and not ids & {tuple(row) for row in others["input_ids"]}
    assert cpu_model.calibration_rows(job, 999, seed=1)[:50] == rows
    assert rows != cpu_model.calibration_rows(job, 50, seed=2) and len(cpu_model.calibration_rows(job, 999, 1)) == 58
