"""Gumbel-Softmax subnetworks with Smart Rescale.

From "Extracting Effective Subnetworks with Gumbel-Softmax" (Dupont, Alaoui, Sahbi, Lebois; ICIP 2022; arXiv
2202.12986). In the soft phase the weights are frozen; one logit per weight and one scale per matrix are trained. Every
optimizer step draws one hard mask, and the model computes with `scale * weight * mask`. At the end the weights are
multiplied by their scale, and the mask is fixed: where `logit >= 0` (the paper; the sparsity emerges), or the best
logits of an exact budget (ours). The budget also holds in training: one shift of all logits keeps the expected number
of kept weights on the ramp. So logits only compete with each other, and no penalty has to be tuned.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..masking.allocation import allocate, kept_count
from ..masking.base import Pattern
from ..masking.groups import Groups
from ..masking.maskset import MaskSet
from ..masking.schedule import LevelPlan
from .gumbel_sample import budget_shift, perturbed, sample
from .hard import FindWeights
from .learned import NEVER, LearnedUnits

_SCALE, _SHIFT = "scale.", "shift."  # prefixes in a checkpoint


@dataclass(frozen=True)
class GumbelOptions:
    """Options of the Gumbel method.

    Attributes:
        tau: temperature.
        budget: hold the expected number of kept weights on the ramp and end in the exact count; else the paper's rule.
        rescale: learn the scales.
        initial_logit: the logits start at `initial_logit + prior * z`.
        prior: weight of z, the standardized log-magnitude of each weight in its matrix; or, where a soft phase begins
            from scores, the log of their comparable scores, standardized over all matrices.
        signed_constant: before training, replace each weight by its sign times its matrix's standard deviation.
        logit_rate: learning rate of the logits.
        scale_rate: learning rate of the scales.
        train_rest: in the soft phase, also train parameters of the `base_model` that are not prunable; else only the
            head, the part of a transformers model outside it, is trained besides the masks.
    """

    tau: float
    budget: bool
    rescale: bool
    initial_logit: float
    prior: float
    signed_constant: bool
    logit_rate: float
    scale_rate: float
    train_rest: bool


class Gumbel(LearnedUnits):
    """Learned masks over frozen weights.

    Args:
        pattern: its units have one logit each. Its scope says how scores are made comparable, and which units share a
            budget: those of a matrix for "layer", else all; or it has groups, each of which keeps its best, from all
            weights down to the target along the ramp.
        sparsity: the target; not used without a budget.
        seed_of: returns the seed of an optimizer step's sample.
        scored: whether logits start from the scores of a criterion; else from magnitudes.
        refits: whether the hardened model is refitted. The targets are then the frozen weights without their scales.
    """

    apart, prefix, called = True, "logits.", "logit"

    def __init__(
        self,
        find_weights: FindWeights,
        report: Callable[[dict[str, float]], None],
        pattern: Pattern,
        sparsity: float,
        options: GumbelOptions,
        seed_of: Callable[[int], int],
        scored: bool = False,
        refits: bool = False,
        keep_zeros: bool = True,
    ) -> None:
        first, prior, rate = options.initial_logit, options.prior, options.logit_rate
        super().__init__(find_weights, report, pattern, sparsity, first, prior, rate, scored, False, keep_zeros)
        self._refits = refits
        self._targets: dict[str, Tensor] = {}  # while the masks of the hardened model are chosen
        self._options, self._seed_of = options, seed_of
        self._scales: dict[str, nn.Parameter] = {}
        self._shifts: dict[str, float] = {}
        self._slopes: dict[str, Tensor] = {}  # derivatives of the sample by the logits, for one step
        self._frozen: list[nn.Parameter] = []
        self._generator = torch.Generator()

    # -- what is trained ---------------------------------------------------------------------------------------------

    def renew(self, model: nn.Module) -> None:
        """Make the logits and scales of a new model."""
        super().renew(model)
        self._shifts = {}
        for name, weight in self.weights.items():
            one = torch.ones((), device=weight.device)
            self._scales[name] = nn.Parameter(one, requires_grad=self._options.rescale)
        body = model.base_model if isinstance(model, PreTrainedModel) else model
        self._frozen = [] if self._options.train_rest else list(body.parameters())

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the logits and scales of an earlier run."""
        super().reset()
        self._shifts = {}
        for scale in self._scales.values():
            scale.fill_(1.0)
            self.optimizer.state.pop(scale, None)

    def parameter_groups(self) -> list[dict]:
        """The logits, and the scales if they are learned."""
        groups = super().parameter_groups()
        if self._options.rescale:
            groups.append({"params": list(self._scales.values()), "lr": self._options.scale_rate, "weight_decay": 0.0})
        return groups

    @torch.no_grad()
    def begin(self, plan: LevelPlan, optimizer: torch.optim.Optimizer) -> None:
        """Start to train by `plan`, with weights of one magnitude a matrix if asked for."""
        if self._options.signed_constant and self._steps_done == 0:
            for weight in self.weights.values():
                weight.copy_(weight.sign() * weight.float().contiguous().std())
        super().begin(plan, optimizer)

    # -- one step ----------------------------------------------------------------------------------------------------

    def prepare(self, step: int) -> None:
        """Seed the samples of the step and compute the shifts that hold the budgets."""
        self.start()
        device = next(iter(self._learned.values())).device
        self._generator = torch.Generator(device=device).manual_seed(self._seed_of(step))
        if self._options.budget and self._pattern.groups is None:
            pools = self._pools()
            for names, keep in zip(pools, self._budgets(pools, self.plan.ramp_at(step) * self._sparsity), strict=True):
                pool = [self._learned[name] for name in names]
                shift = NEVER / 2  # keeps every weight that is not pruned
                if keep is not None:
                    try:
                        shift = budget_shift(pool, keep, self._shifts.get(names[0], 0.0))
                    except ValueError:
                        self.finite()
                        raise
                self._shifts.update(dict.fromkeys(names, shift))

    def _pools(self) -> list[list[str]]:
        """Names that share one budget."""
        names = list(self._learned)
        return [names] if self._pattern.scope == "global" else [[name] for name in names]

    def _budgets(self, pools: list[list[str]], sparsity: float) -> list[float | None]:
        """How many units each pool is to keep on average; None for all that are not pruned."""
        sizes, allowed = [sum(self._learned[name].numel() for name in names) for names in pools], self._allowed_units()
        if allowed is None:
            density = 1 - sparsity
            return [density * size for size in sizes]
        room = [sum(int(torch.count_nonzero(allowed[name])) for name in names) for names in pools]
        quotas = allocate(min(kept_count(sum(sizes), sparsity), sum(room)), sizes, room)
        # A share that rounds to nothing is half a unit on average.
        return [None if quota == left else max(quota, 0.5) for quota, left in zip(quotas, room, strict=True)]

    def _groups_now(self) -> Groups | None:
        """The groups at this point of the ramp; None if there are none, and while they keep every weight."""
        groups = self._pattern.groups
        return None if groups is None else groups.after(self.plan.ramp_at(self._step))

    def effective(self, name: str, weight: Tensor) -> Tensor:
        """The weight times its scale and a sample of its mask."""
        drawn = perturbed(self._learned[name].data, self._generator)
        drawn.sub_(self._shifts.get(name, 0.0))
        groups = self._groups_now()
        if self._pattern.groups is not None and groups is None:
            mask, slope = torch.ones_like(drawn, dtype=torch.bool), torch.zeros_like(drawn)
        else:
            mask, slope = sample(drawn, self._options.tau, groups)
        self._slopes[name] = slope
        return weight * self._scales[name].data.to(weight.dtype) * self._pattern.spread(mask, weight)

    def carry(self, name: str, weight: Tensor, grad: Tensor, effective: Tensor) -> None:
        """Compute the gradients of the scale and the logits."""
        scale = self._scales[name]
        if scale.requires_grad:
            scale.grad = (grad * effective).sum(dtype=torch.float32).div_(scale.data)
        # d effective / d logit = scale * weight * slope, in the memory of the gradient, which is not needed any more
        slope = self._pattern.spread(self._slopes.pop(name), weight)
        of_weights = grad.float().mul_(slope).mul_(weight).mul_(scale.data)
        self._learned[name].grad = self._pattern.unit_scores(of_weights)  # row-major, as the logits are

    def gap(self, masks: MaskSet) -> float:
        """The change by hardening, from one sample."""
        gap = super().gap(masks)
        self._slopes.clear()
        return gap

    def before_clipping(self) -> None:
        """Compute the gradients of logits and scales, and clear those of frozen parameters."""
        stepping = bool(self._trained)
        super().before_clipping()
        if stepping:
            for parameter in (*self._frozen, *self.weights.values()):
                parameter.grad = None

    def on_optimizer_step(self) -> None:
        """Set the pruned weights to zero and clear the gradients of logits and scales."""
        super().on_optimizer_step()
        for scale in self._scales.values():
            scale.grad = None

    # -- masks ------------------------------------------------------------------------------------

    def hard_masks(self) -> MaskSet:
        """The best logits at this point of the ramp; without a budget, those >= 0."""
        self.start()
        logits = self.finite()
        if not self._options.budget:
            return MaskSet({name: t >= 0 for name, t in logits.items()})
        if self._pattern.groups is None:
            sparsity, allowed = self.plan.ramp_at(self._step) * self._sparsity, self._allowed_units()
            if allowed is not None:  # early on the ramp the model has more zeros than it asks for
                sparsity = max(sparsity, MaskSet(allowed).sparsity())
            return self.spread(self._pattern.unit_masks(logits, sparsity, self._allowed_units()))
        groups = self._groups_now()
        if groups is None:
            return MaskSet.ones(self.weights)
        if groups == self._pattern.groups:
            return self.best(logits)
        return MaskSet({name: groups.best(t) for name, t in logits.items()})  # they may need pruned weights

    def candidate(self, ratio: float | None, seed: int) -> MaskSet:
        """The best logits at the target, or a sample of the learned law with the exact count."""
        self.start()
        scores = self.finite()
        if ratio is not None:
            generator = torch.Generator(device=next(iter(scores.values())).device).manual_seed(seed)
            scores = {name: perturbed(t, generator) for name, t in scores.items()}
        if not self._options.budget:
            return MaskSet({name: t >= 0 for name, t in scores.items()})
        return self.best(scores)

    def folded(self, name: str, weight: Tensor) -> Tensor:
        """The weight times its scale."""
        return weight * self._scales[name].data.to(weight.dtype)

    def prepare_level(self) -> None:
        """Leave the soft phase, and note the weights without their scales for the refit."""
        if self._refits:
            self._targets = {n: self._weight(n).to(torch.bfloat16, copy=True) for n in self.weights}
        super().prepare_level()

    def targets(self) -> Mapping[str, Tensor]:
        """The frozen weights, in bfloat16, while the masks of the hardened model are chosen."""
        return self._targets

    def start_level(self, level: int, masks: MaskSet) -> None:
        """Put the hard masks in force; the refit is done."""
        super().start_level(level, masks)
        self._targets = {}

    # -- resume ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, logits, scales and shifts; empty outside the soft phase."""
        state = super().state_dict()
        if state:
            state |= {_SCALE + name: scale.data for name, scale in self._scales.items()}
            for name, shift in self._shifts.items():  # the start of Newton's method decides the next shift's last bits
                state[_SHIFT + name] = torch.tensor(shift, dtype=torch.float64)
        return state

    @torch.no_grad()
    def load_state_dict(self, masks: MaskSet, state: dict[str, Tensor], step: int) -> None:
        """Restore a checkpoint with its logits, scales and shifts."""
        super().load_state_dict(masks, state, step)
        for name in self.weights if state else ():
            self._scales[name].copy_(state[_SCALE + name])
        self._shifts = {name: float(state[_SHIFT + name]) for name in self.weights if _SHIFT + name in state}
