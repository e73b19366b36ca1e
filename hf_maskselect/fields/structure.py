"""Smaller shapes instead of zeros: the fields of `pattern="structured"` and their rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch

from ..masking.schedule import check_levels, cubic_levels
from ..surgery.structured.batches import FEWEST
from ..surgery.structured.record import STRUCTURED
from ..surgery.structured.target import KEPT_SHAPES
from .resolved import ResolvedConfig, StructureOptions
from .rules import check_choice, check_types, no_meaning, option

DTYPES = ("float32", "bfloat16", "float16")
_CANDIDATES = 16
_ROWS = 2048
# Fields of masks, which a smaller shape does not have.
_OF_MASKS = "scope criterion proposals selection trial_steps trial_batch_size trial_learning_rate sampling_ratios"
_OF_MASKS += " target_modules exclude_modules keep_zeros layer_floor"


@dataclass
class StructureFields:
    """Fields of [`PruningConfig`] for `pattern="structured"`, which removes layers, neurons and heads.

    The model then becomes an ordinary smaller one before its training begins (see [`shrink_model`]). The target is
    `target_speedup`, or `sparsity`: the share of the parameters of the layers that goes. `levels` are in the unit of
    the target. Shapes are chosen on the held-out rows, and fitted on `refit_rows` rows of train (2,048 by default).
    `num_candidates` (16 by default) is the number of shapes that are tried at each level.

    Args:
        target_speedup (`float`, *optional*): how many times as fast as the model at the start of the run one call
            shall be, such as 2.0.
        keep_shape (`str`, defaults to `"uniform"`): `"uniform"` takes shapes that the configuration can say, so that
            plain transformers loads the model. `"free"` takes any number of heads and neurons in each layer; the model
            then loads after `import hf_maskselect`.
        latency_shape (`list[int]`, defaults to `[8, 128]`): batch size and length in tokens that are timed.
        latency_dtype (`str`, *optional*): dtype that is timed, such as `"bfloat16"`. Defaults to that of the model.
        latency_device (`str`, *optional*): device that is timed. Defaults to that of the model.
    """

    target_speedup: float | None = option(None, "structured: how many times as fast the model shall be.")
    keep_shape: str = option("uniform", "structured: uniform shapes load plainly; free ones are better.", KEPT_SHAPES)
    latency_shape: list[int] = option((8, 128), "structured: batch size and length that are timed.")
    latency_dtype: str | None = option(None, "structured: dtype that is timed (that of the model).", DTYPES)
    latency_device: str | None = option(None, "structured: device that is timed (that of the model).")

    def _check_structure_values(self) -> None:
        """Check each of these fields by itself."""
        check_types(self, StructureFields)
        check_choice("keep_shape", self.keep_shape, KEPT_SHAPES)
        if self.target_speedup is not None and self.target_speedup <= 1:
            raise ValueError(f"target_speedup={self.target_speedup} must be above 1, such as 2.0")
        if len(self.latency_shape) != 2 or min(self.latency_shape) < 1:
            raise ValueError(
                f"latency_shape={self.latency_shape} must be a batch size and a length above 0, such as [8, 128]"
            )
        if self.latency_dtype is not None:
            check_choice("latency_dtype", self.latency_dtype, DTYPES)
        if self.latency_device is not None:
            try:
                there = torch.empty(1, device=self.latency_device).device.type != "meta"
            except (RuntimeError, AssertionError):  # what torch says where it has no such device
                there = False
            if not there:
                raise ValueError(f"latency_device={self.latency_device!r} is no device of this machine: use 'cpu'")

    def _check_structure_rules(self, settings: ResolvedConfig) -> None:
        """Check these fields against each other and against those of other groups."""
        config: Any = self  # the whole configuration
        shown = f"pattern={config.pattern!r}"
        if settings.structure is None:
            for name in self._changed(field.name for field in fields(StructureFields)):
                raise no_meaning(name, getattr(self, name), shown, f"which leaves shapes alone: use {STRUCTURED!r}")
            return
        if config.method != "random":
            why = "which removes layers, neurons and heads by its own order: leave method unset"
            raise no_meaning("method", config.method, shown, why)
        if settings.structure.rows < FEWEST:
            raise ValueError(
                f"refit_rows={settings.structure.rows} are too few rows to fit a smaller model: give at least {FEWEST}"
            )
        for name in self._changed(_OF_MASKS.split()):
            raise no_meaning(name, getattr(self, name), shown, f"which makes no masks: leave {name} unset")

    def _changed(self, names: Iterable[str]) -> Iterator[str]:
        """Yield the fields that have another value than their default."""
        config: Any = self
        defaults = {field.name: field for field in fields(config)}
        for name in names:
            made = defaults[name].default_factory
            if getattr(self, name) != (defaults[name].default if made is MISSING else made()):
                yield name

    def _structure(self) -> StructureOptions | None:
        """Return the options of a structured run; None for another one.

        Raises:
            ValueError: there is no target, or there are two.
        """
        config: Any = self
        if config.pattern != STRUCTURED:
            return None
        if (self.target_speedup is None) == (config.sparsity is None):
            raise ValueError(
                f"pattern={config.pattern!r} needs target_speedup, such as 2.0, or sparsity, such as 0.5, and not both"
            )
        dtype: torch.dtype | None = None if self.latency_dtype is None else getattr(torch, self.latency_dtype)
        return StructureOptions(
            by_speedup=self.target_speedup is not None,
            free=self.keep_shape == "free",
            num_candidates=_CANDIDATES if config.num_candidates is None else config.num_candidates,
            rows=_ROWS if config.refit_rows is None else config.refit_rows,
            latency_shape=(self.latency_shape[0], self.latency_shape[1]),
            latency_dtype=dtype,
            latency_device=self.latency_device,
        )

    def _structure_levels(self) -> tuple[float, ...]:
        """Return the given levels, or `num_levels` of them: of speed-ups each is the same factor above the last.

        Raises:
            ValueError: the levels do not rise to the target.
        """
        config: Any = self
        target, number = self.target_speedup or config.sparsity, config.num_levels or 1
        assert target is not None
        if self.target_speedup is None:
            levels = tuple(cubic_levels(target, number) if config.levels is None else config.levels)
            check_levels(levels, target)
            return levels
        if config.levels is None:
            return (*(target ** (level / number) for level in range(1, number)), target)
        rises = [1.0, *config.levels]
        if any(a >= b for a, b in zip(rises, config.levels, strict=False)) or rises[-1] != target:
            raise ValueError(
                f"levels={config.levels} must be speed-ups above 1 that rise to target_speedup={target}, such as "
                f"[{target**0.5:.2g}, {target}]"
            )
        return tuple(config.levels)
