"""The report of a CPU model: times of every way to run it, scores, the model card and the commands that print it."""

import math

import numpy
import pytest
import torch
from block_weights import sparse_model, time_quickly

from hf_maskselect import CpuReport, export_cpu, load_cpu, pack
from hf_maskselect.cli import main
from hf_maskselect.runtime.files import LayerRecord, Runtime
from hf_maskselect.runtime.report import layer_kinds
from hf_maskselect.runtime.timing import BF16, DENSE, ONNX, ONNX_INT8, OURS, onnx_jobs
from hf_maskselect.storage.derived import CPU_FILE, CPU_JSON, SECTIONS
from hf_maskselect.utils.files import read_json, write_json

SHAPES = {"int8": False, "batch_sizes": [2, 1, 2], "seq_lens": [8, 8]}
HEADING = SECTIONS[CPU_JSON]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    time_quickly(monkeypatch)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model with a card of its own; do not change."""
    folder = tmp_path_factory.mktemp("model")
    sparse_model(sparsity=0.9).save_pretrained(folder)
    (folder / "README.md").write_text("# Mine\n\n## Speed on sparse tensor cores\n\nold\n")
    return folder


def seen_kinds(model):
    return float(len({type(module).__name__ for module in model.modules()}))


def test_scores_need_no_bound_and_are_kept(saved, tmp_path):
    report = export_cpu(saved, tmp_path / "cpu", evaluate=seen_kinds, **SHAPES)
    loaded = load_cpu(tmp_path / "cpu", retime=False)
    dense = type(loaded).from_pretrained(saved)
    assert report.runtime.scores == {DENSE: seen_kinds(dense), OURS: seen_kinds(loaded)}
    assert f"{seen_kinds(loaded):.4f} (this model)" in str(report)
    assert Runtime.load(tmp_path / "cpu") == report.runtime


@pytest.mark.parametrize("score", [0.25, numpy.float32(0.25), torch.tensor([0.25]), 1])
def test_a_score_is_any_number(tmp_path, score):
    model = sparse_model(sparsity=0.9, num_hidden_layers=1)
    report = export_cpu(model, tmp_path / "cpu", evaluate=lambda _: score, max_drop=0.0, **SHAPES)
    assert report.runtime.scores == {DENSE: float(score), OURS: float(score)}


@pytest.mark.parametrize("score", [math.nan, math.inf, None, {"accuracy": 0.5}, torch.zeros(2)])
def test_a_score_that_is_no_finite_number_is_refused(saved, tmp_path, score):
    with pytest.raises(ValueError, match="evaluate returned .* for dense fp32: return one finite number"):
        export_cpu(saved, tmp_path / "cpu", evaluate=lambda _: score, **SHAPES)
    assert not (tmp_path / "cpu").exists()


def test_shapes_are_timed_once(saved, tmp_path):
    report = export_cpu(saved, tmp_path / "cpu", **SHAPES)
    assert [(time.batch, time.length) for time in report.runtime.times] == [(2, 8), (1, 8)]
    assert all(time.ms.keys() == {DENSE, OURS} for time in report.runtime.times)
    with pytest.raises(ValueError, match="whole numbers above 0"):
        export_cpu(saved, tmp_path / "other", int8=False, batch_sizes=[1.5])


def test_rivals_are_timed_beside_the_model(saved, tmp_path, capsys, monkeypatch):
    pretended = {ONNX: lambda ids: ids + 1, ONNX_INT8: lambda ids: ids + 2}  # an export to ONNX takes long
    monkeypatch.setattr("hf_maskselect.runtime.export.onnx_jobs", lambda model, folder: pretended)
    monkeypatch.setattr("hf_maskselect.runtime.export.bf16_is_fast", lambda: True)
    command = ["export", str(saved), "--format", "cpu", "--dtype", "fp32", "--output", str(tmp_path / "cpu")]
    assert main([*command, "--rivals", "--batch-sizes", "1", "--seq-lens", "8"]) == 0
    (time,) = Runtime.load(tmp_path / "cpu").times
    assert time.ms.keys() == {DENSE, BF16, ONNX, ONNX_INT8, OURS}
    printed = capsys.readouterr().out
    assert all(name in printed for name in time.ms)
    assert f"{time.ms[ONNX_INT8][0] / time.ms[OURS][0]:.2f}" in printed


@pytest.mark.slow
def test_onnx_jobs_compute_the_model(tmp_path):
    model = sparse_model(num_hidden_layers=1)
    ids = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids).logits
    exact, int8 = (torch.from_numpy(job(ids)[0]) for job in onnx_jobs(model, tmp_path).values())
    torch.testing.assert_close(exact, expected, atol=1e-4, rtol=1e-4)
    assert 0 < (int8 - expected).norm() < 0.2 * expected.norm()


def test_rivals_without_their_packages_say_what_to_install(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_maskselect.export.onnx.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"timing ONNX Runtime needs onnx, .*pip install -U 'hf_maskselect\[onnx\]'"):
        export_cpu(saved, tmp_path / "cpu", rivals=True, **SHAPES)
    assert not (tmp_path / "cpu").exists()


def test_the_card_has_the_report_once(saved, tmp_path):
    report = export_cpu(saved, tmp_path / "cpu", evaluate=seen_kinds, **SHAPES)
    export_cpu(saved, tmp_path / "cpu", evaluate=seen_kinds, **SHAPES)
    card = (tmp_path / "cpu" / "README.md").read_text()
    assert card.startswith("# Mine\n") and card.count(HEADING) == 1 and card.count("| batch x length |") == 1
    assert "sparse tensor cores" not in card and "old" in (saved / "README.md").read_text()
    assert 'load_cpu("' in card and report.runtime.cpu.split()[0] in card and "Scores:" in card


def test_the_card_of_the_folder_itself_is_not_carried_to_other_files(tmp_path):
    model = sparse_model("Bert", 0.9)
    model.save_pretrained(tmp_path)
    export_cpu(tmp_path, tmp_path, **SHAPES)
    assert (tmp_path / "README.md").read_text().startswith(HEADING)
    pack(tmp_path, tmp_path / "packed")
    assert not (tmp_path / "packed" / CPU_JSON).exists()
    assert HEADING not in (tmp_path / "packed" / "README.md").read_text()


def test_the_command_reports_what_the_export_printed(saved, tmp_path, capsys):
    report = export_cpu(saved, tmp_path / "cpu", evaluate=seen_kinds, **SHAPES)
    assert main(["report", str(tmp_path / "cpu")]) == 0
    assert capsys.readouterr().out == f"{report}\n"
    assert CpuReport.load(tmp_path / "cpu") == report
    assert main(["verify", str(tmp_path / "cpu")]) == 1
    content = read_json(tmp_path / "cpu" / CPU_JSON, "")
    for wrong in ({**content, "weights": "0"}, {key: content[key] for key in content if key != "zero_blocks"}):
        write_json(tmp_path / "cpu" / CPU_JSON, wrong)
        assert main(["report", str(tmp_path / "cpu")]) == 1
        assert "export the model again" in capsys.readouterr().err
    write_json(tmp_path / "cpu" / CPU_JSON, {**content, "times": []})
    assert main(["report", str(tmp_path / "cpu")]) == 0
    assert "export it again" in capsys.readouterr().out
    (tmp_path / "cpu" / CPU_FILE).unlink()
    assert main(["report", str(tmp_path / "cpu")]) == 1


def test_matrices_that_run_alike_stand_together():
    fast, slow = LayerRecord([[0, "1x4"]]), LayerRecord([[256, "1x4"], [0, "int8"]])
    names = [
        f"bert.encoder.layer.{i}.{matrix}" for i in range(3) for matrix in ("self.query", "self.key", "out.dense")
    ]
    layers = {name: slow if name.endswith("dense") or "1.self" in name else fast for name in names}
    assert layer_kinds(layers) == {
        ("self.query", "self.key"): "1x4 in 2 layers; 1x4 to 256 tokens, int8 in 1 layer",
        ("out",): "1x4 to 256 tokens, int8 in 3 layers",
    }
