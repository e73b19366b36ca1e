"""The criteria: how much a weight matters, as pure functions of the weight and its gradient statistics."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .dtensors import local_rows
from .fisher_blocks import DAMPING, MEMORY, chunks_of, inverse_diagonal, shortened


@dataclass(frozen=True)
class WeightStats:
    """Gradient statistics of one weight over `samples` small batches; float32, shaped like the weight.

    square: sum of g^2 (diagonal empirical Fisher, up to a factor). product: sum of |g * w|. sensitivity: moving
    average of |g * w|, from 0. uncertainty: moving average of the distance of |g * w| from `sensitivity`. inverse:
    diagonal of the inverse Fisher information in blocks (`fisher_blocks`). None when not collected; a `score_fn` gets
    the first two.
    """

    square: Tensor | None
    product: Tensor | None
    samples: int
    sensitivity: Tensor | None = None
    uncertainty: Tensor | None = None
    inverse: Tensor | None = None


PLATON_BETAS = (0.85, 0.95)  # of the moving averages of sensitivity and uncertainty, as in the paper

ScoreFn = Callable[[str, Tensor, WeightStats], Tensor]


def magnitude(name: str, weight: Tensor, stats: WeightStats) -> Tensor:
    """|w|, the classic criterion, and the base of the paper on random masks (EMNLP Findings 2023)."""
    return weight.detach().abs().float()


def fisher(name: str, weight: Tensor, stats: WeightStats) -> Tensor:
    """w^2 * sum g^2, the loss increase expected from pruning w under a diagonal Fisher (Optimal Brain Damage)."""
    assert stats.square is not None
    return weight.detach().float().square() * stats.square


def taylor(name: str, weight: Tensor, stats: WeightStats) -> Tensor:
    """Sum of |g * w|: the first-order change of each sample's loss when w is pruned, without cancelling."""
    assert stats.product is not None
    return stats.product


def platon(name: str, weight: Tensor, stats: WeightStats) -> Tensor:
    """Smoothed sensitivity times smoothed uncertainty (Zhang et al., ICML 2022, arXiv 2206.12562).

    A weight counts if pruning it changes the loss, and also if batches disagree about that.
    """
    assert stats.sensitivity is not None and stats.uncertainty is not None
    return stats.sensitivity * stats.uncertainty


def obert(name: str, weight: Tensor, stats: WeightStats) -> Tensor:
    """w^2 / (2 [F^-1]): the loss increase when w is pruned and the rest of its block makes up for it.

    Optimal Brain Surgeon with the Fisher information in blocks (Kurtic et al., EMNLP 2022, arXiv 2203.07259).
    """
    assert stats.inverse is not None
    return weight.detach().float().square() / (2 * stats.inverse)


PAPER_EXPONENT = 5.0  # of votes by magnitude


@dataclass(frozen=True)
class Criterion:
    """A score function, the `WeightStats` fields that it needs, and the exponent of its votes.

    vote_exponent: the power that turns the score into drawing probabilities, 5 for scores that grow like |w| (the
    exponent of the paper) and 2.5 for those that grow like w^2.
    """

    score: ScoreFn
    needs: tuple[str, ...]
    vote_exponent: float

    @property
    def degree(self) -> float:
        """The power of |w| that the score grows with while the gradients stay."""
        return PAPER_EXPONENT / self.vote_exponent


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude, (), 5.0),
    "fisher": Criterion(fisher, ("square",), 2.5),
    "taylor": Criterion(taylor, ("product",), 5.0),
    "platon": Criterion(platon, ("sensitivity", "uncertainty"), 2.5),
    "obert": Criterion(obert, ("inverse",), 2.5),
}


def criteria_with(score_fn: ScoreFn | None) -> dict[str, Criterion]:
    """The built-in criteria, and the user's `score_fn` under that name. It may read all statistics."""
    return CRITERIA if score_fn is None else {**CRITERIA, "score_fn": Criterion(score_fn, ("square", "product"), 5.0)}


def checked_score(score_fn: ScoreFn, name: str, weight: Tensor, stats: WeightStats) -> Tensor:
    """Call a score function and refuse scores that cannot be ranked.

    Returns:
        float32 scores shaped like `weight`.

    Raises:
        ValueError: wrong shape, or NaN or infinity in the scores; the message names the tensor.
    """
    score = score_fn(name, weight, stats)
    if not isinstance(score, Tensor) or score.shape != weight.shape:
        got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(
            f"the scores of {name} must be a tensor of shape {tuple(weight.shape)}, got {got}: check score_fn"
        )
    score = score.detach().to(weight.device, torch.float32, copy=True)  # may be overwritten from here on
    score = score.contiguous()
    if not bool(torch.isfinite(torch.stack(score.aminmax())).all()):
        raise ValueError(
            f"NaN or infinity in the scores of {name}: check the weights, and the loss that gave the gradients "
            "(a smaller learning rate, or fp32 instead of fp16)"
        )
    return score


class GradientStats:
    """Collects gradient statistics over many small batches, in place and without keeping a graph.

    Use it as a context manager around `passes` and `sample`. Inside, the gradient of a named weight is consumed as
    soon as it is complete, and no other parameter gets a gradient, so the memory peak is the statistics plus one
    matrix. For "inverse" the gradients of a chunk of matrices are held besides, in half precision, and the samples
    pass once for every chunk. On leaving, `requires_grad` and `.grad` are as they were.

    Args:
        model: the model whose loss is sampled.
        weights: the weights by name.
        needs: which fields of `WeightStats` to collect; float32 each.
        damping: for "inverse", see `inverse_diagonal`.
        memory: for "inverse", bytes of gradients that are held at a time, but at least those of one matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        needs: set[str],
        damping: float = DAMPING,
        memory: float = MEMORY,
    ) -> None:
        self._model, self._weights, self._damping, self._memory = model, dict(weights), damping, memory
        self._sums = {
            kind: {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
            for kind in sorted(needs - {"inverse"})
        }
        self._inverse: dict[str, Tensor] | None = {} if "inverse" in needs else None
        self._held: dict[str, list[Tensor]] = {}  # gradients of a chunk of matrices, for its inverse
        self._samples = 0
        self.rounds = 0  # how often the samples have passed

    def __enter__(self) -> GradientStats:
        chosen = {id(w): n for n, w in self._weights.items()}
        self._trained = {id(p): p.requires_grad for p in self._model.parameters()}
        for parameter in self._model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        # Gradients accumulated before must not be added to the samples.
        self._kept = {name: weight.grad for name, weight in self._weights.items()}
        for weight in self._weights.values():
            weight.grad = None
        self._hooks = [w.register_post_accumulate_grad_hook(self._take) for w in self._weights.values()]
        self._names = chosen
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter in self._model.parameters():
            parameter.requires_grad_(self._trained[id(parameter)])
        for name, weight in self._weights.items():
            weight.grad = self._kept[name]
        del self._kept

    def passes(self, samples: int) -> Iterator[None]:
        """Yield before every pass over the same `samples` batches. Their gradients are those of one pass, to the bit.

        All processes that hold rows of the weights go through the passes together.
        """
        names, sizes = list(self._weights), [weight.numel() for weight in self._weights.values()]
        for indices in [[]] if self._inverse is None else chunks_of(sizes, samples, self._memory):
            chunk = [names[index] for index in indices]
            self._held = {name: [] for name in chunk}
            for name, weight in self._weights.items():  # the sums are complete after the first pass
                weight.requires_grad_(name in self._held or (self.rounds == 0 and bool(self._sums)))
            yield
            self.rounds += 1
            for name in chunk:
                assert self._inverse is not None
                held, whole = self._held.pop(name), self._weights[name].detach()
                self._inverse[name] = inverse_diagonal(held, whole, self._samples, self._damping)

    def sample(self, loss: Tensor) -> None:
        """Add one small batch to the statistics: run the backward pass of its mean loss."""
        loss.backward()
        self._samples += self.rounds == 0

    def of(self, name: str) -> WeightStats:
        """The statistics of one weight so far; of a sharded weight those of the rows of this process."""
        return _weight_stats({kind: local_rows(of[name]) for kind, of in self._kinds().items()}, self._samples)

    def _kinds(self) -> dict[str, dict[str, Tensor]]:
        return self._sums if self._inverse is None else {**self._sums, "inverse": self._inverse}

    def save(self, path: str | os.PathLike) -> None:
        """Write the statistics to a file for `StoredStats`."""
        tensors = {f"{kind}/{name}": t.contiguous() for kind, of in self._kinds().items() for name, t in of.items()}
        save_file(tensors, path, metadata={"samples": str(self._samples)})

    @torch.no_grad()
    def _take(self, weight: Tensor) -> None:
        # The hook fires once per backward and parameter, after shared layers (ALBERT) have summed their gradient.
        name, grad = self._names[id(weight)], weight.grad
        assert grad is not None
        weight.grad = None
        grad = grad.float()
        if name in self._held:
            self._held[name].append(shortened(grad, weight))
        if self.rounds:
            return
        sums = {kind: of[name] for kind, of in self._sums.items()}
        if "square" in sums:
            sums["square"].addcmul_(grad, grad)
        if sums.keys() - {"square"}:
            product = grad.mul_(weight).abs_()
            if "product" in sums:
                sums["product"].add_(product)
            if "sensitivity" in sums:
                by_sensitivity, by_uncertainty = PLATON_BETAS
                sums["sensitivity"].mul_(by_sensitivity).add_(product, alpha=1 - by_sensitivity)
                distance = product.sub_(sums["sensitivity"]).abs_()
                sums["uncertainty"].mul_(by_uncertainty).add_(distance, alpha=1 - by_uncertainty)


def passes(needs: Collection[str], sizes: Sequence[int], samples: int, memory: float) -> int:
    """How often `samples` batches pass for the statistics `needs` of matrices of some sizes."""
    return len(chunks_of(sizes, samples, memory)) if "inverse" in needs else 1


class StoredStats:
    """Gradient statistics in a file of `GradientStats.save`, loaded to `device` for one weight at a time."""

    def __init__(self, path: str | os.PathLike, device: torch.device) -> None:
        self._path, self._device = path, device

    def of(self, name: str) -> WeightStats:
        """The statistics of one weight."""
        with safe_open(self._path, framework="pt") as file:
            kinds = {kind: key for key in file.keys() for kind, _, of in (key.partition("/"),) if of == name}
            stats = {kind: file.get_tensor(key).to(self._device) for kind, key in kinds.items()}
            return _weight_stats(stats, int(file.metadata()["samples"]))


def _weight_stats(stats: dict[str, Tensor], samples: int) -> WeightStats:
    """The statistics of one weight; None for those that were not collected."""
    return WeightStats(**{"square": None, "product": None, **stats}, samples=samples)
