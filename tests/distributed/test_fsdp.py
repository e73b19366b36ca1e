"""Three gloo processes, among which FSDP2 cuts every matrix unevenly: what they do is what DistributedDataParallel
does."""

import json
import shutil

import pytest
from fsdp_ranks import main
from launched import launch_ranks
from tiny import weights_of
from transformers import AutoModelForSequenceClassification

from hf_maskselect import PruningState
from hf_maskselect.storage.verify import verify

RANKS = 3
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}  # leaves parameters gathered, which must not matter
SAVED = {"save_strategy": "steps", "save_steps": 3}
CUT = {"refit_rows": 0}
ONE_LEVEL = {"pattern": "2:4", "sparsity": None, "num_levels": None}
SOFT = {"pdp_tau": 1e-3, "frozen_steps": 3, "pruning_warmup_steps": 2, "gradient_accumulation_steps": 2}
RUNS = {
    "magnitude": {**EVALUATED, **SAVED},
    "taylor": {**CUT, "method": "taylor", "scope": "global", "fsdp": {"reshard_after_forward": True}},
    "platon": {**CUT, "method": "platon", "scope": "global"},
    "obert": {**CUT, "method": "obert", "scope": "layer", "obert_memory": 2e-5},
    "blocks": {"scope": "global", "pattern": "1x4"},
    "2:4": {
        **CUT,
        **ONE_LEVEL,
        "method": "fisher",
        "load_best_model_at_end": True,
        **EVALUATED,
        **SAVED,
        "save_steps": 4,
    },
    "pdp": {**ONE_LEVEL, "method": "pdp", **SOFT, **EVALUATED, **SAVED},
    "pdp-taylor": {**ONE_LEVEL, **CUT, "method": "pdp", **SOFT, "pdp_tau": None, **SAVED},
}
FEW = ["magnitude", "taylor", "2:4", "pdp-taylor"]


def launch(folder, engine, runs):
    """What every rank of every run ended with: run -> list by rank."""
    folder.mkdir(exist_ok=True)
    launch_ranks(main, folder, RANKS, folder, engine, runs)
    return {run: [json.loads((folder / run / f"rank{r}.json").read_text()) for r in range(RANKS)] for run in runs}


@pytest.mark.slow
@pytest.mark.parametrize("names", [FEW, pytest.param(list(RUNS), id="all", marks=pytest.mark.exhaustive)])
def test_sharded_weights_are_pruned_like_whole_ones(names, tmp_path):
    chosen = {name: RUNS[name] for name in names}
    whole = launch(tmp_path / "ddp", "ddp", {name: {**run, "fsdp": None} for name, run in chosen.items()})
    sharded = launch(tmp_path / "fsdp", "fsdp", {**chosen, "direct": {}})
    for rank in sharded.pop("direct"):
        assert rank["cut"]["masks"] == rank["whole"]["masks"] and rank["cut"]["kept"] == rank["whole"]["kept"]
        assert rank["cut"]["zeros"] == rank["whole"]["zeros"]
        assert rank["cut"]["sharded"] and not rank["whole"]["sharded"]
        assert rank["cut"]["loss"] == pytest.approx(rank["whole"]["loss"], rel=1e-5)
    for name, ranks in sharded.items():
        for rank, expected in zip(ranks, whole[name], strict=True):
            assert rank["sharded"] and rank["wrapped"].startswith("FSDP"), name
            assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-4), name
            assert rank["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-4), name
            assert rank["masks"] == expected["masks"] and rank["sparsity"] == expected["sparsity"], name
        out = tmp_path / "fsdp" / name / "out"
        verify(out)
        assert PruningState.load(out).architecture == "BertForSequenceClassification"
        _, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), (name, info)
        assert not list(out.glob("_*"))
    # Resumed: inside the first level, inside the soft phase.
    resumed = {name: chosen[name] for name in ("magnitude", "pdp", "pdp-taylor") if name in chosen}
    for name in resumed:
        checkpoint = tmp_path / "fsdp" / name / "out" / "checkpoint-3"
        shutil.copytree(checkpoint, tmp_path / "resumed" / name / "out" / "checkpoint-3")
    runs = {name: {**run, "resume": True} for name, run in resumed.items()}
    again = launch(tmp_path / "resumed", "fsdp", {**runs, "short": {**CUT, "stop": 4}})
    assert len({rank["masks"] for rank in again.pop("short")}) == 1  # and none waits for the others with its warning
    for name, ranks in again.items():
        for first, second in zip(sharded[name], ranks, strict=True):
            assert {**first, "evaluated": 0, "sparsity": 0} == {**second, "evaluated": 0, "sparsity": 0}, name
        saved = [AutoModelForSequenceClassification.from_pretrained(tmp_path / run / name / "out") for run in
                 ("fsdp", "resumed")]  # fmt: skip
        first, second = map(weights_of, saved)
        assert all(bool((first[key] == second[key]).all()) for key in first), name
