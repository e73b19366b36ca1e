"""Pictures of a run as PNG files (needs matplotlib: `pip install 'hf_maskselect[plots]'`)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..search.results import Candidate, LevelSearch
from ..utils.files import replacing
from ..utils.reading import is_number
from ..utils.tables import visible
from .record import RunRecord, best_first, metrics_of

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

DENSITY, SEARCH, HISTORY = "pruning_density.png", "pruning_search.png", "pruning_history.png"
BLUE, RED, GREY, INK = "#0b61a4", "#c0303f", "#a8b0b9", "#24292f"
_ROWS_A_PAGE, _ROWS_A_LEVEL = 40, 20  # candidates in one picture of the search, and of one level


def plot(record: RunRecord, output: str | os.PathLike) -> list[Path]:
    """Write the pictures that the record has data for into the folder `output`, and return their paths.

    A search with many levels is split over several pictures: `pruning_search.png`, `pruning_search_2.png`, ...

    Raises:
        ValueError: matplotlib is not installed.
    """
    output = Path(output)
    drawings: dict[str, Callable[[Figure], None]] = {}
    if record.sparse:
        drawings[DENSITY] = partial(draw_density, record)
    for number, searches in enumerate(search_pages(record), start=1):
        name = SEARCH if number == 1 else SEARCH.replace(".png", f"_{number}.png")
        drawings[name] = partial(draw_search, searches)
    if history_panels(record):
        drawings[HISTORY] = partial(draw_history, record)
    old = search_pictures(output)  # an earlier run may have had more of them
    paths = write_pictures(output, drawings)
    for path in old:
        if path not in paths:
            path.unlink()
    return paths


def write_pictures(output: Path, drawings: Mapping[str, Callable[[Figure], None]]) -> list[Path]:
    """Write PNG files into the folder `output`, created if needed, and return their paths.

    drawings: name of the file -> function that draws on an empty figure.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'hf_maskselect[plots]'") from error
    output.mkdir(parents=True, exist_ok=True)
    for name, draw in drawings.items():
        figure = Figure(layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        with rc_context({"text.parse_math": False}):  # a name with dollars is no formula
            draw(figure)
        with replacing(output / name) as picture:
            figure.savefig(picture, format="png")
    return [output / name for name in drawings]


def search_pictures(folder: Path) -> list[Path]:
    """The pictures of the search in a folder, in order."""
    return sorted(folder.glob(SEARCH.replace(".png", "*.png")), key=lambda path: (len(path.name), path.name))


def draw_density(record: RunRecord, figure: Figure) -> None:
    """Draw a heat map of the share of each matrix that is kept, one row a layer."""
    rows, columns, densities = record.densities()
    figure.set_size_inches(max(5.0, 1.1 * len(columns) + 1.6), max(2.6, 0.34 * len(rows) + 1.9))
    axes = figure.add_subplot()
    values = [[densities.get((row, column), math.nan) for column in columns] for row in rows]
    top = max(densities.values()) or 1
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    labels = [visible(column.removesuffix(".dense")) for column in columns]  # many names end in it
    axes.set_xticks(range(len(columns)), labels, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), [visible(row) or "-" for row in rows], fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    figure.suptitle(f"Weights kept in each matrix, in % (in all: {1 - record.report.sparsity:.2%})", fontsize=10)
    if len(rows) * len(columns) <= 200:
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                if not math.isnan(value):
                    shade = "white" if value > 0.6 * top else INK
                    axes.text(j, i, f"{100 * value:.1f}", ha="center", va="center", fontsize=7, color=shade)
    figure.colorbar(image, ax=axes, format=lambda x, _: f"{100 * x:.3g} %").ax.tick_params(labelsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def search_pages(record: RunRecord) -> list[list[LevelSearch]]:
    """Split the levels that compared candidates into pages of readable height."""
    pages: list[list[LevelSearch]] = []
    height = 0
    for search in record.searches:
        if len(search.candidates) > 1:
            rows = min(len(search.candidates), _ROWS_A_LEVEL)
            if not pages or height + rows > _ROWS_A_PAGE:
                pages.append([])
                height = 0
            pages[-1].append(search)
            height += rows
    return pages


def draw_search(searches: Sequence[LevelSearch], figure: Figure) -> None:
    """Draw one row of panels a level, one panel a rung, and one bar a candidate.

    A bar goes from the score of the deterministic mask to the score of the candidate, so that its length says how much
    better (to the left) or worse a candidate is.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = [_shown(search) for search in searches]
    rungs = max(len(candidate.scores) for candidates in shown for candidate in candidates)
    heights = [len(candidates) + 2.5 for candidates in shown]
    figure.set_size_inches(max(7.0, 2.8 + 2.7 * rungs), 0.2 * sum(heights) + 1.0)
    grid = figure.add_gridspec(len(shown), rungs, height_ratios=heights)
    for row, (search, candidates) in enumerate(zip(searches, shown, strict=True)):
        for rung in range(max(len(candidate.scores) for candidate in candidates)):
            axes = figure.add_subplot(grid[row, rung])
            _draw_rung(axes, search, candidates, rung)
            if rung == 0:
                names = [_name(candidate, candidates) for candidate in candidates]
                axes.set_yticks(range(len(names)), names, fontsize=8)
                for label, candidate in zip(axes.get_yticklabels(), candidates, strict=True):
                    _mark(label, candidate, INK)
    title = "Candidate masks: score on held-out rows (lower is better)"
    figure.suptitle(title + ("; the better ones go on to the next rung" if rungs > 1 else ""), fontsize=10)
    handles = [
        Patch(color=BLUE, label="chosen"),
        Line2D([], [], color=RED, marker="D", markersize=5, linewidth=0.8, label="deterministic (bars start here)"),
        Patch(color=GREY, label="other candidates"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def _shown(search: LevelSearch) -> list[Candidate]:
    """The candidates to draw, best first: all, or the best ones, the chosen and the deterministic one."""
    ranked = best_first(search)
    marked = [candidate for candidate in ranked if candidate.chosen or candidate.index == 0]
    others = [candidate for candidate in ranked if candidate not in marked][: _ROWS_A_LEVEL - len(marked)]
    return [candidate for candidate in ranked if candidate in marked or candidate in others]


def _draw_rung(axes: Axes, search: LevelSearch, candidates: Sequence[Candidate], rung: int) -> None:
    """Draw the scores of one rung; a candidate that did not reach it is marked as out."""
    scores = {y: float(c.scores[rung]) for y, c in enumerate(candidates) if len(c.scores) > rung}
    finite = [score for score in scores.values() if math.isfinite(score)] or [0.0]
    start = next((scores[y] for y in scores if candidates[y].index == 0), math.nan)
    start = start if math.isfinite(start) else max(finite)
    margin = 0.08 * (max(*finite, start) - min(*finite, start)) or 0.05 * abs(start) or 1.0
    axes.axvline(start, color=RED, linewidth=0.8)
    for y, candidate in enumerate(candidates):
        score = scores.get(y, math.nan)
        if math.isfinite(score):
            axes.barh(y, score - start, left=start, height=0.62, color=_colour(candidate), zorder=2)
            if candidate.index == 0:
                axes.plot([score], [y], marker="D", markersize=5, color=_colour(candidate), zorder=3)
        text = f"{score:.4f}" if math.isfinite(score) else "diverged" if y in scores else "out"
        label = axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), fontsize=8, va="center")
        _mark(label, candidate, INK if y in scores else GREY)
    axes.set_xlim(min(*finite, start) - margin, max(*finite, start) + margin)
    axes.set_ylim(len(candidates) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=4)
    axes.set_yticks(range(len(candidates)), [""] * len(candidates))
    axes.set_title(_title(search, len(candidates), rung), fontsize=8, loc="left", color=INK)
    plain_axes(axes, "x")
    axes.tick_params(axis="y", length=0)


def _title(search: LevelSearch, shown: int, rung: int) -> str:
    """The heading of one panel: which level or rung, and how many candidates it scored."""
    count = sum(len(candidate.scores) > rung for candidate in search.candidates)
    if rung:
        return f"rung {rung + 1}: {count} candidates"
    title = f"Level {search.level + 1}, sparsity {search.sparsity:.4f}"
    if not any(candidate.steps for candidate in search.candidates):
        title += ", scored " + ("without training" if search.refit_error is None else "after refit")
    elif any(len(candidate.scores) > 1 for candidate in search.candidates):
        title += f"\nrung 1: {count} candidates"
    return title + (f" ({shown} of {len(search.candidates)} shown)" if shown < len(search.candidates) else "")


def _name(candidate: Candidate, others: Sequence[Candidate]) -> str:
    """The proposal of a candidate, with its number where the proposal alone is ambiguous."""
    twice = sum(other.proposal == candidate.proposal for other in others) > 1
    number = f" #{candidate.index}" if twice else ""
    return visible(candidate.proposal) + number + (" (deterministic)" if candidate.index == 0 else "")


def _colour(candidate: Candidate, other: str = GREY) -> str:
    return BLUE if candidate.chosen else RED if candidate.index == 0 else other


def _mark(label: Text, candidate: Candidate, other: str) -> None:
    """Colour a text by its candidate; bold for the chosen one."""
    label.set_color(_colour(candidate, other))
    label.set_fontweight("bold" if candidate.chosen else "normal")


def history_panels(record: RunRecord) -> dict[str, str]:
    """The logged values that the history can show: key in the log -> label of its panel."""
    metrics = dict.fromkeys(name for entry in record.history for name in metrics_of(entry, "eval_"))
    labels = {"loss": "training loss", **{f"eval_{name}": visible(name) for name in list(metrics)[:1]}}
    labels["eval_sparsity"] = "sparsity"
    return {key: label for key, label in labels.items() if _points(record, key)}


def _points(record: RunRecord, key: str) -> list[tuple[int, float]]:
    """The logged (step, value) pairs of one key."""
    return [(entry["step"], float(entry[key])) for entry in record.history if is_number(entry.get(key))]


def draw_history(record: RunRecord, figure: Figure) -> None:
    """Draw training loss, score and sparsity over optimizer steps; vertical lines mark where masks were set."""
    panels = history_panels(record)
    figure.set_size_inches(7.0, 1.4 + 1.7 * len(panels))
    first: Axes | None = None
    for index, (key, label) in enumerate(panels.items()):
        axes = figure.add_subplot(len(panels), 1, index + 1, sharex=first)
        first = first or axes
        steps, values = zip(*_points(record, key), strict=True)
        axes.plot(steps, values, "-" if len(steps) > 25 else "o-", color=BLUE, markersize=3.5, linewidth=1.5)
        axes.set_ylabel(label, fontsize=8)
        for search in record.searches:
            axes.axvline(search.step, color=GREY, linewidth=0.8, zorder=0)
        plain_axes(axes, "y")
        if key == "eval_sparsity":
            axes.set_ylim(-0.05, 1.05)
    assert first is not None
    figure.axes[-1].set_xlabel("optimizer step", fontsize=8)
    if record.searches:
        _label_cuts(first, record.searches)
        figure.suptitle("Vertical lines: hard masks are set, with their sparsity", fontsize=10)


def _label_cuts(axes: Axes, searches: Sequence[LevelSearch]) -> None:
    """Write the sparsity above each cut; of cuts too close to each other only the last is labelled."""
    left, right = axes.get_xlim()
    free = math.inf
    for search in reversed(searches):
        if free - search.step > 0.09 * (right - left):
            place = axes.get_xaxis_transform()
            axes.text(search.step, 1.03, f"{search.sparsity:.4g}", transform=place, ha="center", fontsize=7)
            free = search.step


def plain_axes(axes: Axes, grid: Literal["both", "x", "y"]) -> None:
    """Leave out what is no data: the frame above and to the right; thin grid lines behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis=grid, linewidth=0.4, color="#d8dee4")
    axes.set_axisbelow(True)
