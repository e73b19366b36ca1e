"""The scripts of `examples/by_feature` and the quick start of the README run offline, as they stand."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from hf_maskselect import verify

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "by_feature"
SHORT = "--max_steps 12 --use_cpu True".split()
SMALL_SEARCH = "--num_levels 1 --refit_rows 16 --max_selection_samples 64".split()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs an example with a few steps and returns its output folder and its result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(name, *flags):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        folder = tmp_path / "out" / name
        return folder, module.main(["--output_dir", str(folder), *SHORT, *flags])

    return run


def test_every_example_has_a_test():
    text = Path(__file__).read_text()
    names = [path.stem for path in EXAMPLES.glob("*.py")]
    assert len(names) >= 5
    assert [name for name in names if f'run("{name}"' not in text] == []


def test_pdp(run):
    folder, _ = run("pdp")
    verify(folder)
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.pruning["method"] == "pdp"


@pytest.mark.slow
def test_two_to_four(run, capsys):
    folder, _ = run("two_to_four", *SMALL_SEARCH)
    verify(folder, "2:4")
    assert (folder / "nm" / "semi_structured_model.safetensors").is_file()
    assert "loaded BertForSequenceClassification" in capsys.readouterr().out


def test_score_fn(run):
    folder, _ = run("score_fn", *SMALL_SEARCH)
    verify(folder)
    searches = json.loads((folder / "search.json").read_text())
    assert "score_fn" in json.dumps(searches)


@pytest.mark.slow
def test_resume(run):
    _, equal = run("resume", *SMALL_SEARCH)
    assert equal


@pytest.mark.slow
def test_hub(run, capsys):
    folder, _ = run("hub", *SMALL_SEARCH)
    assert "0.9000 zeros" in capsys.readouterr().out
    assert {"README.md", "pruning_state.safetensors", "packed_model.safetensors"} <= {f.name for f in folder.iterdir()}


@pytest.mark.slow
def test_the_quick_start_of_the_readme(tmp_path, monkeypatch):
    """Run both blocks with fewer rows; `make demo`, which comes before them, leaves a dense model."""
    import demo_data

    script, load = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    load_demo = demo_data.load_demo
    monkeypatch.setattr(demo_data, "load_demo", lambda: load_demo(320, 64))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    BertForSequenceClassification(demo_data.demo_model_config()).save_pretrained("trainer_output/dense")
    demo_data.demo_tokenizer().save_pretrained("trainer_output/dense")
    exec(script, {})
    verify("out")
    names = {}
    exec(load, names)
    assert names["model"].config.pruning["sparsity"] == 0.9375
