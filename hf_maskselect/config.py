"""`PruningConfig`: `TrainingArguments` plus what to prune, how, and how to choose among masks."""

import copy
from dataclasses import dataclass, fields

from transformers import TrainingArguments

from .fields.distillation import DistillFields
from .fields.resolved import ResolvedConfig
from .fields.rules import SELECTION_LOSSES, SOFT_METHODS, check_inherited_types, greater_is_better, listed
from .fields.search import SearchFields
from .fields.soft import SoftFields
from .fields.structure import StructureFields
from .fields.target import TargetFields
from .masking.patterns import parse_pattern

_GROUPS = (TargetFields, StructureFields, SearchFields, SoftFields, DistillFields)
_EMERGENT = 0.5  # placeholder of `sparsity` where the method finds it; nothing is pruned by it


@dataclass
class PruningConfig(TargetFields, StructureFields, SearchFields, SoftFields, DistillFields, TrainingArguments):
    """Arguments of [`PruningTrainer`]: everything of `TrainingArguments`, and five groups of fields.

    * [`TargetFields`]: what is pruned, how far and when (`method`, `sparsity`, `pattern`, `levels`, ...).
    * [`StructureFields`]: smaller shapes instead of zeros (`target_speedup`, `keep_shape`, `latency_*`).
    * [`SearchFields`]: which candidate, and the refit (`num_candidates`, `proposals`, `refit_rows`, ...).
    * [`SoftFields`]: soft masks of `"pdp"`, `"gumbel"` and `"movement"` (`soft_ramp`, `frozen_steps`, `pdp_tau`, ...).
    * [`DistillFields`]: the losses of a teacher (`distill_*`, `hard_label_weight`).

    A field keeps the value that it was given, None where none was. [`resolved`] returns the values that a run uses.
    Any field may be set between two runs.

    Raises:
        ValueError: a field is out of range, or does not go with another; the message names field, value and remedy.
    """

    def __post_init__(self) -> None:
        self.resolved()
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # `TrainingArguments` would take every name that does not end in "loss" for greater is better.
            self.greater_is_better = greater_is_better(self.metric_for_best_model)
        super().__post_init__()

    def resolved(self) -> ResolvedConfig:
        """Check all fields and return everything that follows from them.

        Raises:
            ValueError: a field is out of range, or does not go with another.
        """
        check_inherited_types(self, TrainingArguments)
        self._check_target_values()
        self._check_structure_values()
        self._check_search_values()
        self._check_soft_values()
        self._check_distill_values()
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError(
                "bf16_full_eval and fp16_full_eval cast the trained weights for good, so pruning cannot go on after "
                "an evaluation: use bf16=True or fp16=True instead"
            )
        settings = self._resolve()
        self._check_structure_rules(settings)
        self._check_soft_rules(settings)
        self._check_search_rules(settings)
        self._check_target_rules(settings)
        return settings

    def pruning_fields(self) -> dict[str, object]:
        """Return a copy of the fields that `TrainingArguments` does not have, as they were given."""
        return {own.name: copy.copy(getattr(self, own.name)) for group in _GROUPS for own in fields(group)}

    def _resolve(self) -> ResolvedConfig:
        """Fill in every default; each field has passed the checks of its own."""
        soft = self.method in SOFT_METHODS
        own = self.criterion or self._criterion_of_soft(self.method)
        criterion = own if soft else self._criterion_of(self.method)
        gumbel = self._gumbel_options(criterion) if self.method == "gumbel" else None
        emergent = gumbel is not None and not gumbel.budget
        scope = "balanced" if criterion != "magnitude" else "global" if soft else "layer"
        structure = self._structure()
        name = "unstructured" if structure else self.pattern  # the masks of a smaller shape keep all
        pattern = parse_pattern(name, self.scope or scope, self.layer_floor)
        sparsity = self.sparsity
        if structure is not None:
            sparsity = sparsity or 0.0
        elif sparsity is None:
            sparsity = _EMERGENT if emergent else pattern.sparsity or 0.9375
        refit_rows, num_candidates = self.refit_rows, self.num_candidates
        frozen_steps = self._frozen(self.method, criterion) if soft else 0.0
        if refit_rows is None:  # magnitude is the plain baseline, and the settings of the papers stay the papers'
            never = criterion == "magnitude" or emergent
            if gumbel is None:
                never |= self.soft_ramp is not None
            else:  # it is refitted when its mask hardens
                never |= not frozen_steps
            refit_rows = 0 if never else 256
        if structure is not None:
            refit_rows, num_candidates = 0, 1  # of masks
        elif num_candidates is None:
            num_candidates = 4 if self.method == "random" else 1
        fits_start = soft and gumbel is None and refit_rows > 0
        target, exclude = self.target_modules, self.exclude_modules
        metric = None if self.selection_metric is None else self.selection_metric.removeprefix("eval_")
        return ResolvedConfig(
            method=self.method,
            soft=soft,
            emergent=emergent,
            sparsity=sparsity,
            pattern=pattern,
            scope=pattern.scope,
            criterion=criterion,
            levels=self._structure_levels() if structure else self._levels(pattern, sparsity, soft),
            num_candidates=num_candidates,
            proposals=listed(self.proposals),
            refit_rows=refit_rows,
            fits_start=fits_start,
            frozen_steps=frozen_steps,
            pdp_taus=self._pdp_taus(criterion),
            movement_prior=self._movement_prior(criterion),
            gumbel=gumbel,
            structure=structure,
            selection_metric=metric,
            selection_greater_is_better=self._selects_greater(metric),
            target_modules=None if target is None else listed(target),
            exclude_modules=None if exclude is None else listed(exclude),
            searches=num_candidates > 1,
            scores_after_refit=self._scores_after_refit(num_candidates > 1, refit_rows > 0 and not fits_start),
            needs_selection_split=num_candidates > 1 or self.level_eval_steps > 0 or structure is not None,
            pruning_warmup_steps=self.pruning_warmup_steps,
            soft_ramp=self._ramp(gumbel, criterion, fits_start),
            lr_rewind=self.lr_rewind and not fits_start,
            last_level_weight=self.last_level_weight,
        )

    def _selects_greater(self, metric: str | None) -> bool:
        """Return whether a greater value of the selection metric (without its prefix `eval_`) is better."""
        if metric is None or metric in SELECTION_LOSSES:
            return False
        if self.selection_greater_is_better is not None:
            return self.selection_greater_is_better
        same = (self.metric_for_best_model or "").removeprefix("eval_") == metric
        return greater_is_better(metric) if not same or self.greater_is_better is None else self.greater_is_better
