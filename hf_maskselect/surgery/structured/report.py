"""What a shrunken model became, and what was tried on the way."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from ...utils.tables import text_table
from .job import ShapeJob
from .latency import Latency
from .search import Candidate
from .shapes import Shape, told

_CLOSE = 1.02  # times are not exact


@dataclass(frozen=True)
class ShrinkReport:
    """What `shrink_model` chose and reached.

    dense, shape: sizes before and after. candidates: the shapes that were tried, the best first. divergence: of the
    returned model's outputs from the dense ones, on held-out rows (KL divergence of the logits in nats; without
    classes the squared error as a share of the variance). parameters: of all of the model, before and after.
    layers_removed: share of the layers' parameters that is gone. milliseconds: of one call, before and after. timed,
    timed_shape: what was timed, and the shape of its inputs. seconds: that everything took.
    """

    dense: Shape
    shape: Shape
    candidates: tuple[Candidate, ...]
    divergence: float
    parameters: tuple[int, int]
    layers_removed: float
    milliseconds: tuple[float, float]
    timed: str
    timed_shape: tuple[int, ...]
    seconds: float

    @classmethod
    def of(
        cls,
        job: ShapeJob,
        latency: Latency,
        small: PreTrainedModel,
        shape: Shape,
        candidates: Sequence[Candidate],
        divergence: float,
        seconds: float,
    ) -> "ShrinkReport":
        """Describe a model that was fitted; its time and that of the dense model are measured now."""
        before, after = latency.measured(small)
        return cls(
            dense=job.encoder.full(),
            shape=shape,
            candidates=tuple(candidates),
            divergence=divergence,
            parameters=(job.dense.num_parameters(), small.num_parameters()),
            layers_removed=1 - job.encoder.parameters(shape) / job.encoder.parameters(job.encoder.full()),
            milliseconds=(1000 * before, 1000 * after),
            timed=str(latency),
            timed_shape=latency.shape,
            seconds=seconds,
        )

    @property
    def speedup(self) -> float:
        """How many times as fast as before the model is."""
        return self.milliseconds[0] / self.milliseconds[1]

    def warn_if_missed(self, speedup: float | None) -> None:
        """Warn if a speed-up was asked for that was not measured in the end."""
        if speedup is not None and self.speedup < speedup / _CLOSE:
            warnings.warn(
                f"speedup={speedup:g} was not reached: measured {self.speedup:.2f} ({self.timed}); time it on a quiet "
                "machine, or ask for more",
                stacklevel=3,
            )

    def metrics(self) -> dict[str, float]:
        """Return the `structure_*` values that a run logs."""
        return {
            "structure_speedup": self.speedup,
            "structure_layers_removed": self.layers_removed,
            "structure_parameters": self.parameters[1],
            "structure_divergence": self.divergence,
            "structure_seconds": self.seconds,
        }

    def __str__(self) -> str:
        gone = [
            tuple(layer for layer in self.dense.layers if layer not in each.shape.layers) for each in self.candidates
        ]
        rows = [
            [told(layers) or "none", told(each.shape.widths), told(each.shape.heads), f"{each.divergence:.4f}"]
            for layers, each in zip(gone, self.candidates, strict=True)
        ]
        before, after = self.parameters
        lines = [
            f"before: {self.dense}",
            f"after:  {self.shape}",
            f"parameters: {before:,} -> {after:,} ({self.layers_removed:.1%} of those in layers removed)",
            f"milliseconds: {self.milliseconds[0]:.2f} -> {self.milliseconds[1]:.2f}, {self.speedup:.2f} times as "
            f"fast ({self.timed})",
            f"divergence from the dense model on held-out rows: {self.divergence:.4f}",
            f"searched and fitted in {self.seconds:.0f} s; candidates, as fitted on fewer rows:",
        ]
        return "\n".join([*lines, text_table(["layers removed", "width", "heads", "divergence"], rows)])
