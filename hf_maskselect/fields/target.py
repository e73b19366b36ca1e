"""What is pruned, how far and when: the fields and their rules."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..masking.patterns import NM, SCOPES, Channel, Unstructured, parse_pattern
from ..masking.schedule import check_levels, cubic_levels
from ..masking.targets import check_module_names
from .resolved import ResolvedConfig
from .rules import METHODS, check_choice, check_least, check_steps, check_types, listed


@dataclass
class TargetFields:
    """Fields of [`PruningConfig`] that say what is pruned, how far and when.

    Args:
        method (`str`, defaults to `"random"`): `"random"` draws several masks a level, tries each and keeps the best
            (arXiv 2310.13183); `"magnitude"`, `"fisher"` and `"taylor"` use one deterministic mask of that
            criterion; `"pdp"` trains through soft masks that harden at the end (arXiv 2305.11203); `"gumbel"` learns a
            mask over frozen weights (arXiv 2202.12986).
        sparsity (`float`, *optional*): fraction of zeros over the prunable weights, in (0, 1), met to the exact count.
            Defaults to 0.9375 (16x), or to the sparsity of an N:M pattern. Leave it unset with `gumbel_budget=False`,
            where it emerges.
        pattern (`str`, defaults to `"unstructured"`): or `"N:M"`, at most N of M consecutive weights along the input
            axis; or `"channel"`, whole output channels, the same share of every matrix (not for `"random"` and
            `"gumbel"`).
        scope (`str`, *optional*): of candidate 0. `"layer"`: every matrix at the target; `"global"`: one ranking;
            `"balanced"`: half-way (scores divided by the root of their matrix's mean, then one ranking). Defaults to
            `"layer"` for magnitude (as in the paper), to `"balanced"` for every other criterion, and to `"global"` for
            the soft methods, where it decides how many weights each matrix loses.
        layer_floor (`float`, defaults to 0.125): in a joint ranking every matrix keeps at least this share of what
            `"layer"` would leave it.
        permute_channels (`bool`, defaults to `False`): before the first mask of an N:M pattern, reorder hidden
            channels so that its groups keep more magnitude; the function computed is the same (see
            [`permute_channels`]).
        target_modules, exclude_modules (`list[str]`, *optional*): module-name suffixes or regexes, as in PEFT.
            Default: every `nn.Linear` of the encoder.
        keep_zeros (`bool`, defaults to `True`): weights that are zero in the model a run starts from stay zero, so
            that a pruned model is fine-tuned with its zeros kept, or pruned further. An N:M or channel pattern is
            refused where a group has fewer weights left than it keeps, or a matrix fewer whole rows. `False` lets
            zeros return, except those of frozen weights; use it for a model with matrices that are zero at their
            initialisation.
        levels (`list[float]`, *optional*): rising sparsities that end at `sparsity`.
        num_levels (`int`, *optional*): number of cubic levels where `levels` is not given; defaults to 4, and to 1 for
            N:M.
        last_level_weight (`float`, defaults to 2): length of the last level, in lengths of the others.
        pruning_warmup_steps (`float`, defaults to 0): dense optimizer steps before the first cut; below 1 a share of
            all. The paper of `"pdp"` has 0.16 (16 of 100 epochs): for a model that is not fine-tuned yet.
        lr_rewind (`bool`, defaults to `True`): restart `lr_scheduler_type` (with `warmup_steps`) at every level.
        level_eval_steps (`int`, defaults to 0): if positive, score the model on the held-out rows every so many steps;
            each level then ends with its best weights.
        pack_on_save (`bool`, defaults to `False`): `save_model` also writes `packed_model.safetensors`, lossless and
            near its entropy bound (see [`pack`]); checkpoints do not have it.
    """

    method: str = field(
        default="random", metadata={"help": "random, magnitude, fisher, taylor, pdp or gumbel", "choices": METHODS}
    )
    sparsity: float | None = field(
        default=None, metadata={"help": "Fraction of zeros over the prunable weights (0.9375)."}
    )
    pattern: str = field(default="unstructured", metadata={"help": "unstructured, channel, or N:M such as 2:4."})
    scope: str | None = field(default=None, metadata={"help": "Of candidate 0: layer, balanced or global."})
    layer_floor: float = field(
        default=0.125, metadata={"help": "Least share of the uniform allocation a matrix keeps."}
    )
    permute_channels: bool = field(
        default=False, metadata={"help": "Reorder hidden channels so that N:M keeps more magnitude."}
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Suffixes or regexes of modules to prune."}
    )
    exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Suffixes or regexes of modules to leave."}
    )
    keep_zeros: bool = field(default=True, metadata={"help": "Zeros of the model a run starts from stay zero."})
    levels: list[float] | None = field(default=None, metadata={"help": "Rising sparsities that end at the target."})
    num_levels: int | None = field(default=None, metadata={"help": "Number of cubic levels (4; for N:M 1)."})
    last_level_weight: float = field(
        default=2.0, metadata={"help": "Length of the last level in lengths of the others."}
    )
    pruning_warmup_steps: float = field(
        default=0, metadata={"help": "Dense steps before the first cut; < 1: a share."}
    )
    lr_rewind: bool = field(default=True, metadata={"help": "Restart the learning-rate schedule at every level."})
    level_eval_steps: int = field(
        default=0, metadata={"help": "Keep each level's best weights, scored every so many steps."}
    )
    pack_on_save: bool = field(default=False, metadata={"help": "Also write the packed file beside a saved model."})

    def _check_target_values(self) -> None:
        """Check each of these fields by itself."""
        check_types(self, TargetFields)
        for modules in (self.target_modules, self.exclude_modules):
            check_module_names(modules or ())
        check_choice("method", self.method, METHODS)
        parse_pattern(self.pattern)
        if self.scope is not None:
            check_choice("scope", self.scope, SCOPES)
        if not 0 <= self.layer_floor <= 1:
            raise ValueError(f"layer_floor={self.layer_floor} must lie in [0, 1]: a share of the uniform allocation")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(
                f"sparsity={self.sparsity} must lie inside (0, 1): it is the fraction of zeros, 0.9375 for 16x smaller"
            )
        if self.num_levels is not None:
            check_least("num_levels", self.num_levels, 1)
        if self.last_level_weight <= 0:
            raise ValueError(f"last_level_weight={self.last_level_weight} must be a positive number")
        check_steps("pruning_warmup_steps", self.pruning_warmup_steps)
        check_least("level_eval_steps", self.level_eval_steps, 0)

    def _check_target_rules(self, settings: ResolvedConfig) -> None:
        """Check these fields against each other and against those of other groups."""
        pattern, wanted = settings.pattern, f"with pattern={self.pattern!r}"
        if isinstance(pattern, Channel) and self.method in ("random", "gumbel"):
            raise ValueError(
                f"pattern='channel' has no meaning with method={self.method!r}, which draws single weights: use "
                "'pdp', 'magnitude', 'fisher' or 'taylor'"
            )
        if isinstance(pattern, Channel) and settings.searches:
            raise ValueError(
                f"num_candidates={settings.num_candidates} has no meaning {wanted}: candidates are drawn by votes on "
                "single weights, so leave num_candidates unset"
            )
        if self.permute_channels and not isinstance(pattern, NM):
            raise ValueError(
                f"permute_channels=True has no meaning {wanted}, which has no groups of columns: use an N:M pattern "
                "such as '2:4'"
            )
        if self.permute_channels and settings.gumbel is not None and settings.gumbel.signed_constant:
            raise ValueError(
                "permute_channels=True has no meaning with gumbel_signed_constant=True, which gives all weights of a "
                "matrix one magnitude: set one of them to False"
            )
        if not isinstance(pattern, Unstructured) and self.scope not in (None, "layer"):
            raise ValueError(
                f"scope={self.scope!r} has no meaning {wanted}, where every matrix keeps the same share: leave scope "
                "unset"
            )
        if isinstance(pattern, NM) and abs(settings.sparsity - pattern.sparsity) > 1e-9:
            raise ValueError(
                f"sparsity={self.sparsity} contradicts pattern={self.pattern!r}, which has {pattern.sparsity:g}: "
                "leave sparsity unset"
            )
        if settings.soft and not (self.levels in (None, [self.sparsity]) and self.num_levels in (None, 1)):
            raise ValueError(
                f"levels and num_levels have no meaning with method={self.method!r}, whose sparsity rises at every "
                "step: leave them unset"
            )
        check_levels(settings.levels, settings.sparsity)
        for level in settings.levels:
            pattern.check_sparsity(level)

    def _modules(self) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
        """Return `target_modules` and `exclude_modules`."""
        target, exclude = self.target_modules, self.exclude_modules
        return None if target is None else listed(target), None if exclude is None else listed(exclude)

    def _levels(self, pattern: Unstructured | NM | Channel, sparsity: float, soft: bool) -> tuple[float, ...]:
        """Return the given levels, or cubic ones; a soft method has one.

        Groups of an N:M pattern lose whole weights (from M:M down to N:M), in one level by default.
        """
        if self.levels is not None:
            return tuple(self.levels)
        number = 1 if soft else self.num_levels
        if not isinstance(pattern, NM):
            return tuple(cubic_levels(sparsity, number or 4))
        zeros = {max(1, round(level * pattern.m)) for level in cubic_levels(sparsity, number or 1)}
        return (*(count / pattern.m for count in sorted(zeros)[:-1]), sparsity)
