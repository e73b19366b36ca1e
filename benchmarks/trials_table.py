"""Tables and pictures of the curves of `trials.py`: rank correlations, spreads, and the cost of each way to choose."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from hf_maskselect.masking.proposals import Proposal
from hf_maskselect.utils.tables import markdown_table

Curve = dict  # content of one file of `trials.py`
DRAWS = 200  # random assignments of seeds to masks
COLOURS = {"taylor": "#0b61a4", "fisher": "#3a7d44", "activation": "#e08e0b", "magnitude": "#d1495b"}


def print_tables(folder: Path, pool: Sequence[Proposal]) -> None:
    """Print a Markdown section, and draw a picture, for every setting in `folder`."""
    for setting in sorted(path for path in folder.iterdir() if path.is_dir()):
        levels = {kind.name: _curves(kind) for kind in sorted(setting.glob("level-*"))}
        levels = {kind: curves for kind, curves in levels.items() if len(curves) == len(pool)}
        if not levels:
            continue
        print(f"\n### {setting.name}, {len(levels)} orders of the data\n")
        seeds = list(levels.values())
        _print_masks(seeds)
        _print_correlations(seeds, {k.name: _curves(k) for k in sorted(setting.glob("trial-*"))})
        _print_choices(seeds, pool)
        draw(folder / f"{setting.name}.png", setting.name, seeds)


def draw(path: Path, title: str, seeds: list[list[Curve]]) -> None:
    """Draw the score of every mask over the level (left), and how well it predicts the end (right)."""
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    marks, places = list(seeds[0][0]["scores"]), range(len(seeds[0][0]["scores"]))
    for i, curve in enumerate(seeds[0]):
        means = [statistics.mean(seed[i]["scores"][mark]["teacher"] for seed in seeds) for mark in marks]
        style = "--" if "votes" in curve["proposal"] else "-"
        left.plot(places, means, style, color=COLOURS[curve["proposal"].partition(":")[0]], linewidth=1.1, alpha=0.8)
    for criterion, colour in COLOURS.items():
        left.plot([], [], color=colour, label=criterion)
    left.plot([], [], "k--", linewidth=1, label="votes around it")
    left.set(xlabel="steps of the level", ylabel="disagreement with the teacher, held-out rows")
    left.set_title(title, fontsize=10)
    near = [i for i, curve in enumerate(seeds[0]) if curve["proposal"].startswith(("taylor", "fisher"))]
    for measure in seeds[0][0]["judged"]:
        (line,) = right.plot(
            places, [correlation_at(seeds, mark, measure, range(len(seeds[0]))) for mark in marks], label=measure
        )
        correlations = [correlation_at(seeds, mark, measure, near) for mark in marks]
        right.plot(places, correlations, ":", color=line.get_color(), label=f"{measure}, taylor and fisher only")
    right.axhline(0, color="#a8b0b9", linewidth=0.8)
    right.set(xlabel="length of the trial", ylabel="rank correlation with the end", ylim=(-1, 1.05))
    for axes in (left, right):
        axes.legend(fontsize=7, frameon=False)
        axes.set_xticks(places, marks, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _curves(kind: Path) -> list[Curve]:
    """Read the curves of a folder, in the order of the pool."""
    return [json.loads(path.read_text()) for path in sorted(kind.glob("*.json"), key=lambda path: int(path.stem))]


def _final(seeds: list[list[Curve]], measure: str) -> list[float]:
    """Judged score of every mask at the end, mean over seeds; lower is better."""
    return [statistics.mean(seed[i]["judged"][measure] for seed in seeds) for i in range(len(seeds[0]))]


def _others(seeds: list[list[Curve]], own: int) -> list[list[Curve]]:
    """Return the curves of the other seeds, which judge the choice of seed `own`.

    So a lucky order of the data does not count as a better mask. With a single seed, that seed judges itself.
    """
    return [seed for i, seed in enumerate(seeds) if i != own] or seeds


def _print_masks(seeds: list[list[Curve]]) -> None:
    """Print the judged scores of every mask: mean over seeds, and each seed."""
    measures = list(seeds[0][0]["judged"])
    rows = []
    for i, curve in enumerate(seeds[0]):
        cells = []
        for measure in measures:
            sign = -1 if measure == "metric" else 1  # the files hold minus the metric
            values = [sign * seed[i]["judged"][measure] for seed in seeds]
            cells.append(f"{statistics.mean(values):.4f} ({', '.join(f'{v:.4f}' for v in values)})")
        rows.append([curve["proposal"], f"{curve['overlap']:.3f}", *cells])
    print(markdown_table(["proposal", "kept set shared with the first", *(f"judged {m}" for m in measures)], rows))
    print()
    if len(seeds) > 1:
        for measure in measures:
            between, within = _spreads([[seed[i]["judged"][measure] for seed in seeds] for i in range(len(seeds[0]))])
            print(f"{measure}: sd between masks {between:.4f}, between seeds of one mask {within:.4f}")
    print()


def _spreads(table: list[list[float]]) -> tuple[float, float]:
    """Standard deviations between masks, and between seeds of one mask, of a table masks x seeds.

    The mean shift of each seed is removed, because all masks share it, and so is the noise of the masks' means.
    """
    count = len(table[0])
    shift = [statistics.mean(row[k] for row in table) for k in range(count)]
    left = [[value - shift[k] for k, value in enumerate(row)] for row in table]
    degrees = (len(table) - 1) * (count - 1)
    within = sum((value - statistics.mean(row)) ** 2 for row in left for value in row) / degrees
    between = statistics.variance([statistics.mean(row) for row in table]) - within / count
    return max(between, 0.0) ** 0.5, within**0.5


def _correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman correlation; 0 if one side is constant."""
    return float(spearmanr(first, second).statistic) if len(set(first)) > 1 and len(set(second)) > 1 else 0.0


def _print_correlations(seeds: list[list[Curve]], fresh: dict[str, list[Curve]]) -> None:
    """Print the correlations over all masks, and over those with a gradient criterion.

    The second group is the harder test, because every trial separates the other masks from these.
    """
    marks, measures = list(seeds[0][0]["scores"]), list(seeds[0][0]["judged"])
    everything = range(len(seeds[0]))
    near = [i for i in everything if seeds[0][i]["proposal"].startswith(("taylor", "fisher"))]
    print("Spearman correlation of the score after k steps with the judged score at the end (same measure):\n")
    rows = []
    for (name, chosen), measure in itertools.product((("all", everything), ("taylor, fisher", near)), measures):
        paired = [f"{correlation_at(seeds, mark, measure, chosen):.2f}" for mark in marks]
        rows.append([name, measure, "paired", *paired])
        if len(seeds) > 1:
            unpaired = [f"{_unpaired(seeds, mark, measure, chosen):.2f}" for mark in marks]
            rows.append([name, measure, "unpaired", *unpaired])
        if measure == "teacher":
            for fewer in sorted({key for seed in seeds for key in seed[0]["scores"][marks[0]]} - set(measures)):
                values = [f"{correlation_at(seeds, mark, measure, chosen, fewer):.2f}" for mark in marks]
                rows.append([name, fewer, "paired", *values])
    print(markdown_table(["masks", "scored by", "batches", *marks], rows))
    for kind, curves in sorted(fresh.items(), key=lambda item: int(item[0].partition("-")[2])):
        if len(curves) == len(everything):
            cells = []
            for name, chosen in (("all", everything), ("taylor, fisher", near)):
                for measure in measures:
                    final = _final(seeds, measure)
                    scores = [list(curves[i]["scores"].values())[-1][measure] for i in chosen]
                    cells.append(f"{name} by {measure} {_correlation(scores, [final[i] for i in chosen]):.2f}")
            print(
                f"\nA trial of {kind.partition('-')[2]} steps with its own warm-up and decay: {', '.join(cells)}",
                end="",
            )
    print("\n")


def correlation_at(
    seeds: list[list[Curve]], mark: str, measure: str, chosen: Sequence[int], scored_by: str | None = None
) -> float:
    """Correlation of the score after `mark` steps with the judged score at the end under other seeds.

    Args:
        seeds: curves of every seed.
        mark: number of steps.
        measure: the judged score.
        chosen: indices of the masks to correlate.
        scored_by: the score after `mark` steps, if it is not `measure`; seeds without it are left out.

    Returns:
        The mean over seeds.
    """
    values, scored_by = [], scored_by or measure
    for own, seed in enumerate(seeds):
        if scored_by not in seed[0]["scores"][mark]:
            continue
        final = _final(_others(seeds, own), measure)
        values.append(_correlation([seed[i]["scores"][mark][scored_by] for i in chosen], [final[i] for i in chosen]))
    return statistics.mean(values)


def _unpaired(seeds: list[list[Curve]], mark: str, measure: str, chosen: Sequence[int]) -> float:
    """Correlation if each mask is tried under a random seed and judged by the other seeds; mean over `DRAWS` draws."""
    generator, values = random.Random(0), []
    for _ in range(DRAWS):
        own = [generator.randrange(len(seeds)) for _ in chosen]
        scores = [seeds[k][i]["scores"][mark][measure] for k, i in zip(own, chosen, strict=True)]
        ends = [_final(_others(seeds, k), measure)[i] for k, i in zip(own, chosen, strict=True)]
        values.append(_correlation(scores, ends))
    return statistics.mean(values)


def _print_choices(seeds: list[list[Curve]], pool: Sequence[Proposal]) -> None:
    """Print, for every way to choose, the judged scores of the mask that it keeps, and its cost in training."""
    measures = list(seeds[0][0]["judged"])
    votes = [i for i, p in enumerate(pool) if p.ratio is not None]
    groups = {
        "all": list(range(len(pool))),
        "deterministic": [i for i in range(len(pool)) if i not in votes],
        "taylor and its votes": [0, *(i for i in votes if pool[i].criterion == "taylor")],
        "magnitude and its votes": [i for i, p in enumerate(pool) if p.criterion == "magnitude"],
    }
    marks = list(seeds[0][0]["scores"])
    length = int(marks[-1])
    score = "teacher" if "teacher" in measures else measures[0]
    print(
        f"Chosen by {score}. The chosen mask is judged under the other orders of the data; lower is better.\n"
        "Levels of training spent: the winner's level and all trials. In `survivors` the winner's trials are part of\n"
        "its level. Refits are not counted.\n"
    )
    ways: dict[str, Callable[[list[Curve], list[int]], tuple[int, float]]] = {"the first": lambda s, g: (g[0], 1.0)}
    for mark in marks:
        share = int(mark) / length
        ways[f"best after {mark}"] = lambda s, g, m=mark, x=share: (_best(s, g, m, score), len(g) * x + (x < 1))
    for rungs in (marks[-5:-2], marks[-4:-1]):  # three rungs, each twice as long as the one before
        steps = ", ".join(rungs)
        ways[f"halving after {steps}"] = lambda s, g, r=rungs: _raced(s, g, r, length, score, restart=True)
        ways[f"survivors after {steps}"] = lambda s, g, r=rungs: _raced(s, g, r, length, score, restart=False)
    rows = []
    for (name, group), (way, choose) in itertools.product(groups.items(), ways.items()):
        chosen = [choose(seed, group) for seed in seeds]
        cells = []
        for measure in measures:
            ends = [_final(_others(seeds, own), measure)[index] for own, (index, _) in enumerate(chosen)]
            cells.append(f"{statistics.mean(ends):.4f}")
        rows.append([name, way, f"{statistics.mean(cost for _, cost in chosen):.2f}", *cells])
    print(markdown_table(["pool", "way", "levels spent", *measures], rows))


def _best(seed: list[Curve], group: list[int], mark: str, measure: str) -> int:
    """Index of the mask with the best score after `mark` steps."""
    return min(group, key=lambda i: (seed[i]["scores"][mark][measure], i))


def _raced(
    seed: list[Curve], group: list[int], marks: Sequence[str], length: int, measure: str, restart: bool
) -> tuple[int, float]:
    """Run a race whose better half goes on after every mark; the first mask always goes on.

    The best mask after the last mark then trains through the level.

    Args:
        seed: curves of one seed.
        group: indices of the masks that race.
        marks: steps after which the race is scored.
        length: steps of the level.
        measure: score of the race.
        restart: whether masks start again from the dense model after a mark, or go on from their weights.

    Returns:
        Index of the winner, and the levels of training spent.
    """
    spent, before, racing = 0.0, 0, group
    for mark in marks:
        spent += len(racing) * (int(mark) - before) / length
        before = 0 if restart else int(mark)
        ranked = sorted(racing, key=lambda i: (seed[i]["scores"][mark][measure], i))
        racing = ranked[: max(2, (len(racing) + 1) // 2)]
        if group[0] not in racing:
            racing[-1] = group[0]
    return ranked[0], spent + (length - before) / length
