"""Token embeddings in 8 bits: error, exactness where a head shares them, files, bounds."""

import copy

import pytest
import torch
from block_weights import sparse_model, time_quickly
from tiny import make, make_rows
from torch import nn

from hf_maskselect import CpuReport, export_cpu, load_cpu
from hf_maskselect.runtime.embeddings import Int8Embedding, Int8Table, int8_tables, storage_of
from hf_maskselect.runtime.files import Runtime
from hf_maskselect.runtime.model import Attention, install
from hf_maskselect.storage.derived import CPU_FILE, CPU_JSON
from hf_maskselect.storage.packed_file import PackedFile, PackedWriter, PackItem, quantize_rows
from hf_maskselect.utils.files import read_json, write_json

ROWS = make_rows(8)
FAST = {"batch_sizes": [1], "seq_lens": [8]}
NAME = "bert.embeddings.word_embeddings"
FAMILIES = {  # family -> name of the token embeddings
    "Bert": NAME,
    "DistilBert": "distilbert.embeddings.word_embeddings",
    "Electra": "electra.embeddings.word_embeddings",
    "Albert": "albert.embeddings.word_embeddings",
    "DebertaV2": "deberta.embeddings.word_embeddings",
    "ModernBert": "model.embeddings.tok_embeddings",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    time_quickly(monkeypatch)
    monkeypatch.setattr("hf_maskselect.runtime.export._Search._fastest_attention", lambda *_: Attention(True, 0))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A CPU model, the outputs of the model that the export made, and its report."""
    seen, output = [], tmp_path_factory.mktemp("cpu")
    with pytest.MonkeyPatch.context() as patch:
        time_quickly(patch)
        patch.setattr("hf_maskselect.runtime.export._Search._fastest_attention", lambda *_: Attention(True, 0))
        report = export_cpu(sparse_model(), output, ROWS, evaluate=lambda m: seen.append(logits(m)) or 0.0, **FAST)
    return output, seen[-1], report


def logits(model):
    batch = {name: torch.stack([row[name] for row in ROWS]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model(**batch).logits


def rewrite(folder, change):
    """Write the file of weights again with other tensors, and JSON that goes with it."""
    packed = PackedFile(folder / CPU_FILE)
    tensors = change({name: packed.tensor(name) for name in packed.entries})
    metadata = {name: packed.metadata[name] for name in ("config", "weights")}
    PackedWriter().write(folder / CPU_FILE, [PackItem(*item, "raw") for item in tensors.items()], metadata)
    checksum = PackedFile(folder / CPU_FILE).metadata["checksum"]
    write_json(folder / CPU_JSON, {**read_json(folder / CPU_JSON, ""), "weights": checksum})


def copied(exported, folder):
    for path in exported[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_each_row_is_within_half_a_step():
    weight = torch.randn(50, 24) * torch.logspace(-6, 3, 50)[:, None]
    weight[7] = 0
    table = Int8Table(*quantize_rows(weight))
    embedding = Int8Embedding(table, padding_idx=7)
    errors = (embedding(torch.arange(50)) - weight).abs().amax(1)
    assert (errors <= table.scales * 0.5001).all() and table.values.abs().amax() == 127
    assert embedding(torch.tensor([[7]])).eq(0).all() and embedding.padding_idx == 7
    assert torch.equal(embedding.weight, embedding(torch.arange(50)))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_shapes_are_those_of_an_embedding(shape, dtype):
    plain = nn.Embedding(9, 4)
    embedding = Int8Embedding(Int8Table(*quantize_rows(plain.weight.detach())), None)
    ids = torch.randint(0, 9, shape).to(dtype)
    assert embedding(ids).shape == plain(ids).shape and embedding(ids).dtype == torch.float32
    with pytest.raises(IndexError):
        embedding(torch.tensor([9]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_ids_and_embeddings(family):
    model = make(family).eval()
    changed = install(copy.deepcopy(model), int8_tables(model), Attention(False))
    assert storage_of(model, int8_tables(model)) == {FAMILIES[family]: "int8"}
    assert changed.get_input_embeddings() is changed.get_submodule(FAMILIES[family])
    assert isinstance(changed.get_input_embeddings(), Int8Embedding)
    ids = torch.stack([row["input_ids"] for row in ROWS])
    with torch.no_grad():
        expected, output = model(input_ids=ids).logits, changed(input_ids=ids).logits
        assert 0 < (output - expected).norm() < 0.05 * expected.norm()
        given = changed(inputs_embeds=changed.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(given, output)


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "DebertaV2", "ModernBert"])
def test_a_table_that_the_head_shares_stays_exact(family):
    model = make(family, "ForMaskedLM")
    assert int8_tables(model) == {} and list(storage_of(model, {}).values()) == ["tied"]
    apart = make(family, "ForMaskedLM", tie_word_embeddings=False)
    assert list(storage_of(apart, int8_tables(apart)).values()) == ["int8"]


def test_what_8_bits_cannot_hold_stays_exact():
    model = make()
    model.bert.embeddings.word_embeddings.weight.data[5, 3] = torch.inf
    assert int8_tables(model) == {} and storage_of(model, {}) == {NAME: "float32"}
    assert int8_tables(make()).keys() == {NAME}


def test_a_loaded_model_is_the_exported_one(exported):
    output, expected, report = exported
    loaded = load_cpu(output, retime=False)
    assert torch.equal(logits(loaded), expected)
    assert report.runtime.embeddings == {NAME: "int8"} and "Token embeddings: 8 bits" in str(report)
    assert "Token embeddings: 8 bits" in (output / "README.md").read_text()
    assert CpuReport.load(output) == report
    kept = PackedFile(output / CPU_FILE).entries[f"{NAME}.weight"]
    assert kept.stored == "int8" and kept.shape == (64, 32)
    assert report.dense_bytes == 4 * sum(each.numel() for each in sparse_model().state_dict().values())


def test_exact_and_tied_exports_keep_float32(tmp_path):
    model = sparse_model(sparsity=0.9)
    report = export_cpu(model, tmp_path / "exact", int8=False, **FAST)
    loaded = load_cpu(tmp_path / "exact", retime=False)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert report.runtime.embeddings == {} and "Token embeddings: float32\n" in str(report)
    tied = make("Bert", "ForMaskedLM").eval()
    report = export_cpu(tied, tmp_path / "tied", ROWS, **FAST)
    loaded = load_cpu(tmp_path / "tied", retime=False)
    assert torch.equal(loaded.get_input_embeddings().weight, tied.get_input_embeddings().weight)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert "float32, since an output head shares them" in str(report)


def test_a_bound_keeps_them_exact(tmp_path):
    def exactness(model):
        return -float(isinstance(model.get_input_embeddings(), Int8Embedding))

    model = sparse_model(num_hidden_layers=1)
    report = export_cpu(model, tmp_path / "drop", ROWS, max_drop=0.0, evaluate=exactness, **FAST)
    assert report.runtime.embeddings == {NAME: "float32"} and "Token embeddings: float32\n" in str(report)
    # One large column, which the positions cancel, leaves few of the 255 steps to the others.
    model.bert.embeddings.word_embeddings.weight.data[:, 0] += 30.0
    model.bert.embeddings.position_embeddings.weight.data[:, 0] -= 30.0
    free = export_cpu(model, tmp_path / "free", ROWS, **FAST).runtime
    bound = export_cpu(model, tmp_path / "kl", ROWS, max_kl=free.divergence / 2, **FAST).runtime
    assert free.embeddings == {NAME: "int8"} and bound.embeddings == {NAME: "float32"}
    assert bound.divergence <= free.divergence / 2 and any(record.input for record in bound.layers.values())


def test_exact_layers_may_have_small_embeddings(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_maskselect.runtime.export._Search._fastest_attention", lambda *_: None)
    runtime = export_cpu(sparse_model(), tmp_path, ROWS, **FAST).runtime
    assert runtime.embeddings == {NAME: "int8"} and runtime.divergence > 0
    assert not any(record.input for record in runtime.layers.values())
    assert isinstance(load_cpu(tmp_path, retime=False).get_input_embeddings(), Int8Embedding)


def test_a_file_with_float32_embeddings_loads(exported, tmp_path):
    folder, key = copied(exported, tmp_path), f"{NAME}.weight"

    def widen(tensors):
        scales = tensors.pop(f"{key}.scales")
        return {**tensors, key: tensors[key] * scales[:, None]}

    rewrite(folder, widen)
    content = read_json(folder / CPU_JSON, "")
    del content["embeddings"]  # as in files of earlier versions
    write_json(folder / CPU_JSON, content)
    assert torch.equal(logits(load_cpu(folder, retime=False)), exported[1])
    assert Runtime.load(folder).embeddings == {} and "Token embeddings: float32" in str(CpuReport.load(folder))


@pytest.mark.parametrize(
    ("embeddings", "told"),
    [
        ({NAME: "int4"}, "stored as 'int4', which is unknown: export the model again"),
        ({NAME: "float32"}, "has 8 bits, of which cpu_model.json says nothing"),
        ({}, "has 8 bits, of which cpu_model.json says nothing"),
        ({NAME: "int8", "bert.nothing": "int8"}, "bert.nothing has no weight"),
        ({NAME: "int8", "bert.embeddings.position_embeddings": "int8"}, "torch.float32 of 2 axes"),
        ({NAME: "int8", "bert.pooler.dense": "int8"}, "bert.pooler.dense of cpu_model.json is no embedding"),
        ([NAME], "embeddings holds"),
    ],
)
def test_json_that_does_not_fit_is_refused(exported, tmp_path, embeddings, told):
    folder = copied(exported, tmp_path)
    write_json(folder / CPU_JSON, {**read_json(folder / CPU_JSON, ""), "embeddings": embeddings})
    with pytest.raises(ValueError, match=told):
        load_cpu(folder, retime=False)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"": None}, "has no weight"),
        ({".scales": None}, "has no bert.*scales"),
        ({".scales": torch.ones(63)}, "no positive number for each of 64 rows"),
        ({".scales": torch.full((64,), torch.inf)}, "no positive number for each of 64 rows"),
        ({".scales": -torch.ones(64)}, "no positive number for each of 64 rows"),
        ({".scales": torch.ones(64, dtype=torch.float16)}, "no positive number for each of 64 rows"),
        ({"": torch.ones(64, 32)}, "not a matrix of torch.int8"),
        ({"": torch.ones(60, 32, dtype=torch.int8), ".scales": torch.ones(60)}, "weights do not fit|of that shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(exported, tmp_path, change, told):
    folder = copied(exported, tmp_path)

    def replace(tensors):
        tensors = {**tensors, **{f"{NAME}.weight{suffix}": tensor for suffix, tensor in change.items()}}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    rewrite(folder, replace)
    with pytest.raises(ValueError, match=told):
        load_cpu(folder, retime=False)


def test_a_flipped_bit_is_refused(exported, tmp_path):
    folder = copied(exported, tmp_path)
    values = PackedFile(folder / CPU_FILE).tensor(f"{NAME}.weight")
    content = bytearray((folder / CPU_FILE).read_bytes())
    content[content.index(values.numpy().tobytes())] ^= 1
    (folder / CPU_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="does not match its checksum"):
        load_cpu(folder, retime=False)
