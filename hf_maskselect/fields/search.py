"""Which candidate is chosen, and the refit after a cut: the fields and their rules."""

from dataclasses import dataclass

from ..masking.fisher_blocks import DAMPING
from ..masking.proposals import parse_proposal
from ..masking.scores import CRITERIA
from ..masking.votes import SAMPLING_RATIOS
from .resolved import ResolvedConfig
from .rules import (
    SELECTION_LOSSES,
    SELECTIONS,
    check_choice,
    check_least,
    check_positive,
    check_types,
    listed,
    no_meaning,
    option,
)


@dataclass
class SearchFields:
    """Fields of [`PruningConfig`] that say which candidate a level takes and how the kept weights are refitted.

    Args:
        num_candidates (`int`, *optional*): masks tried at each level, candidate 0 being the deterministic one.
            Defaults to 4 for `"random"` and to 1 for the others; of these, soft methods may have more.
        proposals (`list[str]`, defaults to `["mixed"]`): `"mixed"` varies criterion, scope and randomness; `"paper"`
            is votes around candidate 0; or a list of `criterion:scope[:votes]`, such as `"taylor:global"`.
        criterion (`str`, *optional*): of candidate 0: `"magnitude"`, `"fisher"`, `"taylor"`, `"platon"` or `"obert"`.
            Defaults to `"taylor"` for `"random"` (to `"magnitude"` with the paper's proposals). For the soft methods
            the ranking that they begin with, see [`SoftFields`].
        criterion_batches (`int`, defaults to 64): gradient samples per level for every criterion but magnitude; those
            of a soft method are taken once, when its soft phase begins.
        criterion_batch_size (`int`, defaults to 8): rows of one gradient sample.
        obert_damping (`float`, defaults to 0.1): what is added to the diagonal of the Fisher information of
            `"obert"`, as a multiple of the mean squared gradient of the matrix (of one sample).
        obert_memory (`float`, defaults to 1): GiB for the gradients that `"obert"` holds, two bytes a weight and
            sample; at least those of one matrix. The samples pass once for every such share of all gradients.
        selection (`str`, defaults to `"halving"`): `"halving"` drops the worse half after each rung and doubles the
            steps; every trial starts from the weights of the run. `"survivors"` lets every candidate continue from the
            weights it has trained, and the run continues from the winner's. `"early"` gives every candidate one trial
            and averages its last evaluations (EMEP in the paper).
        trial_steps (`int`, *optional*): optimizer steps of the first rung (of the whole trial for `"early"`). 0 scores
            each mask right after its refit, without training; in our benchmarks this ranked masks as well as training
            a whole level. Default of `"halving"`: 0 with a refit (unless one of the next two fields is set), else a
            third of the level. Default of `"survivors"`: an eighth of the level, but at least 40 steps or half the
            level. Default of `"early"`: one epoch, but at most the level.
        trial_batch_size (`int`, *optional*): rows of one trial step. Defaults to those of a training step over all
            devices, so that the choice does not depend on their number; one device runs a trial alone, so with many
            of them fewer rows are cheaper (`hf-maskselect plan` shows the cost).
        trial_learning_rate (`float`, *optional*): peak, decayed linearly to 0. Defaults to `learning_rate`, or with
            your own optimizer to its first learning rate above 0 (`"early"`: 4 times that).
        sampling_ratios (`list[float]`): draws of votes per pruned weight; the candidates take them in turn.
        selection_fraction (`float`, defaults to 0.1): share of the train split held out to choose on, where no
            `selection_dataset` is given and the run chooses anything.
        max_selection_samples (`int`, defaults to 500): at most so many rows are held out; every trial is scored on
            all of them.
        selection_metric (`str`, *optional*): the score of a trial on the held-out rows: `"loss"` (the label loss),
            `"teacher"` (cross-entropy against the teacher's soft labels; both lower is better), or a key of
            `compute_metrics`, with or without `eval_` (the paper's choice). Defaults to `"teacher"` where a teacher
            distils a classification, else to `"loss"`: once the teacher is over-confident, the label loss prefers
            candidates that have learned less from it.
        selection_greater_is_better (`bool`, *optional*): direction of a key of `compute_metrics`. Defaults to
            `greater_is_better` where the key is `metric_for_best_model`, else to what its name says: False for losses
            and errors such as `"rmse"`, `"wer"` or `"perplexity"`, True for all others.
        refit_rows (`int`, *optional*): train rows for the refit of every cut matrix (hard masks): least squares over
            its kept weights against its output before the cut (see [`refit`]); at most so many rows as have 16,384
            positions (tokens, patches or frames). A candidate's refit row costs as much as a training row, and the
            uncut model's pass, which all candidates share, a third. `"pdp"` and `"movement"` refit once, when
            their soft phase begins, and `"gumbel"`, whose weights do not train in it, when its mask hardens. Defaults
            to 256, and to 0 (off) where `criterion` is magnitude, the plain baseline, with `soft_ramp` (not for
            `"gumbel"`), and for `"gumbel"` without `frozen_steps` or budget. The errors after a cut and after its
            refit are logged as `cut_error` and `refit_error` (for `"pdp"` and `"movement"` as `soft_cut_error` and
            `soft_fit_error`), as shares of the variance of the outputs.
    """

    num_candidates: int | None = option(None, "Masks tried at each level (4 for random).")
    proposals: list[str] = option(("mixed",), "mixed, paper, or a list of criterion:scope[:votes].")
    criterion: str | None = option(None, "Of candidate 0: magnitude, fisher, taylor, platon or obert.")
    criterion_batches: int = option(64, "Gradient samples per level (magnitude takes none).")
    criterion_batch_size: int = option(8, "Rows of one gradient sample.")
    obert_damping: float = option(DAMPING, "Added to the diagonal, in mean squared gradients.")
    obert_memory: float = option(1.0, "GiB of gradients that obert holds.")
    selection: str = option("halving", "halving, survivors or early.", SELECTIONS)
    trial_steps: int | None = option(None, "Steps of the first rung (0 where matrices are refitted, else a third).")
    trial_batch_size: int | None = option(None, "Rows of one trial step (those of a training step over all devices).")
    trial_learning_rate: float | None = option(None, "Peak learning rate of the trials.")
    sampling_ratios: list[float] = option(SAMPLING_RATIOS, "Draws per removed weight, rotating.")
    selection_fraction: float = option(0.1, "Share of the train split held out to choose on.")
    max_selection_samples: int = option(500, "At most so many rows are held out.")
    selection_metric: str | None = option(
        None, "loss, teacher, or a key of compute_metrics (teacher where there is one)."
    )
    selection_greater_is_better: bool | None = option(None, "Direction of selection_metric (by its name).")
    refit_rows: int | None = option(None, "Train rows that cut matrices are refitted on (256; magnitude 0).")

    def _check_search_values(self) -> None:
        """Check each of these fields by itself."""
        check_types(self, SearchFields)
        check_choice("selection", self.selection, SELECTIONS)
        if self.criterion is not None:
            check_choice("criterion", self.criterion, CRITERIA)
        check_least(self, num_candidates=1, criterion_batches=0, criterion_batch_size=1, trial_steps=0, refit_rows=0)
        check_least(self, max_selection_samples=1)
        check_positive(self, trial_batch_size=8, trial_learning_rate=5e-5, obert_damping=DAMPING, obert_memory=1)
        if not self.proposals:
            raise ValueError("proposals is empty: use 'mixed', 'paper' or a list such as ['taylor:global']")
        if listed(self.proposals) not in (("mixed",), ("paper",)):
            for text in listed(self.proposals):
                parse_proposal(text, [*CRITERIA, "score_fn"], ratio=1.0)
        if not self.sampling_ratios or min(self.sampling_ratios) <= 0:
            raise ValueError(f"sampling_ratios={self.sampling_ratios} must be positive numbers, such as [5e-5, 1e-4]")
        if not 0 < self.selection_fraction < 1:
            raise ValueError(
                f"selection_fraction={self.selection_fraction} must lie inside (0, 1): it is the share of the train "
                "split held out to choose on; pass selection_dataset to choose on other data"
            )

    def _check_search_rules(self, settings: ResolvedConfig) -> None:
        """Check these fields against each other and against those of other groups."""
        method = settings.method
        if settings.soft:
            self._check_of_soft(settings)
        elif method != "random":
            if self.criterion not in (None, method):
                raise ValueError(
                    f"criterion={self.criterion!r} contradicts method={method!r}: leave criterion unset, or use "
                    "method='random' with num_candidates=1"
                )
            if settings.searches:
                why = "which has one deterministic mask: use method='random' to choose among several"
                raise no_meaning("num_candidates", self.num_candidates, f"method={method!r}", why)
        listed_criteria = {text.partition(":")[0] for text in settings.proposals}
        for name, default in ("obert_damping", DAMPING), ("obert_memory", 1.0):
            if getattr(self, name) != default and "obert" not in {settings.criterion, *listed_criteria}:
                why = "since no proposal is by obert: leave it unset"
                raise no_meaning(name, getattr(self, name), f"criterion={settings.criterion!r}", why)
        if self.selection_greater_is_better and settings.selection_metric in (None, *SELECTION_LOSSES):
            beside, why = f"selection_metric={self.selection_metric!r}", "which is a loss: leave it unset"
            raise no_meaning("selection_greater_is_better", True, beside, why)
        if self.criterion_batches == 0 and settings.structure is None and settings.criterion != "magnitude":
            remedy = "use criterion='magnitude'" if settings.soft else "use method='magnitude'"
            remedy = "leave criterion unset with proposals='paper'" if method == "random" else remedy
            raise ValueError(
                f"criterion_batches=0 gives criterion={settings.criterion!r} no gradients: set it to 64 or more, or "
                f"{remedy}"
            )
        if self.trial_steps != 0:
            return
        if settings.fits_start:
            why = "which is refitted before its mask hardens: leave trial_steps unset"
            raise no_meaning("trial_steps", 0, f"method={method!r}", why)
        if not settings.refit_rows or self.selection != "halving":
            raise ValueError(
                "trial_steps=0 scores masks after their refit, without any training: it needs refit_rows, which is "
                f"{settings.refit_rows}, and selection='halving', which is {self.selection!r}; leave trial_steps unset"
            )
        for name in ("trial_batch_size", "trial_learning_rate"):
            if getattr(self, name) is not None:
                why = "which trains no candidate: leave trial_steps unset"
                raise no_meaning(name, getattr(self, name), "trial_steps=0", why)

    def _check_of_soft(self, settings: ResolvedConfig) -> None:
        """Check what a soft method allows."""
        method = f"method={settings.method!r}"
        if settings.proposals != ("mixed",):
            why = "whose candidates are neighbours of its own mask: leave proposals unset"
            raise no_meaning("proposals", list(settings.proposals), method, why)
        if self.refit_rows and settings.emergent:
            why = "which keeps the weights as they are: leave refit_rows unset, or set gumbel_budget=True"
            raise no_meaning("refit_rows", self.refit_rows, "gumbel_budget=False", why)
        if settings.refits_cuts and not settings.frozen_steps:
            why = "which ends with the cut: set frozen_steps, such as 0.7"
            raise no_meaning("refit_rows", self.refit_rows, f"{method} and frozen_steps=0", why)

    def _criterion_of(self, method: str) -> str:
        """Return the criterion of candidate 0; the method names it, except for `"random"`."""
        if method != "random":
            return method
        return self.criterion or ("magnitude" if listed(self.proposals) == ("paper",) else "taylor")

    def _scores_after_refit(self, searches: bool, refits_cuts: bool) -> bool:
        """Return whether candidates are scored right after their refit, without training."""
        if self.trial_steps is not None:
            return self.trial_steps == 0
        trains = self.trial_batch_size or self.trial_learning_rate
        return searches and refits_cuts and self.selection == "halving" and not trains
