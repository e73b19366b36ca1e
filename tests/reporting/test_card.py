"""The card and the pictures of a run."""

import dataclasses
import json
import math
import re
import shutil
import sys

import pytest
from tiny import make, make_rows, make_trainer

from hf_maskselect.cli import main
from hf_maskselect.reporting.card import card_text
from hf_maskselect.reporting.plots import (
    DENSITY,
    HISTORY,
    SEARCH,
    draw_density,
    draw_history,
    draw_search,
    history_panels,
    plot,
    search_pages,
    search_pictures,
)
from hf_maskselect.reporting.record import RunRecord, best_first, metrics_of
from hf_maskselect.search.results import Candidate, LevelSearch
from hf_maskselect.utils.tables import markdown_table

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with two searches and evaluations; do not change."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(
        folder,
        make(num_hidden_layers=3),
        make_rows(),
        method="random",
        num_candidates=3,
        trial_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        keywords={"compute_metrics": lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}},
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return folder, trainer


def test_a_record_holds_what_the_trainer_knew(run):
    folder, trainer = run
    record = RunRecord.load(folder)
    assert record.history == trainer.state.log_history
    assert record.searches == trainer.run.search.history and len(record.searches) == 2
    assert record.state.masks.digest() == trainer.pruning_state().masks.digest()
    rows, columns, found = record.densities()
    assert rows == ["0", "1", "2"] and len(columns) == 6 and len(found) == 18
    masks = record.state.masks
    name = "bert.encoder.layer.1.attention.self.query.weight"
    assert found["1", "attention.self.query"] == pytest.approx(float(masks[name].float().mean()))


def test_the_card_goes_on_with_the_modules_that_were_pruned(run, tmp_path):
    given = {"target_modules": ["query", "value"], "exclude_modules": ["layer.0.attention.self.value"]}
    trainer = make_trainer(tmp_path / "part", **given)
    trainer.train()
    trainer.save_model()
    told = ", ".join(f"{name}={value!r}" for name, value in given.items())
    text = card_text(RunRecord.load(tmp_path / "part"), "part", tmp_path)
    assert f"PruningConfig(sparsity=masks.sparsity(), {told})" in text
    assert "PruningConfig(sparsity=masks.sparsity())" in card_text(RunRecord.load(run[0]), "whole", tmp_path)


def test_scores_are_told_from_times_and_counts():
    results = {"eval_f1": 0.5, "eval_runtime": 3, "eval_samples": 9, "eval_loss": 1.0, "eval_sparsity": 0.9, "x": 1}
    assert metrics_of(results, "eval_") == {"f1": 0.5}


def test_the_first_screen_of_the_card_holds_task_scores_size_and_loading(run):
    record = RunRecord.load(run[0])
    text = card_text(record, "someone/model", run[0], {}, {"accuracy": 0.75}, {"accuracy": 1.0})
    first = "\n".join(text.splitlines()[:18])
    assert "text classification" in first and f"| sparsity | 0.0000 | {record.report.sparsity:.4f} | - |" in first
    assert "| accuracy | 1.0000 | 0.7500 | 75.0% |" in first and "| size in MB (sparse: packed) |" in first
    assert 'from_pretrained("someone/model")' in first


def test_the_card_says_what_the_files_hold(run):
    folder, trainer = run
    record = RunRecord.load(folder)
    text = card_text(record, "someone/model", folder, trainer.args.to_dict(), dense_scores={"accuracy": 0.875})
    assert f"{record.report.prunable_zeros:,} of {record.report.prunable_total:,} prunable weights are zero" in text
    for tensor in record.report.tensors:
        assert (f"| `{tensor.name}` |" in text) == tensor.prunable
    for search in record.searches:
        for candidate in search.candidates:
            assert f"`{candidate.proposal}` | " + " → ".join(f"{s:.4f}" for s in candidate.scores) in text
    assert text.count("| chosen |") == 2
    last = [entry["eval_accuracy"] for entry in record.history if "eval_accuracy" in entry][-1]
    assert f"| accuracy | 0.8750 | {last:.4f} | {last / 0.875:.1%} |" in text and "One seed." in text
    assert "BertForSequenceClassification.from_pretrained(" in text and "2310.13183" in text
    assert "| `num_candidates` | `3` |" in text and "gumbel" not in text and "pdp" not in text


def test_the_card_names_the_teacher_and_no_folder_of_this_machine(tmp_path):
    make(seed=3).save_pretrained(tmp_path / "dense")
    trainer = make_trainer(tmp_path / "run", keywords={"teacher": str(tmp_path / "dense")}, distill_temperature=2.0)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text()
    assert "| `teacher` | `dense` |" in text and "| `distill_temperature` | `2.0` |" in text
    assert str(tmp_path) not in text


def test_the_card_tells_the_spread_over_seeds(run):
    folder, _ = run
    scores, dense = {"accuracy": [0.8, 0.9]}, {"accuracy": [0.9, 0.9]}
    text = card_text(RunRecord.load(folder), "m", folder, {}, scores, dense)
    assert "| accuracy | 0.9000 ± 0.0000 | 0.8500 ± 0.0707 | 94.4% |" in text
    assert "Mean and standard deviation of 2 seeds." in text


def test_the_code_in_the_card_runs(run, tmp_path, monkeypatch):
    """With the folder in place of the repository's name."""
    monkeypatch.chdir(tmp_path)
    folder, trainer = run
    text = card_text(RunRecord.load(folder), str(folder), folder, {})
    first, second = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(first, names)
    exec(second.replace("train_dataset=...", "train_dataset=[{'labels': 0}] * 20"), names)
    assert names["masks"].digest() == trainer.pruning_state().masks.digest()
    assert names["trainer"].args.sparsity == 0.75


@pytest.mark.slow
def test_a_card_of_another_method_cites_it(tmp_path):
    for method, cited in (("pdp", "2305.11203"), ("gumbel", "2202.12986"), ("magnitude", "classic")):
        own = {} if method == "magnitude" else {"num_levels": None, "frozen_steps": 2}
        trainer = make_trainer(tmp_path / method, method=method, **own)
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        text = (tmp_path / method / "README.md").read_text()
        assert cited in text and "No masks were tried against each other." in text


def test_the_console_draws_what_there_is(run, tmp_path, capsys):
    folder, _ = run
    assert main(["plot", str(folder), "--output", str(tmp_path / "a")]) == 0
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted([DENSITY, SEARCH, HISTORY])
    assert capsys.readouterr().out.count("wrote ") == 3
    make().save_pretrained(tmp_path / "dense")
    assert main(["plot", str(tmp_path / "dense")]) == 0
    assert [p.name for p in (tmp_path / "dense").glob("*.png")] == [DENSITY]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def assert_bars(axes, candidates, rung):
    """One row a candidate, with its name, its score and a bar from the score of the deterministic mask to its own."""
    names = [label.get_text() for label in axes.get_yticklabels()]
    texts = [text.get_text() for text in axes.texts]
    scores = {c.index: c.scores[rung] for c in candidates if len(c.scores) > rung}
    assert texts == [f"{scores[c.index]:.4f}" if c.index in scores else "out" for c in candidates]
    if rung == 0:
        assert [name.removesuffix(" (deterministic)") for name in names] == [c.proposal for c in candidates]
        assert [name.endswith(" (deterministic)") for name in names] == [c.index == 0 for c in candidates]
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert ends == pytest.approx([scores[c.index] for c in candidates if c.index in scores])
    assert all(bar.get_x() == pytest.approx(scores[0]) for bar in axes.patches)


def make_search(level, scores, steps=0):
    """A level whose candidates have these scores; the best at the last rung is chosen."""
    candidates = [
        Candidate(i, f"proposal {i}", None, 0.9, "x", list(row), steps * len(row)) for i, row in enumerate(scores)
    ]
    longest = max(len(row) for row in scores)
    min((c for c in candidates if len(c.scores) == longest), key=lambda c: c.scores[-1]).chosen = True
    return LevelSearch(level, 0.5, 10 * level, candidates)


def test_rungs_are_drawn_side_by_side():
    search = make_search(0, [(0.7, 0.6), (0.5, 0.4), (0.9,), (math.nan,)], steps=4)
    figure = Figure()
    draw_search([search], figure)
    first, second = figure.axes
    ranked = best_first(search)
    assert [c.index for c in ranked] == [1, 0, 2, 3]
    assert [text.get_text() for text in first.texts] == ["0.5000", "0.7000", "0.9000", "diverged"]
    assert_bars(second, ranked, rung=1)
    chosen, deterministic = first.get_yticklabels()[:2]
    assert chosen.get_fontweight() == "bold" and deterministic.get_fontweight() == "normal"
    (legend,) = figure.legends
    assert [text.get_text().split(" (")[0] for text in legend.get_texts()] == [
        "chosen",
        "deterministic",
        "other candidates",
    ]


def test_many_levels_fill_several_pages_and_old_pages_go(run, tmp_path):
    record = RunRecord.load(run[0])
    searches = [make_search(level, [(0.5 + i / 100,) for i in range(12)]) for level in range(7)]
    searches.append(make_search(7, [(0.5 + i / 1000,) for i in range(64)]))
    pages = search_pages(dataclasses.replace(record, searches=searches))
    assert [[search.level for search in page] for page in pages] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    figure = Figure()
    draw_search(searches[-1:], figure)
    (axes,) = figure.axes
    assert len(axes.patches) == 20 and "20 of 64" in axes.get_title(loc="left")
    plot(dataclasses.replace(record, searches=searches), tmp_path)
    names = [path.name for path in search_pictures(tmp_path)]
    assert names == [SEARCH, "pruning_search_2.png", "pruning_search_3.png"]
    assert f"]({names[2]})" in card_text(record, "m", tmp_path)
    plot(record, tmp_path)
    assert [path.name for path in search_pictures(tmp_path)] == [SEARCH]


def test_titles_lie_inside_the_picture(run):
    record = RunRecord.load(run[0])
    rungs = [make_search(0, [(0.7, 0.6, 0.5), (0.5, 0.4, 0.3), (0.9,)], steps=4)]
    for draw in (
        lambda figure: draw_density(record, figure),
        lambda figure: draw_search(record.searches, figure),
        lambda figure: draw_search(rungs, figure),
        lambda figure: draw_history(record, figure),
    ):
        figure = Figure(layout="constrained", dpi=50)
        FigureCanvasAgg(figure)
        draw(figure)
        figure.canvas.draw()
        titles = [figure._suptitle, *(axes._left_title for axes in figure.axes)]
        for box in (title.get_window_extent() for title in titles if title.get_text()):
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height


def test_values_that_were_not_logged_have_no_panel(run):
    record = RunRecord.load(run[0])
    assert not history_panels(dataclasses.replace(record, history=[]))
    scores = [{k: v for k, v in entry.items() if k != "loss"} for entry in record.history]
    figure = Figure()
    draw_history(dataclasses.replace(record, history=scores), figure)
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy", "sparsity"]
    assert not history_panels(dataclasses.replace(record, history=[{"train_runtime": 1.0, "step": 5}]))


def test_pictures_show_the_numbers(run):
    record = RunRecord.load(run[0])
    figure = Figure()
    draw_density(record, figure)
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert texts == {f"{100 * value:.1f}" for value in record.densities()[2].values()}
    figure = Figure()
    draw_search(record.searches, figure)
    drawn = [(search, rung) for search in record.searches for rung in range(len(best_first(search)[0].scores))]
    for axes, (search, rung) in zip(figure.axes, drawn, strict=True):
        assert_bars(axes, best_first(search), rung)
    figure = Figure()
    draw_history(record, figure)
    assert [axes.get_ylabel() for axes in figure.axes] == ["training loss", "accuracy", "sparsity"]
    losses = [entry["loss"] for entry in record.history if "loss" in entry]
    assert list(figure.axes[0].lines[0].get_ydata()) == losses


def test_plots_without_matplotlib_say_what_to_install(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", str(run[0]), "--output", str(tmp_path)]) == 1
    assert "pip install 'hf_maskselect[plots]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["trainer_state.json", "search.json", "all_results.json"])
def test_a_damaged_table_is_named(run, tmp_path, capsys, name):
    folder = shutil.copytree(run[0], tmp_path / "copy")
    (folder / name).write_text("{")
    assert main(["plot", str(folder)]) == 1
    assert name in capsys.readouterr().err


def test_results_of_the_scripts_are_shown(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "copy")
    told = {"eval_f1": 0.5, "dense_eval_f1": 0.625, "eval_runtime": 1.0}
    (folder / "all_results.json").write_text(json.dumps(told))
    assert "| f1 | 0.6250 | 0.5000 | 80.0% |" in card_text(RunRecord.load(folder), "m", folder)


def test_a_markdown_table():
    table = markdown_table(["a", "b", "c"], [[1, 2, "x"], [3, "-", ""]])
    assert table == "| a | b | c |\n| --- | ---: | --- |\n| 1 | 2 | x |\n| 3 | - |  |"
    assert markdown_table(["a", "b"], []) == "| a | b |\n| --- | ---: |"
    assert markdown_table(["a"], [["`.*(key|query)`"]]).endswith(r"| `.*(key\|query)` |")
