"""What is pruned, how far and when: the fields and their rules."""

from dataclasses import dataclass

from ..masking.base import Pattern
from ..masking.patterns import SCOPES, parse_pattern
from ..masking.schedule import check_levels
from ..masking.targets import check_module_names
from ..surgery.structured.record import STRUCTURED
from .resolved import ResolvedConfig
from .rules import (
    METHODS,
    check_choice,
    check_least,
    check_positive,
    check_steps,
    check_types,
    no_meaning,
    option,
)

MOST_LEVELS = 10_000


@dataclass
class TargetFields:
    """Fields of [`PruningConfig`] that say what is pruned, how far and when.

    Args:
        method (`str`, defaults to `"random"`): `"random"` draws several masks a level, tries each and keeps the best
            (arXiv 2310.13183); `"magnitude"`, `"fisher"`, `"taylor"`, `"platon"` and `"obert"` use one
            deterministic mask of that criterion; `"pdp"` trains through soft masks that harden at the end (arXiv
            2305.11203); `"gumbel"` learns a mask over frozen weights (arXiv 2202.12986); `"movement"` learns scores
            beside the weights (arXiv 2005.07683).
        sparsity (`float`, *optional*): fraction of zeros over the prunable weights, in (0, 1), met to the exact count.
            Defaults to 0.9375 (16x), or to the sparsity of an N:M pattern. Leave it unset with `gumbel_budget=False`,
            where it emerges.
        pattern (`str`, defaults to `"unstructured"`): or `"N:M"`, at most N of M consecutive weights along the input
            axis; `"RxC"` such as `"1x4"`, blocks of R outputs and C inputs that are kept or pruned whole, chosen as
            single weights are, by the sum of their scores; `"channel"`, whole output channels, the same share of
            every matrix (not for `"random"` and `"gumbel"`); or `"structured"`, which leaves no zeros but makes the
            model smaller (see [`StructureFields`]).
        scope (`str`, *optional*): of candidate 0. `"layer"`: every matrix at the target; `"global"`: one ranking;
            `"balanced"`: half-way (scores divided by the root of their matrix's mean, then one ranking). Defaults to
            `"layer"` for magnitude (as in the paper), to `"balanced"` for every other criterion, and to `"global"` for
            soft methods that begin from magnitudes. In a soft method it decides how many weights each matrix loses.
        layer_floor (`float`, defaults to 0.125): in a joint ranking every matrix keeps at least this share of what
            `"layer"` would leave it.
        target_modules, exclude_modules (`list[str]`, *optional*): module-name suffixes or regexes, as in PEFT.
            Default: the linear and convolution layers of the encoder.
        keep_zeros (`bool`, defaults to `True`): weights that are zero in the model a run starts from stay zero, so
            that a pruned model is fine-tuned with its zeros kept, or pruned further. A pattern is refused
            where a group has fewer weights left than it keeps, or a matrix fewer whole rows, or the model fewer whole
            blocks. `False` lets zeros return, except those of frozen weights; use it for a model with matrices that
            are zero at their initialisation.
        levels (`list[float]`, *optional*): rising sparsities that end at `sparsity`.
        num_levels (`int`, *optional*): number of cubic levels where `levels` is not given; defaults to 4, and to 1 for
            N:M.
        last_level_weight (`float`, defaults to 2): length of the last level, in lengths of the others.
        pruning_warmup_steps (`float`, defaults to 0): dense optimizer steps before the first cut; below 1 a share of
            all. The paper of `"pdp"` has 0.16 (16 of 100 epochs): for a model that is not fine-tuned yet.
        lr_rewind (`bool`, defaults to `True`): restart `lr_scheduler_type` (with `warmup_steps`) at every level.
            `"pdp"` and `"movement"` with `refit_rows` have one schedule for the whole run.
        level_eval_steps (`int`, defaults to 0): if positive, score the model on the held-out rows every so many steps;
            each level then ends with its best weights.
        pack_on_save (`bool`, defaults to `False`): `save_model` also writes `packed_model.safetensors`, lossless and
            near its entropy bound (see [`pack`]); checkpoints do not have it.
    """

    method: str = option(
        "random", "random, magnitude, fisher, taylor, platon, obert, pdp, gumbel or movement", METHODS
    )
    sparsity: float | None = option(None, "Fraction of zeros over the prunable weights (0.9375).")
    pattern: str = option("unstructured", "unstructured, channel, structured, N:M such as 2:4, or RxC such as 1x4.")
    scope: str | None = option(None, "Of candidate 0: layer, balanced or global.")
    layer_floor: float = option(0.125, "Least share of the uniform allocation a matrix keeps.")
    target_modules: list[str] | None = option(None, "Suffixes or regexes of modules to prune.")
    exclude_modules: list[str] | None = option(None, "Suffixes or regexes of modules to leave.")
    keep_zeros: bool = option(True, "Zeros of the model a run starts from stay zero.")
    levels: list[float] | None = option(None, "Rising sparsities that end at the target.")
    num_levels: int | None = option(None, "Number of cubic levels (4; for N:M 1).")
    last_level_weight: float = option(2.0, "Length of the last level in lengths of the others.")
    pruning_warmup_steps: float = option(0, "Dense steps before the first cut; < 1: a share.")
    lr_rewind: bool = option(True, "Restart the learning-rate schedule at every level.")
    level_eval_steps: int = option(0, "Keep each level's best weights, scored every so many steps.")
    pack_on_save: bool = option(False, "Also write the packed file beside a saved model.")

    def _check_target_values(self) -> None:
        """Check each of these fields by itself."""
        check_types(self, TargetFields)
        for modules in (self.target_modules, self.exclude_modules):
            check_module_names(modules or ())
        check_choice("method", self.method, METHODS)
        if self.pattern != STRUCTURED:
            parse_pattern(self.pattern)
        if self.scope is not None:
            check_choice("scope", self.scope, SCOPES)
        if not 0 <= self.layer_floor <= 1:
            raise ValueError(f"layer_floor={self.layer_floor} must lie in [0, 1]: a share of the uniform allocation")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(
                f"sparsity={self.sparsity} must lie inside (0, 1): it is the fraction of zeros, 0.9375 for 16x smaller"
            )
        check_least(self, num_levels=1, level_eval_steps=0)
        if self.num_levels is not None and self.num_levels > MOST_LEVELS:
            raise ValueError(f"num_levels={self.num_levels} must be at most {MOST_LEVELS}, since each takes a step")
        check_positive(self, last_level_weight=2)
        check_steps("pruning_warmup_steps", self.pruning_warmup_steps)

    def _check_target_rules(self, settings: ResolvedConfig) -> None:
        """Check these fields against each other and against those of other groups."""
        pattern, method, shown = settings.pattern, f"method={self.method!r}", f"pattern={self.pattern!r}"
        if settings.emergent and self.pattern != "unstructured":
            raise ValueError(f"{shown} needs gumbel_budget=True: the rule logit >= 0 keeps no fixed count")
        if settings.emergent and self.sparsity is not None:
            why = "where it emerges: leave it unset, or set gumbel_budget=True"
            raise no_meaning("sparsity", self.sparsity, "gumbel_budget=False", why)
        if not pattern.searchable and self.method in ("random", "gumbel"):
            why = "which draws single weights: use 'pdp' or a criterion, such as 'magnitude' or 'taylor'"
            raise no_meaning("pattern", self.pattern, method, why)
        if not pattern.searchable and settings.searches:
            why = "since candidates are drawn by votes on single weights: leave num_candidates unset"
            raise no_meaning("num_candidates", settings.num_candidates, shown, why)
        if self.scope not in (None, *pattern.scopes):
            why = "where every matrix keeps the same share: leave scope unset"
            raise no_meaning("scope", self.scope, shown, why)
        if pattern.sparsity is not None and abs(settings.sparsity - pattern.sparsity) > 1e-9:
            raise ValueError(
                f"sparsity={self.sparsity} contradicts {shown}, which has {pattern.sparsity:g}: leave sparsity unset"
            )
        if settings.soft and not (self.levels in (None, [self.sparsity]) and self.num_levels in (None, 1)):
            raise ValueError(
                f"levels and num_levels have no meaning with {method}, which has one target: leave them unset"
            )
        if settings.soft and settings.needs_selection_split and not settings.frozen_steps:
            name = "num_candidates" if settings.searches else "level_eval_steps"
            raise ValueError(
                f"{name}={getattr(self, name)} needs steps under the hard mask with {method}: set frozen_steps, such "
                "as 0.2"
            )
        if settings.structure is not None:
            return
        check_levels(settings.levels, settings.sparsity)
        for level in settings.levels:
            pattern.check_sparsity(level)

    def _levels(self, pattern: Pattern, sparsity: float, soft: bool) -> tuple[float, ...]:
        """Return the given levels, or those of the pattern; a soft method has one."""
        number = 1 if soft else self.num_levels
        return tuple(pattern.levels(sparsity, number) if self.levels is None else self.levels)
