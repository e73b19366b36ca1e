"""What follows from measured times; the measuring itself runs on the CPU, with dense weights in place of sparse."""

import pytest
import torch
from tiny import save_pruned

from hf_maskselect import export_semi_structured, load_semi_structured, prunable_weights
from hf_maskselect.cli import main
from hf_maskselect.export import semi_structured, timing
from hf_maskselect.export.semi_structured import TIMING_FILE, Choice, Timing, names_that_fit
from hf_maskselect.export.timing import LayerTime, ModelTime, best_backend, time_export, time_models, worthwhile

WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def exported(tmp_path):
    model, _ = save_pruned(tmp_path / "in", 0.5, "2:4", **WIDE)
    export_semi_structured(tmp_path / "in", tmp_path / "out")
    return tmp_path / "out", model


@pytest.fixture
def pretended(monkeypatch):
    """A CPU that passes for a GPU with two back ends, and what was made sparse: (name, back end)."""
    made = []
    for module in (semi_structured, timing):
        monkeypatch.setattr(module, "available_backends", lambda device: ["cusparselt", "cutlass"])
        monkeypatch.setattr(module, "sparse_weight", lambda name, weight, b: made.append((name, b)) or weight.clone())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
    return made


def layer(shape, tokens, a, b):
    return LayerTime(shape, tokens, "eager", 2.0, {"a": a, "b": b})


def whole(dense, **sparse):
    return ModelTime(1, 128, "eager", dense, sparse)


def test_a_matrix_is_sparse_only_where_it_wins_at_every_shape(exported):
    model = load_semi_structured(exported[0])
    names = list(prunable_weights(model))
    layers = [layer((64, 64), 128, 1.0, 3.0), layer((64, 64), 1024, 1.0, 1.0)]
    layers += [layer((128, 64), 128, 1.0, 1.0), layer((128, 64), 1024, 2.0, 1.0)]
    layers += [layer((64, 128), 128, 2.5, 1.0), layer((64, 128), 1024, 1.0, 1.0)]
    assert worthwhile(model, names, layers, "a") == [name for name in names if "attention" in name]
    assert worthwhile(model, names, layers, "b") == [name for name in names if "attention" not in name]
    assert worthwhile(model, names, layers, "a back end that takes no such shape") == []


def test_a_back_end_is_taken_only_where_the_model_is_never_slower():
    assert best_backend([whole(4.0, a=2.0, b=1.0), whole(4.0, a=2.0, b=3.0)]) == "a"
    assert best_backend([whole(4.0, a=2.0, b=1.0), whole(4.0, a=5.0, b=3.0)]) == "b"
    assert best_backend([whole(4.0, a=2.0), whole(4.0, a=4.0)]) is None
    assert best_backend([whole(4.0)]) is None and best_backend([]) is None


def test_each_mode_is_decided_apart_and_followed(exported, pretended, monkeypatch):
    """Sparse is made to win where it is compiled, and to lose where it is not."""
    folder, model = exported
    speeds, loaded, load = {"eager": 3.0, "compiled": 1.0}, [], semi_structured.load_semi_structured

    def layers(model, names, tokens, backends, mode):
        shapes = {tuple(model.get_parameter(name).shape) for name in names}
        times = dict.fromkeys(backends, speeds[mode])
        return [LayerTime(shape, count, mode, 2.0, times) for shape in shapes for count in tokens]

    monkeypatch.setattr(timing, "load_semi_structured", lambda folder: loaded.append(load(folder)) or loaded[-1])
    monkeypatch.setattr(timing, "time_layers", layers)
    monkeypatch.setattr(timing, "_seconds", lambda job, mode, *_: 2.0 if job is loaded[0] else speeds[mode])
    report = time_export(folder, [1, 2], [8], "cpu")
    names = sorted(prunable_weights(model))
    assert report.timing.choices["eager"] == Choice(None, [])
    compiled = report.timing.choices["compiled"]
    assert compiled.backend == "cusparselt" and sorted(compiled.sparse) == names
    assert [(m.mode, m.dense, sorted(m.sparse)) for m in report.models] == [
        *[("eager", 2.0, [])] * 2,
        *[("compiled", 2.0, ["cusparselt", "cutlass"])] * 2,
    ]
    pretended.clear()
    load(folder, "cpu")
    assert pretended == []
    load(folder, "cpu", mode="compiled")
    assert sorted(pretended) == [(name, "cusparselt") for name in names]


def test_a_choice_is_followed_only_where_it_was_made_and_can_be(exported, pretended, monkeypatch):
    folder, model = exported
    feed_forward = sorted(name for name in prunable_weights(model) if "attention" not in name)
    every = sorted((name, "cusparselt") for name in prunable_weights(model))
    Timing("A GPU", {"eager": Choice("cutlass", feed_forward)}).save(folder)
    for load, expected in (
        (lambda: load_semi_structured(folder, "cpu"), [(name, "cutlass") for name in feed_forward]),
        (lambda: load_semi_structured(folder, "cpu", mode="compiled"), every),
        (lambda: load_semi_structured(folder, "cpu", backend="cusparselt"), every),
    ):
        pretended.clear()
        load()
        assert sorted(pretended) == expected
    monkeypatch.setattr(semi_structured, "available_backends", lambda device: ["cusparselt"])  # another torch
    pretended.clear()
    load_semi_structured(folder, "cpu")
    assert sorted(pretended) == every
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Another GPU")
    pretended.clear()
    load_semi_structured(folder, "cpu")
    assert sorted(pretended) == every


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_shape_is_compiled(exported, monkeypatch):
    """torch stops compiling one function after eight shapes, and the times would be those of plain use."""
    graphs, shapes = [], [(batch, length) for batch in (1, 2, 3) for length in (5, 7, 9, 11)]
    compile_ = torch.compile

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda job, dynamic: compile_(job, dynamic=dynamic, backend=counting))
    monkeypatch.setattr(timing.Timer, "blocked_autorange", lambda self, min_run_time: self.timeit(1))
    model = load_semi_structured(exported[0])
    with torch.inference_mode():
        for batch, length in shapes:
            before = len(graphs)
            (found,) = time_models(model, {}, [batch], [length], "compiled")
            assert len(graphs) > before and found.dense > 0 and not found.sparse


def test_tables_go_into_the_card_once(exported, pretended):
    folder, _ = exported
    old = "## Speed on sparse tensor cores\n\nold"
    (folder / "README.md").write_text(f"# A model\n\nText.\n\n{old}\n\n## Citation\n\nX\n")
    report = time_export(folder, [2], [8], "cpu", modes=["eager"])
    text = (folder / "README.md").read_text()
    assert text.startswith("# A model\n\nText.") and "## Citation\n\nX" in text and "old" not in text
    assert text.count("## Speed on sparse tensor cores") == 1 and report.verdict in text and "A GPU" in text
    assert "| 64x64 | 16 | eager |" in text and "| 2 | 8 | eager |" in text
    assert str(report).count("eager") >= 4
    export_semi_structured(folder.parent / "in", folder)
    assert not (folder / TIMING_FILE).exists() and "Speed" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("batches", "lengths", "message"),
    [
        ([0], [8], "must be whole numbers of at least 1"),
        ([1], [], "must be whole numbers of at least 1"),
        ([1], [65], "length 65 exceeds the 64 positions"),
    ],
)
def test_shapes_that_the_model_does_not_take_are_refused(exported, pretended, batches, lengths, message):
    with pytest.raises(ValueError, match=message):
        time_export(exported[0], batches, lengths, "cpu")
    assert not (exported[0] / TIMING_FILE).exists()


def test_a_back_end_takes_what_torch_takes(exported):
    model = load_semi_structured(exported[0])
    model.narrow, model.low = torch.nn.Linear(96, 64), torch.nn.Linear(64, 48)
    names = ["narrow.weight", "low.weight", "bert.encoder.layer.0.output.dense.weight"]
    assert names_that_fit(model, names, "cutlass") == names[2:]
    assert names_that_fit(model, names, "cusparselt") == names


def test_damaged_timing_is_refused(exported, pretended):
    folder, _ = exported
    Timing("A GPU", {"eager": Choice("cutlass", [])}).save(folder)
    (folder / TIMING_FILE).write_text((folder / TIMING_FILE).read_text().replace("cutlass", "cutless"))
    with pytest.raises(ValueError, match="delete it, and time the file again"):
        load_semi_structured(folder, "cpu")


def test_without_a_gpu_the_export_is_done_and_timing_says_why_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    save_pruned(tmp_path / "in", 0.5, "2:4", **WIDE)
    assert main(["export", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--benchmark"]) == 1
    told = capsys.readouterr()
    assert "12 matrices as 2:4" in told.out
    assert "needs a CUDA device of compute capability 8.0" in told.err and "the exported file is complete" in told.err
    assert load_semi_structured(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_timed(tmp_path):
    """Matrices of a few million weights, where sparse tensor cores have something to win."""
    save_pruned(tmp_path / "in", 0.5, "2:4", hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    export_semi_structured(tmp_path / "in", tmp_path / "out")
    report = time_export(tmp_path / "out", [64], [64])
    assert len(report.layers) == 6 and len(report.models) == 2
    assert report.timing.device == torch.cuda.get_device_name()
    for mode, choice in report.timing.choices.items():
        model = load_semi_structured(tmp_path / "out", "cuda", mode=mode)
        sparse = [name for name, p in model.named_parameters() if "SparseSemiStructured" in type(p.data).__name__]
        assert sorted(sparse) == sorted(choice.sparse)
