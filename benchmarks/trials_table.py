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
    marks, places = list(seeds[0][0]["scores"]), range(len(seeds[0][0]["scores"]))
    for i, curve in enumerate(seeds[0]):
        way = [statistics.mean(seed[i]["scores"][mark]["teacher"] for seed in seeds) for mark in marks]
        style = "--" if "votes" in curve["proposal"] else "-"
        left.plot(places, way, style, color=COLOURS[curve["proposal"].partition(":")[0]], linewidth=1.1, alpha=0.8)
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
        found = [correlation_at(seeds, mark, measure, near) for mark in marks]
        right.plot(places, found, ":", color=line.get_color(), label=f"{measure}, taylor and fisher only")
    right.axhline(0, color="#a8b0b9", linewidth=0.8)
    right.set(xlabel="length of the trial", ylabel="rank correlation with the end", ylim=(-1, 1.05))
    for axes in (left, right):
        axes.legend(fontsize=7, frameon=False)
        axes.set_xticks(places, marks, fontsize=8)
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
    """Over all masks, and over those alone that gradients ranked: the losers are told apart by any trial."""
    marks, measures = list(seeds[0][0]["scores"]), list(seeds[0][0]["judged"])
    everything = range(len(seeds[0]))
    near = [i for i in everything if seeds[0][i]["proposal"].startswith(("taylor", "fisher"))]
    print("Spearman correlation of the score after k steps with the judged score at the end (same measure):\n")
    print("| masks | scored by | batches | " + " | ".join(marks) + " |")
    print("| --- | --- | --- |" + " ---: |" * len(marks))
    for (name, chosen), measure in itertools.product((("all", everything), ("taylor, fisher", near)), measures):
        paired = [f"{correlation_at(seeds, mark, measure, chosen):.2f}" for mark in marks]
        print(f"| {name} | {measure} | paired | " + " | ".join(paired) + " |")
        if len(seeds) > 1:
            unpaired = [f"{_unpaired(seeds, mark, measure, chosen):.2f}" for mark in marks]
            print(f"| {name} | {measure} | unpaired | " + " | ".join(unpaired) + " |")
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


def correlation_at(seeds: list[list[Curve]], mark: str, measure: str, chosen: Sequence[int]) -> float:
    """Of the score after `mark` steps with the end, among the masks `chosen`; mean over seeds."""
    final = _final(seeds, measure)
    ends = [final[i] for i in chosen]
    found = [_correlation([seed[i]["scores"][mark][measure] for i in chosen], ends) for seed in seeds]
    return statistics.mean(found)


def _unpaired(seeds: list[list[Curve]], mark: str, measure: str, chosen: Sequence[int]) -> float:
    """The same where every mask has a seed of its own."""
    generator, final, found = random.Random(0), _final(seeds, measure), []
    for _ in range(DRAWS):
        mixed = [generator.choice(seeds)[i]["scores"][mark][measure] for i in chosen]
        found.append(_correlation(mixed, [final[i] for i in chosen]))
    return statistics.mean(found)


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
