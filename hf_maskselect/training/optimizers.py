"""Optimizers that others made: their learning rate, a fresh one for a trial, further groups beside their schedule."""

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, CyclicLR, LRScheduler, OneCycleLR, SequentialLR

from ..masking.dtensors import in_strides_of


def first_rate(optimizer: Optimizer) -> float | None:
    """Learning rate before any schedule, of the first parameter group that has one above 0.

    None where there is none: all groups are frozen by a rate of 0, or the optimizer finds its rate itself (Adafactor).
    """
    rates = [group.get("initial_lr", group.get("lr")) for group in optimizer.param_groups]
    return next((float(rate) for rate in rates if rate), None)


def plain(optimizer: Any) -> Any:
    """Return the optimizer itself, without the wrapper of accelerate."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


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


def check_rate(rate: float | None, optimizer: Any) -> None:
    """Raise a ValueError unless the optimizer has a learning rate, which every trial that trains starts from."""
    if not rate:
        raise ValueError(
            f"{type(plain(optimizer)).__name__} has no learning rate above 0 from which a trial could start: give it "
            "one, or choose without training (trial_steps=0, or num_candidates=1)"
        )


def renewed(optimizer: Optimizer) -> Optimizer:
    """A fresh optimizer of the same class, parameters and options, with the rates before any schedule."""
    groups = []
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name != "initial_lr"}
        groups.append({**options, "lr": float(group.get("initial_lr", group["lr"]))})
    cls: Any = type(optimizer)  # every optimizer but the base class needs no defaults
    return cls(groups)


def align_moments(optimizer: Optimizer) -> None:
    """Give moments the strides of their parameters: a model in another memory format may have written a checkpoint."""
    for parameter, state in optimizer.state.items():
        for name, moment in state.items():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                state[name] = in_strides_of(parameter, moment)


def add_groups(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], schedule: Any = None) -> None:
    """Add parameter groups with a rate of their own; those that are there already stay.

    Args:
        optimizer: not wrapped. One that finds its rates itself (Adafactor) takes those of the new groups as they are.
        groups: with `params` and `lr`.
        schedule: was made for the optimizer as it is now, and goes on to see it so: the lists that it holds have one
            entry a group. At every step, the rates of the new groups are the same share of their peak as the first
            rate above 0 is of its own. None if the schedule is still to be made.
    """
    present = _ids(optimizer.param_groups)
    added = [group for group in groups if not present & _ids([group])]
    if schedule is not None and added:
        _follow(optimizer, added, schedule)
    by_itself = {name: False for name in ("relative_step", "scale_parameter", "warmup_init")}
    options = {name: value for name, value in by_itself.items() if name in optimizer.defaults}
    for group in added:
        optimizer.add_param_group({**options, **group})


def _follow(optimizer: Optimizer, added: Sequence[Mapping[str, Any]], schedule: Any) -> None:
    """Hide groups, which are still to be added, from a schedule, and let their rates follow it."""
    first = next((i for i, group in enumerate(optimizer.param_groups) if _peak(group, schedule, i)), None)
    peak = None if first is None else _peak(optimizer.param_groups[first], schedule, first)
    rates = {id(group["params"][0]): group["lr"] for group in added}
    _hide(schedule, _ids(added))

    def follow(*_: Any) -> None:
        if first is None or peak is None:
            return
        for group in optimizer.param_groups:  # loading a state has replaced the groups
            rate = rates.get(id(group["params"][0]))
            if rate is not None:
                group["lr"] = rate * float(optimizer.param_groups[first]["lr"]) / peak

    optimizer.register_step_pre_hook(follow)


def _peak(group: Mapping[str, Any], schedule: Any, index: int) -> float | None:
    """Return the highest rate that a schedule gives a group; None where the optimizer finds it."""
    rate = schedule.max_lrs[index] if isinstance(schedule, CyclicLR) else group.get("max_lr")
    return rate or group.get("initial_lr") or group.get("lr")


def _hide(schedule: Any, added: set[int]) -> None:
    for inner in schedule._schedulers if isinstance(schedule, SequentialLR | ChainedScheduler) else ():
        _hide(inner, added)
    if "optimizer" in vars(schedule):  # a class of the user's may hold none
        schedule.optimizer = _WithoutGroups(schedule.optimizer, added)


class _WithoutGroups:
    """An optimizer as its schedule saw it when it was made."""

    def __init__(self, optimizer: Any, hidden: set[int]) -> None:
        self._optimizer, self._hidden = optimizer, hidden

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for group in self._optimizer.param_groups if not self._hidden & _ids([group])]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def _ids(groups: Sequence[Mapping[str, Any]]) -> set[int]:
    return {id(parameter) for group in groups for parameter in group["params"]}


def remove_groups(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Remove parameter groups, and the moments of their parameters, from an optimizer."""
    gone = _ids(groups)
    kept = [group for group in optimizer.param_groups if not gone & _ids([group])]
    optimizer.param_groups[:] = kept
    for parameter in [parameter for parameter in optimizer.state if id(parameter) in gone]:
        del optimizer.state[parameter]
