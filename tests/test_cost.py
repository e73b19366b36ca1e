"""The cost model against runs, and what the command says."""

import pytest
from tiny import FAMILIES, make, make_config, make_rows, make_trainer

from hf_maskselect.cli import main
from hf_maskselect.cost import Workload, exchanged, search_cost, workload
from hf_maskselect.masking.targets import prunable_weights

SEARCH = {"method": "random", "num_candidates": 4, "trial_steps": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trial_batch_size": 4},
        {"gradient_accumulation_steps": 2, "selection": "early", "criterion_batches": 8},
        {"proposals": ["magnitude:layer:votes"], "criterion": "magnitude"},
        {"method": "magnitude", "num_candidates": None, "trial_steps": None},
    ],
    ids=["halving", "small trials", "early", "no statistics", "no search"],
)
def test_the_model_counts_what_a_run_counts(tmp_path, changes):
    make().save_pretrained(tmp_path)
    fields = {**SEARCH, **changes}
    trainer = make_trainer(tmp_path / "out", make(), make_rows(100), **fields)
    trainer.train()
    work = workload(make_config(tmp_path / "out", **fields), tmp_path, train_rows=100)
    assert work.rungs == [trainer._search.rungs(trainer._plan, level) for level in range(2)]
    assert work.parameters == trainer.model.num_parameters()
    assert work.prunable == sum(weight.numel() for weight in prunable_weights(trainer.model).values())
    found = trainer.search_summary()["search_step_equivalents"]
    assert search_cost(work, 1).compute == pytest.approx(found, abs=0.06)  # rounded to a tenth


def test_more_ranks_wait_more_and_take_less_time():
    work = Workload(1_000, 800, rows=8, training_steps=120, rungs=[[(8, 10), (4, 20), (2, 40)]] * 2, sample_rows=0,
                    selection_rows=0, trial_rows=8)  # fmt: skip
    one, two, eight, many = (search_cost(work, ranks) for ranks in (1, 2, 8, 64))
    assert one.compute == 2 * 240 and one.seconds_ratio == pytest.approx(4) and one.busy == 1
    assert two.seconds_ratio == pytest.approx(2) and two.busy == 1  # 4 x 10 + 2 x 20 + 1 x 40 a level
    assert eight.seconds_ratio == pytest.approx(2 * 70 / 120) and eight.busy == pytest.approx(240 / (8 * 70))
    assert many.seconds_ratio == eight.seconds_ratio
    assert one.sent == one.trained == 0 and two.training_bytes == one.training_bytes + 4_000
    assert two.search_bytes - two.training_bytes == 3 * 4_000


def test_what_is_sent_does_not_depend_on_the_model():
    """A gather is padded to its longest object: the share of digests shrinks with the ranks, what arrives grows."""
    rungs = [(64, 10), (32, 20), (16, 40), (8, 80), (4, 160), (2, 320)]
    assert exchanged(rungs, 64) < exchanged(rungs, 8) < 20_000 and exchanged([], 8) == 0


def test_the_command_says_what_to_change(tmp_path, capsys):
    make(**{"vocab_size": FAMILIES["Bert"]["vocab_size"]}).save_pretrained(tmp_path)
    run = ["plan", str(tmp_path), "--max_steps", "600", "--num_candidates", "8", "--per_device_train_batch_size", "32"]
    assert main([*run, "--ranks", "1", "64"]) == 0
    told = capsys.readouterr().out
    for expected in ("8 x 40 + 4 x 80", "64 ranks: 94% of their time", "up to 64 candidates", "trial_batch_size=32"):
        assert expected in told
    assert main([*run, "--ranks", "8", "--trial_batch_size", "32"]) == 0
    told = capsys.readouterr().out
    assert "trial_batch_size" not in told and "take no longer" not in told


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give --max_steps"),
        (["--max_steps", "2"], "max_steps"),
        (["--max_steps", "600", "--sparsty", "0.9"], "--sparsty"),
    ],
)
def test_what_cannot_be_planned_is_said(tmp_path, capsys, arguments, expected):
    make().save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), *arguments]) == 1
    assert expected in capsys.readouterr().err
