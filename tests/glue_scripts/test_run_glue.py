"""The scripts as a user runs them, on a tiny model and generated files in the GLUE schema."""

import json
import math
import os
import shlex
import subprocess
import sys

import pytest
import torch
from tiny import make
from transformers import AutoModelForSequenceClassification

import compare
import panel
import run_glue
from arguments import parse_arguments
from demo_data import demo_tokenizer, make_sentences
from hf_maskselect import verify
from records import read_cell

SHORT = {
    "max_steps": 8,
    "num_levels": 2,
    "num_candidates": 2,
    "trial_steps": 1,
    "criterion_batches": 2,
    "dense_epochs": 1,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "report_to": "none",
    "save_strategy": "no",
}
FLAGS = [text for name, value in SHORT.items() for text in (f"--{name}", str(value))]
FLAGS += ["--use_cpu", "--disable_tqdm", "1"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny untrained BERT with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = demo_tokenizer()
    make(head="Model", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """sst2 (classes), stsb (regression) and mnli (two validation splits), 64 and 24 rows."""
    folder = tmp_path_factory.mktemp("data")
    sentences, labels = make_sentences(88)

    def write(task, split, rows):
        (folder / task).mkdir(exist_ok=True)
        (folder / task / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    for split, part in (("train", slice(64)), ("validation", slice(64, 88))):
        found = list(zip(sentences[part], labels[part], strict=True))
        write("sst2", split, [{"sentence": s, "label": y, "idx": i} for i, (s, y) in enumerate(found)])
        pairs = [{"sentence1": s, "sentence2": s[::-1], "label": y * 3.5, "idx": i} for i, (s, y) in enumerate(found)]
        write("stsb", split, pairs)
        three = [{"premise": s, "hypothesis": s[:9], "label": i % 3, "idx": i} for i, (s, _) in enumerate(found)]
        for name in [split] if split == "train" else ["validation_matched", "validation_mismatched"]:
            write("mnli", name, three)
    return str(folder)


def call(*flags):
    """Run the script as from the shell."""
    return run_glue.run(*parse_arguments([str(flag) for flag in flags]))


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("sst2", ["eval_accuracy"]),
        ("stsb", ["eval_pearson", "eval_spearmanr"]),
        ("mnli", ["eval_accuracy", "eval_accuracy_mm"]),
    ],
)
def test_a_task_runs_to_the_end(tmp_path, start, data_dir, task, metrics):
    out = tmp_path / "out"
    call("--task_name", task, "--data_dir", data_dir, "--model_name_or_path", start, "--output_dir", out, *FLAGS)
    results = json.loads((out / "all_results.json").read_text())
    wanted = [*metrics, "eval_sparsity", "search_step_equivalents", "search_cost_ratio", f"dense_{metrics[0]}"]
    assert not set(wanted) - results.keys()
    assert results["eval_sparsity"] == 0.9375
    assert verify(out).masks.sparsity() == 0.9375
    assert AutoModelForSequenceClassification.from_pretrained(out).config.pruning["achieved"] == 0.9375
    assert len(json.loads((out / "search.json").read_text())) == 2


@pytest.mark.slow
def test_accelerate_launches_two_processes(tmp_path, start, data_dir):
    """Plan, tables, results and files come from one of them."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", run_glue.__file__]
    command += ["--task_name", "sst2", "--data_dir", data_dir, "--model_name_or_path", start, "--output_dir", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *FLAGS], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Pruning plan") == 1 and done.stdout.count("Level 2: candidates") == 1
    results = json.loads(done.stdout[done.stdout.index('{\n "dense_eval') :])
    assert results["eval_sparsity"] == 0.9375 and results["search_cost_ratio"] > 0
    assert verify(out).masks.sparsity() == 0.9375
    assert not list(out.glob("_*"))


def test_a_teacher_saves_the_dense_run_and_checkpoints_resume(tmp_path, start, data_dir):
    teacher = tmp_path / "teacher"
    make(vocab_size=len(demo_tokenizer())).save_pretrained(teacher)
    common = [
        "--task_name",
        "sst2",
        "--data_dir",
        data_dir,
        "--model_name_or_path",
        teacher,
        "--tokenizer_name",
        start,
    ]
    common += [*FLAGS, "--teacher_name_or_path", teacher, "--save_strategy", "steps", "--save_steps", "5"]
    whole = call(*common, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out" / "dense").exists()
    resumed = call(*common, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "last")
    assert resumed["eval_loss"] == whole["eval_loss"]


def test_a_dense_model_of_another_run_is_not_taken(tmp_path, start, data_dir):
    common = ["--data_dir", data_dir, "--model_name_or_path", start, "--output_dir", tmp_path, *FLAGS]
    call("--task_name", "sst2", *common)
    with pytest.raises(ValueError, match="dense was made by"):
        call("--task_name", "stsb", *common)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target_modules", "nothing"], "no weight to prune"),
        (["--num_levels", "20"], "the plan cannot reach"),
        (["--pattern", "2:5"], "no multiple of 5"),
    ],
)
def test_nothing_is_trained_before_the_plan_is_checked(tmp_path, start, data_dir, flags, message):
    common = ["--task_name", "sst2", "--data_dir", data_dir, "--model_name_or_path", start]
    with pytest.raises(ValueError, match=message):
        call(*common, "--output_dir", tmp_path, *FLAGS, "--num_levels", "1", *flags)
    assert not list(tmp_path.iterdir())


def test_the_demo_takes_its_flags_and_shows_its_methods(tmp_path, capsys, monkeypatch):
    flags = [
        "--task_name",
        "demo",
        "--output_dir",
        str(tmp_path),
        "--max_eval_samples",
        "5",
        "--max_train_samples",
        "96",
    ]
    flags += ["--max-steps", "4", "--num_levels", "2", "--trial_steps", "1", "--dense_epochs", "1", "--use_cpu"]
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *flags, "--disable_tqdm", "1"])
    run_glue.main()
    table = capsys.readouterr().out.split("\nmodel ")[-1].splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["dense", "magnitude", "random"]
    assert [line.split()[1] for line in table[3:5]] == ["0.9375", "0.9375"]
    assert verify(tmp_path / "random").step == 4  # the flag won over the demo's own epoch


def test_compare_runs_what_is_missing_and_prints_one_table(tmp_path, start, data_dir, capsys, monkeypatch):
    methods = ["magnitude", "pdp", "gumbel", "random"]
    flags = ["--tasks", "sst2", "--methods", *methods, "--seeds", "1", "2", "--output_dir", str(tmp_path)]
    flags += ["--variants", "hot:method=taylor,num_candidates=1,learning_rate=1e-2"]
    methods.append("hot")
    flags += ["--model_name_or_path", start, "--data_dir", data_dir, *FLAGS]
    compare.main([*flags, "--targets", "0.9375", "2:4"])
    table = (tmp_path / "table.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [row[2] for row in rows] == ["dense", *methods, *methods]
    assert [row[1] for row in rows] == ["-", *["0.9375"] * 5, *["2:4"] * 5]
    assert {row[11] for row in rows} == {"2 |"} and {row[3] for row in rows[6:]} == {"0.5000"}
    assert table in capsys.readouterr().out and (tmp_path / "panel.png").stat().st_size > 10_000
    flags += ["--targets", "2:4"]
    monkeypatch.setattr(compare, "run_cell", lambda *given: pytest.fail("a finished cell was run again"))
    compare.main(flags)
    compare.main([*flags, "--targets", "0.99", "2:4", "--only_table", "--learning_rate", "1"])
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    assert [row[2] for row in rows] == ["dense", *methods] and {row[1] for row in rows} == {"-", "2:4"}
    with pytest.raises(ValueError, match=r"dense was made by .*'epochs': 1.* and not by .*'epochs': 2"):
        compare.main([*flags, "--targets", "0.9", "--dense_epochs", "2"])
    with pytest.raises(SystemExit):
        compare.main([*flags, "--learning_rate", "1"])
    assert "was made with other flags" in capsys.readouterr().err


def test_a_cell_is_made_again_by_its_command(tmp_path, start, data_dir, monkeypatch):
    """And a `-total` method trains for so many steps less that its search is paid from the same steps."""
    flags = ["--tasks", "sst2", "--methods", "random", "random-total", "--output_dir", str(tmp_path), *FLAGS]
    flags += ["--model_name_or_path", start, "--data_dir", data_dir, "--max_steps", "60", "--criterion_batches", "4"]
    compare.main(flags)
    folder = tmp_path / "sst2" / "42" / "0.9375"
    free, paid = (read_cell(folder / n, n)["results"] for n in ("random", "random-total"))
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
    compare.main([*flags, "--methods", "magnitude", "--per_device_eval_batch_size", "7"])  # takes it as it is
    assert (dense / "command.txt").read_text() == command


def test_a_panel_goes_on_from_its_records_where_the_models_are_gone(tmp_path, start, data_dir, capsys, monkeypatch):
    flags = ["--tasks", "sst2", "--model_name_or_path", start, "--data_dir", data_dir, *FLAGS]
    flags += ["--records", str(tmp_path / "kept" / "cells.jsonl")]
    monkeypatch.chdir(tmp_path)  # the dense model's recipe and the cells' flags name no folder
    compare.main([*flags, "--output_dir", "a", "--methods", "magnitude"])
    lines = (tmp_path / "kept" / "cells.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines] == ["dense", "magnitude"]
    assert json.loads(lines[1])["command"] == (tmp_path / "a/sst2/42/0.9375/magnitude/command.txt").read_text().strip()
    compare.main([*flags, "--output_dir", "b", "--methods", "magnitude", "pdp"])  # dense is made again, to the digit
    text = (tmp_path / "kept" / "cells.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["method"] for line in lines] == ["dense", "magnitude", "pdp"]
    assert not (tmp_path / "b" / "sst2" / "42" / "0.9375" / "magnitude").exists()
    rows = [line.split(" | ") for line in (tmp_path / "b" / "table.md").read_text().splitlines()[2:]]
    assert [row[2] for row in rows] == ["dense", "magnitude", "pdp"]
    compare.main([*flags, "--output_dir", "c", "--methods", "magnitude", "pdp", "--only_table"])
    assert (tmp_path / "c" / "table.md").read_text() == (tmp_path / "b" / "table.md").read_text()
    with pytest.raises(SystemExit):
        compare.main([*flags, "--output_dir", "c", "--methods", "magnitude", "--learning_rate", "1"])
    assert "was made with other flags" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"dense has a loss of .*, the dense model of its cells in .*cells.jsonl"):
        compare.main([*flags, "--output_dir", "d", "--methods", "gumbel", "--dense_epochs", "2"])
    (tmp_path / "kept" / "cells.jsonl").write_text(text + '{"task": "sst2"}\n')
    with pytest.raises(ValueError, match=r"line 4 of .*cells.jsonl is no finished cell \('seed'\): delete that line"):
        compare.main([*flags, "--output_dir", "e", "--only_table"])


def test_a_recipe_is_chosen_on_held_out_rows(tmp_path, start, data_dir):
    flags = ["--task_name", "sst2", "--data_dir", data_dir, "--output_dir", str(tmp_path), *FLAGS]
    given = parse_arguments([*flags, "--model_name_or_path", start, "--evaluate_held_out"])
    job = run_glue.prepare(*given)
    assert list(job.evaluation) == ["held out"] and len(job.evaluation["held out"]) == 3
    lengths = [len(ids) for ids in job.selection["input_ids"]]
    assert lengths == sorted(lengths) and len(lengths) == 3 and len(job.train) == 58


def test_flags_of_one_task_target_or_method():
    keys = ["rte", "2:4", "pdp"]
    assert compare.merged([("rte", ["--a"]), ("rte", ["--b"])]) == {"rte": ["--a", "--b"]}
    assert compare.names_of("random-total") == ["random", "random-total"] and compare.names_of("pdp") == ["pdp"]
    found = compare.parse_own_flags("rte:max_steps=9,bf16=True", keys)
    assert found == ("rte", ["--max_steps", "9", "--bf16", "True"])
    assert compare.parse_own_flags("2:4:num_levels=1", keys) == ("2:4", ["--num_levels", "1"])
    for text in ("rte:", "rte:max_steps", "rte:=9"):
        with pytest.raises(ValueError, match="must look like rte:max_steps"):
            compare.parse_own_flags(text, keys)
    with pytest.raises(ValueError, match="must begin with one of rte, 2:4, pdp"):
        compare.parse_own_flags("mrpc:max_steps=9", keys)
    own = {key: ["--x", key] for key in [*keys, "dense"]}
    assert compare.Cell("rte", 1, None, "dense").flags(["--y"], own) == ["--y", "--x", "rte", "--x", "dense"]
    cell = compare.Cell("rte", 1, "2:4", "pdp")
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


def test_a_recipe_is_overridden_by_flags(tmp_path):
    json_text, yaml_text = '{"sparsity": 0.5, "method": "taylor"}', "sparsity: 0.5\nmethod: taylor\n"
    for name, text in (("r.json", json_text), ("r.yaml", yaml_text)):
        (tmp_path / name).write_text(text)
        _, _, config = parse_arguments([str(tmp_path / name), "--task_name", "rte", "--method", "fisher", "--use_cpu"])
        assert (config.sparsity, config.method, config.criterion) == (0.5, "fisher", "fisher")


def test_the_recipes_that_ship_are_valid(pytestconfig):
    recipes = sorted((pytestconfig.rootpath / "glue_scripts" / "recipes").glob("*.json"))
    targets = {"100x": 0.99, "2to4": 0.5}
    assert {"random_16x.json", "random_100x.json", "random_2to4.json"} <= {path.name for path in recipes}
    for path in recipes:
        _, _, config = parse_arguments([str(path), "--task_name", "rte", "--use_cpu"])
        assert config.levels[-1] == config.sparsity == targets.get(path.stem.rpartition("_")[2], 0.9375)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sparsty": 0.5}', "unknown field 'sparsty': did you mean 'sparsity'"),
        ('{"method": "rndom"}', "did you mean 'random'"),
        ('{"pattern": "blocky"}', "pattern='blocky' is unknown"),
        ("{", "not valid JSON"),
        ("[1]", "must be one mapping"),
    ],
)
def test_a_bad_recipe_is_one_sentence(tmp_path, monkeypatch, text, message):
    (tmp_path / "r.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["run_glue.py", str(tmp_path / "r.json"), "--task_name", "rte", "--use_cpu"])
    with pytest.raises(SystemExit) as stop:
        run_glue.main()
    assert message in stop.value.code and "\n" not in stop.value.code


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_cpu"], "--task_name is missing"),
        (["--task_name", "sst2", "--use_cpu"], "--model_name_or_path is missing"),
        (["--task_name", "sst", "--use_cpu", "--model_name_or_path", "x"], "Unknown task 'sst'"),
        (["--task_name", "rte", "--use_cpu", "--model_name_or_path", "x", "--data_dir", "/nowhere"], "nowhere"),
        (["missing.json"], "does not exist"),
    ],
)
def test_bad_flags_are_one_sentence(monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *flags])
    with pytest.raises(SystemExit) as stop:
        run_glue.main()
    assert message in str(stop.value.code) and not list(tmp_path.iterdir())
