"""How much faster or smaller a model shall become, and the choice of the shape that meets it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .budget import Budget
from .job import ShapeJob
from .latency import Latency
from .search import Candidate, ShapeSearch
from .shapes import STEP, Shape
from .switches import SwitchSearch

KEPT_SHAPES = ("uniform", "free")
_NARROWED = 6  # times that the chosen width is measured
_MOST_TRIED = 3  # shapes whose whole models are timed, the best first, until one meets the target
_ROOM = 1.05  # a measured speed-up may exceed the target by so much


@dataclass(frozen=True)
class Target:
    """What a smaller model shall reach, one of the two.

    speedup: how many times as fast as before. sparsity: share of the layers' parameters that goes.
    """

    speedup: float | None = None
    sparsity: float | None = None

    def check(self) -> None:
        """Raise a ValueError unless exactly one of the two is given, and in its range."""
        if (self.speedup is None) == (self.sparsity is None):
            raise ValueError("pass speedup, such as 2.0, or sparsity, such as 0.5, and not both")
        if self.speedup is not None and not 1 < self.speedup < float("inf"):
            raise ValueError(f"speedup={self.speedup} must be a number above 1, such as 2.0")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must be between 0 and 1, such as 0.5")

    def __str__(self) -> str:
        return f"sparsity={self.sparsity}" if self.speedup is None else f"speedup={self.speedup}"


def choose_shape(
    job: ShapeJob, latency: Latency, target: Target, num_candidates: int, seed: int
) -> tuple[Shape, list[Candidate]]:
    """Return the shape that meets a target, and the candidates that were tried, the best first.

    Raises:
        ValueError: no shape meets the target.
    """
    encoder = job.encoder
    if target.speedup is not None:
        budget = Budget(encoder, latency.predicted, latency.dense / target.speedup)
    else:
        kept = (1 - (target.sparsity or 0)) * encoder.parameters(encoder.full())
        budget = Budget(encoder, encoder.parameters, kept)

    with job.scored() as evaluate:
        candidates = ShapeSearch(
            encoder,
            first_stays=job.family.first_stays,
            cuts_heads=job.cuts_heads,
            width_of=budget.width_of,
            evaluate=evaluate,
            count=num_candidates,
            seed=seed,
        ).run()
        if not candidates:
            check_reachable(job, latency, target)
            raise ValueError(f"{target} is met by no shape of at least {STEP} neurons a layer: ask for less")
        shape = _first_that_meets(latency, target, candidates)
        if job.free:
            # The table errs where many heads go, but little about small changes of a shape that was measured itself.
            budget, start = replace(budget, limit=budget.cost(shape)), Candidate(shape, evaluate(shape))
            candidates += [start, *SwitchSearch(budget, evaluate, num_candidates, seed).run(start)]
            candidates = sorted(set(candidates), key=lambda candidate: candidate.divergence)
            shape = _first_that_meets(
                latency, target, [each for each in candidates if budget.cost(each.shape) <= budget.limit]
            )
    return shape, candidates


def _first_that_meets(latency: Latency, target: Target, candidates: Sequence[Candidate]) -> Shape:
    """Return the best shape that meets the target as measured; the best one if none of the first three does."""
    if target.speedup is None:
        return candidates[0].shape
    shapes = []
    for candidate in candidates[:_MOST_TRIED]:
        shapes.append(narrowed(latency, candidate.shape, target.speedup))
        if latency.speedup(shapes[-1]) >= target.speedup:
            return shapes[-1]
    return shapes[0]


def narrowed(latency: Latency, shape: Shape, speedup: float) -> Shape:
    """Change the widths until the measured time of the whole model meets the target, by at most 5 % too much."""
    met: list[Shape] = []
    tried: set[Shape] = set()
    following: Shape | None = shape
    while len(tried) < _NARROWED and following is not None and following not in tried:
        shape = following
        tried.add(shape)
        reached = latency.speedup(shape)
        if reached >= speedup:
            met.append(shape)
        if speedup <= reached <= speedup * _ROOM:
            break
        aim = latency.predicted(shape) * reached / (speedup * (1 + _ROOM) / 2)
        following = Budget(latency.encoder, latency.predicted, aim).scaled(shape)
    return max(met or tried, key=lambda each: sum(each.widths) if met else -sum(each.widths))


def check_reachable(job: ShapeJob, latency: Latency, target: Target) -> None:
    """Raise a ValueError that names the most that a shape reaches, if the smallest one misses a target."""
    encoder, heads = job.encoder, 1 if job.cuts_heads else job.encoder.heads
    layers = tuple(range(encoder.depth if encoder.shared else 1))
    least = encoder.uniform(layers, STEP, heads)
    if target.speedup is not None:
        reached = latency.dense / latency.predicted(least)
        missed, best = reached < target.speedup, f"{reached:.1f} times as fast"
    else:
        share = 1 - encoder.parameters(least) / encoder.parameters(encoder.full())
        missed, best = share < (target.sparsity or 0), f"without {share:.1%} of the layers' parameters"
    if missed:
        remedy = "ask for less" if job.cuts_heads or encoder.shared else "ask for less, or for keep_shape='free'"
        raise ValueError(f"{target} is reached by no shape: the smallest, {least}, is {best}; {remedy}")
