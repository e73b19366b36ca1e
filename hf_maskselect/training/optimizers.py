"""The user's own optimizer: its learning rate, and a fresh one of the same kind for a trial."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR


def first_rate(optimizer: Optimizer) -> float | None:
    """Learning rate before any schedule, of the first parameter group that has one above 0.

    None where there is none: all groups are frozen by a rate of 0, or the optimizer finds its rate itself (Adafactor).
    """
    rates = [group.get("initial_lr", group.get("lr")) for group in optimizer.param_groups]
    return next((float(rate) for rate in rates if rate), None)


def check_renewable(optimizer: Optimizer, schedule: LRScheduler | None) -> None:
    """Raise a ValueError unless `renewed` surely gives an optimizer like the user's.

    The optimizers of torch keep all their options in their groups. Two schedules change more of these than the rate.
    """
    of_torch = f"{type(optimizer).__module__}.".startswith("torch.optim.")
    if not of_torch or not first_rate(optimizer) or isinstance(schedule, CyclicLR | OneCycleLR):
        under = "" if schedule is None else f" under {type(schedule).__name__}"
        raise ValueError(
            f"optimizers holds {type(optimizer).__name__}{under}, of which a trial cannot make a fresh one: pass "
            "optimizer_cls_and_kwargs=(class, its arguments) instead, or set num_candidates=1"
        )


def renewed(optimizer: Optimizer) -> Optimizer:
    """A fresh optimizer of the same class, parameters and options, with the rates before any schedule."""
    groups = []
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name != "initial_lr"}
        groups.append({**options, "lr": float(group.get("initial_lr", group["lr"]))})
    cls: Any = type(optimizer)  # every optimizer but the base class needs no defaults
    return cls(groups)


def remove_groups(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Remove parameter groups, and the moments of their parameters, from an optimizer."""
    gone = {id(parameter) for group in groups for parameter in group["params"]}
    kept = [group for group in optimizer.param_groups if not gone & {id(parameter) for parameter in group["params"]}]
    optimizer.param_groups[:] = kept
    for parameter in [parameter for parameter in optimizer.state if id(parameter) in gone]:
        del optimizer.state[parameter]
