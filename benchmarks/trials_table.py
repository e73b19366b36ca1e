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

from hf_maskselect.masking.proposals import Proposal

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


def _others(seeds: list[list[Curve]], own: int) -> list[list[Curve]]:
    """What a seed is judged by: the other ones, so that the luck of its order is not taken for a better mask (with one
    seed there is no other, and it is)."""
    return [seed for i, seed in enumerate(seeds) if i != own] or seeds


def _print_masks(seeds: list[list[Curve]]) -> None:
    measures = list(seeds[0][0]["judged"])
    print("| proposal | kept set shared with the first | " + " | ".join(f"judged {m}" for m in measures) + " |")
    print("| --- |" + " ---: |" * (len(measures) + 1))
    for i, curve in enumerate(seeds[0]):
        cells = []
        for measure in measures:
            sign = -1 if measure == "metric" else 1  # as it is told, higher is better
            values = [sign * seed[i]["judged"][measure] for seed in seeds]
            cells.append(f"{statistics.mean(values):.4f} ({', '.join(f'{v:.4f}' for v in values)})")
        print(f"| {curve['proposal']} | {curve['overlap']:.3f} | " + " | ".join(cells) + " |")
    print()
    if len(seeds) > 1:
        for measure in measures:
            between, within = _spreads([[seed[i]["judged"][measure] for seed in seeds] for i in range(len(seeds[0]))])
            print(f"{measure}: sd between masks {between:.4f}, between seeds of one mask {within:.4f}")
    print()


def _spreads(table: list[list[float]]) -> tuple[float, float]:
    """(between masks, between seeds of one mask) of a table masks x seeds: what a seed shifts alike for all masks is
    taken out, as pairing does, and the noise of the means as well."""
    count = len(table[0])
    shift = [statistics.mean(row[k] for row in table) for k in range(count)]
    left = [[value - shift[k] for k, value in enumerate(row)] for row in table]
    degrees = (len(table) - 1) * (count - 1)
    within = sum((value - statistics.mean(row)) ** 2 for row in left for value in row) / degrees
    between = statistics.variance([statistics.mean(row) for row in table]) - within / count
    return max(between, 0.0) ** 0.5, within**0.5


def _correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's; 0 where one side is constant and so tells nothing."""
    return float(spearmanr(first, second).statistic) if len(set(first)) > 1 and len(set(second)) > 1 else 0.0


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
        if measure == "teacher":
            for fewer in sorted({key for seed in seeds for key in seed[0]["scores"][marks[0]]} - set(measures)):
                found = [f"{correlation_at(seeds, mark, measure, chosen, fewer):.2f}" for mark in marks]
                print(f"| {name} | {fewer} | paired | " + " | ".join(found) + " |")
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
    """Of the score after `mark` steps with the end under other seeds, among the masks `chosen`; mean over seeds (over
    those that were also scored by `scored_by`, where it is not `measure`)."""
    found, scored_by = [], scored_by or measure
    for own, seed in enumerate(seeds):
        if scored_by not in seed[0]["scores"][mark]:
            continue
        final = _final(_others(seeds, own), measure)
        found.append(_correlation([seed[i]["scores"][mark][scored_by] for i in chosen], [final[i] for i in chosen]))
    return statistics.mean(found)


def _unpaired(seeds: list[list[Curve]], mark: str, measure: str, chosen: Sequence[int]) -> float:
    """The same where every mask was tried under any one of the seeds, and is judged by the others."""
    generator, found = random.Random(0), []
    for _ in range(DRAWS):
        own = [generator.randrange(len(seeds)) for _ in chosen]
        scores = [seeds[k][i]["scores"][mark][measure] for k, i in zip(own, chosen, strict=True)]
        ends = [_final(_others(seeds, k), measure)[i] for k, i in zip(own, chosen, strict=True)]
        found.append(_correlation(scores, ends))
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
    marks = list(seeds[0][0]["scores"])
    length = int(marks[-1])
    score = "teacher" if "teacher" in measures else measures[0]
    print(
        f"Chosen by {score}; the chosen mask judged under the other orders, less is better. Levels of training spent:"
    )
    print("survivors' training is part of the winner's level, any other trial is thrown away; fits are not in it.\n")
    print("| pool | way | levels spent | " + " | ".join(measures) + " |")
    print("| --- | --- | ---: |" + " ---: |" * len(measures))
    ways: dict[str, Callable[[list[Curve], list[int]], tuple[int, float]]] = {"the first": lambda s, g: (g[0], 1.0)}
    for mark in marks:
        share = int(mark) / length
        ways[f"best after {mark}"] = lambda s, g, m=mark, x=share: (_best(s, g, m, score), len(g) * x + (x < 1))
    for rungs in (marks[-5:-2], marks[-4:-1]):  # three, each twice as long as the one before
        told = ", ".join(rungs)
        ways[f"halving after {told}"] = lambda s, g, r=rungs: _raced(s, g, r, length, score, anew=True)
        ways[f"survivors after {told}"] = lambda s, g, r=rungs: _raced(s, g, r, length, score, anew=False)
    for (name, group), (way, choose) in itertools.product(groups.items(), ways.items()):
        chosen = [choose(seed, group) for seed in seeds]
        cells = []
        for measure in measures:
            ends = [_final(_others(seeds, own), measure)[index] for own, (index, _) in enumerate(chosen)]
            cells.append(f"{statistics.mean(ends):.4f}")
        print(f"| {name} | {way} | {statistics.mean(c for _, c in chosen):.2f} | " + " | ".join(cells) + " |")


def _best(seed: list[Curve], group: list[int], mark: str, measure: str) -> int:
    return min(group, key=lambda i: (seed[i]["scores"][mark][measure], i))


def _raced(
    seed: list[Curve], group: list[int], marks: Sequence[str], length: int, measure: str, anew: bool
) -> tuple[int, float]:
    """The better half goes on after every mark, from the start (anew) or from its weights, the first mask always
    among it; then the best after the last trains through the level; (winner, levels of training spent)."""
    spent, before, racing = 0.0, 0, group
    for mark in marks:
        spent += len(racing) * (int(mark) - before) / length
        before = 0 if anew else int(mark)
        ranked = sorted(racing, key=lambda i: (seed[i]["scores"][mark][measure], i))
        racing = ranked[: max(2, (len(racing) + 1) // 2)]
        if group[0] not in racing:
            racing[-1] = group[0]
    return ranked[0], spent + (length - before) / length
