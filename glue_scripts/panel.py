"""Tables and a picture of the finished cells of `compare.py`."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cells import Cell
from hf_maskselect.utils.tables import markdown_table
from tasks import get_task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLE, PICTURE = "table.md", "panel.png"
STEPS = ("train_steps", "search_step_equivalents")  # results that hold the cost of training and of the search
COLOURS = ("#0b61a4", "#d1495b", "#3a7d44", "#8e5ea2", "#e08e0b", "#24292f", "#7f8c8d", "#00798c")


@dataclass(frozen=True)
class Group:
    """Finished seeds of one task, target and method.

    Args:
        scores: main metric of each seed, in points (0 to 100).
        results: all results of each seed.
    """

    scores: list[float]
    results: list[dict]

    @property
    def mean(self) -> float:
        """Mean score over seeds, in points."""
        return statistics.mean(self.scores)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the scores over seeds; None for one seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def text(self) -> str:
        """Mean and, with more than one seed, standard deviation."""
        return f"{self.mean:.1f}" + ("" if self.spread is None else f" ± {self.spread:.1f}")

    def average(self, key: str) -> float:
        """Mean of one result over seeds."""
        return statistics.mean(result[key] for result in self.results)


Groups = dict[tuple[str, str | None, str], Group]


def write_panel(output_dir: Path, cells: Sequence[Cell], results: Mapping[Cell, dict]) -> None:
    """Print and write the tables of the finished cells, and draw the picture if matplotlib is installed.

    Args:
        output_dir: folder for `table.md` and `panel.png`.
        cells: all cells of the comparison; their order is that of the rows.
        results: results of the finished cells.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    groups = group_cells(results)
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    targets = list(dict.fromkeys(cell.target for cell in cells if cell.target is not None))
    methods = list(dict.fromkeys(cell.method for cell in cells if cell.target is not None))
    table = make_table(groups, tasks, targets, methods)
    if len(tasks) > 1:
        table += "\n\n" + make_summary(groups, tasks, targets, methods)
    (output_dir / TABLE).write_text(table + "\n")
    print(table)
    if draw(output_dir / PICTURE, groups, tasks, targets, methods):
        print(f"\nThe picture is {output_dir / PICTURE}")
    else:
        print("\nNo picture: it needs matplotlib (pip install 'hf_maskselect[plots]') and a pruned cell")


def group_cells(results: Mapping[Cell, dict]) -> Groups:
    """Group the results of finished cells by task, target and method."""
    groups = defaultdict(list)
    for cell, cell_results in results.items():
        groups[cell.task, cell.target, cell.method].append(cell_results)
    return {
        key: Group([100 * seed[f"eval_{get_task(key[0]).main_metric}"] for seed in seeds], seeds)
        for key, seeds in groups.items()
    }


def make_table(groups: Groups, tasks: Sequence[str], targets: Sequence[str], methods: Sequence[str]) -> str:
    """Markdown table with one row for each task, target and method.

    Columns are the mean score, its standard deviation over seeds, its share of the dense score, and the costs.
    """
    header = ["task", "target", "method", "sparsity", "metric", "score", "sd", "of dense", "training steps"]
    header += ["search, in steps", "minutes", "seeds"]
    rows = []
    for task in tasks:
        dense = groups.get((task, None, "dense"))
        for target, method in [(None, "dense"), *itertools.product(targets, methods)]:
            group = groups.get((task, target, method))
            if group is None:
                continue
            sparsity, costs = "0", ["-", "-", "-"]
            if target is not None:
                sparsity = f"{group.average('eval_sparsity'):.4f}"
                costs = [f"{group.average(key):.0f}" for key in STEPS]
                costs.append(f"{group.average('cell_seconds') / 60:.1f}")
            spread = "-" if group.spread is None else f"{group.spread:.1f}"
            retention = f"{100 * group.mean / dense.mean:.1f} %" if dense and dense.mean > 0 else "-"
            row = [task, target or "-", method, sparsity, get_task(task).main_metric, f"{group.mean:.1f}", spread]
            rows.append([*row, retention, *costs, len(group.scores)])
    return markdown_table(header, rows)


def make_summary(groups: Groups, tasks: Sequence[str], targets: Sequence[str], methods: Sequence[str]) -> str:
    """Markdown table with one row for each target and method, and one column for each task.

    Further columns are the mean over all tasks and its share of the dense mean (`-` while a task is missing), and the
    mean number of training steps and of search steps.
    """
    rows, dense = [], panel_mean(groups, tasks, None, "dense")
    for target, method in [(None, "dense"), *itertools.product(targets, methods)]:
        row_groups = [groups.get((task, target, method)) for task in tasks]
        finished = [group for group in row_groups if group is not None]
        if not finished:
            continue
        mean, steps = panel_mean(groups, tasks, target, method), "-"
        if target is not None:
            steps = " + ".join(f"{statistics.mean(group.average(key) for group in finished):.0f}" for key in STEPS)
        rows.append(
            [
                target or "-",
                method,
                *("-" if group is None else group.text for group in row_groups),
                "-" if mean is None else f"{mean:.1f}",
                f"{100 * mean / dense:.1f} %" if mean and dense else "-",
                steps,
            ]
        )
    return markdown_table(["target", "method", *tasks, "mean", "of dense", "steps + search"], rows)


def panel_mean(groups: Groups, tasks: Sequence[str], target: str | None, method: str) -> float | None:
    """Mean over tasks of the means over seeds, in points; None while a task is missing."""
    row_groups = [groups.get((task, target, method)) for task in tasks]
    return None if None in row_groups else statistics.mean(group.mean for group in row_groups)


def draw(path: Path, groups: Groups, tasks: Sequence[str], targets: Sequence[str], methods: Sequence[str]) -> bool:
    """Draw score against target, with error bars of one standard deviation, in one panel for each task.

    A last panel shows the mean over tasks of the methods that have finished all of them.

    Returns:
        False if matplotlib is not installed or no pruned cell is finished.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = [task for task in tasks if any(key[0] == task and key[1] for key in groups)]
    if not shown:
        return False
    panels = [(f"{task}: {get_task(task).main_metric}", task) for task in shown]
    means = [panel_mean(groups, tasks, target, method) for target, method in itertools.product(targets, methods)]
    if len(tasks) > 1 and any(mean is not None for mean in means):
        panels.append((f"mean of {len(tasks)} tasks", None))
    rows = math.ceil(len(panels) / 3)
    columns = math.ceil(len(panels) / rows)
    figure = Figure(figsize=(3.1 * columns + 1.6, 3.2 * rows), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, task) in itertools.zip_longest(places, panels, fillvalue=(None, None)):
        if title is None:
            axes.set_axis_off()
            continue
        points = {
            (target, method): _point(groups, tasks if task is None else [task], target, method)
            for target, method in [(None, "dense"), *itertools.product(targets, methods)]
        }
        _draw_points(axes, {key: point for key, point in points.items() if point is not None}, targets, methods)
        axes.set_title(title, fontsize=9)
    handles = {label: h for a in figure.axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path)
    return True


def _point(groups: Groups, tasks: Sequence[str], target: str | None, method: str) -> tuple[float, float] | None:
    """Mean and standard deviation over seeds, for one task or for the mean of independent tasks.

    The deviation is NaN, which draws no bar, if a task has one seed. Returns None while a task is missing.
    """
    mean = panel_mean(groups, tasks, target, method)
    if mean is None:
        return None
    spreads = [groups[task, target, method].spread for task in tasks]
    return mean, math.nan if None in spreads else math.hypot(*spreads) / len(spreads)


def _draw_points(
    axes: Axes,
    points: dict[tuple[str | None, str], tuple[float, float]],
    targets: Sequence[str],
    methods: Sequence[str],
) -> None:
    """Draw the points of one panel, one colour for each method."""
    if (None, "dense") in points:
        axes.axhline(points[None, "dense"][0], color="#a8b0b9", linestyle="--", linewidth=1, label="dense")
    for place, method in enumerate(methods):
        bars = [(i, *points[target, method]) for i, target in enumerate(targets) if (target, method) in points]
        if bars:
            shift = 0.5 * (place / max(len(methods) - 1, 1) - 0.5)  # methods stand side by side, so no bar is hidden
            axes.errorbar(
                [i + shift for i, _, _ in bars],
                [mean for _, mean, _ in bars],
                [spread for _, _, spread in bars],
                color=COLOURS[place % len(COLOURS)],
                marker="o",
                markersize=4,
                linewidth=0,
                elinewidth=1.2,
                capsize=2,
                label=method,
            )
    axes.set_xticks(range(len(targets)), targets, fontsize=8)
    axes.set_xlim(-0.5, len(targets) - 0.5)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
