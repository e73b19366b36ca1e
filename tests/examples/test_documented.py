"""Tables, scripts and names in the pages are those of the package."""

import re
import runpy
import sys
from pathlib import Path

import datasets
import pytest
from transformers import BertForSequenceClassification

import hf_maskselect
from hf_maskselect import verify

ROOT = Path(__file__).parents[2]


def rows_of(text):
    """Return the cells of every row of the Markdown tables in `text`."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture(scope="module")
def panel(tmp_path_factory):
    """Run the command of docs/results.md that writes the panel; return its last table."""
    text = (ROOT / "docs" / "results.md").read_text()
    command = re.search(r"^python (.*--only_table(?:.*\\\n)+.*)", text, re.M)[1].replace("\\\n", " ").split()
    folder = tmp_path_factory.mktemp("panel")
    changes = {"runs": str(folder), "benchmarks/panel.jsonl": str(ROOT / "benchmarks" / "panel.jsonl")}
    argv, sys.argv = sys.argv, [changes.get(word, word) for word in command]
    try:
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    finally:
        sys.argv = argv
    return (folder / "table.md").read_text().strip().split("\n\n")[-1]


def test_the_panel_is_the_one_of_the_stored_cells(panel):
    assert panel in (ROOT / "docs" / "results.md").read_text()


def test_the_readme_has_rows_of_the_panel(panel):
    cells = {(row[0], row[1]): [re.sub(" ±.*", "", cell) for cell in row[2:9]] for row in rows_of(panel)[2:]}
    rows = {row[0]: row[1:] for row in rows_of((ROOT / "README.md").read_text()) if len(row) == 9}
    names = {"dense": "-", "16x smaller (93.75 % zeros)": "0.9375", "100x smaller (99 % zeros)": "0.99"}
    for name, target in {**names, "2:4 (50 % zeros)": "2:4"}.items():
        dense = target == "-"
        magnitude = cells[target, "dense" if dense else "magnitude"][5]
        assert rows[name] == [*cells[target, "dense" if dense else "random"], magnitude]


def test_the_api_page_has_every_public_name():
    names = re.findall(r"^::: hf_maskselect\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(names) == sorted(hf_maskselect.__all__)


def test_the_whole_script_of_the_quick_start(tmp_path, monkeypatch):
    """Run it with a small model and generated pairs in place of those of the Hub, and one short level."""
    import demo_data

    script = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text(), re.S)[0]
    script = script.replace("path-or-hub-name-of-a-bert-fine-tuned-on-mrpc", "dense")
    script = script.replace("num_train_epochs=10", "max_steps=4, num_levels=1, refit_rows=16")
    monkeypatch.chdir(tmp_path)
    BertForSequenceClassification(demo_data.demo_model_config()).save_pretrained("dense")
    demo_data.demo_tokenizer().save_pretrained("dense")
    data = demo_data.load_demo(320, 64)
    data = data.map(
        lambda row: {"sentence1": row["sentence"], "sentence2": row["sentence"]}, remove_columns="sentence"
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: data)
    exec(script, {})
    verify("out")
