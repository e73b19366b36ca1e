"""Packed models: round trips, sizes, lossy options, refusals."""

import hashlib
import json
import math
import re
import shutil
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make, same, save_pruned, weights_of
from transformers import AutoModelForSequenceClassification

from hf_maskselect import MaskSet, PruningState, load_pruned, prunable_weights, verify
from hf_maskselect.cli import main
from hf_maskselect.storage.pack import pack, unpack
from hf_maskselect.storage.packed_file import PACKED_FILE, PackedFile, quantize_rows
from hf_maskselect.storage.state import STATE_FILE
from hf_maskselect.storage.weights import saved_tensors
from hf_maskselect.utils.digests import header_checksum

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
TABLE = "bert.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_pruned(folder)
    return folder


@pytest.fixture(scope="module")
def packed(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pack(saved, folder)
    return folder


@pytest.fixture
def copied(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


def load(folder):
    """name -> tensor, with the sign of zeros."""
    return load_file(folder / "model.safetensors")


# -- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "Albert", "ModernBert"])
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.02, 0.5, 0.9375, 1 - 1 / 256])
def test_a_model_comes_back(tmp_path, family, sparsity):
    _, masks = save_pruned(tmp_path / "a", sparsity, family=family)
    pack(tmp_path / "a", tmp_path / "b")
    unpack(tmp_path / "b", tmp_path / "c")
    assert same(load(tmp_path / "a"), load(tmp_path / "c"))
    assert PruningState.load(tmp_path / "c").masks.digest() == masks.digest()
    verify(tmp_path / "c")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("unstructured", 0.8)])
def test_every_dtype_and_pattern_comes_back(tmp_path, dtype, pattern, sparsity):
    save_pruned(tmp_path / "a", sparsity, pattern, dtype=dtype)
    pack(tmp_path / "a", tmp_path / "b")
    unpack(tmp_path / "b", tmp_path / "c")
    assert same(load(tmp_path / "a"), load(tmp_path / "c"))
    assert {tensor.dtype for tensor in load(tmp_path / "c").values()} == {dtype}


def test_a_kept_weight_that_is_zero_stays_kept(tmp_path):
    model, masks = save_pruned(tmp_path / "a")
    name, mask = next(iter(masks.items()))
    with torch.no_grad():
        model.get_parameter(name).view(-1)[mask.view(-1).nonzero()[0]] = -0.0
    model.save_pretrained(tmp_path / "a")
    PruningState.load(tmp_path / "a").sealed(tmp_path / "a").save(tmp_path / "a")
    pack(tmp_path / "a", tmp_path / "b")
    unpack(tmp_path / "b", tmp_path / "c")
    assert PruningState.load(tmp_path / "c").masks.digest() == masks.digest()
    before, after = load(tmp_path / "a")[name], load(tmp_path / "c")[name]
    assert torch.equal(before[mask].view(torch.int32), after[mask].view(torch.int32))


def test_a_foreign_model_with_zeros_comes_back(tmp_path):
    model = make()
    with torch.no_grad():
        for weight in prunable_weights(model).values():
            weight[:, ::3] = 0
    model.save_pretrained(tmp_path / "a")
    pack(tmp_path / "a", tmp_path / "b")
    unpack(tmp_path / "b", tmp_path / "c")
    assert same(load(tmp_path / "a"), load(tmp_path / "c")) and not (tmp_path / "c" / STATE_FILE).exists()
    loaded, masks = load_pruned(tmp_path / "b")
    assert same(weights_of(loaded), weights_of(model))
    assert masks.digest() == MaskSet.from_zeros(model).digest()


def test_shards_come_back_as_one_file(tmp_path):
    model, _ = save_pruned(tmp_path / "a")
    whole = load(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "a", max_shard_size="40KB")
    pack(tmp_path / "a", tmp_path / "b")
    unpack(tmp_path / "b", tmp_path / "c")
    assert same(whole, load(tmp_path / "c")) and not list((tmp_path / "b").glob("*.index.json"))


def test_the_file_may_lie_beside_the_weights(tmp_path):
    save_pruned(tmp_path)
    before = load(tmp_path)
    pack(tmp_path, tmp_path)
    verify(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / STATE_FILE).unlink()
    unpack(tmp_path, tmp_path)
    assert same(before, load(tmp_path))
    verify(tmp_path)


def test_a_plain_load_finds_no_model_in_a_packed_folder(packed):
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForSequenceClassification.from_pretrained(packed)


# -- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.9375, 0.99])
@pytest.mark.parametrize("lossy", [{}, {"values": "bf16", "embeddings": "int8"}])
def test_a_packed_model_is_near_its_entropy_bound(tmp_path, sparsity, lossy):
    """Large enough that the header, about 250 bytes a tensor, does not decide."""
    size = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 4000}
    model, masks = save_pruned(tmp_path / "a", sparsity, **size)
    report = pack(tmp_path / "a", tmp_path / "b", **lossy)
    width = 16 if lossy else 32
    bits = 0
    for name, tensor in model.state_dict().items():
        if lossy and "embeddings.weight" in name:
            bits += 8 * tensor.numel() + 32 * len(tensor)
        else:  # biases are zero here: a tensor may be sparse without being prunable
            p = float((masks[name] if name in masks else tensor != 0).double().mean())
            entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p) if 0 < p < 1 else 0
            bits += tensor.numel() * min(entropy + p * width, width)
    assert report.bound == pytest.approx(bits / 8, rel=1e-4)
    assert report.packed == (tmp_path / "b" / PACKED_FILE).stat().st_size <= 1.03 * report.bound
    assert report.dense == sum(4 * tensor.numel() for tensor in model.state_dict().values())


def test_one_tensor_is_in_memory_at_a_time(tmp_path, saved, packed, monkeypatch):
    """When the next one is asked for, no more than the last is still alive."""
    seen = []

    def alive():
        return sum(reference() is not None for reference in seen)

    def watch(tensor):
        assert alive() <= 1
        seen.append(weakref.ref(tensor))
        return tensor

    def watched_saved(folder):
        for name, tensor in saved_tensors(folder):
            watch(tensor)
            yield name, tensor

    read = PackedFile.tensor_and_mask
    monkeypatch.setattr("hf_maskselect.storage.pack.saved_tensors", watched_saved)
    pack(saved, tmp_path / "b")
    count = len(seen)
    seen.clear()
    monkeypatch.setattr(PackedFile, "tensor_and_mask", lambda *given: (lambda t, m: (watch(t), m))(*read(*given)))
    unpack(packed, tmp_path / "c")
    assert len(seen) == count == len(load(saved))


# -- lossy options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "error"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_narrow_values_are_the_nearest(tmp_path, saved, values, error):
    pack(saved, tmp_path / "b", values=values)
    unpack(tmp_path / "b", tmp_path / "c")
    before, after = load(saved), load(tmp_path / "c")
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert bool(((after[name] - tensor).abs() <= error * tensor.abs() + 1e-7).all())
    assert PruningState.load(tmp_path / "c").masks.digest() == PruningState.load(saved).masks.digest()
    verify(tmp_path / "c")


def test_values_that_would_vanish_stay_kept(tmp_path):
    model, masks = save_pruned(tmp_path / "a")
    with torch.no_grad():
        model.get_parameter(QUERY).mul_(1e-9)
    model.save_pretrained(tmp_path / "a")
    PruningState.load(tmp_path / "a").sealed(tmp_path / "a").save(tmp_path / "a")
    pack(tmp_path / "a", tmp_path / "b", values="fp16")
    unpack(tmp_path / "b", tmp_path / "c")
    before, after = load(tmp_path / "a")[QUERY], load(tmp_path / "c")[QUERY]
    assert torch.equal(after != 0, masks[QUERY]) and torch.equal(after.sign(), before.sign())
    verify(tmp_path / "c")


def test_values_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path):
    model, _ = save_pruned(tmp_path / "a")
    with torch.no_grad():
        model.get_parameter(QUERY).mul_(1e6)
    model.save_pretrained(tmp_path / "a")
    PruningState.load(tmp_path / "a").sealed(tmp_path / "a").save(tmp_path / "a")
    with pytest.raises(ValueError, match=f"{QUERY} has values up to .* use values='bf16'"):
        pack(tmp_path / "a", tmp_path / "b", values="fp16")
    assert not list((tmp_path / "b").glob("packed*"))


def test_embedding_tables_in_int8_are_near(tmp_path, saved):
    exact, lossy = pack(saved, tmp_path / "a"), pack(saved, tmp_path / "b", embeddings="int8")
    unpack(tmp_path / "b", tmp_path / "c")
    before, after = load(saved), load(tmp_path / "c")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    for name in changed:
        step = before[name].abs().amax(1, keepdim=True) / 127
        assert bool(((after[name] - before[name]).abs() <= 0.5001 * step).all())
    assert lossy.packed < exact.packed


def test_a_row_of_zeros_has_a_scale_of_zero():
    table = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    steps, scale = quantize_rows(table)
    assert table.tolist() == [[0, 0], [1, -2]]
    assert steps.tolist() == [[0, 0], [64, -127]] and scale.tolist() == [0, pytest.approx(2 / 127)]


# -- load_pruned ------------------------------------------------------------------------------------------------------


def test_load_pruned_reads_either_and_gives_its_masks(saved, packed):
    plain, plain_masks = load_pruned(saved)
    small, small_masks = load_pruned(packed)
    assert same(weights_of(plain), weights_of(small))
    assert plain_masks.digest() == small_masks.digest() == PruningState.load(saved).masks.digest()
    assert type(plain) is type(small) and plain.config.num_labels == small.config.num_labels
    plain_masks.check_fits(prunable_weights(plain))
    AutoModelForSequenceClassification.from_pretrained(saved)


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.02, 0.9])
def test_masks_of_nearly_dense_models_are_loaded(tmp_path, sparsity):
    _, masks = save_pruned(tmp_path / "a", sparsity, dtype=torch.bfloat16)
    pack(tmp_path / "a", tmp_path / "b")
    assert load_pruned(tmp_path / "b")[1].digest() == masks.digest()


def test_the_single_file_is_checked_where_it_is_the_one_that_loads(tmp_path):
    """`from_pretrained` prefers it to shards beside it."""
    model, _ = save_pruned(tmp_path)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    with torch.no_grad():
        model.classifier.weight.add_(1)
    model.save_pretrained(tmp_path / "other")
    for file in (tmp_path / "shards").glob("model*"):
        shutil.copy(file, tmp_path)
    verify(tmp_path)
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="the weights are not those"):
        verify(tmp_path)


def test_a_place_inside_the_folder_is_refused(saved):
    with pytest.raises(ValueError, match="load_pruned takes no subfolder"):
        load_pruned(saved, subfolder="x")


def test_load_pruned_passes_options_on(saved, packed):
    for folder in (saved, packed):
        assert load_pruned(folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
        model, masks = load_pruned(
            folder, hidden_dropout_prob=0.3, output_attentions=True, attn_implementation="eager"
        )
        assert model.config.hidden_dropout_prob == model.bert.embeddings.dropout.p == 0.3
        assert model.config.output_attentions and model.config._attn_implementation == "eager"
        masks.check_fits(prunable_weights(model))
        with pytest.raises(ValueError, match="do not fit BertForSequenceClassification"):
            load_pruned(folder, num_labels=5)
        with pytest.raises(TypeError, match="no_such_option"):
            load_pruned(folder, no_such_option=1)


# -- refusals ---------------------------------------------------------------------------------------------------------


def rewrite(folder, change=None, retell=None):
    """The packed file with other tensors or another header, with checksums made again: a foreign hand."""
    path = folder / PACKED_FILE
    with safe_open(path, "pt") as file:
        header, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    entries = json.loads(header["tensors"])
    if change:
        change(tensors)
    if retell:
        retell(entries)
    header["tensors"] = json.dumps(entries)
    del header["checksum"]
    save_file(tensors, path, header | {"checksum": header_checksum(header)})


def swapped(folder):
    other = QUERY.replace("query", "key")

    def swap(tensors):
        for prefix in ("values/", "where/"):
            first, second = prefix + QUERY, prefix + other
            tensors[first], tensors[second] = tensors[second], tensors[first]

    rewrite(folder, swap)
    return f"{other} does not match its checksum"


def another_dtype(folder):
    rewrite(folder, lambda tensors: tensors.update({f"values/{QUERY}": tensors[f"values/{QUERY}"].view(torch.int32)}))
    return f"{QUERY} has values of another shape or dtype"


def another_shape(folder):
    rewrite(folder, lambda tensors: tensors.update({f"values/{TABLE}": tensors[f"values/{TABLE}"].T.contiguous()}))
    return "damaged"


def hostile_shape(folder):
    rewrite(folder, retell=lambda entries: entries[QUERY].update(shape=[2**30, 2**20]))
    return f"{QUERY} has shape"


def hostile_count(folder):
    rewrite(folder, retell=lambda entries: entries[QUERY].update(kept=2**40))
    return "impossible sizes"


def negative_shape(folder):
    rewrite(folder, retell=lambda entries: entries[QUERY].update(shape=[-32, -32]))
    return "impossible sizes"


def long_code(folder):
    path = f"where/{QUERY}"

    def retell(entries):
        with safe_open(folder / PACKED_FILE, "pt") as file:
            streams = [torch.cat([file.get_tensor(path), torch.zeros(10**6, dtype=torch.uint8)])]
            streams.append(file.get_tensor(f"values/{QUERY}"))
        sha = hashlib.sha256(b"".join(stream.numpy().tobytes() for stream in streams)).hexdigest()
        entries[QUERY].update(sha256=sha)

    longer = torch.zeros(10**6, dtype=torch.uint8)
    rewrite(folder, lambda tensors: tensors.update({path: torch.cat([tensors[path], longer])}), retell)
    return f"{QUERY} does not decode"


def hostile_parameter(folder):
    rewrite(folder, retell=lambda entries: entries[QUERY].update(k=31))
    return f"{QUERY} does not decode"


def unknown_coding(folder):
    rewrite(folder, retell=lambda entries: entries[QUERY].update(coding="pickle"))
    return "unknown dtype or coding"


def unknown_field(folder):
    rewrite(folder, retell=lambda entries: entries[QUERY].update(more=1))
    return "unknown field"


def no_entry(folder):
    rewrite(folder, retell=lambda entries: entries.pop(QUERY))
    return "do not match its header"


def truncated(folder):
    path = folder / PACKED_FILE
    path.write_bytes(path.read_bytes()[:-9])
    return "cannot be read as a packed model"


def foreign(folder):
    save_file({"a": torch.zeros(2)}, folder / PACKED_FILE)
    return "is not a packed model of format version 1"


def another_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.1}))
    return "config.json is not the one"


def no_packed_file(folder):
    (folder / PACKED_FILE).unlink()
    return f"has no {PACKED_FILE}"


DAMAGES = [swapped, another_dtype, another_shape, hostile_shape, hostile_count, negative_shape, hostile_parameter]
DAMAGES += [long_code, unknown_coding, unknown_field, no_entry, truncated, foreign, another_config, no_packed_file]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_packed_folder_is_refused_and_leaves_nothing(copied, tmp_path, capsys, damage):
    named = damage(copied)
    assert main(["unpack", str(copied), "--output", str(tmp_path / "c")]) == 1
    assert named in capsys.readouterr().err
    assert not list((tmp_path / "c").glob("*.safetensors*"))
    with pytest.raises(ValueError, match=re.escape(named)):
        load_pruned(copied)


@pytest.mark.parametrize("command", ["report", "verify", "plot", "pack", "export"])
def test_what_needs_an_ordinary_model_names_unpack(packed, tmp_path, capsys, command):
    output = ["--output", str(tmp_path)] if command in ("pack", "export") else []
    assert main([command, str(packed), *output]) == 1
    assert f"{packed} holds a packed model" in (told := capsys.readouterr().err) and "hf-maskselect unpack" in told


def test_load_pruned_of_an_empty_folder_names_both_files(tmp_path):
    with pytest.raises(ValueError, match=f"has no {PACKED_FILE} and no model.safetensors"):
        load_pruned(tmp_path)


def test_a_model_that_its_masks_do_not_know_is_not_packed(tmp_path, saved):
    folder = shutil.copytree(saved, tmp_path / "a")
    tensors = load(folder)
    tensors[TABLE][3, 3] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="the weights are not those"):
        pack(folder, tmp_path / "b")
    with pytest.raises(ValueError, match="the weights are not those"):
        load_pruned(folder)
    assert not (tmp_path / "b" / PACKED_FILE).exists()


def test_the_folder_of_another_model_is_not_written_into(saved, packed, tmp_path):
    save_pruned(tmp_path / "other", 0.5)
    for command, source in (("pack", saved), ("unpack", packed)):
        with pytest.raises(ValueError, match="already holds the weights"):
            {"pack": pack, "unpack": unpack}[command](source, tmp_path / "other")


@pytest.mark.parametrize("options", [{"values": "int4"}, {"embeddings": "bf16"}])
def test_unknown_options_are_refused(saved, tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        pack(saved, tmp_path / "b", **options)


def test_a_repository_that_cannot_be_had_is_named(monkeypatch):
    with pytest.raises(ValueError, match="someone/nothing is not a folder and cannot be downloaded from the Hub"):
        load_pruned("someone/nothing")


# -- the console ------------------------------------------------------------------------------------------------------


def test_the_console_packs_and_unpacks(saved, tmp_path, capsys):
    assert main(["pack", str(saved), "--output", str(tmp_path / "b")]) == 0
    assert "x smaller than the dense" in capsys.readouterr().out
    assert main(["unpack", str(tmp_path / "b"), "--output", str(tmp_path / "c")]) == 0
    assert main(["verify", str(tmp_path / "c")]) == 0
    assert same(load(saved), load(tmp_path / "c"))
