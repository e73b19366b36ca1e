"""The cost model against runs, and what the command says."""

import pytest
from tiny import FAMILIES, make, make_config, make_rows, make_trainer

from hf_maskselect.cli import main
from hf_maskselect.masking.targets import prunable_weights
from hf_maskselect.surgery.dense_outputs import LEAST_SAMPLED
from hf_maskselect.training.search_cost import Workload, search_cost, workload

NO_SEARCH = {"num_candidates": None, "trial_steps": None}
SEARCH = {"method": "random", "num_candidates": 4, "trial_steps": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"trial_batch_size": 4}, marks=pytest.mark.slow),
        pytest.param(
            {"gradient_accumulation_steps": 2, "selection": "early", "criterion_batches": 8, "trial_steps": None},
            marks=pytest.mark.slow,
        ),
        {"proposals": ["magnitude:layer:votes"], "criterion": "magnitude"},
        {"method": "fisher", **NO_SEARCH},
        {"method": "platon", **NO_SEARCH},
        {"method": "obert", "obert_memory": 5e-5, **NO_SEARCH},
        {"proposals": ["obert:layer", "magnitude:layer", "taylor:layer:votes"]},
        {"method": "magnitude", **NO_SEARCH},
        {"selection_metric": "teacher"},
        pytest.param({"max_selection_samples": 3}, marks=pytest.mark.slow),
        {"selection": "survivors"},
        {"trial_steps": 0},
    ],
    ids=[
        "halving",
        "small trials",
        "early",
        "no statistics",
        "no search",
        "platon",
        "obert",
        "obert beside others",
        "nothing",
        "teacher",
        "few rows",
        "survivors",
        "after refit",
    ],
)
def test_the_model_counts_what_a_run_counts(tmp_path, changes):
    make().save_pretrained(tmp_path)
    fields = {**SEARCH, **changes}
    keywords = {"teacher": make(seed=3)} if "selection_metric" in changes else {}
    trainer = make_trainer(tmp_path / "out", make(), make_rows(100), keywords=keywords, **fields)
    trainer.train()
    work = workload(make_config(tmp_path / "out", **fields), tmp_path, train_rows=100)
    assert work.rungs(1) == [trainer.run.search.rungs(trainer.run.plan, level) for level in range(2)]
    assert work.parameters == trainer.model.base_model.num_parameters()
    assert work.prunable == sum(weight.numel() for weight in prunable_weights(trainer.model).values())
    found = trainer.search_summary()["search_step_equivalents"]
    assert search_cost(work, 1).compute == pytest.approx(found, abs=0.06)  # rounded to a tenth


def test_more_ranks_wait_more_and_take_less_time(tmp_path):
    """Rungs of 8 x 10 + 4 x 20 + 2 x 30 at both levels, of 60 and 120 steps."""
    fields = {"method": "random", "num_candidates": 8, "trial_batch_size": 8, "trial_steps": 30, "max_steps": 180}
    fields |= {"proposals": ["magnitude:layer:votes"], "criterion": "magnitude", "last_level_weight": 2.0}
    config = make_config(tmp_path, **fields)
    one, two, eight, many = (search_cost(Workload(config, 1_000, 800, 0), ranks) for ranks in (1, 2, 8, 64))
    rungs = Workload(config, 1, 1, 0).rungs(1)
    assert rungs == [[(8, 30), (4, 60)], [(8, 30), (4, 60), (2, 120)]]
    alone = 8 * 30 + 4 * 60 + 8 * 30 + 4 * 60 + 2 * 120
    assert one.compute == alone and one.time == pytest.approx(alone / 180) and one.busy == 1
    assert two.time == pytest.approx(alone / 180 / 2) and two.busy == 1
    longest = 30 + 60 + 30 + 60 + 120
    assert eight.time == pytest.approx(longest / 180) and eight.busy == pytest.approx(alone / (8 * longest))
    assert many.time == eight.time
    assert one.shared == one.trained == 0 and two.training_bytes == one.training_bytes + 4_000
    assert two.search_bytes - two.training_bytes == 3 * 4_000


def test_a_search_needs_the_most_memory_in_trials_that_train_or_where_masks_are_drawn(tmp_path):
    """4,000 bytes a copy of the weights, 3,200 of the prunable ones."""
    for changes, expected in (
        ({"method": "random", "trial_steps": 2}, 3 * 4_000),
        ({"method": "random"}, (2 + 2) * 3_200 - 4_000),  # two statistics, a score and its ranking; no gradients
        ({"method": "random", "proposals": "magnitude:layer:votes", "criterion": "magnitude", "refit_rows": 8,
          "trial_steps": 0}, 4_000),
        ({"method": "magnitude", "refit_rows": 8}, 3_200),
        ({"method": "magnitude"}, 0),
    ):  # fmt: skip
        cost = search_cost(Workload(make_config(tmp_path, **changes), 1_000, 800, 100), 1)
        assert cost.search_bytes - cost.training_bytes == expected


def test_the_outputs_that_refits_aim_at_take_memory(tmp_path):
    """Beside the copy of the weights; of 12 matrices 32 or 64 outputs, at `LEAST_SAMPLED` positions each."""
    make().save_pretrained(tmp_path)
    fields = {"proposals": ["magnitude:layer:votes"], "criterion": "magnitude", "method": "random", "trial_steps": 0}
    costs = []
    for rows in (8, 0):
        changes = fields | ({"refit_rows": rows} if rows else {"refit_rows": 0, "trial_steps": None})
        work = workload(make_config(tmp_path / "out", **changes), tmp_path, 100)
        costs.append(search_cost(work, 1))
    assert work.dense_outputs == 2 * (5 * 32 + 64) * LEAST_SAMPLED
    copies = 4 * work.parameters
    assert costs[0].search_bytes - costs[0].training_bytes == copies + 4 * work.dense_outputs
    assert costs[1].search_bytes - costs[1].training_bytes == 3 * copies


def test_survivors_send_the_winners_weights(tmp_path):
    config = make_config(tmp_path, **SEARCH)
    plain = search_cost(Workload(config, 1_000_000, 800, 0), 2)
    config.selection = "survivors"
    assert plain.shared == 4 * 800 and search_cost(Workload(config, 1_000_000, 800, 0), 2).shared == 4_000_000


def test_an_epoch_is_shorter_on_more_ranks(tmp_path):
    config = make_config(tmp_path, **{**SEARCH, "selection": "early", "trial_steps": None, "max_steps": 600})
    work = Workload(config, 1, 1, 1_000)
    assert work.rungs(1)[1] == [(4, 112)] and work.rungs(8)[1] == [(4, 14)]  # 900 rows in steps of 8 and 64


def test_the_command_says_what_to_change(tmp_path, capsys):
    make(**{"vocab_size": FAMILIES["Bert"]["vocab_size"]}).save_pretrained(tmp_path)
    run = ["plan", str(tmp_path), "--max_steps", "600", "--num_candidates", "8", "--per_device_train_batch_size", "32"]
    assert main([*run, "--ranks", "64"]) == 0
    told = capsys.readouterr().out
    assert "8 x refit" in told and "with num_candidates=64" in told
    short = ["plan", str(tmp_path), "--max_steps", "4", "--num_levels", "1", "--num_candidates", "64", "--ranks", "2"]
    for more, told_so in ([], False), (["--trial_steps", "1"], True):  # masks that are only fitted have no batches
        assert main([*short, *more]) == 0
        assert ("trial_batch_size=" in capsys.readouterr().out) == told_so
    run += ["--trial_steps", "40"]
    assert main([*run, "--ranks", "1", "64"]) == 0
    told = capsys.readouterr().out
    for expected in (
        "8 x 40 + 4 x 80",
        "64 ranks: 94% of their time",
        "with num_candidates=64",
        "trial_batch_size=32",
    ):
        assert expected in told
    assert main([*run, "--ranks", "16", "--trial-batch-size", "32"]) == 0
    told = capsys.readouterr().out
    assert "trial_batch_size" not in told and "waiting" in told


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give --max_steps"),
        (["--max_steps", "2"], "the plan cannot reach sparsity"),
        (["--max_steps", "sixty"], "invalid int value: 'sixty'"),
        (["--max_steps", "600", "--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0"),
        (["--max_steps", "600", "--trial_batch_size", "9"], "trial_batch_size=9 is no multiple"),
        (["--max_steps", "600", "--warmup_steps", "300"], "longer than the shortest level"),
        (["--max_steps", "600", "--target_modules", "("], "'(' in target_modules or exclude_modules is no regex"),
        (["--max_steps", "600", "--proposals", "taylor:layer"], "only 2 different masks"),
        (["--max_steps", "600", "--method", "rndom"], "invalid choice: 'rndom'"),
        (["--max_steps", "600", "--sparsty", "0.9"], "unrecognized arguments: --sparsty 0.9"),
        (["--max_steps", "600", "--sparsity", "1.5"], "sparsity=1.5 must lie inside (0, 1)"),
    ],
)
def test_arguments_that_no_run_would_take_are_bad_usage(tmp_path, capsys, arguments, expected):
    with pytest.raises(SystemExit) as left:
        main(["plan", str(tmp_path), *arguments])
    usage, error = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and usage.startswith("usage: hf-maskselect plan PATH")
    assert error.startswith("hf-maskselect plan: error: ") and expected in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--pattern", "2:5"], "columns are no multiple of 5"),
        (["--target_modules", "nothing"], "no weight to prune"),
    ],
)
def test_what_the_model_does_not_go_with_is_said(tmp_path, capsys, arguments, expected):
    make().save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--max_steps", "600", *arguments]) == 1
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMaskedLM", "Model"])
@pytest.mark.parametrize("names", ["query", r"bert\.encoder\..*query"])
def test_modules_are_named_as_in_training(tmp_path, head, names):
    make(head=head).save_pretrained(tmp_path)
    work = workload(make_config(tmp_path / "out", target_modules=names), tmp_path, train_rows=100)
    assert work.prunable == 2 * 32 * 32


def test_a_layer_of_the_head_may_be_pruned(tmp_path):
    make().save_pretrained(tmp_path)
    assert workload(make_config(tmp_path / "out", target_modules="classifier"), tmp_path, 100).prunable == 2 * 32


def test_more_candidates_than_there_are_masks_are_not_advised(tmp_path, capsys):
    make().save_pretrained(tmp_path)
    run = ["plan", str(tmp_path), "--max_steps", "600", "--num_candidates", "2", "--ranks", "8", "--proposals"]
    for proposal, advised in ("fisher:layer", False), ("fisher:layer:votes", True):
        assert main([*run, proposal]) == 0
        assert ("with num_candidates=8" in capsys.readouterr().out) == advised


def test_a_model_that_is_not_there_is_said(tmp_path, capsys):
    assert main(["plan", "no-such-model-anywhere", "--max_steps", "600"]) == 1
    assert "no-such-model-anywhere" in capsys.readouterr().err
