"""The plan of a run as a table, and the learning rate that restarts at every level."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from ..config import PruningConfig
from ..fields.resolved import ResolvedConfig
from ..masking.schedule import LevelPlan
from ..search.schedule import rungs_text
from ..utils.tables import text_table


def rewound_rate(args: PruningConfig, plan: LevelPlan) -> Callable[[int], float]:
    """Return a function from optimizer step to factor of the learning rate.

    It is the configured schedule, restarted at every level.

    Raises:
        ValueError: the schedule is not a function of the step, or its warm-up is longer than a level.
    """
    levels = [level for level in range(-1, len(plan.levels)) if plan.length(level) > 0]
    shortest = min(plan.length(level) for level in levels)
    if args.warmup_steps >= 1 and args.warmup_steps > shortest:
        raise ValueError(
            f"warmup_steps={args.warmup_steps:g} is longer than the shortest level ({shortest} steps), and the "
            "schedule restarts at every level: give a share such as 0.1, or set lr_rewind=False"
        )

    options: Any = args.lr_scheduler_kwargs  # text has been parsed by now

    def schedule(steps: int) -> Callable[[int], float]:
        dummy = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
        made = get_scheduler(
            args.lr_scheduler_type,
            dummy,
            args.get_warmup_steps(steps),
            steps,
            scheduler_specific_kwargs=options,
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
    if settings.emergent:
        return "emerges"
    return f"0 - {settings.sparsity:.4f}" if settings.soft_ramp else f"{settings.sparsity:.4f}"


def _phase(plan: LevelPlan, level: int, emergent: bool) -> str:
    if level >= 0:
        return f"level {level + 1}" if plan.soft_start is None else "frozen mask"
    if plan.soft_start is None:
        return "dense"
    dense = f"dense to step {plan.soft_start - 1}, " if plan.soft_start else ""
    if emergent or plan.ramp_steps == 1:
        return f"{dense}soft"
    return f"{dense}soft, at the target from step {min(plan.soft_start + plan.ramp_steps - 1, plan.starts[0])}"


def plan_text(
    args: PruningConfig,
    plan: LevelPlan,
    rungs: Sequence[Sequence[tuple[int, int]]],
    peak: float | None,
    own: Sequence[object] = (),
    held_out: int = 0,
    start: float = 0.0,
) -> str:
    """Return the plan as text: a table of the levels with their steps, learning rate and trials.

    Args:
        args: the arguments of the run.
        plan: its levels and steps.
        rungs: for each level, (candidates, steps) of every rung of its search.
        peak: learning rate before its schedule; None if the user's optimizer or schedule decides.
        own: the user's optimizer and schedule; None where the trainer makes them.
        held_out: number of held-out rows; 0 if nothing is chosen.
        start: sparsity of the model that the run begins with.
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
                rate if settings.lr_rewind or first == 0 else "(one schedule)",
                rungs_text(trials) or "-",
                sum(count * steps for count, steps in trials),
            ]
        )
    scored = sum(count for trials in rungs for count, steps in trials if steps == 0)
    trial_steps = sum(count * steps for trials in rungs for count, steps in trials)
    names = [type(one).__name__ for one in own if one is not None]
    structure = settings.structure
    unit = "sparsity" if structure is None else "speed-up" if structure.by_speedup else "layers removed"
    target = "that emerges" if settings.emergent else f"{settings.levels[-1]:g}"
    if structure is not None:
        target += f" ({unit}), {structure.num_candidates} shapes a level, fitted on {structure.rows} rows"
    title = f"Pruning plan: method {args.method}, pattern {args.pattern}, target {target}"
    if start:
        title += f", from a model with sparsity {start:.4f} whose zeros stay"
    if held_out:
        title += f"; {'masks' if structure is None else 'shapes'} are chosen on {held_out} held-out rows"
    if settings.refit_rows:
        title += f"; kept weights are refitted on {settings.refit_rows} rows"
    end = f"{plan.max_steps} training steps and {trial_steps} trial steps"
    if scored:
        end += f"; {scored} masks are scored after their refit, without training"
    if names:
        end += f"\nYour own {' and '.join(names)}" + ": its rates do not restart at a level" * (peak is None)
    header = ["phase", unit, "steps", "peak lr", "trials (count x steps)", "trial steps"]
    return f"{title}\n{text_table(header, rows)}\n{end}"
