"""Draw scores against milliseconds, for models that run in several ways."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.report import CpuReport
from ..runtime.timing import DENSE, ONNX, OURS, Shape
from ..utils.tables import visible
from .plots import BLUE, GREY, INK, RED, plain_axes, write_pictures

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (BLUE, RED, "#2f8f5b", "#b7791f", "#6b4fa0", "#3aa0a8")
# Where a label may stand, in order of preference: the place of its corner or edge, in points from its point. Lines
# leave to the right, since only the fastest point of a model is labelled.
_PLACES = [
    (x * reach, y * reach, {-1: "right", 0: "center", 1: "left"}[x], {-1: "top", 0: "center", 1: "bottom"}[y])
    for reach in (6, 14, 24, 36)
    for x, y in ((-1, 0), (0, 1), (0, -1), (1, 0), (-1, 1), (-1, -1), (1, 1), (1, -1))
]


@dataclass(frozen=True)
class LatencyPoint:
    """One model, run in one way.

    Args:
        name: of the model; lines join its points to its reference, and the fastest of them bears the name.
        series: how it runs; a colour each.
        ms: milliseconds of one call.
        score: better when larger.
    """

    name: str
    series: str
    ms: float
    score: float


def plot_latency(
    points: Sequence[LatencyPoint], output: str | os.PathLike, reference: str = DENSE, title: str = ""
) -> Path:
    """Write a picture of scores against milliseconds (on a logarithmic axis) as a PNG file, and return its path.

    Args:
        points: at least one.
        output: path of the file; its folder is created if needed.
        reference: the series that the others are compared with. It is grey, and a dashed line shows its best score.
        title: above the picture.

    Raises:
        ValueError: there are no points, a number is not finite or a time not positive, or matplotlib is not installed.
    """
    if not points:
        raise ValueError("there are no points to draw: give at least one LatencyPoint")
    for point in points:
        if not (math.isfinite(point.score) and 0 < point.ms < math.inf):
            raise ValueError(f"{point} cannot be drawn: give a finite score, and milliseconds above 0")
    output = Path(output)
    write_pictures(output.parent, {output.name: partial(draw_latency, points, reference, title)})
    return output


def plot_cpu_models(
    folders: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    batch_sizes: Sequence[int] | None = None,
    seq_lens: Sequence[int] | None = None,
) -> list[Path]:
    """Draw CPU models that were exported with `evaluate`, before and after: `latency_1x32.png` for 1 row of 32 tokens.

    Args:
        folders: folders of CPU models. Their names are the labels, with those of the folders above where they are
            the same.
        output: folder of the pictures, created if needed.
        batch_sizes: batch sizes, of one picture each; by default the first that the first model was timed at.
        seq_lens: lengths in tokens, likewise.

    Raises:
        ValueError: a model has no scores or was not timed at a shape, or matplotlib is not installed.
    """
    reports = {Path(folder).resolve(): CpuReport.load(folder) for folder in folders}
    first = _first_shape(next(iter(reports.values())))
    names, machines = _names(list(reports)), dict.fromkeys(report.machine for report in reports.values())
    pictures = {}
    for batch in batch_sizes or first[:1]:
        for length in seq_lens or first[1:]:
            points = [
                point
                for folder, report in reports.items()
                for point in _points(names[folder], report, (batch, length))
            ]
            pictures[f"latency_{batch}x{length}.png"] = points, f"{batch} x {length} tokens; {'; '.join(machines)}"
    return [plot_latency(points, Path(output) / name, title=title) for name, (points, title) in pictures.items()]


def _first_shape(report: CpuReport) -> Shape:
    times = [(time.batch, time.length) for time in report.runtime.times if time.ms]
    if not times:
        raise ValueError(f"{report.path} was not timed on this machine: export the model again")
    return times[0]


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Return as many parts of each path, from its end, as make all names different."""
    for count in itertools.count(1):
        names = {folder: "/".join(folder.parts[-count:]) for folder in folders}
        if len(set(names.values())) == len(folders):
            break
    return names


def _points(name: str, report: CpuReport, shape: Shape) -> list[LatencyPoint]:
    """Return the ways to run a model whose score is known: ONNX Runtime in float32 scores as torch does."""
    runtime = report.runtime
    ms = next((time.ms for time in runtime.times if (time.batch, time.length) == shape), {})
    scores = {**runtime.scores, ONNX: runtime.scores.get(DENSE, math.nan)}
    if not {DENSE, OURS} <= ms.keys():
        timed = ", ".join(f"{time.batch} x {time.length}" for time in runtime.times if time.ms)
        raise ValueError(
            f"{report.path} was not timed at {shape[0]} x {shape[1]}, but at {timed or 'no shape'}: choose one of "
            "these, or export the model again"
        )
    if not {DENSE, OURS} <= scores.keys():
        raise ValueError(f"{report.path} has no scores: export the model again with evaluate=")
    series = {DENSE: DENSE, ONNX: ONNX, OURS: "CPU model"}
    return [LatencyPoint(name, series[way], ms[way][0], scores[way]) for way in series if way in ms]


def draw_latency(points: Sequence[LatencyPoint], reference: str, title: str, figure: Figure) -> None:
    """Draw one point a model and series, and lines to the reference of each model."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure.set_size_inches(7.0, 4.6)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    for start in (point for point in points if point.series == reference):
        for end in (point for point in points if point.name == start.name):
            axes.plot([start.ms, end.ms], [start.score, end.score], color=GREY, linewidth=0.7, zorder=1)
    every = dict.fromkeys(point.series for point in points)
    colours = dict(zip((series for series in every if series != reference), itertools.cycle(_COLOURS), strict=False))
    for series in every:
        ms, scores = zip(*((point.ms, point.score) for point in points if point.series == series), strict=True)
        colour, marker = colours.get(series, "#6b7580"), "D" if series == reference else "o"
        axes.plot(ms, scores, marker, color=colour, markersize=6, label=visible(series), zorder=3, alpha=0.85)
        if series == reference:
            axes.axhline(max(scores), color=colour, linestyle="--", linewidth=0.8, zorder=0)
    axes.margins(x=0.18, y=0.12)
    low, high = axes.get_xlim()
    wider = max(1.0, (5 * low / high) ** 0.5)  # so that two numbers stand below the axis
    axes.set_xlim(low / wider, high * wider)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("milliseconds", fontsize=8)
    axes.set_ylabel("score", fontsize=8)
    plain_axes(axes, "both")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    axes.set_title(visible(title), fontsize=10)
    fastest = {point.name: point for point in sorted(points, key=lambda point: -point.ms)}
    _label(axes, fastest.values(), points)


def _label(axes: Axes, named: Iterable[LatencyPoint], points: Sequence[LatencyPoint]) -> None:
    """Write names beside their points, each where it covers no point and no other name, if there is such a place."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure: Any = axes.figure
    figure.draw_without_rendering()  # which finds the place of all else
    renderer, inside = figure.canvas.get_renderer(), axes.get_window_extent()
    taken = [
        Bbox.from_extents(x - 8, y - 8, x + 8, y + 8)
        for x, y in axes.transData.transform([(point.ms, point.score) for point in points])
    ]
    style: dict[str, Any] = {
        "textcoords": "offset points",
        "fontsize": 8,
        "color": INK,
        "in_layout": False,
        "bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
        "arrowprops": {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
    }
    for point in named:
        label = axes.annotate(visible(point.name), (point.ms, point.score), (0, 0), zorder=2, **style)

        def put(place: tuple[float, float, str, str], label: Any = label) -> Bbox:
            label.set(position=place[:2], ha=place[2], va=place[3])
            label.update_positions(renderer)
            return Text.get_window_extent(label, renderer)  # without the line to the point

        def cost(place: tuple[float, float, str, str], put: Callable = put) -> int:
            box = put(place)
            outside = not (inside.contains(*box.min) and inside.contains(*box.max))
            return 10 * outside + sum(box.overlaps(other) for other in taken)

        taken.append(put(min(_PLACES, key=cost)))
