"""Two gloo processes on the CPU: one run, one search, one model, and no rank left waiting."""

import json
import shutil
import time

import pytest
from forked import finish
from launched import launch_ranks, start_ranks
from tiny import make, make_config
from two_ranks import main

from hf_maskselect import PruningState, prunable_weights
from hf_maskselect.training.search_cost import Workload, search_cost

SEARCH = {"method": "random", "num_candidates": 4, "trial_steps": 2, "refit_rows": 0}
METHODS = {
    "random": {**SEARCH, "level_eval_steps": 2},
    "pdp": {"method": "pdp", "num_levels": None, "frozen_steps": 3, "num_candidates": 2, "trial_steps": 2},
    "gumbel": {"method": "gumbel", "num_levels": None, "frozen_steps": 0},
    "movement": {"method": "movement", "num_levels": None, "frozen_steps": 0},
    "survivors": {**SEARCH, "selection": "survivors", "max_steps": 24},
    "refit": {**SEARCH, "refit_rows": 32},
    "fitted": {**SEARCH, "refit_rows": 32, "trial_steps": 0},
    "structured": {"pattern": "structured", "method": "random", "sparsity": 0.3, "num_levels": None, "refit_rows": 32}
    | {"num_candidates": 2, "latency_shape": [1, 8], "keep_shape": "free"},
    "own_loss": {**SEARCH, "own_loss": True},
    "own_loss_by_metric": {**SEARCH, "own_loss": True, "selection_metric": "accuracy"},
}
METHODS["fitted_elsewhere"] = METHODS["fitted"] | {  # rank 1 tries the winner of both levels
    "num_candidates": 2,
    "proposals": ["magnitude:layer", "magnitude:global"],
}
SAVED = {name: {**changes, "save_strategy": "steps", "save_steps": 3} for name, changes in METHODS.items()}
RESUMED = ("random", "pdp", "gumbel", "movement", "survivors", "refit", "structured", "fitted_elsewhere")
STOPPED = ("random", "pdp")


def launch(folder, ranks, runs):
    """What every rank of every run ended with: run -> list by rank."""
    launch_ranks(main, folder, ranks, folder, runs)
    return {run: [json.loads((folder / run / f"rank{r}.json").read_text()) for r in range(ranks)] for run in runs}


def launch_unwatched(folder, runs, limit):
    """Two ranks of which none is stopped when the other is gone: (exit code, what it printed) of each."""
    logs, processes = start_ranks(main, folder, 2, folder, runs)
    codes = finish(processes, limit, alone=True)
    return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of runs that two ranks have ended, and what they ended with. Each has saved its third step.

    The runs of `METHODS`; "apart": survivors in folders that the ranks do not share; "crooked": one rank refits
    otherwise; "stopped random" and "stopped pdp" have got a SIGTERM. Do not change.
    """
    folder = tmp_path_factory.mktemp("two")
    stops = {f"stopped {name}": {**SAVED[name], "enable_jit_checkpoint": True, "terminate": 4} for name in STOPPED}
    apart = {"apart": {**METHODS["survivors"], "apart": True}}
    crooked = {"crooked": {"method": "taylor", "refit_rows": 32, "fault": "refit"}}
    return folder, launch(folder, 2, SAVED | stops | apart | crooked)


@pytest.mark.slow
def test_two_ranks_are_one_run(tmp_path, whole):
    """2 x 8 rows a step are 1 x 8 accumulated twice, and 1 x 16: the search to the bit, where the micro-batches are
    the same, the training but for the order of one sum."""
    folder, runs = whole
    first, second = runs["crooked"]  # a rank that fits a little otherwise gets what the first has fitted
    assert first["weights"] == second["weights"]
    two = {method: runs[method] for method in METHODS}
    two["survivors"] = runs["apart"]
    accumulated = {name: {**changes, "gradient_accumulation_steps": 2} for name, changes in METHODS.items()}
    large = {"large": {**METHODS["random"], "per_device_train_batch_size": 16}}
    one = launch(tmp_path / "one", 1, accumulated | large)
    for method, (first, second) in two.items():
        assert first["wrapped"] == "DistributedDataParallel"
        for key in ("masks", "chosen", "weights", "after", "scores", "digests"):
            assert first[key] == second[key], (method, key)
        (alone,) = one[method]
        assert alone["before"] == pytest.approx(first["before"], rel=1e-5)  # P1: not multiplied by the ranks
        assert alone["losses"] == pytest.approx(first["losses"], rel=1e-4)
        assert alone["masks"] == first["masks"] and alone["chosen"] == first["chosen"], method
        assert not list((folder / ("apart" if method == "survivors" else method)).glob("out*/_*"))
    for method in ("survivors", "random"):
        first, (alone,) = two[method][0], one[method]
        assert alone["scores"] == first["scores"] and alone["digests"] == first["digests"]
        assert all(max(map(len, level)) == 2 for level in first["scores"])  # two rungs
    assert min(two["survivors"][0]["sent"]) > two["survivors"][0]["bytes"] > 50_000  # the winner's weights
    assert two["fitted_elsewhere"][0]["chosen"] == [1, 1]
    model = make()
    sizes = model.num_parameters(), sum(weight.numel() for weight in prunable_weights(model).values())
    work = Workload(make_config(tmp_path, **METHODS["fitted"]), *sizes, 96)
    # Names, shapes, biases, digests and scores come on top of the matrices.
    shared = search_cost(work, 2).shared
    assert all(shared < sent < shared + 8_000 for sent in two["fitted"][0]["sent"])
    (large,) = one["large"]
    assert len(first["chosen"]) == 2 and all(len(level[0]) == 2 for level in first["scores"])  # two rungs
    # Digests, scores and names: no mask, no weight.
    config = make_config(tmp_path, **METHODS["random"])
    work = Workload(config, 1, 1, 0)
    assert max(first["sent"]) < 4_000
    # The model scores no row; here 16 are scored by every trial, and once by the teacher.
    scored = (sum(len(scores) for level in first["scores"] for scores in level) + 1) * 16 / (3 * 16)
    assert first["equivalents"] == pytest.approx(search_cost(work, 2).compute + scored, abs=0.06)
    assert large["losses"] == pytest.approx(first["losses"], rel=1e-4)
    assert large["masks"] == first["masks"] and large["chosen"] == first["chosen"]


@pytest.mark.slow
def test_two_ranks_resume_to_the_bit(tmp_path, whole):
    """From the checkpoint of a run that was killed in its fifth step; the second level's search is made again. And
    from the one that all ranks write when one of them gets a SIGTERM."""
    folder, runs = whole
    again = {method: SAVED[method] for method in RESUMED}
    for method in again:
        out = tmp_path / method / "out"
        shutil.copytree(folder / method / "out" / "checkpoint-3", out / "checkpoint-3")
        (out / "_saving" / "checkpoint-6").mkdir(parents=True)  # half-written
    stops = {f"stopped {name}": {**SAVED[name], "enable_jit_checkpoint": True} for name in STOPPED}
    for stop in stops:
        assert runs[stop][0]["steps"] == runs[stop][1]["steps"] in (5, 6)
        shutil.copytree(folder / stop, tmp_path / stop)
    resumed = {name: {**changes, "resume": True} for name, changes in (again | stops).items()}
    for run, ranks in launch(tmp_path, 2, resumed).items():
        method = run.split()[-1]
        for first, second in zip(runs[method], ranks, strict=True):
            for key in ("steps", "masks", "losses", "after", "weights", "chosen"):
                assert first[key] == second[key], (run, key)
        found = PruningState.load(tmp_path / run / "out")
        assert PruningState.load(folder / method / "out").weights == found.weights
        assert not list((tmp_path / run / "out").glob("_*"))


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(tmp_path, whole):
    """From two ranks to one that accumulates, between the levels: the same search and masks, and a run that is valid
    to its end; from one rank to two as well."""
    folder, (expected, _) = whole[0], whole[1]["random"]
    one, two = {**SAVED["random"], "gradient_accumulation_steps": 2}, SAVED["random"]
    shutil.copytree(folder / "random" / "out" / "checkpoint-3", tmp_path / "fewer" / "out" / "checkpoint-3")
    found = launch(tmp_path, 1, {"fewer": {**one, "resume": True}, "alone": one})
    shutil.copytree(tmp_path / "alone" / "out" / "checkpoint-3", tmp_path / "more" / "out" / "checkpoint-3")
    found |= launch(tmp_path, 2, {"more": {**two, "resume": True}})
    for ranks in found.values():
        for rank in ranks:
            assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-4)
            assert rank["masks"] == expected["masks"] and rank["chosen"] == expected["chosen"]


@pytest.mark.slow
def test_an_uneven_last_batch_is_trained_on(tmp_path):
    """90 rows in batches of 16: the sixth has 10, which accelerate fills up for both ranks."""
    runs = {
        "dispatched": {"accelerator_config": {"dispatch_batches": True}},
        "split": {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 16},
        "sharded": {},
    }
    found = launch(tmp_path, 2, {name: {**SEARCH, "rows": 90, **changes} for name, changes in runs.items()})
    for name, (first, second) in found.items():
        assert first["masks"] == second["masks"] and first["weights"] == second["weights"], name
        assert first["after"] == second["after"] and len(first["losses"]) == 12, name
        assert first["chosen"] == found["sharded"][0]["chosen"], name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "there", "elsewhere"),
    [
        ("raise", "ArithmeticError: a trial went wrong", "rank 1 failed: ArithmeticError: a trial went wrong"),
        ("die", "", "rank 0 got no answer from the other ranks: one of them died"),
        ("hang", "", "was busy for more than 5 s"),
        ("journal", "rank 0 failed: ZeroDivisionError", "ZeroDivisionError: division by zero"),
        ("load", "ZeroDivisionError: division by zero", "rank 1 failed: ZeroDivisionError"),
        (
            "statistics",
            "layer.1.output.dense.weight differ",
            "layer.1.output.dense.weight differ between ranks 0 and 1",
        ),
    ],
)
def test_a_rank_that_goes_wrong_stops_the_other(tmp_path, fault, there, elsewhere):
    """In one of its trials, with gradients of its own, or where it is to share its fit; nobody waits longer than
    ddp_timeout."""
    proposals = {"proposals": ["taylor:layer:votes"], "scope": "layer"}  # where matrices do not depend on each other
    changes = METHODS["fitted_elsewhere"] if fault == "load" else {**SEARCH, **proposals}
    changes = {**changes, "fault": fault, "ddp_timeout": 5}
    start = time.monotonic()
    (first, second) = launch_unwatched(tmp_path, {"run": changes}, limit=120)
    assert first[0] != 0 and elsewhere in first[1], first[1][-3000:]
    assert second[0] != 0 and there in second[1], second[1][-3000:]
    if fault == "raise":  # the masks that waited are gone, the finished trials are kept
        assert [path.name for path in (tmp_path / "run" / "out").glob("_*")] == ["_search-journal.json"]
    assert time.monotonic() - start < 100


@pytest.mark.slow
def test_survivors_of_a_failed_run_go_on_where_they_are(tmp_path, whole):
    """Each rank has a folder of its own; one fails in the second rung, and started again they end as if none had."""
    changes = {**METHODS["survivors"], "apart": True}
    first, second = launch_unwatched(tmp_path, {"run": {**changes, "fault": "raise"}}, limit=120)
    assert "rank 1 failed: ArithmeticError: a trial went wrong" in first[1] and second[0] != 0
    kept = [path for rank in (0, 1) for path in (tmp_path / "run" / f"out{rank}").glob("_survivors/*")]
    assert len(kept) == 4
    again = launch(tmp_path, 2, {"run": changes})["run"]
    for key in ("masks", "chosen", "scores", "digests", "losses", "weights", "after"):
        assert [rank[key] for rank in again] == [rank[key] for rank in whole[1]["apart"]], key
