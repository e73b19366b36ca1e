"""Every rule about the fields of `PruningConfig`, each refused with what, where and how to mend, and the defaults that
depend on other fields."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

from ..masking.patterns import NM, SCOPES, Channel, Unstructured, parse_pattern
from ..masking.proposals import parse_proposal
from ..masking.schedule import check_levels, cubic_levels
from ..masking.scores import CRITERIA
from ..masking.targets import check_module_names

if TYPE_CHECKING:
    from ..config import PruningConfig

SOFT_METHODS = ("pdp", "gumbel")
METHODS = ("random", *CRITERIA, *SOFT_METHODS)
_EMERGENT = 0.5  # stands for a sparsity that is no target; nothing is pruned by it
SELECTIONS = ("halving", "survivors", "early")
SELECTION_LOSSES = ("loss", "teacher")
WHOLE_NUMBERS = (
    "num_levels",
    "num_candidates",
    "criterion_batches",
    "criterion_batch_size",
    "trial_steps",
    "trial_batch_size",
    "level_eval_steps",
    "max_selection_samples",
    "refit_rows",
)
BOOLEANS = (
    "lr_rewind",
    "keep_zeros",
    "pack_on_save",
    "permute_channels",
    "gumbel_untrained",
    "gumbel_budget",
    "gumbel_signed_constant",
    "gumbel_rescale",
    "gumbel_train_rest",
)
NUMBERS = (
    "sparsity",
    "layer_floor",
    "last_level_weight",
    "pruning_warmup_steps",
    "soft_ramp",
    "frozen_steps",
    "pdp_tau",
    "gumbel_tau",
    "gumbel_initial_logit",
    "gumbel_prior",
    "gumbel_learning_rate",
    "gumbel_scale_learning_rate",
    "trial_learning_rate",
    "selection_fraction",
    "distill_logits",
    "distill_hidden",
    "distill_attention",
    "distill_temperature",
    "hard_label_weight",
)


# What the defaults of other fields were derived from.
DECIDING = (
    "method",
    "sparsity",
    "pattern",
    "num_levels",
    "criterion",
    "proposals",
    "gumbel_untrained",
    "gumbel_budget",
    "gumbel_signed_constant",
)


def decided(config: PruningConfig) -> dict[str, object]:
    """A copy of those fields."""
    return {name: copy.copy(getattr(config, name)) for name in DECIDING}


def check_unchanged(config: PruningConfig, before: Mapping[str, object]) -> None:
    """Fields may be set after the configuration was made, as a hyper-parameter search does, but not those from which
    others follow; before: `decided` when it was made."""
    for name, then in before.items():
        if getattr(config, name) != then:
            raise ValueError(
                f"{name}={getattr(config, name)!r} was {then!r} when the PruningConfig was made, and other fields "
                f"follow from it: make a new PruningConfig with {name}={getattr(config, name)!r}"
            )
    check_pruning(config)


def check_pruning(config: PruningConfig) -> None:
    for name in ("proposals", "target_modules", "exclude_modules"):  # a plain string is a list of one
        if isinstance(getattr(config, name), str):
            setattr(config, name, [getattr(config, name)])
    check_types(config)
    if config.selection_metric is not None:  # as metric_for_best_model, with or without its prefix
        config.selection_metric = config.selection_metric.removeprefix("eval_")
    for name in ("target_modules", "exclude_modules"):
        check_module_names(getattr(config, name) or ())
    check_choice("method", config.method, METHODS)
    check_choice("selection", config.selection, SELECTIONS)
    check_soft(config)
    check_candidates(config)
    check_scope(config)
    check_sparsity_and_levels(config)
    check_refit(config)
    check_trials(config)
    check_ranges(config)


def check_types(config: PruningConfig) -> None:
    """Recipes are JSON or YAML, where a number is easily a string, a fraction or a list."""
    for name in WHOLE_NUMBERS:
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name}={value!r} must be a whole number")
    for name in NUMBERS:
        value = getattr(config, name)
        if value is not None and not _is_number(value):
            raise ValueError(f"{name}={value!r} must be a finite number")
    for name in BOOLEANS:
        value = getattr(config, name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be true or false")
    for name in ("levels", "sampling_ratios"):
        value = getattr(config, name)
        if value is not None and not (isinstance(value, list | tuple) and all(_is_number(v) for v in value)):
            raise ValueError(f"{name}={value!r} must be a list of finite numbers, such as [0.5, 0.9]")


def check_soft(config: PruningConfig) -> None:
    if config.frozen_steps is None:
        config.frozen_steps = 0.2 if config.soft and not config.gumbel_untrained else 0
    for name in ("pruning_warmup_steps", "frozen_steps"):
        value = getattr(config, name)
        if value < 0 or (value > 1 and value % 1):
            raise ValueError(f"{name}={value} must be a share below 1 or a whole number of steps")
    if not 0 < config.soft_ramp <= 1:
        raise ValueError(f"soft_ramp={config.soft_ramp} must lie in (0, 1]: it is a share of the soft phase")
    usual = {"pdp_tau": 1e-4, "gumbel_tau": 1, "gumbel_learning_rate": 0.5, "gumbel_scale_learning_rate": 1e-3}
    for name, value in usual.items():
        given = getattr(config, name)
        if given is not None and given <= 0:
            raise ValueError(f"{name}={given} must be positive, such as {value:g}")
    for known in fields(config):
        of = "soft methods" if known.name == "soft_ramp" else known.name.partition("_")[0]
        meant = config.soft if of == "soft methods" else config.method == of
        if of in ("soft methods", *SOFT_METHODS) and not meant and getattr(config, known.name) != known.default:
            raise ValueError(
                f"{known.name}={getattr(config, known.name)!r} has no meaning with method={config.method!r}, it "
                f"belongs to {of}: leave it unset"
            )
    if config.method == "gumbel":
        resolve_gumbel(config)
    if not config.soft:
        if config.frozen_steps:
            raise ValueError(
                f"frozen_steps={config.frozen_steps} has no meaning with method={config.method!r}, whose masks are "
                "always hard: use last_level_weight for a longer last level"
            )
        return
    if config.levels not in (None, [config.sparsity]) or config.num_levels not in (None, 1):
        raise ValueError(
            f"levels and num_levels have no meaning with method={config.method!r}, whose sparsity rises at every "
            "step: leave them unset"
        )
    config.num_levels = 1
    if config.proposals != ["mixed"]:
        raise ValueError(
            f"proposals={config.proposals} have no meaning with method={config.method!r}, whose candidates are "
            "neighbours of its own mask: leave proposals unset"
        )
    for name, wanted in (
        ("num_candidates", (config.num_candidates or 1) > 1),
        ("level_eval_steps", config.level_eval_steps),
    ):
        if wanted and not config.frozen_steps:
            raise ValueError(
                f"{name}={getattr(config, name)} needs steps under the hard mask with method={config.method!r}: set "
                "frozen_steps, such as 0.2"
            )


def resolve_gumbel(config: PruningConfig) -> None:
    new = config.gumbel_untrained
    resolved = {
        "gumbel_budget": not new,
        "gumbel_initial_logit": 0.0 if new else 3.0,
        "gumbel_prior": 0.0 if new else 1.0,
        "gumbel_signed_constant": new,
        "gumbel_learning_rate": 0.05 if new else 0.5,
        "gumbel_train_rest": not new,
    }
    for name, value in resolved.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if config.gumbel_prior and config.gumbel_signed_constant:
        raise ValueError(
            f"gumbel_prior={config.gumbel_prior} has no meaning with gumbel_signed_constant=True, which leaves all "
            "weights of a matrix at one magnitude: set one of them to 0 or False"
        )
    if config.emergent and (config.num_candidates or 1) > 1:
        raise ValueError(
            f"num_candidates={config.num_candidates} has no meaning with gumbel_budget=False: samples of a mask "
            "without a budget differ in sparsity, so set gumbel_budget=True"
        )
    if config.scope == "balanced":
        raise ValueError(
            "scope='balanced' has no meaning with method='gumbel', whose logits are comparable as they are: use "
            "'global' or 'layer'"
        )
    if config.emergent and config.pattern != "unstructured":
        raise ValueError(
            f"pattern={config.pattern!r} needs gumbel_budget=True: the rule logit >= 0 keeps no fixed count"
        )
    if config.emergent and config.sparsity not in (None, _EMERGENT):
        raise ValueError(
            f"sparsity={config.sparsity} has no meaning with gumbel_budget=False, where it emerges: leave it unset, "
            "or set gumbel_budget=True"
        )


def check_candidates(config: PruningConfig) -> None:
    paper = config.proposals == ["paper"]
    if config.soft:
        if config.criterion not in (None, "magnitude"):
            raise ValueError(
                f"criterion={config.criterion!r} has no meaning with method={config.method!r}, which makes its own "
                "masks: leave criterion unset"
            )
        config.criterion = "magnitude"  # reads no gradients
    elif config.method != "random":
        if config.criterion not in (None, config.method):
            raise ValueError(
                f"criterion={config.criterion!r} contradicts method={config.method!r}: leave criterion unset, or use "
                "method='random' with num_candidates=1"
            )
        if config.num_candidates not in (None, 1):
            raise ValueError(
                f"num_candidates={config.num_candidates} has no meaning with method={config.method!r}, which has one "
                "deterministic mask: use method='random' to choose among several"
            )
    config.criterion = config.criterion or (
        config.method if config.method != "random" else "magnitude" if paper else "taylor"
    )
    check_choice("criterion", config.criterion, CRITERIA)
    if config.num_candidates is None:
        config.num_candidates = 4 if config.method == "random" else 1
    if config.num_candidates < 1:
        raise ValueError(f"num_candidates={config.num_candidates} must be at least 1 (the deterministic mask)")
    if not config.proposals:
        raise ValueError("proposals is empty: use 'mixed', 'paper' or a list such as ['taylor:global']")
    if config.proposals not in (["mixed"], ["paper"]):
        for text in config.proposals:
            parse_proposal(text, [*CRITERIA, "score_fn"], ratio=1.0)


def check_scope(config: PruningConfig) -> None:
    if not 0 <= config.layer_floor <= 1:
        raise ValueError(f"layer_floor={config.layer_floor} must lie in [0, 1]: a share of the uniform allocation")
    pattern = parse_pattern(config.pattern)
    if isinstance(pattern, Channel) and config.method in ("random", "gumbel"):
        raise ValueError(
            f"pattern='channel' has no meaning with method={config.method!r}, which draws single weights: use "
            "'pdp', 'magnitude', 'fisher' or 'taylor'"
        )
    if isinstance(pattern, Channel) and config.num_candidates > 1:
        raise ValueError(
            f"num_candidates={config.num_candidates} has no meaning with pattern='channel': candidates are drawn by "
            "votes on single weights, so leave num_candidates unset"
        )
    if config.permute_channels and not isinstance(pattern, NM):
        raise ValueError(
            f"permute_channels=True has no meaning with pattern={config.pattern!r}, which has no groups of columns: "
            "use an N:M pattern such as '2:4'"
        )
    if config.permute_channels and config.gumbel_signed_constant:
        raise ValueError(
            "permute_channels=True has no meaning with gumbel_signed_constant=True, which leaves all weights of a "
            "matrix at one magnitude: set one of them to False"
        )
    if not isinstance(pattern, Unstructured):
        if config.scope not in (None, "layer"):
            raise ValueError(
                f"scope={config.scope!r} has no meaning with pattern={config.pattern!r}, where every matrix keeps the "
                "same share: leave scope unset"
            )
        config.scope = "layer"
    elif config.scope is None:
        config.scope = "global" if config.soft else "layer" if config.criterion == "magnitude" else "balanced"
    check_choice("scope", config.scope, SCOPES)


def check_sparsity_and_levels(config: PruningConfig) -> None:
    pattern = parse_pattern(config.pattern, config.scope, config.layer_floor)
    if config.sparsity is None and config.emergent:
        config.sparsity = _EMERGENT
    if config.sparsity is None:
        config.sparsity = pattern.sparsity if isinstance(pattern, NM) else 0.9375
    if not 0 < config.sparsity < 1:
        raise ValueError(
            f"sparsity={config.sparsity} must lie inside (0, 1): it is the fraction of zeros, 0.9375 for 16x smaller"
        )
    if isinstance(pattern, NM) and abs(config.sparsity - pattern.sparsity) > 1e-9:
        raise ValueError(
            f"sparsity={config.sparsity} contradicts pattern={config.pattern!r}, which has "
            f"{pattern.sparsity:g}: leave sparsity unset"
        )
    if config.num_levels is not None and config.num_levels < 1:
        raise ValueError(f"num_levels={config.num_levels} must be at least 1")
    if config.levels is None:
        config.levels = pattern_levels(pattern, config.sparsity, config.num_levels)
    check_levels(config.levels, config.sparsity)
    for level in config.levels:
        pattern.check_sparsity(level)
    config.num_levels = len(config.levels)


def check_refit(config: PruningConfig) -> None:
    if config.soft and config.refit_rows:
        raise ValueError(
            f"refit_rows={config.refit_rows} has no meaning with method={config.method!r}, whose weights are trained "
            "as they are cut: leave it unset"
        )
    if config.refit_rows is None:  # magnitude is the plain baseline, and the paper's proposals stay the paper's
        config.refit_rows = 0 if config.soft or config.criterion == "magnitude" else 256


def check_trials(config: PruningConfig) -> None:
    if config.trial_steps is not None and config.trial_steps < 0:
        raise ValueError(
            f"trial_steps={config.trial_steps} must be at least 0, which compares masks as they are fitted"
        )
    if config.trial_steps == 0 and not (config.refit_rows and config.selection == "halving"):
        raise ValueError(
            "trial_steps=0 compares masks as they are fitted, without any training: it needs refit_rows, which is "
            f"{config.refit_rows}, and selection='halving', which is {config.selection!r}; leave trial_steps unset"
        )
    for name in ("trial_batch_size", "trial_learning_rate"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value} must be positive")
        if value is not None and config.trial_steps == 0:
            raise ValueError(
                f"{name}={value} has no meaning with trial_steps=0, which trains no candidate: leave trial_steps unset"
            )


def check_ranges(config: PruningConfig) -> None:
    for name, low in (
        ("refit_rows", 0),
        ("criterion_batches", 0),
        ("criterion_batch_size", 1),
        ("level_eval_steps", 0),
        ("max_selection_samples", 1),
    ):
        value = getattr(config, name)
        if value is None or value < low:
            raise ValueError(f"{name}={value} must be a whole number and at least {low}")
    if config.last_level_weight is None or config.last_level_weight <= 0:
        raise ValueError(f"last_level_weight={config.last_level_weight} must be a positive number")
    if not config.sampling_ratios or min(config.sampling_ratios) <= 0:
        raise ValueError(f"sampling_ratios={config.sampling_ratios} must be positive numbers, such as [5e-5, 1e-4]")
    if not 0 < config.selection_fraction < 1:
        raise ValueError(
            f"selection_fraction={config.selection_fraction} must lie inside (0, 1): it is the share of the train "
            "split held out to choose on; pass selection_dataset to choose on other data"
        )
    if config.criterion_batches == 0 and config.criterion != "magnitude":
        others = (
            "leave criterion unset with proposals='paper'" if config.method == "random" else "use method='magnitude'"
        )
        raise ValueError(
            f"criterion_batches=0 gives criterion={config.criterion!r} no gradients: set it to 64 or more, or {others}"
        )
    if config.bf16_full_eval or config.fp16_full_eval:
        raise ValueError(
            "bf16_full_eval and fp16_full_eval cast the trained weights for good, so pruning cannot go on after an "
            "evaluation: use bf16=True or fp16=True instead"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def pattern_levels(pattern: Unstructured | NM | Channel, sparsity: float, num_levels: int | None) -> list[float]:
    """Cubic levels to `sparsity`; for N:M the groups lose whole weights (M:M down to N:M), in one level by default."""
    if not isinstance(pattern, NM):
        return cubic_levels(sparsity, num_levels or 4)
    zeros = {max(1, round(level * pattern.m)) for level in cubic_levels(sparsity, num_levels or 1)}
    return [count / pattern.m for count in sorted(zeros)[:-1]] + [sparsity]


def check_choice(name: str, value: object, choices) -> None:
    """Raise a ValueError that names the field, the value and what is possible."""
    if value not in choices:
        close = difflib.get_close_matches(str(value), list(choices), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"{name}={value!r} is unknown: {hint}choose one of {', '.join(choices)}")
