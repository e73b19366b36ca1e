"""What follows from measured times; the measuring itself runs on the CPU, with dense weights in place of sparse."""

import pytest
import torch
from test_packing import save_pruned

from hf_maskselect import export_semi_structured, load_semi_structured, prunable_weights
from hf_maskselect.cli import main
from hf_maskselect.export import semi_structured, timing
from hf_maskselect.export.semi_structured import TIMING_FILE, Timing
from hf_maskselect.export.timing import LayerTime, ModelTime, best_backend, time_export, worthwhile

WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def exported(tmp_path):
    model, _ = save_pruned(tmp_path / "in", 0.5, "2:4", **WIDE)
    export_semi_structured(tmp_path / "in", tmp_path / "out")
    return tmp_path / "out", model


@pytest.fixture
def pretended(monkeypatch):
    """A CPU that passes for a GPU with two back ends, and the names of what was made sparse."""
    made = []
    for module in (semi_structured, timing):
        monkeypatch.setattr(module, "available_backends", lambda device: ["cusparselt", "cutlass"])
        monkeypatch.setattr(module, "sparse_weight", lambda name, weight, backend: made.append(name) or weight.clone())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
    return made


def test_a_matrix_is_sparse_only_where_it_wins_at_every_shape(exported):
    model = load_semi_structured(exported[0])
    names = list(prunable_weights(model))
    layers = [
        LayerTime((64, 64), 128, 2.0, {"a": 1.0, "b": 3.0}),
        LayerTime((64, 64), 1024, 2.0, {"a": 1.0, "b": 1.0}),
        LayerTime((128, 64), 128, 2.0, {"a": 1.0, "b": 1.0}),
        LayerTime((128, 64), 1024, 2.0, {"a": 2.0, "b": 1.0}),
        LayerTime((64, 128), 128, 2.0, {"a": 2.5, "b": 1.0}),
        LayerTime((64, 128), 1024, 2.0, {"a": 1.0, "b": 1.0}),
    ]
    assert worthwhile(model, names, layers, "a") == [name for name in names if "attention" in name]
    assert worthwhile(model, names, layers, "b") == [name for name in names if "attention" not in name]


def test_a_back_end_is_taken_only_where_the_model_is_never_slower():
    def measured(backend, dense, dense_compiled, sparse, sparse_compiled):
        return ModelTime(1, 128, backend, dense, dense_compiled, sparse, sparse_compiled)

    slower = measured("a", 4.0, 2.0, 3.0, 2.5)  # beats plain dense, not the compiled one
    faster, fastest = measured("a", 4.0, 3.0, 2.5, 2.5), measured("b", 4.0, None, 2.0, None)
    assert [round(m.speedup, 3) for m in (slower, faster, fastest)] == [0.8, 1.2, 2.0]
    assert best_backend([faster, fastest]) == "b" and best_backend([faster]) == "a"
    assert best_backend([slower, faster]) is None and best_backend([]) is None


def test_timing_is_written_down_and_followed(exported, pretended, monkeypatch):
    folder, model = exported
    monkeypatch.setattr(timing, "_seconds", lambda job: job() is None or 1.0)
    report = time_export(folder, [1, 2], [8], "cpu", compiled=False)
    assert report.timing == Timing("A GPU", None, [])  # as fast is not faster
    assert "all layers stay dense" in str(report) and len(report.layers) == 6 and not report.models
    pretended.clear()
    load_semi_structured(folder, "cpu")
    assert pretended == []
    feed_forward = [name for name in prunable_weights(model) if "attention" not in name]
    Timing("A GPU", "cutlass", feed_forward).save(folder)
    load_semi_structured(folder, "cpu")
    assert pretended == feed_forward
    Timing("Another GPU", "cutlass", feed_forward).save(folder)
    pretended.clear()
    load_semi_structured(folder, "cpu")
    assert sorted(pretended) == sorted(prunable_weights(model))


def test_tables_go_into_the_card_once(exported, pretended):
    folder, _ = exported
    (folder / "README.md").write_text(
        "# A model\n\nText.\n\n## Speed on sparse tensor cores\n\nold\n\n## Citation\n\nX\n"
    )
    report = time_export(folder, [2], [8], "cpu", compiled=False)
    text = (folder / "README.md").read_text()
    assert text.startswith("# A model\n\nText.") and "## Citation\n\nX" in text and "old" not in text
    assert text.count("## Speed on sparse tensor cores") == 1 and report.verdict in text and "A GPU" in text
    assert "| 64x64 | 16 |" in text
    assert (folder / TIMING_FILE).is_file()
    export_semi_structured(folder.parent / "in", folder)
    assert not (folder / TIMING_FILE).exists()


def test_damaged_timing_is_refused(exported, pretended):
    folder, _ = exported
    Timing("A GPU", "cutlass", []).save(folder)
    (folder / TIMING_FILE).write_text((folder / TIMING_FILE).read_text().replace("cutlass", "cutless"))
    with pytest.raises(ValueError, match="delete it, and time the file again"):
        load_semi_structured(folder, "cpu")


def test_without_a_gpu_the_export_is_done_and_timing_says_why_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    save_pruned(tmp_path / "in", 0.5, "2:4", **WIDE)
    assert main(["export", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--benchmark"]) == 1
    told = capsys.readouterr()
    assert "12 matrices as 2:4" in told.out
    assert "needs a CUDA device of compute capability 8.0" in told.err and "the exported file is whole" in told.err
    assert load_semi_structured(tmp_path / "out")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_timed(exported):
    report = time_export(exported[0], [4], [32], compiled=False)
    assert report.layers and report.timing.device == torch.cuda.get_device_name()
    assert load_semi_structured(exported[0], "cuda")
