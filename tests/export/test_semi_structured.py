"""Exported 2:4 models: exact round trips, the pattern checked before anything is written, refusals by name."""

import pytest
import torch
from tiny import make, save_pruned, weights_of
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from hf_maskselect import MaskSet, PruningState, export_semi_structured, load_semi_structured, prunable_weights, verify
from hf_maskselect.cli import main
from hf_maskselect.export.semi_structured import SEMI_STRUCTURED_FILE, available_backends, make_sparse, sparse_weight
from hf_maskselect.masking.patterns import NM
from hf_maskselect.storage.packed_file import PackedFile, quantize_rows
from hf_maskselect.storage.two_of_four import decompress

WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model, _ = save_pruned(folder, 0.5, "2:4", **WIDE)
    return folder, model


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_come_back_as_they_were_rounded(saved, tmp_path, dtype, kind):
    folder, model = saved
    report = export_semi_structured(folder, tmp_path, dtype)
    assert set(report.sparse) == set(prunable_weights(model)) and not report.dense and not report.excluded
    assert report.packed_bytes == (tmp_path / SEMI_STRUCTURED_FILE).stat().st_size
    loaded = load_semi_structured(tmp_path)
    assert not loaded.training and loaded.dtype == kind
    for name, weight in weights_of(loaded).items():
        assert torch.equal(weight, weights_of(model)[name].to(kind)), name
    ids = torch.randint(3, 64, (2, 7))
    expected = AutoModelForSequenceClassification.from_pretrained(folder, dtype=kind).eval()(input_ids=ids).logits
    assert torch.equal(loaded(input_ids=ids).logits, expected)


def test_int8_comes_back_as_it_was_quantized(saved, tmp_path):
    folder, model = saved
    export_semi_structured(folder, tmp_path, "int8")
    loaded, sparse = weights_of(load_semi_structured(tmp_path)), prunable_weights(model)
    for name, weight in weights_of(model).items():
        expected = weight.to(torch.bfloat16)
        if name in sparse:
            steps, scale = quantize_rows(expected)
            expected = (steps.float() * scale.unsqueeze(1)).to(torch.bfloat16)
            assert float((expected - weight).abs().max()) <= 0.6 * float(scale.max()) + 0.01
        assert torch.equal(loaded[name], expected)


def test_a_live_model_of_any_family_is_exported(tmp_path):
    for family in ("Roberta", "DistilBert", "ModernBert"):
        changes = {"dim": 64, "hidden_dim": 128} if family == "DistilBert" else WIDE
        model, _ = save_pruned(tmp_path / family, 0.5, "2:4", family=family, **changes)
        report = export_semi_structured(model, tmp_path / f"{family}-nm")
        assert set(report.sparse) == set(prunable_weights(model))
        loaded = weights_of(load_semi_structured(tmp_path / f"{family}-nm"))
        assert all(torch.equal(loaded[n], w.to(torch.bfloat16)) for n, w in weights_of(model).items())


def test_a_matrix_that_is_not_2_4_is_named_and_nothing_is_written(saved, tmp_path):
    _, model = saved
    name = "bert.encoder.layer.1.output.dense.weight"
    model = make(**WIDE).eval()
    model.load_state_dict(saved[1].state_dict())
    model.get_parameter(name).data[7, 40:43] = 1
    with pytest.raises(ValueError, match=f"{name} does not hold the pattern 2:4: 1 of its 2048 groups.*10 of row 7"):
        export_semi_structured(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = export_semi_structured(model, tmp_path / "out", exclude_modules=["layer.1.output.dense"])
    assert report.excluded == (name,) and "1 left dense, excluded" in str(report)
    with pytest.raises(ValueError, match=r"exclude_modules names \['layer.one'\]"):
        export_semi_structured(model, tmp_path / "misspelt", exclude_modules=["layer.one"])
    assert not (tmp_path / "misspelt").exists()
    assert torch.equal(
        load_semi_structured(tmp_path / "out").get_parameter(name), model.get_parameter(name).bfloat16()
    )


def test_matrices_that_the_layout_cannot_hold_stay_dense(tmp_path):
    model, _ = save_pruned(tmp_path / "in", 0.5, "2:4", hidden_size=64, intermediate_size=48)
    report = export_semi_structured(tmp_path / "in", tmp_path / "out")
    assert len(report.dense) == 4 and all(".dense.weight" in name for name in report.dense)
    loaded = weights_of(load_semi_structured(tmp_path / "out"))
    assert all(torch.equal(loaded[n], w.to(torch.bfloat16)) for n, w in weights_of(model).items())
    save_pruned(tmp_path / "small", 0.5, "2:4", hidden_size=16, intermediate_size=16)
    with pytest.raises(ValueError, match="none of its 12 prunable matrices fits the packed 2:4 layout"):
        export_semi_structured(tmp_path / "small", tmp_path / "no")


def test_values_beyond_fp16_are_refused(saved, tmp_path):
    model = make(**WIDE)
    model.load_state_dict(saved[1].state_dict())
    model.classifier.bias.data[0] = 1e6
    with pytest.raises(ValueError, match="classifier.bias has values up to 1e.06, which fp16 cannot hold"):
        export_semi_structured(model, tmp_path, "fp16")
    assert not (tmp_path / SEMI_STRUCTURED_FILE).exists()


def test_an_export_that_fails_leaves_the_earlier_one(saved, tmp_path):
    export_semi_structured(saved[0], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = make(**WIDE, num_labels=5)
    other.load_state_dict({n: w for n, w in saved[1].state_dict().items() if "classifier" not in n}, strict=False)
    other.classifier.bias.data[0] = 1e6
    with pytest.raises(ValueError, match="classifier.bias has values up to"):
        export_semi_structured(other, tmp_path, "fp16")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_int8_refuses_what_it_cannot_hold(saved, tmp_path):
    model = make(**WIDE)
    model.load_state_dict(saved[1].state_dict())
    weight = model.bert.encoder.layer[0].output.dense.weight
    weight.data[weight != 0] = float("inf")
    with pytest.raises(ValueError, match="layer.0.output.dense.weight holds NaN or infinity, which int8 cannot"):
        export_semi_structured(model, tmp_path, "int8")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, _: load_semi_structured(f, "gpu"), "device='gpu' is unknown to torch"),
        (lambda f, _: load_semi_structured(f, mode="fast"), "mode='fast' must be one of eager, compiled"),
        (lambda f, to: export_semi_structured(torch.nn.Linear(4, 4), to), "Linear is not a transformers model"),
        (lambda f, to: export_semi_structured(f, to, "fp8"), "dtype='fp8' must be one of"),
    ],
)
def test_wrong_arguments_are_refused(saved, tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(saved[0], tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_a_device_that_is_not_there_is_named(saved, tmp_path):
    export_semi_structured(saved[0], tmp_path)
    with pytest.raises(ValueError, match="device='cuda' is not available, or this torch is built without CUDA"):
        load_semi_structured(tmp_path, "cuda")


def test_a_folder_with_weights_is_not_written_into(saved, tmp_path):
    make().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="already holds the weights of a model"):
        export_semi_structured(saved[0], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_file_is_refused(saved, tmp_path):
    export_semi_structured(saved[0], tmp_path)
    path = tmp_path / SEMI_STRUCTURED_FILE
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="does not match its checksum"):
        load_semi_structured(tmp_path)


def test_the_file_is_not_taken_for_a_model(saved, tmp_path):
    export_semi_structured(saved[0], tmp_path)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no semi_structured_model.safetensors: .*hf-maskselect export"):
        load_semi_structured(saved[0])
    with pytest.raises(ValueError, match="backend='cutlass' does not run on cpu with this torch"):
        load_semi_structured(tmp_path, backend="cutlass")


def test_the_console_exports_and_verifies(saved, tmp_path, capsys):
    folder, _ = saved
    assert main(["verify", str(folder), "--pattern", "2:4"]) == 0
    assert main(["export", str(folder), "--output", str(tmp_path / "out"), "--format", "nm", "--dtype", "fp16"]) == 0
    assert "12 matrices as 2:4" in capsys.readouterr().out
    assert sum(entry.coding == "2:4" for entry in PackedFile(tmp_path / "out" / SEMI_STRUCTURED_FILE).entries.values())
    assert main(["verify", str(folder), "--pattern", "1:4"]) == 1
    assert "does not hold the pattern 1:4" in capsys.readouterr().err
    save_pruned(tmp_path / "other", 0.5, "unstructured", **WIDE)
    assert main(["verify", str(tmp_path / "other")]) == 0
    assert main(["verify", str(tmp_path / "other"), "--pattern", "2:4"]) == 1
    assert main(["export", str(tmp_path / "other"), "--output", str(tmp_path / "no")]) == 1
    assert "does not hold the pattern 2:4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--format", "onnx", "--dtype", "fp16"],
        ["--format", "onnx", "--benchmark"],
        ["--batch-sizes", "4"],
        ["--benchmark", "--batch-sizes", "0"],
        ["--benchmark", "--seq-lens", "x"],
    ],
)
def test_flags_that_do_not_go_together_are_bad_usage(saved, tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        main(["export", str(saved[0]), "--output", str(tmp_path / "out"), *flags])
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert "error: " in capsys.readouterr().err


def test_verify_knows_that_conv1d_is_transposed(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, pad_token_id=0)
    model = GPT2ForSequenceClassification(config)
    masks = MaskSet(NM(2, 4).masks({n: w.detach().abs() for n, w in prunable_weights(model).items()}, 0.5))
    masks.apply_(model)
    model.save_pretrained(tmp_path)
    PruningState(masks, "magnitude", "unstructured", 0.5, 1, 0, 0).sealed(tmp_path).save(tmp_path)
    assert verify(tmp_path).masks.sparsity() == 0.5
    with pytest.raises(ValueError, match="belongs to a Conv1D, which stores it transposed: it cannot hold 2:4"):
        verify(tmp_path, "2:4")


def test_verify_takes_n_m_patterns_only(saved):
    with pytest.raises(ValueError, match="pattern='channel' cannot be checked alone"):
        verify(saved[0], "channel")


def test_a_model_with_sparse_tensors_computes_the_same(saved, tmp_path, monkeypatch):
    """torch's own tensor class and its dispatch; only the two CUDA kernels are products of unpacked weights here."""

    def mm(packed, meta, other):
        return decompress(packed, meta) @ other

    def addmm(bias, packed, meta, other):
        return decompress(packed, meta) @ other + bias.unsqueeze(1)

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", mm)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", addmm)
    export_semi_structured(saved[0], tmp_path)
    dense, sparse = load_semi_structured(tmp_path), load_semi_structured(tmp_path)
    names = list(prunable_weights(dense))
    make_sparse(sparse, names, "cutlass")
    assert all(isinstance(sparse.get_parameter(name).data, SparseSemiStructuredTensorCUTLASS) for name in names)
    ids = torch.randint(3, 64, (8, 16))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found, expected = sparse(input_ids=ids).logits, dense(input_ids=ids).logits
        assert torch.allclose(found, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sparse_tensor_cores_compute_the_same(tmp_path, dtype):
    model, _ = save_pruned(tmp_path / "in", 0.5, "2:4", hidden_size=128, intermediate_size=256)
    export_semi_structured(model, tmp_path / "out", dtype)
    dense, sparse = load_semi_structured(tmp_path / "out").cuda(), load_semi_structured(tmp_path / "out", "cuda")
    names = list(prunable_weights(model))
    assert all("SparseSemiStructured" in type(sparse.get_parameter(name).data).__name__ for name in names)
    ids = torch.randint(3, 64, (8, 32), device="cuda")
    with torch.no_grad():
        a, b = dense(input_ids=ids).logits, sparse(input_ids=ids).logits
    assert torch.allclose(a, b, rtol=3e-2, atol=3e-2)
    for name in names:
        weight = dense.get_parameter(name).detach()
        packed = sparse_weight(name, weight, available_backends(weight.device)[0])
        x = torch.randn(64, weight.shape[1], device="cuda", dtype=weight.dtype)
        assert torch.allclose(torch.nn.functional.linear(x, packed), x @ weight.t(), rtol=2e-2, atol=2e-2)
