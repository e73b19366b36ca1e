"""What a run will do and when: its table, and the learning rate that starts again at every level."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from ..config import PruningConfig
from ..fields.resolved import ResolvedConfig
from ..masking.schedule import LevelPlan
from ..search.schedule import rungs_text
from ..utils.tables import text_table


def rewound_rate(args: PruningConfig, plan: LevelPlan) -> Callable[[int], float]:
    """Optimizer step -> factor of the learning rate: the configured schedule, restarted at every level.

    Raises:
        ValueError: the schedule is no function of the step, or its warm-up is longer than a level.
    """
    levels = [level for level in range(-1, len(plan.levels)) if plan.length(level) > 0]
    shortest = min(plan.length(level) for level in levels)
    if args.warmup_steps >= 1 and args.warmup_steps > shortest:
        raise ValueError(
            f"warmup_steps={args.warmup_steps:g} is longer than the shortest level ({shortest} steps), and the "
            "schedule restarts at every level: give a share such as 0.1, or set lr_rewind=False"
        )

    def schedule(steps: int) -> Callable[[int], float]:
        dummy = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
        made = get_scheduler(
            args.lr_scheduler_type,
            dummy,
            args.get_warmup_steps(steps),
            steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        if not isinstance(made, LambdaLR):
            raise ValueError(
                f"lr_scheduler_type={args.lr_scheduler_type!r} cannot be restarted at every level: set "
                "lr_rewind=False or choose a schedule that is a function of the step, such as 'linear' or 'cosine'"
            )
        return made.lr_lambdas[0]

    rates = {level: schedule(plan.length(level)) for level in levels}

    def rate(step: int) -> float:
        level = plan.level_at(min(step, plan.max_steps - 1))
        return rates[level](step - plan.span(level)[0])

    return rate


def _rising(settings: ResolvedConfig) -> str:
    return "emerges" if settings.emergent else f"0 - {settings.sparsity:.4f}"


def _phase(plan: LevelPlan, level: int, emergent: bool) -> str:
    if level >= 0:
        return f"level {level + 1}" if plan.soft_start is None else "frozen mask"
    if plan.soft_start is None:
        return "dense"
    dense = f"dense to step {plan.soft_start - 1}, " if plan.soft_start else ""
    if emergent:
        return f"{dense}soft"
    return f"{dense}soft, at the target from step {min(plan.soft_start + plan.ramp_steps - 1, plan.starts[0])}"


def plan_text(
    args: PruningConfig,
    plan: LevelPlan,
    rungs: Sequence[Sequence[tuple[int, int]]],
    peak: float | None,
    given: Sequence[object] = (),
    held_out: int = 0,
    start: float = 0.0,
) -> str:
    """The plan as a table: levels, steps, learning rate and trials of each.

    Args:
        rungs: for each level, (candidates, steps) of every rung of its search.
        peak: learning rate before its schedule; None where the optimizer or the schedule has its own.
        given: the optimizer and the schedule that the caller made.
        held_out: rows that masks are chosen on; 0 where nothing is chosen.
        start: sparsity of the model the run begins with.
    """
    settings = args.resolved()
    rows, rate = [], "(its own)" if peak is None else f"{peak:g}"
    for level in range(-1, len(plan.levels)):
        if plan.length(level) == 0:
            continue
        first, last = plan.span(level)
        trials = rungs[level] if level >= 0 else []
        rows.append(
            [
                _phase(plan, level, settings.emergent),
                f"{plan.levels[level]:.4f}" if level >= 0 else _rising(settings) if settings.soft else f"{start:.4g}",
                f"{first}-{last - 1}",
                rate if args.lr_rewind or first == 0 else "(one schedule)",
                rungs_text(trials) or "-",
                sum(count * steps for count, steps in trials),
            ]
        )
    compared = sum(count for trials in rungs for count, steps in trials if steps == 0)
    held = f"; masks are chosen on {held_out} rows held out" if held_out else ""
    fitted = f"; what a cut leaves is fitted anew on {settings.refit_rows} rows" if settings.refit_rows else ""
    begun = f", from a model at {start:.4f} whose zeros are kept" if start else ""
    target = "that emerges" if settings.emergent else f"{settings.sparsity:g}"
    return (
        f"Pruning plan: method {args.method}, pattern {args.pattern}, target {target}{begun}{held}{fitted}\n"
        + text_table(["phase", "sparsity", "steps", "peak lr", "trials (count x steps)", "trial steps"], rows)
        + f"\n{plan.max_steps} training steps and {sum(row[-1] for row in rows)} trial steps"
        + f"; {compared} masks are fitted and compared before they are trained" * bool(compared)
        + f"\nThe caller's own: {' and '.join(type(made).__name__ for made in given)}" * bool(given)
        + ", whose rates do not start again at a level" * (bool(given) and peak is None)
    )
