"""Two thousand damaged files: each is refused with our sentence, or gives the identical model; never another one."""

import json
import random
import resource
import shutil
import struct
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make, make_trainer, same, save_pruned, weights_of

from hf_maskselect import export_semi_structured, load_pruned, load_semi_structured
from hf_maskselect.export.semi_structured import SEMI_STRUCTURED_FILE, TIMING_FILE, Choice, Timing
from hf_maskselect.search.journal import JOURNAL_FILE, Journal
from hf_maskselect.search.level_best import FILE as LEVEL_FILE
from hf_maskselect.search.level_best import LevelBest
from hf_maskselect.search.results import SEARCH_FILE
from hf_maskselect.search.search import MaskSearch
from hf_maskselect.search.weight_files import FOLDER, Survivors
from hf_maskselect.storage.pack import pack
from hf_maskselect.storage.packed_file import PACKED_FILE
from hf_maskselect.utils.processes import Processes

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
    journal.open("a" * 64)
    journal.add({f"{index:064x}": 0.1 + index / 3 for index in range(4)}, 20)
    LevelBest(run).consider(1, 0.25, trainer.model)
    kept = Survivors(run)
    kept.open("a" * 64)
    kept.keep("d" * 64, {2: 0.5, 4: 0.25}, weights_of(trainer.model))
    return root


# -- what is read: each returns something that two reads can be compared by -------------------------------------------


def read_model(folder):
    model, masks = load_pruned(folder)
    return weights_of(model), masks.digest(), [model.config.hidden_act, model.config.layer_norm_eps]


def read_semi_structured(folder):
    return weights_of(load_semi_structured(folder)), str(Timing.find(folder)), []


def read_journal(folder):
    journal = Journal(folder)
    journal.open("a" * 64)
    return {}, str([journal.find(f"{index:064x}", 20) for index in range(4)]), []


def read_search(folder):
    search = MaskSearch(
        types.SimpleNamespace(output_dir=str(folder), selection="halving"),
        None,
        None,
        {},
        None,
        Processes(),
        quiet=True,
    )
    search.recall(100, folder)
    assert all(type(done.step) is int and done.metrics() for done in search.history)
    return {}, "", []  # a table for people: refused or read, no weights depend on it


def read_level_best(folder):
    model = make(**SMALL, seed=3, num_labels=3)
    best = LevelBest(folder)
    best.restore(1, model)
    return weights_of(model), best._known()["score"], []


def read_survivors(folder):
    kept = Survivors(folder)
    kept.open("a" * 64)
    return kept.load("d" * 64), str(kept.scores("d" * 64)), []


READ = {
    "pruning_state.safetensors": ("plain", read_model, 500),
    "model.safetensors": ("plain", read_model, 350),
    "config.json": ("plain", read_model, 200),
    "model.safetensors.index.json": ("shards", read_model, 100),
    PACKED_FILE: ("packed", read_model, 500),
    SEMI_STRUCTURED_FILE: ("semi", read_semi_structured, 300),
    TIMING_FILE: ("semi", read_semi_structured, 100),
    JOURNAL_FILE: ("run", read_journal, 150),
    SEARCH_FILE: ("run", read_search, 100),
    LEVEL_FILE: ("run", read_level_best, 150),
    f"{FOLDER}/{'a' * 16}-{'d' * 16}.safetensors": ("run", read_survivors, 150),
}


# -- what happens to files --------------------------------------------------------------------------------------------


def truncate(draw, content):
    return content[: draw.randrange(len(content))]


def flip(draw, content):
    """One to three bits, half of the time in the first part, where headers are."""
    damaged = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        damaged[draw.randrange(len(content) if draw.random() < 0.5 else min(len(content), 400))] ^= (
            1 << draw.randrange(8)
        )
    return bytes(damaged)


def overwrite(draw, content):
    at = draw.randrange(len(content))
    noise = draw.randbytes(draw.randint(1, 64))
    return content[:at] + noise + content[at + len(noise) :]


def remove(draw, content):
    at = draw.randrange(len(content))
    return content[:at] + content[at + draw.randint(1, 16) :]


def extend(draw, content):
    return content + draw.randbytes(draw.randint(1, 64))


def digits(draw, content):
    """Another number somewhere in a header: sizes, shapes, offsets, steps."""
    places = [i for i, byte in enumerate(content[:20_000]) if 48 <= byte <= 57]
    damaged = bytearray(content)
    for at in draw.sample(places, min(len(places), draw.randint(1, 2))):
        damaged[at] = draw.choice(b"0123456789")
    return bytes(damaged)


def hostile_length(draw, content):
    """A header that claims to be enormous, or is not there."""
    size = draw.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1, len(content), len(content) * 2])
    return struct.pack("<Q", size) + content[8:]


def foreign(draw, content):
    return draw.choice(
        [b"", b"{}", b"[]", b"null", b"\x80\x04K\x01.", b"PK\x03\x04", draw.randbytes(100), b'{"a": 1}']
    )


ANY = [truncate, flip, flip, overwrite, remove, extend, digits, digits, foreign]


def rewritten(draw, path):
    """A valid safetensors file with the same header and other tensors: swapped, of another dtype or shape, or gone."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    first, second = draw.sample(sorted(tensors), 2)
    kind = draw.choice(["swap", "dtype", "shape", "drop", "add", "value"])
    if kind == "swap":
        tensors[first], tensors[second] = tensors[second], tensors[first]
    elif kind == "dtype":
        tensors[first] = tensors[first].to(draw.choice([torch.float16, torch.int32, torch.float64, torch.bool]))
    elif kind == "shape":
        tensors[first] = tensors[first].reshape(1, *tensors[first].shape)
    elif kind == "drop":
        del tensors[first]
    elif kind == "add":
        tensors[f"{first}.more"] = tensors[first].clone()
    else:
        flat = tensors[first].clone().view(-1)
        if flat.numel():
            flat[draw.randrange(flat.numel())] += 1
        tensors[first] = flat.view(tensors[first].shape)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path, header)


def equal(first, second):
    return same(first[0], second[0]) and first[1:] == second[1:]


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_damaged_files_never_give_another_model(folders, tmp_path, name):
    kind, read, count = READ[name]
    folder = shutil.copytree(folders / kind, tmp_path / "copy")
    path, content = folder / name, (folder / name).read_bytes()
    expected, draw = read(folder), random.Random(name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for index in range(count):
        path.write_bytes(content)
        if path.suffix == ".safetensors" and index % 4 == 0:
            rewritten(draw, path)
        elif path.suffix == ".safetensors" and index % 16 == 1:
            path.write_bytes(hostile_length(draw, content))
        else:
            path.write_bytes(draw.choice(ANY)(draw, content))
        try:
            found = read(folder)
        except ValueError as error:
            assert str(folder) in str(error), (index, error)
            refused += 1
        else:
            assert equal(found, expected), index
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, f"{grown} KiB more memory at most"
    assert refused > count // 2


def test_two_thousand_files_are_damaged():
    assert sum(count for _, _, count in READ.values()) >= 2000
