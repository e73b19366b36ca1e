"""What a folder may hold that is not ours: nothing in it runs, leads elsewhere, or is read as another model."""

import builtins
import json
import resource
import shutil
import struct
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make, make_trainer, save_pruned, weights_of

from hf_maskselect import MaskSet, load_pruned
from hf_maskselect.cli import main
from hf_maskselect.masking.tensor_files import TensorFile
from hf_maskselect.reporting.card import card_text
from hf_maskselect.reporting.record import RunRecord
from hf_maskselect.reporting.sparsity import SparsityReport, TensorReport
from hf_maskselect.storage.pack import pack
from hf_maskselect.storage.packed_file import PACKED_FILE
from hf_maskselect.storage.state import PruningState
from hf_maskselect.storage.verify import verify
from hf_maskselect.training.search_cost import workload
from hf_maskselect.utils.digests import header_checksum
from hf_maskselect.utils.reading import parse_json
from hf_maskselect.utils.tables import code, escaped, without_section

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`plain`: weights in one file; `shards`: in several; `packed`. Do not change."""
    root = tmp_path_factory.mktemp("saved")
    trainer = make_trainer(root / "plain", make(**SMALL))
    trainer.train()
    trainer.save_model()
    shutil.copytree(root / "plain", root / "shards")
    (root / "shards" / "model.safetensors").unlink()
    trainer.model.save_pretrained(root / "shards", max_shard_size="4KB")
    pack(root / "plain", root / "packed")
    return root


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved model in one file."""
    return shutil.copytree(saved / "plain", tmp_path / "copy")


@pytest.fixture
def shards(saved, tmp_path):
    """A copy of the saved model in several files."""
    return shutil.copytree(saved / "shards", tmp_path / "copy")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def index_of(folder):
    return folder / "model.safetensors.index.json"


def refused(folder, match):
    """Every reader of a folder says what is wrong."""
    for read in (load_pruned, verify):
        with pytest.raises(ValueError, match=match):
            read(folder)


# -- weights in several files -----------------------------------------------------------------------------------------


def test_the_shards_are_read(shards, saved):
    model, masks = load_pruned(shards)
    whole, same = load_pruned(saved / "plain")
    assert all(torch.equal(weights_of(model)[name], weight) for name, weight in weights_of(whole).items())
    assert masks.digest() == same.digest()


def test_a_tensor_in_two_shards_is_refused(shards):
    places = json.loads(index_of(shards).read_text())["weight_map"]
    name, place = next(iter(places.items()))
    other = shards / next(shard for shard in places.values() if shard != place)
    twice = load_file(other) | {name: torch.zeros_like(load_file(shards / place)[name])}
    save_file(twice, other, metadata={"format": "pt"})
    refused(shards, f"{name} is in .*{min(place, other.name)} and in {max(place, other.name)}")


def test_a_tensor_twice_in_one_header_is_refused(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    name = "classifier.bias"
    entry = json.dumps(json.loads(data[8 : 8 + length])[name])
    header = data[8 : 8 + length].decode().rstrip()[:-1] + f',"{name}":{entry}}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data[8 + length :])
    refused(folder, f"names '{name}' twice")


def test_a_tensor_that_the_index_looks_for_elsewhere_is_refused(shards):
    content = json.loads(index_of(shards).read_text())
    names = sorted(set(content["weight_map"].values()))
    name = next(name for name, place in content["weight_map"].items() if place == names[0])
    content["weight_map"][name] = names[1]
    index_of(shards).write_text(json.dumps(content))
    refused(shards, f"says that {name} is in")


@pytest.mark.parametrize("name", ["../plain/model.safetensors", "/etc/hostname", "..", "a\\b.safetensors", "x\0y", ""])
def test_an_index_never_leads_out_of_its_folder(shards, name):
    content = json.loads(index_of(shards).read_text())
    content["weight_map"]["classifier.bias"] = name
    index_of(shards).write_text(json.dumps(content))
    refused(shards, "no safetensors file of its folder")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "pruning_state.safetensors"])
def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, file):
    elsewhere = (folder / file).rename(tmp_path / file)
    (folder / file).symlink_to(elsewhere)
    refused(folder, "is a link to .*outside its folder")
    with pytest.raises(ValueError, match="outside its folder"):
        pack(folder, tmp_path / "packed")


def test_a_tokenizer_file_that_is_a_link_is_not_copied(folder, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a link"):
        pack(folder, tmp_path / "packed")
    assert not (tmp_path / "packed" / "tokenizer.json").exists()


def test_the_links_of_the_hubs_cache_are_followed(folder, tmp_path, saved):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(path for path in folder.iterdir() if path.is_file()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert load_pruned(snapshot)[1].digest() == load_pruned(saved / "plain")[1].digest()


# -- what changes the outputs beside the weights ----------------------------------------------------------------------


def test_an_adapter_in_the_folder_is_refused(folder, saved):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(load_pruned(folder)[0], peft.LoraConfig(target_modules=["query"]))
    adapted.save_pretrained(folder)
    refused(folder, "holds an adapter.*merge_adapter_with_masks")


def test_an_adapter_beside_packed_weights_changes_nothing(saved, tmp_path):
    folder = shutil.copytree(saved / "packed", tmp_path / "copy")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    assert load_pruned(folder)[1].digest() == load_pruned(saved / "packed")[1].digest()


ELSEWHERE = {
    "transformers_weights": "other.safetensors",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "_attn_implementation": "someone/kernel",
    "attn_implementation": {"": "someone/kernel"},
    "backbone": "someone/model",
    "use_pretrained_backbone": True,
}


@pytest.mark.parametrize("key", ELSEWHERE)
def test_a_configuration_that_leads_elsewhere_is_refused(saved, tmp_path, key):
    for kind in ("plain", "packed"):
        folder = shutil.copytree(saved / kind, tmp_path / kind)
        change(folder / "config.json", **{key: ELSEWHERE[key]})
        (folder / "pruning_state.safetensors").unlink(missing_ok=True)  # which knows the configuration
        with pytest.raises(ValueError, match=r"config\.json"):
            load_pruned(folder)


# -- code -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Fails the test if anybody asks on standard input; answers "y" then."""
    questions = []
    monkeypatch.setattr(builtins, "input", lambda text="": questions.append(text) or "y")
    yield
    assert not questions


AUTO = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")}


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("changes", [{}, {"model_type": "evil"}, {"architectures": ["Evil"]}, {"model_type": None}])
@pytest.mark.parametrize(
    "command",
    ["report", "verify", "plot", "pack", "unpack", pytest.param("export", marks=pytest.mark.slow), "plan"],
)
def test_no_code_of_a_folder_runs(saved, tmp_path, capsys, command, changes):
    folder = shutil.copytree(saved / ("packed" if command == "unpack" else "plain"), tmp_path / "copy")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change(folder / "config.json", auto_map=AUTO, **changes)
    (folder / "pruning_state.safetensors").unlink(missing_ok=True)
    options = ["--output", str(tmp_path / "out")] if command in ("pack", "unpack", "export") else []
    options += ["--format", "onnx"] if command == "export" else []
    code = main([command, str(folder), *options, *(["--max_steps", "8"] if command == "plan" else [])])
    printed = capsys.readouterr()
    assert code in (0, 1) and "Traceback" not in printed.err
    if changes.get("model_type") and command not in ("verify", "unpack"):  # which miss the pruning state first
        assert code == 1 and "'evil', which transformers does not have" in printed.err
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


def test_no_regex_of_a_folder_runs(saved, tmp_path):
    folder = shutil.copytree(saved / "plain", tmp_path / "copy")
    change(folder / "config.json", pruning={"target_modules": ["(([a-z]|[a-z.]+)+)+!$"]})
    (folder / "pruning_state.safetensors").unlink()
    start = time.process_time()
    with pytest.raises(ValueError, match="a regex from a file is never run"):
        load_pruned(folder)
    assert time.process_time() - start < 5


def test_a_regex_of_the_user_is_saved_as_names(tmp_path):
    trainer = make_trainer(tmp_path, make(**SMALL), target_modules=[r".*\.query", "output.dense"])
    trainer.save_model()
    names = trainer.model.config.pruning["target_modules"]
    assert names == ["encoder.layer.0.attention.self.query", "output.dense"]
    (tmp_path / "pruning_state.safetensors").unlink()
    assert load_pruned(tmp_path)[1].keys() == trainer.pruning_state().masks.keys()


@pytest.mark.usefixtures("asked")
def test_no_code_runs_that_a_part_of_a_configuration_names(tmp_path):
    # The decoder is built by an Auto class, which has no decoder of this type and would take the folder's.
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    encoder = {"model_type": "bert", **SMALL, "vocab_size": 30}
    decoder = {"model_type": "vit", "is_decoder": True, "add_cross_attention": True, "_name_or_path": str(tmp_path)}
    decoder["auto_map"] = {"AutoModelForCausalLM": "evil.Evil"}
    parts = {"model_type": "encoder-decoder", "architectures": ["EncoderDecoderModel"], "is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps({**parts, "encoder": encoder, "decoder": decoder}))
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"config\.json describes no EncoderDecoderModel"):
        load_pruned(tmp_path)
    assert main(["pack", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


def test_a_class_of_another_model_type_is_refused(folder):
    (folder / "pruning_state.safetensors").unlink()
    change(folder / "config.json", architectures=["ShieldGemma2ForImageClassification"])
    with pytest.raises(ValueError, match="the model type 'bert'"):
        load_pruned(folder)


def test_another_configuration_that_the_first_names_is_not_read(folder):
    other = json.loads((folder / "config.json").read_text()) | {"hidden_act": "relu"}
    (folder / "config.4.0.0.json").write_text(json.dumps(other))
    (folder / "pruning_state.safetensors").unlink()
    change(folder / "config.json", configuration_files=["config.4.0.0.json"])
    with pytest.raises(ValueError, match="names other files in configuration_files"):
        load_pruned(folder)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 10**9},
        {"num_labels": 10**10},
        {"hidden_size": 10**12},
        {"vocab_size": 10**30},
        {"hidden_size": -16},
        {"num_attention_heads": 0},
        {"hidden_size": 1 << 39, "intermediate_size": 1 << 39},
        {"vocab_size": 1 << 36},
    ],
)
def test_an_absurd_configuration_takes_no_memory(saved, tmp_path, sizes):
    for kind in ("plain", "packed"):
        folder = shutil.copytree(saved / kind, tmp_path / kind)
        change(folder / "config.json", **sizes)
        (folder / "pruning_state.safetensors").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=r"config\.json"):
            load_pruned(folder)


@pytest.mark.parametrize("key", ["inner_group_num", "num_hidden_groups"])
@pytest.mark.parametrize("parts", [500, 10**9])
def test_parts_are_counted_under_any_name(tmp_path, key, parts):
    save_pruned(tmp_path, family="Albert")
    (tmp_path / "pruning_state.safetensors").unlink()
    change(tmp_path / "config.json", **{key: parts})
    start = time.process_time()
    with pytest.raises(ValueError, match="more than [0-9,]+ parameters"):
        load_pruned(tmp_path)
    assert time.process_time() - start < 1


def test_a_list_of_kinds_of_attention_is_not_repeated_without_end(folder):
    (folder / "pruning_state.safetensors").unlink()
    change(folder / "config.json", model_type="gpt_neo", attention_types=[[["global"], 10**9]])
    with pytest.raises(ValueError, match="attention_types.*too large"):
        load_pruned(folder)


@pytest.mark.parametrize("layers", [1, 4])
def test_a_description_far_larger_than_the_weights_takes_no_memory(folder, layers):
    (folder / "pruning_state.safetensors").unlink()
    change(folder / "config.json", num_hidden_layers=layers, hidden_size=1 << 14, intermediate_size=1 << 15)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"config\.json describes [0-9,]+ numbers but [0-9,]+ are saved"):
        load_pruned(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def with_header(text, data=b""):
    return struct.pack("<Q", len(text)) + text.encode() + data


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
SLOW_HEADERS = {
    "axes": json.dumps({"a": {"dtype": "F32", "shape": [2**62 - 1] * 60_000, "data_offsets": [0, 8]}}),
    "names": "{" + ",".join(f'"n{i}":{ENTRY}' for i in range(20_000)) + f',"n19999":{ENTRY}}}',
}


@pytest.mark.parametrize("kind", SLOW_HEADERS)
def test_a_long_header_is_refused_at_once(tmp_path, kind):
    (tmp_path / "x.safetensors").write_bytes(with_header(SLOW_HEADERS[kind], b"\0" * 8))
    start = time.process_time()
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        TensorFile(tmp_path / "x.safetensors")
    assert time.process_time() - start < 1


def changed_fields(path, change):
    """Change the text fields of a header, and make its checksum again."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    fields = header["__metadata__"]
    change(fields)
    fields["checksum"] = header_checksum({key: value for key, value in fields.items() if key != "checksum"})
    path.write_bytes(with_header(json.dumps(header), data[8 + length :]))


def test_a_mask_of_many_axes_is_refused_at_once(folder):
    def widen(fields):
        fields[next(key for key in fields if key.startswith("shape."))] = ",".join(["9" * 18] * 60_000)

    changed_fields(folder / "pruning_state.safetensors", widen)
    start = time.process_time()
    refused(folder, "do not match its header")
    assert time.process_time() - start < 1


def test_a_packed_tensor_of_many_axes_is_refused_at_once(saved, tmp_path):
    def widen(fields):
        tensors = json.loads(fields["tensors"])
        next(iter(tensors.values()))["shape"] = [2**60] * 60_000
        fields["tensors"] = json.dumps(tensors)

    folder = shutil.copytree(saved / "packed", tmp_path / "copy")
    changed_fields(folder / PACKED_FILE, widen)
    start = time.process_time()
    with pytest.raises(ValueError, match="impossible sizes"):
        load_pruned(folder)
    assert time.process_time() - start < 1


def test_json_of_millions_of_lists_is_refused_at_once():
    start = time.process_time()
    with pytest.raises(ValueError, match="lists and objects"):
        parse_json("[" + "[]," * 3_000_000 + "[]]", "a file")
    assert time.process_time() - start < 1


@pytest.mark.parametrize("length", [0, 7, 1 << 20, 1 << 62, (1 << 64) - 1])
def test_a_header_that_lies_about_its_length_takes_no_memory(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(folder, r"model\.safetensors cannot be read")


LIES = [
    {"dtype": "F99"},
    {"dtype": ["F32"]},
    {"shape": [1 << 62, 4]},
    {"shape": [-2]},
    {"shape": [True, 2]},
    {"shape": "2"},
    {"data_offsets": [0, 1 << 61]},
    {"data_offsets": [8, 0]},
    {"data_offsets": [0]},
    {"more": 1},
]


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_header_that_lies_about_a_tensor_is_refused(tmp_path, lie):
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["a"] |= lie
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        TensorFile(tmp_path / "x.safetensors")


# -- texts ------------------------------------------------------------------------------------------------------------

HOSTILE = "x`|\n# Heading\n<img src=x onerror=alert(1)>\x1b[2J](http://evil)"


def test_names_from_files_stay_text_in_a_card(folder):
    replace(PruningState.load(folder), method=HOSTILE).save(folder)
    candidate = {"proposal": HOSTILE, "ratio": None, "overlap": 1.0, "digest": "d", "scores": [0.5]}
    candidates = [{**candidate, "index": 0, "chosen": True}, {**candidate, "index": 1}]
    search = {"level": 0, "sparsity": 0.5, "step": 0, "candidates": candidates}
    (folder / "search.json").write_text(json.dumps([search]))
    (folder / "all_results.json").write_text(json.dumps({f"eval_{HOSTILE}": 0.5}))
    text = card_text(RunRecord.load(folder), HOSTILE, folder, {"method": HOSTILE, "scope": HOSTILE})
    assert "\n# Heading" not in text and "\x1b" not in text and text.count("Heading") >= 7
    assert escaped(HOSTILE) in text and code(HOSTILE).replace("|", "\\|") in text
    for line in text.splitlines():
        before, hostile, _ = line.partition("<img")  # only ever inside of code
        assert not hostile or "`` " in before or before.startswith("model"), line


def test_names_from_files_do_not_move_the_cursor(tmp_path, capsys):
    save_file({HOSTILE: torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    MaskSet({HOSTILE: torch.tensor([True, False])}).save(
        tmp_path / "pruning_state.safetensors",
        {"method": "x", "pattern": "unstructured", "sparsity": "0.5", "step": "1", "level": "0", "seed": "0"}
        | {"start": "0", "architecture": "", "weights": "", "config": ""},
    )
    assert main(["report", str(tmp_path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_plan_reads_nothing_but_a_description(folder):
    change(folder / "config.json", num_hidden_layers=10**7)
    with pytest.raises(ValueError, match="too large for a model"):
        workload(None, folder, 10)


def test_a_name_with_many_numbers_is_split_at_once():
    start = time.process_time()
    tensors = tuple(TensorReport(name, (2, 2), 1, 4, True) for name in ("1." * 15_000 + "x", "a.3.b.weight"))
    assert RunRecord(None, SparsityReport(tensors), None).densities()[2]["a.3", "b"] == 0.75
    assert time.process_time() - start < 1


def test_a_section_of_a_card_is_found_among_many_empty_lines():
    start = time.process_time()
    card = "# a\n" + "\n" * 100_000 + "## b\nx\n" + "\n" * 100_000 + "## c\ny\n"
    assert without_section(card, "## b") == "# a" + "\n" * 100_001 + "## c\ny\n"
    assert without_section(card, "## c") == card[: card.index("## c")].rstrip("\n")
    assert without_section(card, "## d") == card
    assert time.process_time() - start < 1


def test_a_score_that_no_float_holds_is_left_out(folder):
    (folder / "all_results.json").write_text('{"eval_a": 1' + "0" * 400 + ', "eval_b": 0.5}')
    text = card_text(RunRecord.load(folder), "name", folder)
    assert "| b | - | 0.5000 |" in text and "| a |" not in text


def test_a_picture_shows_dollars_in_names(folder):
    pytest.importorskip("matplotlib")
    candidate = {"proposal": "$\\frac$", "ratio": None, "overlap": 1.0, "digest": "d", "scores": [0.5]}
    candidates = [{**candidate, "index": 0, "chosen": True}, {**candidate, "index": 1, "proposal": "$x^"}]
    candidates[0]["scores"] = [10**30]  # more than an int of C holds
    search = {"level": 0, "sparsity": 0.5, "step": 0, "candidates": candidates}
    (folder / "search.json").write_text(json.dumps([search]))
    assert main(["plot", str(folder)]) == 0


def test_an_error_does_not_move_the_cursor(folder, capsys):
    change(folder / "config.json", architectures=["\x1b[2J\ngood: x"])
    (folder / "pruning_state.safetensors").unlink()
    assert main(["report", str(folder)]) == 1
    printed = capsys.readouterr().err
    assert "\x1b" not in printed and printed.count("\n") == 1
