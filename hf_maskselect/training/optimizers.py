"""The optimizer that a run was given instead of making one: its rate, and another like it for a trial."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR


def first_rate(optimizer: Optimizer) -> float | None:
    """Learning rate before any schedule, of the first group that has one above 0; None where there is none (frozen
    by their rates, or found by the optimizer itself, as Adafactor does)."""
    rates = [group.get("initial_lr", group.get("lr")) for group in optimizer.param_groups]
    return next((float(rate) for rate in rates if rate), None)


def check_renewable(optimizer: Optimizer, schedule: LRScheduler | None) -> None:
    """Raise a ValueError unless `renewed` gives what the caller made for certain: torch's own classes keep all that
    they were told in their groups, of which these two schedules change more than the rate."""
    of_torch = f"{type(optimizer).__module__}.".startswith("torch.optim.")
    if not of_torch or not first_rate(optimizer) or isinstance(schedule, CyclicLR | OneCycleLR):
        under = "" if schedule is None else f" under {type(schedule).__name__}"
        raise ValueError(
            f"optimizers holds {type(optimizer).__name__}{under}, of which trials that train cannot make another: "
            "pass optimizer_cls_and_kwargs=(class, its arguments) instead, or set num_candidates=1"
        )


def renewed(optimizer: Optimizer) -> Optimizer:
    """Another of the same class, parameters and options, without state, at the rates before any schedule."""
    groups = []
    for group in optimizer.param_groups:
        kept = {name: value for name, value in group.items() if name != "initial_lr"}
        groups.append({**kept, "lr": float(group.get("initial_lr", group["lr"]))})
    return type(optimizer)(groups)
