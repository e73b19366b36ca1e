"""Tables and a picture of the cells that `compare.py` has finished."""

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
from tasks import get_task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLE, PICTURE = "table.md", "panel.png"
COLOURS = ("#0b61a4", "#d1495b", "#3a7d44", "#8e5ea2", "#e08e0b", "#24292f", "#7f8c8d", "#00798c")


@dataclass(frozen=True)
class Group:
    """The finished seeds of one task, target and method. scores: main metric in points (0 to 100)."""

    scores: list[float]
    results: list[dict]

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None of one seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def text(self) -> str:
        """Mean, and the deviation if there is one."""
        return f"{self.mean:.1f}" + ("" if self.spread is None else f" ± {self.spread:.1f}")

    def average(self, key: str) -> float:
        """Mean of one of the results."""
        return statistics.mean(result[key] for result in self.results)


Groups = dict[tuple[str, str | None, str], Group]


def write_panel(output_dir: Path, cells: Sequence[Cell], found: Mapping[Cell, dict]) -> None:
    """Print and write the tables of those of `cells` whose results are `found`; draw the picture if matplotlib is
    there."""
    output_dir.mkdir(parents=True, exist_ok=True)
    groups = group_cells(found)
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


def group_cells(found: Mapping[Cell, dict]) -> Groups:
    """Results of finished cells by task, target and method."""
    groups = defaultdict(list)
    for cell, results in found.items():
        groups[cell.task, cell.target, cell.method].append(results)
    return {
        key: Group([100 * result[f"eval_{get_task(key[0]).main_metric}"] for result in results], results)
        for key, results in groups.items()
    }


def make_table(groups: Groups, tasks: Sequence[str], targets: Sequence[str], methods: Sequence[str]) -> str:
    """Markdown, one row for each task, target and method: mean, standard deviation over seeds, retention, costs."""
    lines = [
        "| task | target | method | sparsity | metric | score | sd | of dense | training steps | search, in steps | "
        "minutes | seeds |",
        "| --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for task in tasks:
        dense = groups.get((task, None, "dense"))
        for target, method in [(None, "dense"), *((t, m) for t in targets for m in methods)]:
            group = groups.get((task, target, method))
            if group is None:
                continue
            costs = ["0", "-", "-", "-"]
            if target is not None:
                minutes = group.average("cell_seconds") / 60
                steps = group.average("train_steps")
                costs = [f"{group.average('eval_sparsity'):.4f}", f"{steps:.0f}"]
                costs += [f"{group.average('search_step_equivalents'):.0f}", f"{minutes:.1f}"]
            row = [task, target or "-", method, costs[0], get_task(task).main_metric, f"{group.mean:.1f}"]
            row += ["-" if group.spread is None else f"{group.spread:.1f}"]
            row += [f"{100 * group.mean / dense.mean:.1f} %" if dense and dense.mean > 0 else "-"]
            row += [*costs[1:], str(len(group.scores))]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def make_summary(groups: Groups, tasks: Sequence[str], targets: Sequence[str], methods: Sequence[str]) -> str:
    """Markdown, targets and methods by tasks: mean and standard deviation, the mean over all tasks and what that is of
    dense (`-` while a task is missing), and the steps of training and of search that a task took on average."""
    lines = ["| target | method | " + " | ".join(tasks) + " | mean | of dense | steps + search |"]
    lines.append("| --- | --- |" + " ---: |" * (len(tasks) + 3))
    dense = panel_mean(groups, tasks, None, "dense")
    for target, method in [(None, "dense"), *((target, method) for target in targets for method in methods)]:
        found = [groups.get((task, target, method)) for task in tasks]
        known = [group for group in found if group is not None]
        if not known:
            continue
        mean, steps = panel_mean(groups, tasks, target, method), "-"
        if target is not None:
            parts = [
                statistics.mean(group.average(key) for group in known)
                for key in ("train_steps", "search_step_equivalents")
            ]
            steps = " + ".join(f"{part:.0f}" for part in parts)
        row = [target or "-", method, *("-" if group is None else group.text for group in found)]
        row += [
            "-" if mean is None else f"{mean:.1f}",
            f"{100 * mean / dense:.1f} %" if mean and dense else "-",
            steps,
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def panel_mean(groups: Groups, tasks: Sequence[str], target: str | None, method: str) -> float | None:
    """Mean over the tasks of their means over seeds; None while one is missing."""
    found = [groups.get((task, target, method)) for task in tasks]
    return None if None in found else statistics.mean(group.mean for group in found)


def draw(path: Path, groups: Groups, tasks: Sequence[str], targets: Sequence[str], methods: Sequence[str]) -> bool:
    """Score against target, bars of one standard deviation: one panel a task, and one of their mean for those methods
    that have all of them; whether there was something to draw."""
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
    """(mean, standard deviation) over seeds: of one task, or of the mean of independent ones (NaN, which draws no bar,
    where a task has one seed); None while a task is missing."""
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
    if (None, "dense") in points:
        axes.axhline(points[None, "dense"][0], color="#a8b0b9", linestyle="--", linewidth=1, label="dense")
    for place, method in enumerate(methods):
        known = [(i, *points[target, method]) for i, target in enumerate(targets) if (target, method) in points]
        if known:
            shift = 0.5 * (place / max(len(methods) - 1, 1) - 0.5)  # side by side, so that bars do not hide each other
            axes.errorbar(
                [i + shift for i, _, _ in known],
                [mean for _, mean, _ in known],
                [spread for _, _, spread in known],
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
