"""Pictures of scores against milliseconds."""

import itertools
import math
from dataclasses import replace

import pytest

from hf_maskselect import CpuReport, LatencyPoint, plot_latency
from hf_maskselect.cli import main
from hf_maskselect.reporting import latency
from hf_maskselect.reporting.latency import draw_latency
from hf_maskselect.runtime.files import Runtime, ShapeTime
from hf_maskselect.runtime.timing import DENSE, ONNX, OURS
from hf_maskselect.storage.derived import CPU_JSON

pytest.importorskip("matplotlib")
from matplotlib import rc_context  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.image import imread  # noqa: E402
from matplotlib.text import Annotation, Text  # noqa: E402

CROWD = [LatencyPoint(f"model-{i}", "this model", 10 * 1.05**i, 0.8 + 0.001 * (7 * i % 10)) for i in range(10)]
DENSE_POINT = LatencyPoint("dense", DENSE, 100.0, 0.81)


def drawn(points, title=""):
    figure = Figure(layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    with rc_context({"text.parse_math": False}):
        draw_latency(points, DENSE, title, figure)
        figure.draw_without_rendering()
    return figure.axes[0]


def test_labels_cover_nothing_and_stay_inside():
    axes = drawn([*CROWD, DENSE_POINT])
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    assert sorted(label.get_text() for label in labels) == sorted(point.name for point in [*CROWD, DENSE_POINT])
    boxes = [Text.get_window_extent(label) for label in labels]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    places = axes.transData.transform([(point.ms, point.score) for point in [*CROWD, DENSE_POINT]])
    assert not any(box.contains(*place) for box in boxes for place in places)
    assert all(axes.get_window_extent().contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_the_axis_is_logarithmic_and_has_the_reference():
    axes = drawn([*CROWD[:2], DENSE_POINT], "STS-B")
    assert axes.get_xscale() == "log" and axes.get_title() == "STS-B"
    assert {"10", "20", "50", "100"} <= {text.get_text() for text in axes.get_xticklabels()}
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in dashed] == [[DENSE_POINT.score] * 2]


@pytest.mark.parametrize("count", [1, 2])
def test_few_points_have_ticks(count):
    axes = drawn([replace(CROWD[i], ms=3.2 + i / 100, score=0.5) for i in range(count)])
    low, high = axes.get_xlim()
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 2


def test_the_picture_is_written(tmp_path):
    path = plot_latency([LatencyPoint("cost in $, not $x^2$", OURS, 3, 0), DENSE_POINT], tmp_path / "new" / "a.png")
    assert path == tmp_path / "new" / "a.png" and imread(path).std() > 0.01


def test_points_that_cannot_be_drawn_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one LatencyPoint"):
        plot_latency([], tmp_path / "a.png")
    for wrong in ({"ms": 0.0}, {"ms": math.nan}, {"score": math.nan}, {"ms": math.inf}):
        with pytest.raises(ValueError, match="finite score, and milliseconds above 0"):
            plot_latency([DENSE_POINT, replace(CROWD[0], **wrong)], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The reports of two folders that stand for CPU models, timed at two shapes."""
    reports = {}
    for number, name in enumerate(("small/cpu", "large/cpu")):
        times = [ShapeTime(1, length, {DENSE: [9.0, 9.5], ONNX: [5.0, 6.0], OURS: [1.0, 1.1]}) for length in (8, 16)]
        scores = {DENSE: 0.8 + number / 100, OURS: 0.79}
        runtime = Runtime("a CPU", 1, "2", "", "", False, 0, None, "", 0.9, {}, times, scores)
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / CPU_JSON).touch()
        reports[str(folder)] = CpuReport(folder / "weights", runtime, 2, 1)
    monkeypatch.setattr(CpuReport, "load", lambda folder: reports[str(folder)])
    return reports


def test_models_have_different_names(models, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(latency, "plot_latency", lambda points, path, title: drawn.update({title: points}))
    latency.plot_cpu_models([*models, *models], tmp_path)
    ((title, points),) = drawn.items()
    assert title == "1 x 8 tokens; a CPU, 1 thread"
    assert {point.name for point in points} == {"small/cpu", "large/cpu"} and len(points) == 6


def test_the_command_draws_the_models_at_the_shapes(models, tmp_path, capsys):
    output = str(tmp_path / "out")
    assert main(["plot", *models, "--output", output]) == 0
    assert main(["plot", *models, "--output", output, "--seq-lens", "16", "8"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"latency_1x8.png", "latency_1x16.png"}
    first = next(iter(models))
    assert main(["plot", first]) == 0  # one model, into its own folder
    assert f"wrote {first}/latency_1x8.png" in capsys.readouterr().out


def test_the_command_refuses_models_without_times_or_scores(models, tmp_path, capsys):
    output = str(tmp_path / "out")
    assert main(["plot", *models, "--output", output, "--batch-sizes", "4"]) == 1
    assert "was not timed at 4 x 8, but at 1 x 8, 1 x 16" in capsys.readouterr().err
    first, report = next(iter(models.items()))
    models[first] = replace(report, runtime=replace(report.runtime, scores={}))
    assert main(["plot", *models, "--output", output]) == 1
    assert "no scores: export the model again with evaluate=" in capsys.readouterr().err
    models[first] = replace(report, runtime=replace(report.runtime, times=[ShapeTime(1, 8)]))
    assert main(["plot", *models, "--output", output]) == 1
    assert "not timed on this machine" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plot", first, str(tmp_path / "nothing")])
    assert not (tmp_path / "out").exists()
