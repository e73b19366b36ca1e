"""`PruningConfig`: `TrainingArguments` plus what to prune, how, and how to choose among masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from transformers import TrainingArguments

from .fields.rules import METHODS, SELECTIONS, SOFT_METHODS, check_pruning, check_unchanged, decided
from .masking.patterns import NM, Channel, Unstructured, parse_pattern
from .masking.schedule import LevelPlan
from .masking.votes import SAMPLING_RATIOS
from .methods.gumbel import GumbelOptions


@dataclass
class PruningConfig(TrainingArguments):
    """Arguments of [`PruningTrainer`]: everything of `TrainingArguments`, and the fields below.

    > What to prune

    Args:
        method (`str`, defaults to `"random"`): `"random"` draws several masks a level, tries each and keeps the best
            (arXiv 2310.13183); `"magnitude"`, `"fisher"` and `"taylor"` use one deterministic mask of that
            criterion; `"pdp"` trains through soft masks that harden at the end (arXiv 2305.11203); `"gumbel"` learns a
            mask over frozen weights (arXiv 2202.12986).
        sparsity (`float`, *optional*): fraction of zeros over the prunable weights, in (0, 1), met to the exact count.
            Defaults to 0.9375 (16x), or to what an N:M pattern implies. Leave it unset with `gumbel_budget=False`,
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

    > When

    Args:
        levels (`list[float]`, *optional*): rising sparsities that end at `sparsity`.
        num_levels (`int`, *optional*): number of cubic levels where `levels` is not given; defaults to 4, and to 1 for
            N:M.
        last_level_weight (`float`, defaults to 2): length of the last level, in lengths of the others.
        keep_zeros (`bool`, defaults to `True`): weights that are zero in the model a run starts from stay zero, so
            that a pruned model is fine-tuned with its zeros kept, or pruned further. An N:M or channel pattern is
            refused where a group has fewer weights left than it keeps, or a matrix fewer whole rows. `False` lets
            zeros return, but for those of frozen weights: for that, and for a model with matrices that are zero at
            their initialisation.
        pruning_warmup_steps (`float`, defaults to 0): dense optimizer steps before the first cut; below 1 a share of
            all. The paper of `"pdp"` has 0.16 (16 of 100 epochs): for a model that is not fine-tuned yet.
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
            defaults below ("untrained").
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
        gumbel_learning_rate (`float`, *optional*): of the logits, in an optimizer group of their own that follows
            `lr_scheduler_type`; for Adam. Defaults to 0.5, untrained to 0.05. The paper's 50 belongs to plain SGD.
        gumbel_scale_learning_rate (`float`, defaults to 1e-3): of the scales.
        gumbel_train_rest (`bool`, *optional*): also train biases, norms and embeddings of the body in the soft
            phase. Defaults to `True`, untrained to `False` (the paper). The head (what lies outside `base_model`)
            always trains; in the warm-up and under the frozen mask everything does.

    > Which candidate

    Args:
        num_candidates (`int`, *optional*): masks tried at each level, candidate 0 being the deterministic one.
            Defaults to 4 for `"random"`; the other methods have one.
        proposals (`list[str]`, defaults to `["mixed"]`): `"mixed"` varies criterion, scope and randomness; `"paper"`
            is votes around magnitude per layer; or a list of `criterion:scope[:votes]`, such as `"taylor:global"`.
        criterion (`str`, *optional*): of candidate 0: `"magnitude"`, `"fisher"` or `"taylor"`. Defaults to `"taylor"`
            for `"random"` (to `"magnitude"` with the paper's proposals).
        criterion_batches (`int`, defaults to 64): gradient samples a level for fisher and taylor.
        criterion_batch_size (`int`, defaults to 8): rows of one gradient sample.
        selection (`str`, defaults to `"halving"`): `"halving"` drops the worse half after each rung and doubles the
            steps, each trial from the same start; in `"survivors"` every candidate goes on from the weights it has
            trained, and then the run from the winner's; `"early"` gives every candidate one trial and averages its
            last evaluations (the paper's EMEP).
        trial_steps (`int`, *optional*): optimizer steps of the first rung (of the whole trial for `"early"`). 0
            compares masks as they are fitted, before any training, for a fit and a score a candidate: that tells as
            much as a whole level. It is the default for `"halving"` where matrices are fitted (`refit_rows`) and
            neither of the next two fields is given. Else a third of the level, since shorter trials of masks that are
            not fitted rank them at random (for `"survivors"`: an eighth, and at least 40 or half the level; for
            `"early"`: one epoch, at most the level).
        trial_batch_size (`int`, *optional*): rows of one trial step. Defaults to those of a training step over all
            devices, so that the choice does not depend on their number; one device runs a trial alone, so with many
            of them fewer rows are cheaper (`hf-maskselect plan` tells the cost).
        trial_learning_rate (`float`, *optional*): peak, decayed linearly to 0. Defaults to `learning_rate`, or to that
            of the first group that learns in an optimizer that the trainer is given (`"early"`: 4x).
        sampling_ratios (`list[float]`): draws per removed weight of votes, rotating over the candidates.
        selection_fraction (`float`, defaults to 0.1): share of the train split held out to choose on, where no
            `selection_dataset` is given and the run chooses anything.
        max_selection_samples (`int`, defaults to 500): at most so many rows are held out; every trial is scored on
            all of them.
        selection_metric (`str`, *optional*): what a trial is scored by on the selection split: `"loss"` (the label
            loss), `"teacher"` (cross-entropy against the teacher's soft labels; both lower is better), or a key of
            `compute_metrics`, with or without `eval_` (higher is better; the paper's choice). Defaults to `"teacher"`
            where a teacher distils a classification, else to `"loss"`: once the teacher is over-confident, the label
            loss prefers candidates that have learned less from it.

    > Distillation (used when a teacher is given; losses of arXiv 2310.13183)

    Args:
        distill_logits, distill_hidden (`float`, default 1): weights of the soft-label and hidden-state losses.
        distill_attention (`float`, defaults to 0): weight of the attention-map loss; 1 in the paper. Needs eager
            attention, which it switches on.
        distill_temperature (`float`, defaults to 1), hard_label_weight (`float`, defaults to 0).

    > After each cut (hard masks)

    Args:
        refit_rows (`int`, *optional*): train rows on which every cut matrix is fitted to what it computed before, by
            least squares over the weights it keeps, before training goes on (see [`refit`]); at most so many as have
            16,384 tokens. Costs as much as training on twice as many rows. Defaults to 256, and to 0 (off) where
            `criterion` is magnitude, the plain baseline.

    > Storage

    Args:
        pack_on_save (`bool`, defaults to `False`): `save_model` also writes `packed_model.safetensors`, lossless and
            near its entropy bound (see [`pack`]); checkpoints do not have it.

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
    gumbel_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the logits (0.5; untrained 0.05)."}
    )
    gumbel_scale_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the scales."})
    gumbel_train_rest: bool | None = field(
        default=None, metadata={"help": "Also train biases, norms and embeddings of the body (untrained: false)."}
    )

    num_candidates: int | None = field(default=None, metadata={"help": "Masks tried at each level (4 for random)."})
    proposals: list[str] = field(
        default_factory=lambda: ["mixed"], metadata={"help": "mixed, paper, or a list of criterion:scope[:votes]."}
    )
    criterion: str | None = field(default=None, metadata={"help": "Of candidate 0: magnitude, fisher or taylor."})
    criterion_batches: int = field(default=64, metadata={"help": "Gradient samples a level for fisher and taylor."})
    criterion_batch_size: int = field(default=8, metadata={"help": "Rows of one gradient sample."})
    selection: str = field(default="halving", metadata={"help": "halving, survivors or early.", "choices": SELECTIONS})
    trial_steps: int | None = field(
        default=None, metadata={"help": "Steps of the first rung (0 where matrices are refitted, else a third)."}
    )
    trial_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of one trial step (those of a training step over all devices)."}
    )
    trial_learning_rate: float | None = field(default=None, metadata={"help": "Peak learning rate of the trials."})
    sampling_ratios: list[float] = field(
        default_factory=lambda: list(SAMPLING_RATIOS), metadata={"help": "Draws per removed weight, rotating."}
    )
    selection_fraction: float = field(
        default=0.1, metadata={"help": "Share of the train split held out to choose on."}
    )
    max_selection_samples: int = field(default=500, metadata={"help": "At most so many rows are held out."})
    selection_metric: str | None = field(
        default=None, metadata={"help": "loss, teacher, or a key of compute_metrics (teacher where there is one)."}
    )

    distill_logits: float = field(default=1.0, metadata={"help": "Weight of the soft-label loss."})
    distill_hidden: float = field(default=1.0, metadata={"help": "Weight of the hidden-state loss."})
    distill_attention: float = field(default=0.0, metadata={"help": "Weight of the attention-map loss."})
    distill_temperature: float = field(default=1.0, metadata={"help": "Temperature of the soft labels."})
    hard_label_weight: float = field(default=0.0, metadata={"help": "Weight of the label loss beside the teacher's."})

    refit_rows: int | None = field(
        default=None, metadata={"help": "Train rows that cut matrices are fitted on (256; magnitude 0)."}
    )

    pack_on_save: bool = field(default=False, metadata={"help": "Also write the packed file beside a saved model."})

    _decided: ClassVar[Mapping[str, object]] = {}  # of one that an earlier version has pickled

    def __post_init__(self) -> None:
        check_pruning(self)
        self._decided = decided(self)
        super().__post_init__()

    def check_again(self) -> None:
        """Before a run: what was set since the configuration was made.

        Raises:
            ValueError: a field is out of range, or one from which others follow is another.
        """
        check_unchanged(self, self._decided)
        self._decided = decided(self)  # other levels have set their number

    @property
    def mask_pattern(self) -> Unstructured | NM | Channel:
        """The pattern with the scope of candidate 0."""
        return parse_pattern(self.pattern, self.scope, self.layer_floor)

    def plan(self, max_steps: int, start: float = 0.0) -> LevelPlan:
        """When each level starts in a run of `max_steps` optimizer steps.

        start: sparsity of the model the run begins with; levels that it has reached are left out, but for the last.

        Raises:
            ValueError: the target cannot be reached within them.
        """
        warmup = _steps(self.pruning_warmup_steps, max_steps)
        if self.soft:
            frozen = _steps(self.frozen_steps, max_steps)
            if self.needs_selection_split and not frozen:
                raise ValueError(
                    f"frozen_steps={self.frozen_steps} of {max_steps} steps is not one step, and choosing needs some: "
                    "raise frozen_steps"
                )
            return LevelPlan.build_soft(self.sparsity, max_steps, warmup, frozen, self.soft_ramp)
        levels = [level for level in self.levels if level > start] or self.levels[-1:]
        return LevelPlan.build(levels, max_steps, warmup, self.last_level_weight)

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
    def compares_fitted(self) -> bool:
        """Whether masks are compared as they are fitted, before any training (wherever any matrix can be fitted)."""
        if self.trial_steps is not None:
            return self.trial_steps == 0
        trains = self.trial_batch_size or self.trial_learning_rate
        return self.searches and bool(self.refit_rows) and self.selection == "halving" and not trains

    @property
    def needs_selection_split(self) -> bool:
        """Whether the run makes any choice that must not look at the evaluation data."""
        return self.searches or self.level_eval_steps > 0


def _steps(value: float, max_steps: int) -> int:
    """A number of steps, or a share of `max_steps` below 1."""
    return int(value * max_steps) if 0 < value < 1 else int(value)
