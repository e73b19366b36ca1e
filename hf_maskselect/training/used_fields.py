"""What a trainer has read of its arguments and will not read again: set later, it is refused and not ignored."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from ..config import PruningConfig

Used = Mapping[str, tuple[object, object]]  # field -> (what of it counts, its value)

_SPLIT = ("selection_fraction", "max_selection_samples")
_TAUGHT = ("distill_logits", "distill_hidden", "distill_attention", "distill_temperature", "hard_label_weight")


def split_fields(args: PruningConfig, held_out: bool) -> Used:
    """Those that the split depends on, once for all runs of a trainer; held_out: whether it was made of train rows."""
    return {name: (getattr(args, name),) * 2 for name in _SPLIT if held_out}


def run_fields(args: PruningConfig, taught: bool, metric: str) -> Used:
    """Those that a run is assembled from, again for every `model_init`; metric: what masks are chosen by."""
    names = ["keep_zeros", *(_TAUGHT if taught else ())]
    if args.soft:
        names += ["scope", "layer_floor", *(name for name in vars(args) if name.startswith(f"{args.method}_"))]
    told = {name: (copy.copy(getattr(args, name)),) * 2 for name in names}
    told["selection"] = args.selection == "survivors", args.selection
    told["level_eval_steps"] = args.level_eval_steps > 0, args.level_eval_steps
    if args.needs_selection_split:
        told["selection_metric"] = metric, args.selection_metric
    return told


def check_used(before: Used, now: Used) -> None:
    """Raise a ValueError where a field has another value than it had when it was used."""
    for name, (then, value) in before.items():
        if name in now and now[name][0] != then:
            other = now[name][1]
            raise ValueError(
                f"{name}={other!r} was {value!r} when the PruningTrainer was made, which has used it: make a new "
                f"PruningTrainer with {name}={other!r}"
            )
