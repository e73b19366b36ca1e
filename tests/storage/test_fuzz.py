"""A thousand files of a wrong structure, with checksums made again: our sentence or the right model, at once."""

import hashlib
import json
import random
import resource
import shutil
import struct
import time

import pytest
from saved_files import READ, folders  # noqa: F401 (a fixture)
from tiny import same

from hf_maskselect import load_pruned
from hf_maskselect.export.semi_structured import SEMI_STRUCTURED_FILE, TIMING_FILE
from hf_maskselect.reporting.card import card_text
from hf_maskselect.reporting.record import RunRecord
from hf_maskselect.search.journal import JOURNAL_FILE
from hf_maskselect.storage.packed_file import PACKED_FILE
from hf_maskselect.utils.digests import header_checksum

DEEP = "<deep>"
NUMBERS = [0, -1, 1, 3, 2**31, 2**63, 10**30, 1e308, -0.5, float("nan"), float("inf")]
TEXTS = ["", "x", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "é" * 300, "(a+)+$", "²", DEEP]
VALUES = [None, True, False, *NUMBERS, *TEXTS, [], {}, [[]], [None] * 50, {"": None}, [1, "1"]]


class Twin(str):
    """A key that a dictionary takes beside an equal one."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__


def places(content):
    """Every (container, key) below a JSON value."""
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in list(keys):
        yield content, key
        yield from places(content[key])


def wrong(draw, content):
    """Change the structure of a JSON value in one place."""
    found = list(places(content))
    if not found or draw.random() < 0.03:
        return draw.choice(VALUES)
    container, key = draw.choice(found)
    kind = draw.choice(["value", "value", "value", "gone", "wrap", "swap", "more", "twice", "name"])
    if kind == "value":
        container[key] = draw.choice(VALUES)
    elif kind == "gone":
        del container[key]
    elif kind == "wrap":
        container[key] = draw.choice([[container[key]], {"x": container[key]}, str(container[key])])
    elif kind == "swap":
        other, place = draw.choice(found)
        container[key], other[place] = other[place], container[key]
    elif isinstance(container, dict):
        container[{"more": "more", "twice": Twin(key), "name": f"{key}x"}[kind]] = draw.choice(
            [*VALUES, container[key]]
        )
        if kind == "name":
            del container[key]
    else:
        container.append(container[key])
    return content


def text_of(draw, content):
    deep = draw.choice([100, 5_000, 100_000])
    try:
        text = json.dumps(content)
    except (RecursionError, ValueError):  # a swap put a container into itself
        text = "[" * deep
    return text.replace(f'"{DEEP}"', "[" * deep + "]" * deep)


def wrong_json(draw, path):
    path.write_text(text_of(draw, wrong(draw, json.loads(path.read_text()))))


def wrong_checked_json(draw, path):
    content = text_of(draw, wrong(draw, json.loads(json.loads(path.read_text())["content"])))
    stored = json.loads(path.read_text())
    if draw.random() < 0.1:
        path.write_text(text_of(draw, wrong(draw, stored)))
        return
    sha256 = hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()
    path.write_text(json.dumps({"sha256": sha256, "content": content}))


def wrong_header(draw, path):
    """Another header of a safetensors file: of its tensors, its fields, or the JSON in a field."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    fields = header.get("__metadata__", {})
    nested = [key for key, value in fields.items() if value.startswith(("{", "["))]
    kind = draw.random()
    if kind < 0.4 or not fields:
        header = wrong(draw, header)
    elif kind < 0.7 and nested:
        key = draw.choice(nested)
        fields[key] = text_of(draw, wrong(draw, json.loads(fields[key])))
    else:
        fields = header["__metadata__"] = wrong(draw, fields)
    if isinstance(fields, dict) and "checksum" in fields and all(isinstance(v, str) for v in fields.values()):
        fields["checksum"] = header_checksum({k: v for k, v in fields.items() if k != "checksum"})
    text = text_of(draw, header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def read_bare(folder):
    """A model without a pruning state: any readable description is right."""
    (folder / "pruning_state.safetensors").unlink(missing_ok=True)
    load_pruned(folder)
    return {}, "", []


def read_record(folder):
    card_text(RunRecord.load(folder), "name", folder)
    return {}, "", []


def reader_of(name):
    return READ[name][:2]


SURVIVORS = next(name for name in READ if "/" in name)
CASES = {  # name -> (file, folder, reader, what is done to it)
    "config": ("config.json", *reader_of("config.json"), wrong_json),
    "config of a packed model": ("config.json", "packed", READ["config.json"][1], wrong_json),
    "config without a state": ("config.json", "plain", read_bare, wrong_json),
    "index": ("model.safetensors.index.json", *reader_of("model.safetensors.index.json"), wrong_json),
    "weights": ("model.safetensors", *reader_of("model.safetensors"), wrong_header),
    "weights without a state": ("model.safetensors", "plain", read_bare, wrong_header),
    "state": ("pruning_state.safetensors", *reader_of("pruning_state.safetensors"), wrong_header),
    "packed": (PACKED_FILE, *reader_of(PACKED_FILE), wrong_header),
    "2:4": (SEMI_STRUCTURED_FILE, *reader_of(SEMI_STRUCTURED_FILE), wrong_header),
    "timing": (TIMING_FILE, *reader_of(TIMING_FILE), wrong_checked_json),
    "journal": (JOURNAL_FILE, *reader_of(JOURNAL_FILE), wrong_checked_json),
    "level's best": ("_level_best.safetensors", *reader_of("_level_best.safetensors"), wrong_header),
    "survivors": (SURVIVORS, *reader_of(SURVIVORS), wrong_header),
    "search": ("search.json", "record", read_record, wrong_json),
    "trainer state": ("trainer_state.json", "record", read_record, wrong_json),
    "results": ("all_results.json", "record", read_record, wrong_json),
}
EACH = 64


@pytest.fixture(scope="module")
def records(folders):  # noqa: F811
    """The saved files, and a run's record of its searches and scores."""
    record = shutil.copytree(folders / "plain", folders / "record")
    candidate = {"proposal": "votes", "ratio": 1.5, "overlap": 0.9, "digest": "d" * 64, "scores": [0.5, 0.25]}
    candidates = [{**candidate, "index": 0, "steps": 3, "chosen": True}, {**candidate, "index": 1, "ratio": None}]
    search = {"level": 0, "sparsity": 0.5, "step": 0, "candidates": candidates, "step_equivalents": 3.0}
    (record / "search.json").write_text(json.dumps([search]))
    logs = [{"step": 1, "loss": 0.5, "epoch": 0.5}, {"step": 2, "eval_accuracy": 0.75, "epoch": 1.0}]
    state = {"global_step": 2, "max_steps": 2, "epoch": 1.0, "log_history": logs, "best_metric": None}
    (record / "trainer_state.json").write_text(json.dumps(state))
    (record / "all_results.json").write_text(
        json.dumps({"eval_accuracy": 0.75, "dense_eval_accuracy": 0.9, "epoch": 1})
    )
    return folders


@pytest.mark.parametrize(
    ("case", "numbers"),
    [
        *((case, range(12)) for case in CASES),
        *(pytest.param(case, range(12, EACH), marks=pytest.mark.slow) for case in CASES),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}",
)
def test_a_wrong_structure_is_one_sentence(records, tmp_path, case, numbers):
    name, kind, read, damage = CASES[case]
    folder = shutil.copytree(records / kind, tmp_path / "copy")
    state = folder / "pruning_state.safetensors"
    kept = state.read_bytes() if state.is_file() else None
    path, content = folder / name, (folder / name).read_bytes()
    expected = {name: weight.clone() for name, weight in read(folder)[0].items()}  # else mapped from the file
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for number in numbers:
        if kept is not None:
            state.write_bytes(kept)
        path.write_bytes(content)
        damage(random.Random(f"{case} {number}"), path)
        start = time.process_time()
        try:
            found = read(folder)
        except ValueError as error:
            assert "\n" not in str(error).strip() or read is read_bare, (number, error)
            refused += 1
        else:
            assert same(found[0], expected), number
        assert time.process_time() - start < 1, number
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, f"{grown} KiB more memory at most"
    assert refused > 0 or len(numbers) < 20


def test_a_thousand_files_have_a_wrong_structure():
    assert len(CASES) * EACH >= 1_000
