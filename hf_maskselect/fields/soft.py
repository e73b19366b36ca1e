"""Soft masks (`"pdp"`, `"gumbel"`, `"movement"`): the fields and their rules."""

from dataclasses import dataclass, fields

from ..methods.gumbel import GumbelOptions
from .resolved import ResolvedConfig
from .rules import SOFT_METHODS, check_positive, check_steps, check_types, no_meaning, option


@dataclass
class SoftFields:
    """Fields of [`PruningConfig`] for soft masks, which are in force from the end of the warm-up on.

    Every method begins from a ranking of the weights, which `criterion` (or a `score_fn`) makes. For `"pdp"` and
    `"gumbel"` the default is `"taylor"`: gradients are sampled when the soft phase begins. `criterion="magnitude"` is
    that of the papers. It is the default for `"movement"`, where `pdp_tau` is given, with `gumbel_untrained`, and with
    `gumbel_prior=0` or `gumbel_budget=False`.

    The defaults of `"gumbel"` differ for `gumbel_untrained`, the setting of its paper ("untrained"), and for
    `criterion="magnitude"`.

    Args:
        soft_ramp (`float`, *optional*): share of the soft phase in which the sparsity rises to the target, linear in
            optimizer steps, in (0, 1]. `"pdp"` and `"movement"` have no ramp with `refit_rows`, the default for all
            criteria but magnitude: the model is fitted to the target when the soft phase begins. Else defaults to 0.8,
            the pace of PDP's paper (0.015 an epoch from epoch 16 of 100), and to 0.3 for `"gumbel"` with another
            criterion than magnitude.
        frozen_steps (`float`, *optional*): steps at the end that train on under the frozen hard mask; below 1 a share
            of all. They heal what hardening breaks (`soft_hard_gap`, logged). Defaults to 0.3. For `"gumbel"`, whose
            weights do not train before, to 0.7. With `criterion="magnitude"` to 0.2. For `gumbel_untrained` to 0: the
            mask hardens after the last step, as in the papers. Candidates need these steps: they are drawn when the
            mask hardens (neighbours of the method's own mask).
        pdp_tau (`float`, *optional*): width of the soft band of `sigmoid((w^2 - t^2) / pdp_tau)`, in squared weight
            units (the paper), only for `criterion="magnitude"`. Defaults to 1e-4, which fits weights of standard
            deviation about 0.04, as in BERT's encoder.
        pdp_relative_tau (`float`, *optional*): the same in units of t^2 at each step, so that it fits weights and
            scores of any scale. With another criterion than magnitude every |w| is multiplied by a fixed factor, and
            the products rank like the criterion's scores (made comparable by `scope`) when the soft phase begins.
            Defaults to 0.1 for these; for magnitude `pdp_tau` counts.
        gumbel_tau (`float`, defaults to 1): temperature of the straight-through gradient.
        gumbel_untrained (`bool`, defaults to `False`): the paper's setting, weights at their initialisation.
        gumbel_budget (`bool`, *optional*): share the kept weights out by an exact budget that follows the ramp, and
            end in the best logits; else keep where the logit is >= 0 and let the sparsity emerge (leave `sparsity`
            unset then). Defaults to `True`, untrained to `False` (the paper).
        gumbel_initial_logit (`float`, *optional*): where logits start; a weight is kept with probability
            `sigmoid(logit)`. Defaults to 3, untrained to 0 (the paper).
        gumbel_prior (`float`, *optional*): adds this many times the logarithm of each weight's comparable score,
            standardized over all matrices, to its first logit; for magnitude standardized in its own matrix. Defaults
            to 10, so that samples differ at the boundary only; for magnitude to 1, untrained to 0 (the paper).
        gumbel_signed_constant (`bool`, *optional*): replace each weight by its sign times its matrix's standard
            deviation before training. Defaults to `False`, untrained to `True` (the paper).
        gumbel_rescale (`bool`, defaults to `True`): Smart Rescale, one learned scale per matrix, folded in at the end.
        gumbel_learning_rate (`float`, *optional*): of the logits, in an optimizer group of their own that follows
            `lr_scheduler_type`; for Adam. Defaults to 0.1, for magnitude to 0.5, untrained to 0.05. The paper's 50
            belongs to plain SGD.
        gumbel_scale_learning_rate (`float`, defaults to 1e-3): of the scales.
        gumbel_train_rest (`bool`, *optional*): also train biases, norms and embeddings of the body in the soft
            phase. Defaults to `True`, untrained to `False` (the paper). The head (what lies outside `base_model`)
            always trains; in the warm-up and under the frozen mask everything does.
        movement_learning_rate (`float`, defaults to 0.01): of the scores, in an optimizer group of their own that
            follows `lr_scheduler_type`; for Adam (the paper).
        movement_prior (`float`, *optional*): the scores start at this many times the logarithm of each weight's
            magnitude (or comparable score, with another `criterion`), standardized over all matrices. Defaults to
            0.01, about one step of their training, so that the first cuts go by magnitude, and to 1 with another
            criterion. With 0 all scores start at 0 (the paper), and ties are cut by index.
    """

    soft_ramp: float | None = option(
        None, "Share of the soft phase in which sparsity rises (0.8; none with a fit; gumbel 0.3)."
    )
    frozen_steps: float | None = option(None, "Steps at the end under the hard mask; < 1: a share (0.3; gumbel 0.7).")
    pdp_tau: float | None = option(None, "Width of PDP's soft band, in squared weight units (magnitude: 1e-4).")
    pdp_relative_tau: float | None = option(None, "The same in units of t^2 (0.1).")
    gumbel_tau: float = option(1.0, "Temperature of the straight-through gradient.")
    gumbel_untrained: bool = option(False, "Weights at their initialisation (the paper).")
    gumbel_budget: bool | None = option(None, "Exact budget; else the sparsity emerges.")
    gumbel_initial_logit: float | None = option(None, "Where logits start (3; untrained 0).")
    gumbel_prior: float | None = option(None, "Weight of the log-scores in the first logits (10; magnitude 1).")
    gumbel_signed_constant: bool | None = option(
        None, "Weights become sign times standard deviation (untrained: true)."
    )
    gumbel_rescale: bool = option(True, "Smart Rescale: one learned scale per matrix.")
    gumbel_learning_rate: float | None = option(None, "Learning rate of the logits (0.1; magnitude 0.5).")
    gumbel_scale_learning_rate: float = option(1e-3, "Learning rate of the scales.")
    gumbel_train_rest: bool | None = option(
        None, "Also train biases, norms and embeddings of the body (untrained: false)."
    )
    movement_learning_rate: float = option(0.01, "Learning rate of the scores of movement.")
    movement_prior: float | None = option(None, "Weight of the log-scores in the first scores (magnitude 0.01).")

    def _check_soft_values(self) -> None:
        """Check each of these fields by itself."""
        check_types(self, SoftFields)
        if self.soft_ramp is not None and not 0 < self.soft_ramp <= 1:
            raise ValueError(f"soft_ramp={self.soft_ramp} must lie in (0, 1]: it is a share of the soft phase")
        if self.frozen_steps is not None:
            check_steps("frozen_steps", self.frozen_steps)
        check_positive(self, pdp_tau=1e-4, pdp_relative_tau=0.1, gumbel_tau=1, gumbel_learning_rate=0.1)
        check_positive(self, gumbel_scale_learning_rate=1e-3, movement_learning_rate=0.01)
        if self.movement_prior is not None and self.movement_prior < 0:
            raise ValueError(f"movement_prior={self.movement_prior} must be at least 0: larger scores start ahead")

    def _check_soft_rules(self, settings: ResolvedConfig) -> None:
        """Check these fields against each other and against those of other groups."""
        method, gumbel = f"method={settings.method!r}", settings.gumbel
        for own in fields(SoftFields):
            prefix, value = own.name.partition("_")[0], getattr(self, own.name)
            of_other = prefix in SOFT_METHODS and settings.method != prefix
            if value != own.default and (of_other or own.name == "soft_ramp" and not settings.soft):
                owner = prefix if of_other else "soft methods"
                raise no_meaning(own.name, value, method, f"since it belongs to {owner}: leave it unset")
        if self.soft_ramp is not None and settings.fits_start:
            why = "which fits the model to its target when the soft phase begins: leave one of them unset"
            raise no_meaning("soft_ramp", self.soft_ramp, f"refit_rows={settings.refit_rows}", why)
        if self.frozen_steps and not settings.soft:
            why = "whose masks are always hard: use last_level_weight for a longer last level"
            raise no_meaning("frozen_steps", self.frozen_steps, method, why)
        if gumbel is not None and gumbel.prior and gumbel.signed_constant:
            why = "which gives all weights of a matrix one magnitude: set one of them to 0 or False"
            raise no_meaning("gumbel_prior", gumbel.prior, "gumbel_signed_constant=True", why)
        learned = {"gumbel": gumbel.prior if gumbel else 0.0, "movement": settings.movement_prior}
        if settings.method in learned and settings.scope == "balanced" and settings.criterion == "magnitude":
            why = "whose learned numbers are comparable as they are: use 'global' or 'layer'"
            raise no_meaning("scope", "balanced", f"{method} and criterion='magnitude'", why)
        if settings.criterion != "magnitude" and learned.get(settings.method) == 0:
            why = "which starts all weights alike: leave criterion unset"
            raise no_meaning("criterion", settings.criterion, f"{settings.method}_prior=0", why)
        if self.pdp_tau is not None and settings.criterion != "magnitude":
            why = "whose scores have another scale: use pdp_relative_tau"
            raise no_meaning("pdp_tau", self.pdp_tau, f"criterion={settings.criterion!r}", why)
        if self.pdp_tau is not None and self.pdp_relative_tau is not None:
            why = "which is the same width in another unit: leave one of them unset"
            raise no_meaning("pdp_relative_tau", self.pdp_relative_tau, f"pdp_tau={self.pdp_tau}", why)
        if settings.method == "movement" and settings.searches:
            why = "which has one mask: leave num_candidates unset, or use method='random'"
            raise no_meaning("num_candidates", settings.num_candidates, method, why)
        if settings.emergent and settings.searches:
            why = "since samples of a mask without a budget differ in sparsity: set gumbel_budget=True"
            raise no_meaning("num_candidates", settings.num_candidates, "gumbel_budget=False", why)

    def _criterion_of_soft(self, method: str) -> str:
        """Return what a soft method begins from, where no criterion was given."""
        ranks_nothing = self.gumbel_untrained or self.gumbel_budget is False or self.gumbel_prior == 0
        if method == "movement" or (method == "gumbel" and ranks_nothing) or self.pdp_tau is not None:
            return "magnitude"
        return "taylor"

    def _frozen(self, method: str, criterion: str) -> float:
        """Return `ResolvedConfig.frozen_steps` of a soft method."""
        if self.frozen_steps is not None:
            return self.frozen_steps
        if self.gumbel_untrained:
            return 0.0
        return 0.2 if criterion == "magnitude" else 0.7 if method == "gumbel" else 0.3

    def _pdp_taus(self, criterion: str) -> tuple[float | None, float]:
        """Return `ResolvedConfig.pdp_taus`."""
        if criterion == "magnitude" and self.pdp_relative_tau is None:
            return self.pdp_tau or 1e-4, 0.1
        return None, self.pdp_relative_tau or 0.1

    def _movement_prior(self, criterion: str) -> float:
        """Return `ResolvedConfig.movement_prior`."""
        if self.movement_prior is not None:
            return self.movement_prior
        return 0.01 if criterion == "magnitude" else 1.0

    def _ramp(self, gumbel: GumbelOptions | None, criterion: str, fits_start: bool) -> float:
        """Return `ResolvedConfig.soft_ramp`."""
        if fits_start:
            return 0.0
        return self.soft_ramp or (0.3 if gumbel is not None and criterion != "magnitude" else 0.8)

    def _gumbel_options(self, criterion: str) -> GumbelOptions:
        """Return the options of the Gumbel method; `gumbel_untrained` and the criterion decide what was not given."""
        paper, scored = self.gumbel_untrained, criterion != "magnitude"

        def given(value, default):
            return default if value is None else value

        return GumbelOptions(
            tau=self.gumbel_tau,
            budget=given(self.gumbel_budget, not paper),
            rescale=self.gumbel_rescale,
            initial_logit=given(self.gumbel_initial_logit, 0.0 if paper else 3.0),
            prior=given(self.gumbel_prior, 0.0 if paper else 10.0 if scored else 1.0),
            signed_constant=given(self.gumbel_signed_constant, paper),
            logit_rate=given(self.gumbel_learning_rate, 0.05 if paper else 0.1 if scored else 0.5),
            scale_rate=self.gumbel_scale_learning_rate,
            train_rest=given(self.gumbel_train_rest, not paper),
        )
