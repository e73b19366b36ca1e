"""One file for the finished cells of a panel, where their models do not go."""

import json

import pytest
import torch
from short import FLAGS

import compare
import hf_maskselect
from compare import Cell
from records import CELL, COMMAND, Records, read_cell, write_origin

PRUNED, DENSE = Cell("sst2", 1, "0.99", "magnitude"), Cell("sst2", 1, None, "dense")


def finish(root, cell, loss=0.5):
    """What a finished cell leaves."""
    folder = cell.folder(root)
    write_origin(folder, "run_glue.py", ["--seed", "1", "--name", "two words"], torch.device("cpu"))
    if cell.method == "dense":
        (folder / "recipe.json").write_text('{"epochs": 1}')
        (folder / "all_results.json").write_text(json.dumps({"eval_loss": loss}))
    else:
        (folder / CELL).write_text(json.dumps({"told": {"flags": []}, "results": {"eval_loss": loss}}))


def test_what_a_line_holds(tmp_path):
    path, root = tmp_path / "kept" / "cells.jsonl", tmp_path / "runs"
    records = Records(root, path)
    for cell in (DENSE, PRUNED):
        finish(root, cell)
        assert records.lacks(cell) and records.where(cell) == str(cell.folder(root))
        records.add(cell)
        records.add(cell)  # once is enough
        assert not records.lacks(cell) and records.where(cell) == f"{cell} in {path}"
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["told"] == {"epochs": 1} and first["target"] is None and second["target"] == "0.99"
    assert second["command"].endswith(" python glue_scripts/run_glue.py --seed 1 --name 'two words'")
    assert second["command"] == (PRUNED.folder(root) / COMMAND).read_text().strip()
    versions = {"hf_maskselect": hf_maskselect.__version__, "torch": torch.__version__}
    assert versions.items() <= second["made_with"].items()
    assert second["made_with"]["device"] == torch.backends.cpu.get_cpu_capability()
    elsewhere = Records(tmp_path / "other", path)
    assert elsewhere.find(PRUNED) == read_cell(PRUNED.folder(root), "magnitude")
    assert elsewhere.find(Cell("sst2", 2, "0.99", "magnitude")) is None


def test_a_torn_line_spoils_no_other(tmp_path):
    path, root = tmp_path / "cells.jsonl", tmp_path / "runs"
    records = Records(root, path)
    finish(root, PRUNED)
    finish(root, DENSE)
    records.add(DENSE)
    path.write_bytes(path.read_bytes()[:-20])
    records.add(PRUNED)
    with pytest.raises(ValueError, match=r"line 1 of .*cells.jsonl is no finished cell .*: delete that line"):
        Records(root, path)
    path.write_text(path.read_text().splitlines()[1])  # nor is a missing end of line one
    records = Records(root, path)
    records.add(DENSE)
    assert [json.loads(line)["method"] for line in path.read_text().splitlines()] == ["magnitude", "dense"]


def test_two_lines_of_one_cell_must_agree(tmp_path):
    path = tmp_path / "cells.jsonl"
    line = {"task": "sst2", "seed": 1, "target": None, "method": "dense", "told": {}, "results": {"eval_loss": 1.0}}
    path.write_text(2 * (json.dumps(line) + "\n"))
    assert Records(tmp_path, path).find(DENSE)["results"] == {"eval_loss": 1.0}
    other = json.dumps(line | {"results": {"eval_loss": 2.0}})
    path.write_text(path.read_text() + other)
    with pytest.raises(ValueError, match=r"lines 1 and 3 of .* tell of sst2 1 dense otherwise: delete the wrong one"):
        Records(tmp_path, path)


def test_bad_files_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot be written: Is a directory"):
        Records(tmp_path, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/cells.jsonl cannot be written: "):
        Records(tmp_path, tmp_path / "file" / "cells.jsonl")
    with pytest.raises(ValueError, match="cells.jsonl cannot be read: No such file"):
        Records(tmp_path, tmp_path / "cells.jsonl", writes=False)
    (tmp_path / "cells.jsonl").write_text('{"task": "sst2"}\n')
    with pytest.raises(ValueError, match=r"line 1 of .*cells.jsonl is no finished cell \('seed'\): delete that line"):
        Records(tmp_path, tmp_path / "cells.jsonl")


def test_a_cell_without_its_origin_is_not_recorded(tmp_path):
    path = tmp_path / "cells.jsonl"
    records = Records(tmp_path / "runs", path)
    finish(tmp_path / "runs", PRUNED)
    (PRUNED.folder(tmp_path / "runs") / COMMAND).unlink()
    with pytest.raises(ValueError, match="command.txt is missing: delete its folder"):
        records.add(PRUNED)
    assert path.read_text() == ""


def test_a_panel_goes_on_from_its_records_where_the_models_are_gone(tmp_path, start, data_dir, capsys, monkeypatch):
    path = tmp_path / "kept" / "cells.jsonl"
    plain = ["--tasks", "sst2", "--model_name_or_path", start, "--data_dir", data_dir, *FLAGS]
    flags = [*plain, "--records", str(path)]
    monkeypatch.chdir(tmp_path)  # the dense model's recipe and the cells' flags name no folder

    def methods():
        return [json.loads(line)["method"] for line in path.read_text().splitlines()]

    compare.main([*flags, "--output_dir", "a", "--methods", "magnitude"])
    assert methods() == ["dense", "magnitude"]
    compare.main([*flags, "--output_dir", "b", "--methods", "magnitude", "pdp"])  # dense is made again, to the digit
    assert methods() == ["dense", "magnitude", "pdp"]
    assert not (tmp_path / "b" / "sst2" / "42" / "0.9375" / "magnitude").exists()
    rows = [line.split(" | ") for line in (tmp_path / "b" / "table.md").read_text().splitlines()[2:]]
    assert [row[2] for row in rows] == ["dense", "magnitude", "pdp"]
    compare.main([*flags, "--output_dir", "c", "--methods", "magnitude", "pdp", "--only_table"])
    assert (tmp_path / "c" / "table.md").read_text() == (tmp_path / "b" / "table.md").read_text()
    with pytest.raises(SystemExit):
        compare.main([*flags, "--output_dir", "c", "--methods", "magnitude", "--learning_rate", "1"])
    assert "sst2 42 0.9375 magnitude in " in capsys.readouterr().err

    # A cell of another dense model, which was made without the records, stays out of them.
    compare.main([*plain, "--output_dir", "d", "--methods", "gumbel"])
    told = tmp_path / "d" / "sst2" / "42" / "dense" / "all_results.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"eval_loss": 9.5}))
    with pytest.raises(ValueError, match=r"dense has an eval_loss of 9.5, the dense model that made .*cells.jsonl"):
        compare.main([*flags, "--output_dir", "d", "--methods", "gumbel"])
    # One of another recipe is not even trained.
    monkeypatch.setattr(compare, "fine_tune_dense", lambda *_: pytest.fail("the wrong dense model was trained"))
    with pytest.raises(ValueError, match=r"sst2 42 dense in .* was made by .*'epochs': 1.* and not by .*'epochs': 2"):
        compare.main([*flags, "--output_dir", "e", "--methods", "gumbel", "--dense_epochs", "2"])
    with pytest.raises(ValueError, match=r"'rows_a_step': 16.* and not by .*'rows_a_step': 32"):
        compare.main([*flags, "--output_dir", "e", "--methods", "gumbel", "--gradient_accumulation_steps", "2"])
    assert methods() == ["dense", "magnitude", "pdp"]


def test_cells_of_an_earlier_sitting_are_recorded(tmp_path, start, data_dir, monkeypatch):
    """With their dense model, as it is, and without running any again."""
    flags = [
        "--tasks",
        "sst2",
        "--model_name_or_path",
        start,
        "--data_dir",
        data_dir,
        *FLAGS,
        "--methods",
        "magnitude",
    ]
    flags += ["--output_dir", str(tmp_path / "runs")]
    compare.main(flags)
    monkeypatch.setattr(compare, "run_cell", lambda *_: pytest.fail("a finished cell was run again"))
    compare.main([*flags, "--records", str(tmp_path / "cells.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == ["dense", "magnitude"]
