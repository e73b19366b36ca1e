"""Saved files of every kind, and a reader of each, for tests that damage them."""

import json
import shutil
from dataclasses import replace

import pytest
from tiny import make, make_trainer, same, save_pruned, weights_of

from hf_maskselect import export_semi_structured, load_pruned, load_semi_structured
from hf_maskselect.export.semi_structured import SEMI_STRUCTURED_FILE, TIMING_FILE, Choice, Timing
from hf_maskselect.search.continued import FOLDER, ContinuedTrials
from hf_maskselect.search.journal import JOURNAL_FILE, Journal
from hf_maskselect.search.results import SEARCH_FILE, Candidate, read_searches
from hf_maskselect.search.sharing import Team
from hf_maskselect.search.weight_files import LevelBest
from hf_maskselect.storage.pack import pack
from hf_maskselect.storage.packed_file import PACKED_FILE
from hf_maskselect.utils.processes import Processes

CANDIDATE = Candidate(1, "votes", None, 1.0, "d" * 64)
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`plain`: weights and state; `shards`: the weights in several files; `packed`: the packed file; `run`: what a
    run keeps beside its checkpoints. Do not change."""
    root = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(root / "plain", make(**SMALL, num_labels=3))
    trainer.train()
    trainer.save_model()
    (root / "plain" / "search.json").unlink(missing_ok=True)
    shutil.copytree(root / "plain", root / "shards")
    (root / "shards" / "model.safetensors").unlink()
    trainer.model.save_pretrained(root / "shards", max_shard_size="8KB")
    pack(root / "plain", root / "packed")
    save_pruned(root / "groups", 0.5, "2:4", **{**SMALL, "hidden_size": 32, "intermediate_size": 32})
    export_semi_structured(root / "groups", root / "semi")
    Timing("A GPU", {"eager": Choice("cutlass", [])}).save(root / "semi")
    run = root / "run"
    run.mkdir()
    (run / SEARCH_FILE).write_text(
        json.dumps(
            [
                {"level": 0, "sparsity": 0.5, "step": 0, "candidates": [], "step_equivalents": 3.0, "seconds": 1.0},
                {"level": 1, "sparsity": 0.75, "step": 4, "candidates": [], "step_equivalents": 2.5, "seconds": 1.0},
            ]
        )
    )
    journal = Journal(run)
    journal.open({"part": "a" * 64})
    journal.add({f"{index:064x}": 0.1 + index / 3 for index in range(4)}, 20)
    LevelBest(run).consider(1, 0.25, trainer.model)
    trials = ContinuedTrials(run, Team(Processes(), None))
    trials.open("a" * 64)
    trials.keep(CANDIDATE, 2, 0.5, weights_of(trainer.model))
    return root


# -- what is read: each returns something that two reads can be compared by -------------------------------------------


def read_model(folder):
    model, masks = load_pruned(folder)
    return weights_of(model), masks.digest(), [model.config.hidden_act, model.config.layer_norm_eps]


def read_semi_structured(folder):
    return weights_of(load_semi_structured(folder)), str(Timing.find(folder)), []


def read_journal(folder):
    journal = Journal(folder)
    journal.open({"part": "a" * 64})
    return {}, str([journal.find(f"{index:064x}", 20) for index in range(4)]), []


def read_search(folder):
    searches = read_searches(folder / SEARCH_FILE)
    assert all(type(done.step) is int and done.metrics() for done in searches)
    return {}, "", []  # a table for people: refused or read, no weights depend on it


def read_level_best(folder):
    model = make(**SMALL, seed=3, num_labels=3)
    best = LevelBest(folder)
    if not best.restore(1, model):
        raise ValueError(f"{folder} holds the best of another level")
    return weights_of(model), best._store.header(best.NAME).get("score"), []


def read_survivors(folder):
    trials = ContinuedTrials(folder, Team(Processes(), None))
    trials.open("a" * 64)
    scores = trials.scores(CANDIDATE)
    return trials.start_of(replace(CANDIDATE, steps=2))(), str(scores), []


READ = {
    "pruning_state.safetensors": ("plain", read_model, 200),
    "model.safetensors": ("plain", read_model, 150),
    "config.json": ("plain", read_model, 100),
    "model.safetensors.index.json": ("shards", read_model, 50),
    PACKED_FILE: ("packed", read_model, 200),
    SEMI_STRUCTURED_FILE: ("semi", read_semi_structured, 120),
    TIMING_FILE: ("semi", read_semi_structured, 50),
    JOURNAL_FILE: ("run", read_journal, 60),
    SEARCH_FILE: ("run", read_search, 50),
    "_level_best.safetensors": ("run", read_level_best, 60),
    f"{FOLDER}/{'a' * 16}-{'d' * 16}.safetensors": ("run", read_survivors, 60),
}


def equal(first, second):
    return same(first[0], second[0]) and first[1:] == second[1:]
