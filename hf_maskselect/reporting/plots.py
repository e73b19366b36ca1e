"""Pictures of a run as PNG (needs matplotlib: `pip install 'hf_maskselect[plots]'`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .record import RunRecord, metrics_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSITY, SEARCH, HISTORY = "pruning_density.png", "pruning_search.png", "pruning_history.png"
_ACCENT, _SECOND, _QUIET, _INK = "#0b61a4", "#d1495b", "#a8b0b9", "#24292f"
_PER_PAGE = 6  # searches side by side


def plot(record: RunRecord, output: str | os.PathLike) -> list[Path]:
    """Write the pictures that the record has data for into `output`; returns their paths.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'hf_maskselect[plots]'") from error
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw, there in (
        (DENSITY, draw_density, True),
        (SEARCH, draw_search, any(len(search.candidates) > 1 for search in record.searches)),
        (HISTORY, draw_history, bool(record.history)),
    ):
        if there:
            figure = Figure(layout="constrained", dpi=150)
            FigureCanvasAgg(figure)
            draw(record, figure)
            figure.savefig(output / name)
            written.append(output / name)
    return written


def draw_density(record: RunRecord, figure: Figure) -> None:
    """Heat map: which share of each matrix is kept, layers from top to bottom."""
    rows, columns, found = record.densities()
    figure.set_size_inches(max(4.5, 1.1 * len(columns) + 1.6), max(2.6, 0.34 * len(rows) + 1.9))
    axes = figure.add_subplot()
    values = [[found.get((row, column), float("nan")) for column in columns] for row in rows]
    top = max(found.values()) or 1
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(columns)), [_short(column) for column in columns], rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), [row or "-" for row in rows], fontsize=8)
    axes.set_ylabel("layer")
    axes.set_title(f"Share of weights kept (all together {1 - record.report.sparsity:.2%})", fontsize=10, color=_INK)
    if len(rows) * len(columns) <= 200:
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                if value == value:
                    shade = "white" if value > 0.6 * top else _INK
                    axes.text(j, i, f"{100 * value:.1f}", ha="center", va="center", fontsize=7, color=shade)
    figure.colorbar(image, ax=axes, format=lambda x, _: f"{100 * x:.3g} %")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_search(record: RunRecord, figure: Figure) -> None:
    """One panel a level: each candidate's score after each rung, lower is better; the chosen one is coloured."""
    searches = [search for search in record.searches if len(search.candidates) > 1][-_PER_PAGE:]
    figure.set_size_inches(2.4 * len(searches) + 0.8, 3.0)
    for index, search in enumerate(searches):
        axes = figure.add_subplot(1, len(searches), index + 1)
        longest = max(len(candidate.scores) for candidate in search.candidates)
        for candidate in sorted(search.candidates, key=lambda c: c.chosen):
            rungs = range(1, len(candidate.scores) + 1)
            colour = _ACCENT if candidate.chosen else _SECOND if candidate.index == 0 else _QUIET
            axes.plot(rungs, candidate.scores, "o-", color=colour, markersize=4, linewidth=1.5)
        chosen = next(candidate for candidate in search.candidates if candidate.chosen)
        axes.set_title(
            f"level {search.level + 1}, sparsity {search.sparsity:.4g}\nchosen: {chosen.proposal}", fontsize=8
        )
        axes.set_xticks(range(1, longest + 1))
        axes.set_xlim(0.8, longest + 0.2)
        axes.set_xlabel("rung", fontsize=8)
        _plain(axes)
    figure.axes[0].set_ylabel("score on held-out rows\n(lower is better)", fontsize=8)
    figure.suptitle("Candidates: blue chosen, red deterministic, grey others", fontsize=10, color=_INK)


def draw_history(record: RunRecord, figure: Figure) -> None:
    """Training loss, and score and sparsity as evaluated, over optimizer steps; cuts are vertical lines."""
    kinds = [("loss", "training loss")]
    names = dict.fromkeys(name for entry in record.history for name in metrics_of(entry, "eval_"))
    kinds += [(f"eval_{name}", name) for name in list(names)[:1]]
    kinds += [("eval_sparsity", "sparsity")] if any("eval_sparsity" in entry for entry in record.history) else []
    figure.set_size_inches(6.5, 1.2 + 1.9 * len(kinds))
    first = None
    for index, (key, label) in enumerate(kinds):
        axes = figure.add_subplot(len(kinds), 1, index + 1, sharex=first)
        first = first or axes
        points = [(entry["step"], entry[key]) for entry in record.history if key in entry and "step" in entry]
        style = "-" if len(points) > 25 else "o-"
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            style,
            color=_ACCENT,
            markersize=3.5,
            linewidth=1.5,
        )
        axes.set_ylabel(label, fontsize=8)
        for search in record.searches:
            axes.axvline(search.step, color=_QUIET, linewidth=0.8)
            if index == 0:
                where = axes.get_xaxis_transform()
                axes.text(search.step, 1.02, f"{search.sparsity:.3g}", transform=where, fontsize=7, color=_INK)
        _plain(axes)
    figure.axes[-1].set_xlabel("optimizer step", fontsize=8)
    if record.searches:
        figure.suptitle("Vertical lines: cuts, with the sparsity from there on", fontsize=9, color=_INK)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", linewidth=0.4, color="#d8dee4")


def _short(name: str) -> str:
    """A module's name without the `dense` that many end in."""
    return name.removesuffix(".dense")
