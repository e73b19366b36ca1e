"""What the curves of `trials.py` say: rank correlations, spreads, what each choice would have cost, and a picture."""

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

from hf_maskselect.proposals import Proposal

Curve = dict  # one file of `trials.py`
DRAWS = 200  # of unpaired seeds
COLOURS = {"taylor": "#0b61a4", "fisher": "#3a7d44", "activation": "#e08e0b", "magnitude": "#d1495b"}


def print_tables(folder: Path, pool: Sequence[Proposal]) -> None:
    """Markdown, one section for every setting that lies in `folder`."""
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
    """Left: every mask's way down, mean over seeds; right: how well its place on the way foretells the end."""
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    marks = [int(mark) for mark in seeds[0][0]["scores"]]
    measure = "teacher"
    for i, curve in enumerate(seeds[0]):
        way = [statistics.mean(seed[i]["scores"][str(mark)][measure] for seed in seeds) for mark in marks]
        style = "--" if "votes" in curve["proposal"] else "-"
        left.plot(marks, way, style, color=COLOURS[curve["proposal"].partition(":")[0]], linewidth=1.1, alpha=0.8)
    for criterion, colour in COLOURS.items():
        left.plot([], [], color=colour, label=criterion)
    left.plot([], [], "k--", linewidth=1, label="votes around it")
    left.set(xscale="symlog", xlabel="steps of the level", ylabel="score of a trial (less is better)")
    left.set_title(title, fontsize=10)
    left.legend(fontsize=7, frameon=False)
    for measure in seeds[0][0]["judged"]:
        final = _final(seeds, measure)
        found = [
            statistics.mean(_correlation([c["scores"][str(mark)][measure] for c in seed], final) for seed in seeds)
            for mark in marks
        ]
        right.plot(marks, found, marker="o", markersize=3, label=measure)
    right.axhline(0, color="#a8b0b9", linewidth=0.8)
    right.set(xscale="symlog", xlabel="length of the trial", ylabel="rank correlation with the end", ylim=(-1, 1.05))
    right.legend(fontsize=7, frameon=False)
    for axes in (left, right):
        axes.set_xticks(marks, marks, fontsize=7)
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _curves(kind: Path) -> list[Curve]:
    return [json.loads(path.read_text()) for path in sorted(kind.glob("*.json"), key=lambda path: int(path.stem))]


def _final(seeds: list[list[Curve]], measure: str) -> list[float]:
    """Of every mask the judged score at the end, mean over seeds; lower is better."""
    return [statistics.mean(seed[i]["judged"][measure] for seed in seeds) for i in range(len(seeds[0]))]


def _print_masks(seeds: list[list[Curve]]) -> None:
    measures = list(seeds[0][0]["judged"])
    print("| proposal | kept set shared with the first | " + " | ".join(f"judged {m}" for m in measures) + " |")
    print("| --- |" + " ---: |" * (len(measures) + 1))
    for i, curve in enumerate(seeds[0]):
        cells = []
        for measure in measures:
            values = [abs(seed[i]["judged"][measure]) for seed in seeds]
            cells.append(f"{statistics.mean(values):.4f} ({', '.join(f'{v:.4f}' for v in values)})")
        print(f"| {curve['proposal']} | {curve['overlap']:.3f} | " + " | ".join(cells) + " |")
    print()
    for measure in measures:
        table = [[seed[i]["judged"][measure] for seed in seeds] for i in range(len(seeds[0]))]
        means = [statistics.mean(row) for row in table]
        within = statistics.mean(statistics.variance(row) for row in table) ** 0.5 if len(seeds) > 1 else float("nan")
        print(f"{measure}: sd between masks {statistics.stdev(means):.4f}, between seeds of one mask {within:.4f}")
    print()


def _correlation(first: Sequence[float], second: Sequence[float]) -> float:
    return float(spearmanr(first, second).statistic)


def _print_correlations(seeds: list[list[Curve]], fresh: dict[str, list[Curve]]) -> None:
    marks = list(seeds[0][0]["scores"])
    measures = list(seeds[0][0]["judged"])
    print("Spearman correlation of the score after k steps with the judged score at the end (same measure):\n")
    print("| scored by | batches | " + " | ".join(marks) + " |")
    print("| --- | --- |" + " ---: |" * len(marks))
    for measure in measures:
        final = _final(seeds, measure)
        paired = [
            statistics.mean(_correlation([c["scores"][mark][measure] for c in seed], final) for seed in seeds)
            for mark in marks
        ]
        print(f"| {measure} | paired | " + " | ".join(f"{value:.2f}" for value in paired) + " |")
        if len(seeds) == 1:
            continue
        generator, unpaired = random.Random(0), []
        for mark in marks:
            found = []
            for _ in range(DRAWS):
                mixed = [generator.choice(seeds)[i]["scores"][mark][measure] for i in range(len(final))]
                found.append(_correlation(mixed, final))
            unpaired.append(statistics.mean(found))
        print(f"| {measure} | unpaired | " + " | ".join(f"{value:.2f}" for value in unpaired) + " |")
    for kind, curves in sorted(fresh.items(), key=lambda item: int(item[0].partition("-")[2])):
        if len(curves) == len(seeds[0]):
            cells = []
            for measure in measures:
                scores = [list(c["scores"].values())[-1][measure] for c in curves]
                cells.append(f"{measure} {_correlation(scores, _final(seeds, measure)):.2f}")
            steps = kind.partition("-")[2]
            print(f"\nA trial of its own, {steps} steps with their own warm-up and decay: {', '.join(cells)}", end="")
    print("\n")


def _print_choices(seeds: list[list[Curve]], pool: Sequence[Proposal]) -> None:
    """For every way to choose: what it would have kept, judged, beside the first mask and the best one."""
    measures = list(seeds[0][0]["judged"])
    votes = [i for i, p in enumerate(pool) if p.ratio is not None]
    groups = {
        "all": list(range(len(pool))),
        "deterministic": [i for i in range(len(pool)) if i not in votes],
        "taylor and its votes": [0, *(i for i in votes if pool[i].criterion == "taylor")],
        "magnitude and its votes": [i for i, p in enumerate(pool) if p.criterion == "magnitude"],
    }
    length = int(list(seeds[0][0]["scores"])[-1])
    score = measures[1] if "teacher" in measures else measures[0]
    print(f"Chosen by {score}; judged {', '.join(measures)} of the chosen, and levels of training spent in all:\n")
    print("| pool | way | levels spent | " + " | ".join(f"{m}, less is better" for m in measures) + " |")
    print("| --- | --- | ---: |" + " ---: |" * len(measures))
    ways: dict[str, Callable[[list[Curve], list[int]], tuple[int, float]]] = {"the first": lambda s, g: (g[0], 1.0)}
    for mark in list(seeds[0][0]["scores"])[1:]:
        share = int(mark) / length
        ways[f"best after {mark}"] = lambda s, g, m=mark, x=share: (_best(s, g, m, score), len(g) * x + (x < 1))
    ways["survivors, 1/6 1/3 2/3"] = lambda s, g: _survivor(s, g, ["40", "80", "160"], length, score)
    ways["survivors, 1/12 1/6 1/3"] = lambda s, g: _survivor(s, g, ["20", "40", "80"], length, score)
    for (name, group), (way, choose) in itertools.product(groups.items(), ways.items()):
        chosen = [choose(seed, group) for seed in seeds]
        cells = []
        for measure in measures:
            # Judged over all seeds, so that the luck of one order is not taken for a better mask.
            final = _final(seeds, measure)
            cells.append(f"{statistics.mean(final[i] for i, _ in chosen):.4f}")
        print(f"| {name} | {way} | {statistics.mean(c for _, c in chosen):.2f} | " + " | ".join(cells) + " |")


def _best(seed: list[Curve], group: list[int], mark: str, measure: str) -> int:
    return min(group, key=lambda i: (seed[i]["scores"][mark][measure], i))


def _survivor(seed: list[Curve], group: list[int], marks: list[str], length: int, measure: str) -> tuple[int, float]:
    """The better half goes on from its weights after every mark; (winner, levels of training spent)."""
    spent, before, racing = 0.0, 0, group
    for mark in marks:
        spent += len(racing) * (int(mark) - before) / length
        before = int(mark)
        racing = sorted(racing, key=lambda i: (seed[i]["scores"][mark][measure], i))[: max(1, (len(racing) + 1) // 2)]
    return racing[0], spent + (length - before) / length
