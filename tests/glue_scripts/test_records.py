"""One file for the finished cells of a comparison, without their models."""

import json

import pytest
import torch
from short import FLAGS

import compare
import hf_maskselect
from cells import Cell
from records import CELL, COMMAND, Records, origin, read_cell, write_origin

PRUNED, DENSE = Cell("sst2", 1, "0.99", "magnitude"), Cell("sst2", 1, None, "dense")


def finish(root, cell, loss=0.5):
    """Write the files of a finished cell."""
    folder = cell.folder(root)
    write_origin(folder, "run_glue.py", ["--seed", "1", "--name", "two words"], torch.device("cpu"))
    if cell.method == "dense":
        (folder / "recipe.json").write_text('{"epochs": 1}')
        (folder / "all_results.json").write_text(json.dumps({"eval_loss": loss}))
    else:
        told = {"told": {"flags": []}, "results": {"eval_loss": loss}, "dense_eval_loss": 0.5}
        (folder / CELL).write_text(json.dumps(told))


def test_the_content_of_a_line(tmp_path):
    path, root = tmp_path / "kept" / "cells.jsonl", tmp_path / "runs"
    records = Records(root, path)
    for cell in (DENSE, PRUNED):
        finish(root, cell)
        assert records.lacks(cell) and records.where(cell) == str(cell.folder(root))
        records.add(cell)
        records.add(cell)  # the second call adds nothing
        assert not records.lacks(cell) and records.where(cell) == f"{cell} in {path}"
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["told"] == {"epochs": 1} and first["target"] is None and second["target"] == "0.99"
    assert second["command"].endswith(" python glue_scripts/run_glue.py --seed 1 --name 'two words'")
    assert second["command"] == (PRUNED.folder(root) / COMMAND).read_text().strip()
    versions = {"hf_maskselect": hf_maskselect.__version__, "torch": torch.__version__}
    assert versions.items() <= second["made_with"].items()
    assert second["made_with"]["device"] == torch.backends.cpu.get_cpu_capability()
    assert second["made_with"]["threads"] == torch.get_num_threads() and second["dense_eval_loss"] == 0.5
    assert origin(torch.device("mps"))["device"] == "mps"
    elsewhere = Records(tmp_path / "other", path)
    assert read_cell(PRUNED.folder(root), "magnitude").items() <= elsewhere.find(PRUNED).items()
    assert elsewhere.find(Cell("sst2", 2, "0.99", "magnitude")) is None


def test_a_torn_line_spoils_no_other(tmp_path):
    path, root = tmp_path / "cells.jsonl", tmp_path / "runs"
    records = Records(root, path)
    for cell in (DENSE, PRUNED):
        finish(root, cell)
    records.add(DENSE)
    path.write_bytes(path.read_bytes()[:-20])
    records.add(PRUNED)
    with pytest.raises(ValueError, match=r"line 1 of .*cells.jsonl is not a cell .*: delete that line"):
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
    with pytest.raises(ValueError, match=r"lines 1 and 3 of .* differ on sst2 1 dense: delete the wrong one"):
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
    with pytest.raises(ValueError, match=r"line 1 of .*cells.jsonl is not a cell \('seed'\): delete that line"):
        Records(tmp_path, tmp_path / "cells.jsonl")


def test_a_wrong_or_incomplete_cell_is_not_recorded(tmp_path):
    path, root = tmp_path / "cells.jsonl", tmp_path / "runs"
    records = Records(root, path)
    for cell in (DENSE, PRUNED):
        finish(root, cell)
    (PRUNED.folder(root) / COMMAND).unlink()
    with pytest.raises(ValueError, match="magnitude/command.txt is missing: delete its folder"):
        records.add(PRUNED)
    finish(root, DENSE, loss=0.25)  # made again, elsewhere; beside it lies a cell of the first one
    with pytest.raises(ValueError, match=r"an eval_loss of 0.5, which now has 0.25: delete that folder"):
        records.add(PRUNED)
    (DENSE.folder(root) / "all_results.json").write_text('{"eval_l')
    with pytest.raises(ValueError, match=r"all_results.json cannot be read .*: delete .*dense"):
        records.add(DENSE)
    assert path.read_text() == "" and records.lacks(DENSE) and records.lacks(PRUNED)


def test_a_missing_file_does_not_lose_the_cell(tmp_path):
    path, root = tmp_path / "kept" / "cells.jsonl", tmp_path / "runs"
    records = Records(root, path)
    finish(root, DENSE)
    path.unlink()
    path.parent.rmdir()
    with pytest.raises(ValueError, match=r"cannot be written \(No such file .*: the cell is finished in .*dense"):
        records.add(DENSE)
    assert records.lacks(DENSE)
    path.parent.mkdir()
    records.add(DENSE)
    assert Records(root, path).find(DENSE)["told"] == {"epochs": 1}


@pytest.mark.slow
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
    with pytest.raises(SystemExit, match=r"an eval_loss of 9.5, sst2 42 dense in .*: delete d/sst2/42 and"):
        compare.main([*flags, "--output_dir", "d", "--methods", "gumbel"])
    # One that would be another is not even trained.
    monkeypatch.setattr(compare, "fine_tune_dense", lambda *_: pytest.fail("the wrong dense model was trained"))
    flags += ["--output_dir", "e", "--methods", "gumbel"]
    with pytest.raises(SystemExit, match=r"sst2 42 dense in .*cells.jsonl was made with epochs 1\.0 and not 2"):
        compare.main([*flags, "--dense_epochs", "2"])
    with pytest.raises(SystemExit, match=r"was made with gradient_accumulation_steps 1 and not 2: give"):
        compare.main([*flags, "--gradient_accumulation_steps", "2"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(SystemExit, match=r"was made with threads 1, this is 7: results are the same only"):
        compare.main(flags)
    assert methods() == ["dense", "magnitude", "pdp"] and not (tmp_path / "e" / "sst2").exists()
    assert (tmp_path / "e" / "table.md").is_file()  # of what is known


@pytest.mark.slow
def test_cells_of_an_earlier_call_are_recorded(tmp_path, start, data_dir, monkeypatch):
    """Their dense model is recorded too, and no cell runs again."""
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
