"""`PruningConfig`: `TrainingArguments` plus what to prune, how, and how to choose among masks."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from .masking.patterns import NM, SCOPES, Channel, Unstructured, parse_pattern
from .masking.schedule import LevelPlan, check_levels, cubic_levels
from .masking.scores import CRITERIA
from .masking.votes import SAMPLING_RATIOS
from .methods.gumbel import GumbelOptions
from .proposals import parse_proposal

SOFT_METHODS = ("pdp", "gumbel")
METHODS = ("random", *CRITERIA, *SOFT_METHODS)
_EMERGENT = 0.5  # stands for a sparsity that is no target; nothing is pruned by it
SELECTIONS = ("halving", "early")
SELECTION_LOSSES = ("loss", "teacher")
WHOLE_NUMBERS = (
    "num_levels",
    "num_candidates",
    "criterion_batches",
    "criterion_batch_size",
    "trial_steps",
    "level_eval_steps",
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


@dataclass
class PruningConfig(TrainingArguments):
    """Arguments of [`PruningTrainer`]: everything of `TrainingArguments`, and the fields below.

    > What to prune

    Args:
        method (`str`, defaults to `"random"`): `"random"` draws several masks a level and keeps the best after short
            trials (arXiv 2310.13183); `"magnitude"`, `"fisher"` and `"taylor"` use one deterministic mask of that
            criterion; `"pdp"` trains through soft masks that harden at the end (arXiv 2305.11203); `"gumbel"` learns a
            mask over frozen weights (arXiv 2202.12986).
        sparsity (`float`, *optional*): fraction of zeros over the prunable weights, in (0, 1), met to the exact count.
            Defaults to 0.9375 (16x), or to what an N:M pattern implies.
        pattern (`str`, defaults to `"unstructured"`): or `"N:M"`, at most N of M consecutive weights along the input
            axis; or `"channel"`, whole output channels, the same share of every matrix (not for `"random"` and
            `"gumbel"`).
        scope (`str`, *optional*): of candidate 0. `"layer"`: every matrix at the target; `"global"`: one ranking;
            `"balanced"`: half-way (scores divided by the root of their matrix's mean, then one ranking). Defaults to
            `"layer"` for magnitude (as in the paper), to `"balanced"` for every other criterion, and to `"global"` for
            the soft methods, where it decides how many weights each matrix loses.
        layer_floor (`float`, defaults to 0.125): in a joint ranking every matrix keeps at least this share of what
            `"layer"` would leave it.
        target_modules, exclude_modules (`list[str]`, *optional*): module-name suffixes or regexes, as in PEFT.
            Default: every `nn.Linear` of the encoder.

    > When

    Args:
        levels (`list[float]`, *optional*): rising sparsities that end at `sparsity`.
        num_levels (`int`, *optional*): number of cubic levels where `levels` is not given; defaults to 4, and to 1 for
            N:M.
        last_level_weight (`float`, defaults to 2): length of the last level, in lengths of the others.
        pruning_warmup_steps (`float`, *optional*): dense optimizer steps before the first cut; below 1 a share of
            all. Defaults to 0, and to 0.16 for `"pdp"` (16 of the paper's 100 epochs).
        lr_rewind (`bool`, defaults to `True`): restart `lr_scheduler_type` (with `warmup_steps`) at every level.
        level_eval_steps (`int`, defaults to 0): if positive, score the model on the selection split every so many
            steps and at each level's end go on from the level's best weights.

    > Soft masks (`"pdp"`, `"gumbel"`), in force from the warm-up on

    Args:
        soft_ramp (`float`, defaults to 0.8): share of the soft phase in which the sparsity rises to the target, linear
            in optimizer steps, in (0, 1]. 0.8 is the pace of the paper's 0.015 an epoch from epoch 16 of 100.
        frozen_steps (`float`, *optional*): steps at the end that train on under the frozen hard mask; below 1 a share
            of all. Defaults to 0.2, which heals what hardening breaks (`soft_hard_gap`, logged), and to 0 for
            `gumbel_untrained`; 0 hardens after the last step, as the papers do. Candidates need it: they are drawn
            when the mask hardens (neighbours of the method's own mask) and tried on these steps.
        pdp_tau (`float`, defaults to 1e-4): width of the soft band of `sigmoid((w^2 - t^2) / pdp_tau)`, in squared
            weight units; fits weights of standard deviation about 0.04, as in BERT's encoder.

    > Learned masks (`"gumbel"`)

    Args:
        gumbel_tau (`float`, defaults to 1): temperature of the straight-through gradient.
        gumbel_untrained (`bool`, defaults to `False`): the paper's setting, weights at their initialisation; changes
            the defaults of the next four fields.
        gumbel_budget (`bool`, *optional*): share the kept weights out by an exact budget that follows the ramp, and
            end in the best logits; else keep where the logit is >= 0 and let the sparsity emerge (leave `sparsity`
            unset then). Defaults to `True`, untrained to `False` (the paper).
        gumbel_initial_logit (`float`, *optional*): where logits start; a weight is kept with probability
            `sigmoid(logit)`. Defaults to 3, untrained to 0 (the paper).
        gumbel_prior (`float`, *optional*): adds this many times the standardized log-magnitude of each weight (in its
            matrix) to its first logit. Defaults to 1, untrained to 0 (the paper).
        gumbel_signed_constant (`bool`, *optional*): replace each weight by its sign times its matrix's standard
            deviation before training. Defaults to `False`, untrained to `True` (the paper).
        gumbel_rescale (`bool`, defaults to `True`): Smart Rescale, one learned scale a matrix, folded in at the end.
        gumbel_learning_rate (`float`, defaults to 0.05): of the logits, in an optimizer group of their own that
            follows `lr_scheduler_type`; for Adam. The paper's 50 belongs to plain SGD.
        gumbel_scale_learning_rate (`float`, defaults to 1e-3): of the scales.
        gumbel_train_rest (`bool`, defaults to `False`): also train biases, norms and embeddings of the body; the head
            always trains.

    > Which candidate

    Args:
        num_candidates (`int`, *optional*): masks tried at each level, candidate 0 being the deterministic one.
            Defaults to 4 for `"random"`; the other methods have one.
        proposals (`list[str]`, defaults to `["mixed"]`): `"mixed"` varies criterion, scope and randomness; `"paper"`
            is votes around magnitude per layer; or a list of `criterion:scope[:votes]`, such as `"taylor:global"`.
        criterion (`str`, *optional*): of candidate 0: `"magnitude"`, `"fisher"` or `"taylor"`. Defaults to `"taylor"`
            for `"random"` (to `"magnitude"` with the paper's proposals).
        criterion_batches (`int`, defaults to 256): gradient samples a level for fisher and taylor.
        criterion_batch_size (`int`, defaults to 8): rows of one gradient sample.
        selection (`str`, defaults to `"halving"`): `"halving"` drops the worse half after each rung and doubles the
            steps; `"early"` gives every candidate one trial and averages its last evaluations (the paper's EMEP).
        trial_steps (`int`, *optional*): optimizer steps of the first rung (of the whole trial for `"early"`). Defaults
            to a third of the level: shorter trials rank masks at random (for `"early"`: one epoch, at most the level).
        trial_learning_rate (`float`, *optional*): peak, decayed linearly to 0. Defaults to `learning_rate` (`"early"`:
            4x).
        sampling_ratios (`list[float]`): draws per removed weight of votes, rotating over the candidates.
        selection_fraction (`float`, defaults to 0.1): share of the train split held out to choose on, where no
            `selection_dataset` is given and the run chooses anything.
        selection_metric (`str`, *optional*): what a trial is scored by on the selection split: `"loss"` (the label
            loss), `"teacher"` (cross-entropy against the teacher's soft labels; both lower is better), or a key of
            `compute_metrics` (higher is better; the paper's choice). Defaults to `"teacher"` where a teacher distils a
            classification, else to `"loss"`: once the teacher is over-confident, the label loss prefers candidates
            that have learned less from it.

    > Distillation (used when a teacher is given; losses of arXiv 2310.13183)

    Args:
        distill_logits, distill_hidden (`float`, default 1): weights of the soft-label and hidden-state losses.
        distill_attention (`float`, defaults to 0): weight of the attention-map loss; 1 in the paper. Needs eager
            attention, which it switches on.
        distill_temperature (`float`, defaults to 1), hard_label_weight (`float`, defaults to 0).

    Raises:
        ValueError: a field is out of range; the message names the field, the value and the remedy.
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
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Suffixes or regexes of modules to prune."}
    )
    exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Suffixes or regexes of modules to leave."}
    )

    levels: list[float] | None = field(default=None, metadata={"help": "Rising sparsities that end at the target."})
    num_levels: int | None = field(default=None, metadata={"help": "Number of cubic levels (4; for N:M 1)."})
    last_level_weight: float = field(
        default=2.0, metadata={"help": "Length of the last level in lengths of the others."}
    )
    pruning_warmup_steps: float | None = field(
        default=None, metadata={"help": "Dense steps before the first cut; < 1: a share (0; pdp 0.16)."}
    )
    lr_rewind: bool = field(default=True, metadata={"help": "Restart the learning-rate schedule at every level."})
    level_eval_steps: int = field(
        default=0, metadata={"help": "Keep each level's best weights, scored every so many steps."}
    )

    soft_ramp: float = field(default=0.8, metadata={"help": "Share of the soft phase in which sparsity rises."})
    frozen_steps: float | None = field(
        default=None, metadata={"help": "Steps at the end under the frozen hard mask; < 1: a share (0.2)."}
    )
    pdp_tau: float = field(default=1e-4, metadata={"help": "Width of PDP's soft band, in squared weight units."})

    gumbel_tau: float = field(default=1.0, metadata={"help": "Temperature of the straight-through gradient."})
    gumbel_untrained: bool = field(default=False, metadata={"help": "Weights at their initialisation (the paper)."})
    gumbel_budget: bool | None = field(default=None, metadata={"help": "Exact budget; else the sparsity emerges."})
    gumbel_initial_logit: float | None = field(default=None, metadata={"help": "Where logits start (3; untrained 0)."})
    gumbel_prior: float | None = field(
        default=None, metadata={"help": "Weight of the log-magnitude in the first logits (1; untrained 0)."}
    )
    gumbel_signed_constant: bool | None = field(
        default=None, metadata={"help": "Weights become sign times standard deviation (untrained: true)."}
    )
    gumbel_rescale: bool = field(default=True, metadata={"help": "Smart Rescale: one learned scale a matrix."})
    gumbel_learning_rate: float = field(default=0.05, metadata={"help": "Learning rate of the logits."})
    gumbel_scale_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the scales."})
    gumbel_train_rest: bool = field(
        default=False, metadata={"help": "Also train biases, norms and embeddings of the body."}
    )

    num_candidates: int | None = field(default=None, metadata={"help": "Masks tried at each level (4 for random)."})
    proposals: list[str] = field(
        default_factory=lambda: ["mixed"], metadata={"help": "mixed, paper, or a list of criterion:scope[:votes]."}
    )
    criterion: str | None = field(default=None, metadata={"help": "Of candidate 0: magnitude, fisher or taylor."})
    criterion_batches: int = field(default=256, metadata={"help": "Gradient samples a level for fisher and taylor."})
    criterion_batch_size: int = field(default=8, metadata={"help": "Rows of one gradient sample."})
    selection: str = field(default="halving", metadata={"help": "halving or early.", "choices": SELECTIONS})
    trial_steps: int | None = field(default=None, metadata={"help": "Steps of the first rung (a third of the level)."})
    trial_learning_rate: float | None = field(default=None, metadata={"help": "Peak learning rate of the trials."})
    sampling_ratios: list[float] = field(
        default_factory=lambda: list(SAMPLING_RATIOS), metadata={"help": "Draws per removed weight, rotating."}
    )
    selection_fraction: float = field(
        default=0.1, metadata={"help": "Share of the train split held out to choose on."}
    )
    selection_metric: str | None = field(
        default=None, metadata={"help": "loss, teacher, or a key of compute_metrics (teacher where there is one)."}
    )

    distill_logits: float = field(default=1.0, metadata={"help": "Weight of the soft-label loss."})
    distill_hidden: float = field(default=1.0, metadata={"help": "Weight of the hidden-state loss."})
    distill_attention: float = field(default=0.0, metadata={"help": "Weight of the attention-map loss."})
    distill_temperature: float = field(default=1.0, metadata={"help": "Temperature of the soft labels."})
    hard_label_weight: float = field(default=0.0, metadata={"help": "Weight of the label loss beside the teacher's."})

    def __post_init__(self) -> None:
        self._check_pruning()
        super().__post_init__()

    @property
    def mask_pattern(self) -> Unstructured | NM | Channel:
        """The pattern with the scope of candidate 0."""
        return parse_pattern(self.pattern, self.scope, self.layer_floor)

    def plan(self, max_steps: int) -> LevelPlan:
        """When each level starts in a run of `max_steps` optimizer steps.

        Raises:
            ValueError: the target cannot be reached within them.
        """
        warmup = _steps(self.pruning_warmup_steps, max_steps)
        if self.soft:
            frozen = _steps(self.frozen_steps, max_steps)
            return LevelPlan.build_soft(self.sparsity, max_steps, warmup, frozen, self.soft_ramp)
        return LevelPlan.build(self.levels, max_steps, warmup, self.last_level_weight)

    @property
    def soft(self) -> bool:
        """Whether the method trains through soft masks."""
        return self.method in SOFT_METHODS

    @property
    def emergent(self) -> bool:
        """Whether the sparsity is no target but a result."""
        return self.method == "gumbel" and not self.gumbel_budget

    @property
    def gumbel_options(self) -> GumbelOptions:
        """The fields of the Gumbel method."""
        return GumbelOptions(
            tau=self.gumbel_tau,
            budget=self.gumbel_budget,
            rescale=self.gumbel_rescale,
            initial_logit=self.gumbel_initial_logit,
            prior=self.gumbel_prior,
            signed_constant=self.gumbel_signed_constant,
            logit_rate=self.gumbel_learning_rate,
            scale_rate=self.gumbel_scale_learning_rate,
            train_rest=self.gumbel_train_rest,
        )

    @property
    def searches(self) -> bool:
        """Whether a mask is chosen among several."""
        return self.num_candidates > 1

    @property
    def needs_selection_split(self) -> bool:
        """Whether the run makes any choice that must not look at the evaluation data."""
        return self.searches or self.level_eval_steps > 0

    def _check_pruning(self) -> None:
        for name in ("proposals", "target_modules", "exclude_modules"):  # a plain string is a list of one
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        self._check_types()
        check_choice("method", self.method, METHODS)
        check_choice("selection", self.selection, SELECTIONS)
        self._check_soft()
        self._check_candidates()
        self._check_scope()
        self._check_sparsity_and_levels()
        self._check_ranges()

    def _check_types(self) -> None:
        """Recipes are JSON or YAML, where a number is easily a string, a fraction or a list."""
        for name in WHOLE_NUMBERS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name}={value!r} must be a whole number")
        for name in NUMBERS:
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise ValueError(f"{name}={value!r} must be a finite number")
        for name in ("levels", "sampling_ratios"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, list | tuple) and all(_is_number(v) for v in value)):
                raise ValueError(f"{name}={value!r} must be a list of finite numbers, such as [0.5, 0.9]")

    def _check_soft(self) -> None:
        if self.pruning_warmup_steps is None:
            self.pruning_warmup_steps = 0.16 if self.method == "pdp" else 0
        if self.frozen_steps is None:
            self.frozen_steps = 0.2 if self.soft and not self.gumbel_untrained else 0
        for name in ("pruning_warmup_steps", "frozen_steps"):
            value = getattr(self, name)
            if value < 0 or (value > 1 and value % 1):
                raise ValueError(f"{name}={value} must be a share below 1 or a whole number of steps")
        if not 0 < self.soft_ramp <= 1:
            raise ValueError(f"soft_ramp={self.soft_ramp} must lie in (0, 1]: it is a share of the soft phase")
        for name, usual in (("pdp_tau", 1e-4), ("gumbel_tau", 1), ("gumbel_learning_rate", 0.05)):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive, such as {usual:g}")
        self._resolve_gumbel()
        if not self.soft:
            if self.frozen_steps:
                raise ValueError(
                    f"frozen_steps={self.frozen_steps} has no meaning with method={self.method!r}, whose masks are "
                    "always hard: use last_level_weight for a longer last level"
                )
            return
        if self.levels not in (None, [self.sparsity]) or self.num_levels not in (None, 1):
            raise ValueError(
                f"levels and num_levels have no meaning with method={self.method!r}, whose sparsity rises at every "
                "step: leave them unset"
            )
        self.num_levels = 1
        if self.proposals != ["mixed"]:
            raise ValueError(
                f"proposals={self.proposals} have no meaning with method={self.method!r}, whose candidates are "
                "neighbours of its own mask: leave proposals unset"
            )
        for name, wanted in (
            ("num_candidates", (self.num_candidates or 1) > 1),
            ("level_eval_steps", self.level_eval_steps),
        ):
            if wanted and not self.frozen_steps:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs steps under the hard mask with method={self.method!r}: set "
                    "frozen_steps, such as 0.2"
                )

    def _resolve_gumbel(self) -> None:
        new = self.gumbel_untrained
        resolved = {
            "gumbel_budget": not new,
            "gumbel_initial_logit": 0.0 if new else 3.0,
            "gumbel_prior": 0.0 if new else 1.0,
            "gumbel_signed_constant": new,
        }
        for name, value in resolved.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.method != "gumbel":
            return
        if self.scope == "balanced":
            raise ValueError(
                "scope='balanced' has no meaning with method='gumbel', whose logits are comparable as they are: use "
                "'global' or 'layer'"
            )
        if self.emergent and self.pattern != "unstructured":
            raise ValueError(
                f"pattern={self.pattern!r} needs gumbel_budget=True: the rule logit >= 0 keeps no fixed count"
            )
        if self.emergent and self.sparsity not in (None, _EMERGENT):
            raise ValueError(
                f"sparsity={self.sparsity} has no meaning with gumbel_budget=False, where it emerges: leave it unset, "
                "or set gumbel_budget=True"
            )

    def _check_candidates(self) -> None:
        paper = self.proposals == ["paper"]
        if self.soft:
            if self.criterion is not None:
                raise ValueError(
                    f"criterion={self.criterion!r} has no meaning with method={self.method!r}, which makes its own "
                    "masks: leave criterion unset"
                )
            self.criterion = "magnitude"  # reads no gradients
        elif self.method != "random":
            if self.criterion not in (None, self.method):
                raise ValueError(
                    f"criterion={self.criterion!r} contradicts method={self.method!r}: leave criterion unset, or use "
                    "method='random' with num_candidates=1"
                )
            if self.num_candidates not in (None, 1):
                raise ValueError(
                    f"num_candidates={self.num_candidates} has no meaning with method={self.method!r}, which has one "
                    "deterministic mask: use method='random' to choose among several"
                )
        self.criterion = self.criterion or (
            self.method if self.method != "random" else "magnitude" if paper else "taylor"
        )
        check_choice("criterion", self.criterion, CRITERIA)
        if self.num_candidates is None:
            self.num_candidates = 4 if self.method == "random" else 1
        if self.num_candidates < 1:
            raise ValueError(f"num_candidates={self.num_candidates} must be at least 1 (the deterministic mask)")
        if not self.proposals:
            raise ValueError("proposals is empty: use 'mixed', 'paper' or a list such as ['taylor:global']")
        if self.proposals not in (["mixed"], ["paper"]):
            for text in self.proposals:
                parse_proposal(text, [*CRITERIA, "score_fn"], ratio=1.0)

    def _check_scope(self) -> None:
        if not 0 <= self.layer_floor <= 1:
            raise ValueError(f"layer_floor={self.layer_floor} must lie in [0, 1]: a share of the uniform allocation")
        pattern = parse_pattern(self.pattern)
        if isinstance(pattern, Channel) and self.method in ("random", "gumbel"):
            raise ValueError(
                f"pattern='channel' has no meaning with method={self.method!r}, which draws single weights: use "
                "'pdp', 'magnitude', 'fisher' or 'taylor'"
            )
        if not isinstance(pattern, Unstructured):
            if self.scope not in (None, "layer"):
                raise ValueError(
                    f"scope={self.scope!r} has no meaning with pattern={self.pattern!r}, where every matrix keeps the "
                    "same share: leave scope unset"
                )
            self.scope = "layer"
        elif self.scope is None:
            self.scope = "global" if self.soft else "layer" if self.criterion == "magnitude" else "balanced"
        check_choice("scope", self.scope, SCOPES)

    def _check_sparsity_and_levels(self) -> None:
        pattern = parse_pattern(self.pattern, self.scope, self.layer_floor)
        if self.sparsity is None and self.emergent:
            self.sparsity = _EMERGENT
        if self.sparsity is None:
            self.sparsity = pattern.sparsity if isinstance(pattern, NM) else 0.9375
        if not 0 < self.sparsity < 1:
            raise ValueError(
                f"sparsity={self.sparsity} must lie inside (0, 1): it is the fraction of zeros, 0.9375 for 16x smaller"
            )
        if isinstance(pattern, NM) and abs(self.sparsity - pattern.sparsity) > 1e-9:
            raise ValueError(
                f"sparsity={self.sparsity} contradicts pattern={self.pattern!r}, which has "
                f"{pattern.sparsity:g}: leave sparsity unset"
            )
        if self.num_levels is not None and self.num_levels < 1:
            raise ValueError(f"num_levels={self.num_levels} must be at least 1")
        if self.levels is None:
            self.levels = pattern_levels(pattern, self.sparsity, self.num_levels)
        check_levels(self.levels, self.sparsity)
        for level in self.levels:
            pattern.check_sparsity(level)
        self.num_levels = len(self.levels)

    def _check_ranges(self) -> None:
        for name, low in (("criterion_batches", 0), ("criterion_batch_size", 1), ("level_eval_steps", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")
        for name in ("trial_steps", "trial_learning_rate", "last_level_weight"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive")
        if not self.sampling_ratios or min(self.sampling_ratios) <= 0:
            raise ValueError(f"sampling_ratios={self.sampling_ratios} must be positive numbers, such as [5e-5, 1e-4]")
        if not 0 < self.selection_fraction < 1:
            raise ValueError(
                f"selection_fraction={self.selection_fraction} must lie inside (0, 1): it is the share of the train "
                "split "
                "held out to choose on; pass selection_dataset to choose on other data"
            )
        if self.criterion_batches == 0 and self.criterion != "magnitude":
            raise ValueError(
                f"criterion_batches=0 gives criterion={self.criterion!r} no gradients: set it to 64 or more, or use "
                "method='magnitude'"
            )
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError(
                "bf16_full_eval and fp16_full_eval cast the trained weights for good, so pruning cannot go on after "
                "an "
                "evaluation: use bf16=True or fp16=True instead"
            )


def _steps(value: float, max_steps: int) -> int:
    """A number of steps, or a share of `max_steps` below 1."""
    return int(value * max_steps) if 0 < value < 1 else int(value)


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
