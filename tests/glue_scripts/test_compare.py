"""Comparisons on a tiny model: which cells run, which do not run again, and the tables."""

import json
import math
import shlex
import sys

import pytest
import torch
from short import FLAGS

import compare
import panel
import run_glue
from cells import Cell, names_of
from records import read_cell


@pytest.mark.slow
def test_compare_runs_what_is_missing_and_prints_one_table(tmp_path, start, data_dir, capsys, monkeypatch):
    methods = ["magnitude", "random"]
    flags = ["--tasks", "sst2", "--methods", *methods, "--seeds", "1", "2", "--output_dir", str(tmp_path)]
    flags += ["--variants", "hot:method=taylor,num_candidates=1,learning_rate=1e-2"]
    methods.append("hot")
    flags += ["--model_name_or_path", start, "--data_dir", data_dir, *FLAGS]
    compare.main([*flags, "--targets", "0.9375", "2:4"])
    table = (tmp_path / "table.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [row[2] for row in rows] == ["dense", *methods, *methods]
    assert [row[1] for row in rows] == ["-", *["0.9375"] * 3, *["2:4"] * 3]
    assert {row[11] for row in rows} == {"2 |"} and {row[3] for row in rows[4:]} == {"0.5000"}
    assert table in capsys.readouterr().out and (tmp_path / "panel.png").stat().st_size > 10_000
    flags += ["--targets", "2:4"]
    monkeypatch.setattr(compare, "run_cell", lambda *given: pytest.fail("a finished cell was run again"))
    compare.main(flags)
    compare.main([*flags, "--targets", "0.99", "2:4", "--only_table", "--learning_rate", "1"])
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    assert [row[2] for row in rows] == ["dense", *methods] and {row[1] for row in rows} == {"-", "2:4"}
    with pytest.raises(
        SystemExit, match=r"sst2 2 dense, with all cells .*/dense was made with epochs 1\.0 and not 2\.0: give"
    ):
        compare.main([*flags, "--targets", "0.9", "--dense_epochs", "2"])
    with pytest.raises(SystemExit):
        compare.main([*flags, "--learning_rate", "1"])
    assert "was made with other flags" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cell_is_made_again_by_its_command(tmp_path, start, data_dir, monkeypatch):
    """Also: a `-total` method trains for fewer steps, which pay for its search."""
    flags = ["--tasks", "sst2", "--methods", "random", "random-total", "--output_dir", str(tmp_path), *FLAGS]
    flags += ["--model_name_or_path", start, "--data_dir", data_dir, "--max_steps", "60", "--criterion_batches", "4"]
    compare.main(flags)
    folder = tmp_path / "sst2" / "42" / "0.9375"
    free, paid = (read_cell(folder / n, n)["results"] for n in ("random", "random-total"))
    levels = read_cell(folder / "random", "random")["searches"]
    assert [len(level) for level in levels] == [2, 2] and all("taylor:balanced" in level for level in levels)
    assert free["train_steps"] == 60 and 2 <= paid["train_steps"] < 60
    assert 40 < paid["train_steps"] + paid["search_step_equivalents"] <= 60
    threads, _, script, *again = shlex.split((folder / "random-total" / "command.txt").read_text())
    assert threads == f"OMP_NUM_THREADS={torch.get_num_threads()}" and script == "glue_scripts/run_glue.py"
    again[again.index("--output_dir") + 1] = str(tmp_path / "again")
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *again])
    run_glue.main()
    found = json.loads((tmp_path / "again" / "all_results.json").read_text())
    assert all(found[key] == paid[key] for key in ("eval_loss", "eval_accuracy", "train_loss", "train_steps"))
    dense = tmp_path / "sst2" / "42" / "dense"
    _, _, script, *again = shlex.split((dense / "command.txt").read_text())
    again[again.index("--output_dir") + 1] = str(tmp_path / "again")
    assert script == "glue_scripts/compare.py"
    compare.main(again)
    found = (tmp_path / "again" / "sst2" / "42" / "dense" / "all_results.json").read_text()
    told = [
        {k: v for k, v in json.loads(text).items() if k in ("eval_loss", "eval_accuracy")}
        for text in (found, (dense / "all_results.json").read_text())
    ]
    assert told[0] == told[1] and len(told[0]) == 2
    command = (dense / "command.txt").read_text()
    compare.main([*flags, "--methods", "magnitude", "--per_device_eval_batch_size", "7"])  # reuses the dense model
    assert (dense / "command.txt").read_text() == command


def test_flags_of_one_task_target_or_method():
    keys = ["rte", "2:4", "pdp"]
    assert compare.merged([("rte", ["--a"]), ("rte", ["--b"])]) == {"rte": ["--a", "--b"]}
    assert names_of("random-total") == ["random", "random-total"] and names_of("pdp") == ["pdp"]
    found = compare.parse_own_flags("rte:max_steps=9,bf16=True", keys)
    assert found == ("rte", ["--max_steps", "9", "--bf16", "True"])
    assert compare.parse_own_flags("2:4:num_levels=1", keys) == ("2:4", ["--num_levels", "1"])
    for text in ("rte:", "rte:max_steps", "rte:=9"):
        with pytest.raises(ValueError, match="must look like rte:max_steps"):
            compare.parse_own_flags(text, keys)
    with pytest.raises(ValueError, match="must begin with one of rte, 2:4, pdp"):
        compare.parse_own_flags("mrpc:max_steps=9", keys)
    own = {key: ["--x", key] for key in [*keys, "dense"]}
    assert Cell("rte", 1, None, "dense").flags(["--y"], own) == ["--y", "--x", "rte", "--x", "dense"]
    cell = Cell("rte", 1, "2:4", "pdp")
    assert cell.flags(["--y"], own) == ["--y", "--pattern", "2:4", "--x", "rte", "--x", "2:4", "--x", "pdp"]


def test_the_panel_mean_needs_every_task():
    cost = {"train_steps": 30, "search_step_equivalents": 10.4}
    groups = {("cola", None, "dense"): panel.Group([50.0], [{}]), ("sst2", None, "dense"): panel.Group([90.0], [{}])}
    groups |= {
        ("cola", "0.99", "a"): panel.Group([40.0, 44.0], [cost, cost]),
        ("sst2", "0.99", "a"): panel.Group([77.0], [cost | {"train_steps": 50}]),
    }
    groups |= {("cola", "0.99", "b"): panel.Group([40.0], [cost])}
    table = panel.make_summary(groups, ["cola", "sst2"], ["0.99", "2:4"], ["a", "b"]).splitlines()
    assert table[0] == "| target | method | cola | sst2 | mean | of dense | steps + search |"
    assert table[2:] == [
        "| - | dense | 50.0 | 90.0 | 70.0 | 100.0 % | - |",
        "| 0.99 | a | 42.0 ± 2.8 | 77.0 | 59.5 | 85.0 % | 40 + 10 |",
        "| 0.99 | b | 40.0 | - | - | - | 30 + 10 |",
    ]


def test_the_spread_of_a_mean_is_that_of_independent_tasks():
    groups = {("cola", "2:4", "a"): panel.Group([39.0, 41.0], []), ("sst2", "2:4", "a"): panel.Group([80.0, 82.0], [])}
    groups |= {("rte", "2:4", "a"): panel.Group([50.0], [])}
    assert panel._point(groups, ["cola", "sst2"], "2:4", "a") == pytest.approx((60.5, 1.0))  # sqrt(2 + 2) / 2
    mean, spread = panel._point(groups, ["cola", "rte"], "2:4", "a")
    assert mean == 45.0 and math.isnan(spread)  # one seed says nothing of a spread
    assert panel._point(groups, ["cola", "mrpc"], "2:4", "a") is None
