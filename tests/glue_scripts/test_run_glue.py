"""Run the scripts as a user does, on a tiny model and generated files with the columns of GLUE."""

import json
import os
import subprocess
import sys

import pytest
from short import FLAGS
from tiny import make
from transformers import AutoModelForSequenceClassification

import run_glue
from arguments import parse_arguments
from demo_data import demo_tokenizer
from hf_maskselect import load_cpu, verify
from job import prepare


def call(*flags):
    """Run the script with these flags."""
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
    """Plan, tables, results and files come from one process."""
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
    with pytest.raises(ValueError, match="dense was made with task sst2 and not stsb"):
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


@pytest.mark.slow
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
    table, cpu = (text.splitlines() for text in capsys.readouterr().out.split("\nmodel ")[-2:])
    assert [line.split()[0] for line in table[2:5]] == ["dense", "magnitude", "random"]
    assert [line.split()[1] for line in table[3:5]] == ["0.9375", "0.9375"]
    assert [line.split()[0] for line in cpu[2:5]] == ["dense", "random,", "times"]
    assert cpu[0].endswith("ms at 1x32  ms at 8x32")
    assert load_cpu(tmp_path / "random" / "cpu").config.pruning["method"] == "random"
    assert not (tmp_path / "magnitude" / "cpu").exists()
    assert verify(tmp_path / "random").step == 4  # the flag won over the demo's own epoch


def test_a_recipe_is_chosen_on_held_out_rows(tmp_path, start, data_dir):
    flags = ["--task_name", "sst2", "--data_dir", data_dir, "--output_dir", str(tmp_path), *FLAGS]
    given = parse_arguments([*flags, "--model_name_or_path", start, "--evaluate_held_out"])
    job = prepare(*given)
    assert list(job.evaluation) == ["held out"] and len(job.evaluation["held out"]) == 3
    lengths = [len(ids) for ids in job.selection["input_ids"]]
    assert lengths == sorted(lengths) and len(lengths) == 3 and len(job.train) == 58


def test_a_recipe_is_overridden_by_flags(tmp_path):
    json_text, yaml_text = '{"sparsity": 0.5, "method": "taylor"}', "sparsity: 0.5\nmethod: taylor\n"
    for name, text in (("r.json", json_text), ("r.yaml", yaml_text)):
        (tmp_path / name).write_text(text)
        _, _, config = parse_arguments([str(tmp_path / name), "--task_name", "rte", "--method", "fisher", "--use_cpu"])
        assert (config.sparsity, config.method, config.resolved().criterion) == (0.5, "fisher", "fisher")


def test_a_yaml_recipe_is_read_by_yaml_1_2(tmp_path):
    """Not by 1.1, where 2:4 is 124, no is false, and 1e-4 is text."""
    text = "pattern: 2:4\neval_strategy: no\nlearning_rate: 1e-4\nkeep_zeros: yes\nmethod: magnitude\nseed: 7\n"
    (tmp_path / "r.yaml").write_text(text)
    _, _, config = parse_arguments([str(tmp_path / "r.yaml"), "--task_name", "rte", "--use_cpu"])
    assert (config.pattern, config.eval_strategy, config.learning_rate) == ("2:4", "no", 1e-4)
    assert config.keep_zeros is True and config.seed == 7 and config.resolved().sparsity == 0.5


def test_the_recipes_that_ship_are_valid(pytestconfig):
    recipes = sorted((pytestconfig.rootpath / "glue_scripts" / "recipes").glob("*.json"))
    targets = {"100x": 0.99, "2to4": 0.5, "fast": 0.8, "smallest": 0.8}
    assert {"random_16x.json", "random_100x.json", "random_2to4.json"} <= {path.name for path in recipes}
    for path in recipes:
        _, _, config = parse_arguments([str(path), "--task_name", "rte", "--use_cpu"])
        settings = config.resolved()
        target = targets.get(path.stem.removesuffix("_cpu").rpartition("_")[2], 0.9375)
        assert settings.levels[-1] == settings.sparsity == target


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
        (["--task_name", "sst", "--use_cpu", "--model_name_or_path", "x"], "unknown task 'sst'"),
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
