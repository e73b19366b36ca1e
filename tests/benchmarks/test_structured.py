"""Smaller models by every method meet one target, and are scored, trained, kept and not made again."""

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import make, make_rows, same, weights_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForSequenceClassification, DataCollatorWithPadding

from demo_data import demo_tokenizer, make_sentences

METHODS = ["ours", "layers", "magnitude", "kwon"]


@pytest.fixture
def script(monkeypatch):
    """The script, which counts operations instead of seconds."""

    def operations(jobs, seconds, now=None):
        counts = {}
        for name, job in jobs.items():
            with torch.inference_mode(False), torch.no_grad(), FlopCounterMode(display=False) as counter:
                job()
            counts[name] = float(counter.get_total_flops())
        return counts

    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    script, methods = map(importlib.import_module, ("structured", "structured_methods"))
    monkeypatch.setattr(script, "least_seconds", operations)
    monkeypatch.setattr("hf_maskselect.surgery.structured.latency.least_seconds", operations)
    monkeypatch.setattr(methods, "TIMED", (2, 16))
    return script


@pytest.fixture
def runs(tmp_path):
    """A folder with a dense model of two layers for sst2 and its files; 80 rows, of which 8 are held out."""
    folder, data = tmp_path / "runs" / "sst2" / "42" / "dense", tmp_path / "data" / "sst2"
    tokenizer = demo_tokenizer()
    make(vocab_size=len(tokenizer), intermediate_size=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps({"train_rows": 72}))
    (folder / "all_results.json").write_text(json.dumps({"eval_accuracy": 0.5}))
    data.mkdir(parents=True)
    sentences, labels = make_sentences(96)
    rows = [json.dumps({"sentence": s, "label": y}) for s, y in zip(sentences, labels, strict=True)]
    (data / "train.jsonl").write_text("\n".join(rows[:80]))
    (data / "validation.jsonl").write_text("\n".join(rows[80:]))
    return tmp_path


def call(script, runs, monkeypatch, *flags):
    given = ["--runs", runs / "runs", "--data_dir", runs / "data", "--tasks", "sst2", "--work", runs / "work"]
    monkeypatch.setattr("sys.argv", ["structured.py", *map(str, given), "--steps", "2", *flags])
    script.main()


@pytest.fixture
def start(script):
    """A dense model of two layers, to make twice as fast, and rows."""
    dense = make(intermediate_size=256).eval()
    rows = Dataset.from_list(
        [{"input_ids": r["input_ids"].tolist(), "label": int(r["labels"])} for r in make_rows(64)]
    )
    return script.Start(dense, rows, rows, DataCollatorWithPadding(demo_tokenizer()), 2.0, "uniform", 0, {})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_meets_the_target(script, start, method):
    before = weights_of(start.dense)
    small, shape = script.METHODS[method](start)
    dense, counted = start.latency.measured(small)
    assert 2 <= dense / counted < 2.2
    assert (small.config.num_hidden_layers, small.config.intermediate_size) == (len(shape.layers), shape.width)
    assert method == "ours" or len(shape.layers) == (1 if method == "layers" else 2)
    assert same(weights_of(start.dense), before)


@pytest.mark.slow
def test_cells_are_scored_and_not_made_again(script, runs, monkeypatch, capsys):
    call(script, runs, monkeypatch, "--speedup", "2")
    folder = runs / "work" / "2.0x uniform" / "sst2" / "42"
    for method in METHODS:
        cell = json.loads((folder / method / "cell.json").read_text())
        small = BertForSequenceClassification.from_pretrained(folder / method)
        assert f"width {small.config.intermediate_size}" in cell["shape"] and cell["dense"] == 50.0
    table = capsys.readouterr().out.split("\n\n")[-2]
    assert [line.split()[2] for line in table.splitlines()[2:6]] == METHODS
    monkeypatch.setattr(script, "Task", None)
    call(script, runs, monkeypatch, "--speedup", "2")
    assert capsys.readouterr().out.split("\n\n")[-2] == table


def test_a_target_that_no_width_meets_is_said(script, runs, monkeypatch, capsys):
    call(script, runs, monkeypatch, "--speedup", "6", "--methods", "magnitude")
    cell = json.loads((runs / "work" / "6.0x uniform" / "sst2" / "42" / "magnitude" / "cell.json").read_text())
    assert cell == {"dense": 50.0, "shape": "not reached"}
    assert "not reached" in capsys.readouterr().out


def test_another_recipe_is_refused(script, runs, monkeypatch):
    (runs / "runs" / "sst2" / "42" / "dense" / "recipe.json").write_text(json.dumps({"train_rows": 70}))
    with pytest.raises(ValueError, match="trained on 70 rows, and these are 72: give the recipe"):
        call(script, runs, monkeypatch)


def test_exchanges_lower_the_cost_of_what_goes(script):
    gradients = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    order = gradients.square().sum(0).argsort()
    exchanged = importlib.import_module("structured_methods").exchange(gradients, order, 8)
    costs = [gradients[:, each[:8]].sum(1).square().sum() for each in (exchanged, order)]
    assert costs[0] < costs[1] and sorted(exchanged.tolist()) == list(range(20))


def test_scales_are_found_again(start):
    small = copy.deepcopy(start.dense)
    for layer in small.bert.encoder.layer:
        layer.output.dense.weight.data *= 0.5 + torch.rand(256, generator=torch.Generator().manual_seed(0))
        layer.attention.output.dense.weight.data[:, :16] *= 0.7
    before = start.divergence(small)
    importlib.import_module("structured_methods").rescale(small, start)
    assert start.divergence(small) < 0.05 * before
