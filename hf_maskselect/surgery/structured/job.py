"""Fits and scores smaller models of one dense model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...utils.judge import Judge
from ...utils.wrappers import own_copy
from .batches import Batch, batches_of
from .cut import Cutter
from .families import Family
from .fit import Calls, fit
from .layer_shapes import LayerShapes
from .moments import consumer_grams
from .notes import Notes
from .order import removal_order
from .shapes import Shape, head_size

TRIAL_POSITIONS = 8192  # that neurons are ordered by, and candidates fitted and scored on
HELD_OUT = 512  # rows
POSITIONS = 32768  # that the chosen one is fitted on


class ShapeJob:
    """Fits and scores smaller models of one dense model. All of its models are in float32 and in eval mode.

    Args:
        model: the dense model. It stays as it is.
        family: its family.
        rows: to fit on, from `rows_of`. The first ones are used, up to 32,768 positions.
        held_out: rows to score on: the first 512 for the chosen shape, and of these 8,192 positions for candidates.
        notes: the divergence of every shape that was scored, by its text. What it holds already is not scored again.
        free: each layer may get heads and neurons of its own.
        quiet: whether to show no progress bar.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        rows: Sequence[Batch],
        held_out: Sequence[Batch],
        notes: Notes,
        free: bool = False,
        quiet: bool = False,
    ) -> None:
        _check_free(model, family, free)
        self.free, self.cuts_heads, self._quiet = free, family.plain_heads or free, quiet
        dense: Any = own_copy(model)
        self.dense, self.family, self._dtype, self._notes = dense.float().eval(), family, model.dtype, notes
        self.rows = _few(rows, model.main_input_name, POSITIONS)
        self._few = batches_of(_few(self.rows, model.main_input_name, TRIAL_POSITIONS), model)
        few_held_out = _few(held_out, model.main_input_name, TRIAL_POSITIONS)
        self._judge = Judge(self.dense, batches_of(few_held_out[:HELD_OUT], model))
        self._held_out = batches_of(held_out[:HELD_OUT], model)
        grams = consumer_grams(self.dense, family, self._few, self.cuts_heads)
        orders = []
        for layer, (head_gram, gram) in zip(family.layers(self.dense), grams, strict=True):
            attention, ffn = family.consumers(layer)
            size = head_size(model.config)
            heads = torch.empty(0) if head_gram is None else removal_order(attention.weight, head_gram, size, 1)
            orders.append((heads, removal_order(ffn.weight, gram)))
        self.cutter = Cutter(self.dense, family, orders, grams)
        self.encoder = self.cutter.encoder

    @contextmanager
    def scored(self) -> Iterator[Callable[[Shape], float]]:
        """Give a function that fits a shape and returns its divergence, from the notes if they have it."""
        calls = self._calls(self._few, keeps=True)
        # Without a total: layers that are removed alone to rank them are no candidates.
        with tqdm(desc="shapes", leave=False, disable=self._quiet) as bar:

            def evaluate(shape: Shape) -> float:
                bar.update()
                if str(shape) not in self._notes:
                    self._notes[str(shape)] = self._judge(self._fitted(shape, calls))
                return self._notes[str(shape)]

            yield evaluate

    def fitted(self, shape: Shape) -> tuple[PreTrainedModel, float]:
        """Return the model of a shape, fitted on all rows, in the dtype of the model given, and its divergence."""
        fitted: Any = self._fitted(shape, self._calls(batches_of(self.rows, self.dense)))
        divergence = Judge(self.dense, self._held_out)(fitted)  # before the dtype changes
        return fitted.to(self._dtype), divergence

    def _calls(self, batches: Sequence[Batch], keeps: bool = False) -> Calls | None:
        return None if self.family.shared else Calls(self.dense, self.family, batches, keeps)

    def _fitted(self, shape: Shape, calls: Calls | None) -> PreTrainedModel:
        small = self.cutter.cut(shape)
        if calls is not None:
            fit(small, self.family, shape.layers, calls)
        return small


def _check_free(model: PreTrainedModel, family: Family, free: bool) -> None:
    kind = model.config.model_type
    if free and family.shared:
        raise ValueError(
            f"the layers of a {kind!r} model share their weights, so they have one shape: use keep_shape='uniform'"
        )
    if not free and LayerShapes.of(model.config) is not None:
        raise ValueError(f"the layers of this {kind!r} model have shapes of their own already: use keep_shape='free'")


def _few(rows: Sequence[Batch], name: str, positions: int) -> list[Batch]:
    """Return the first rows that have so many tokens together."""
    few, count = [], 0
    for row in rows:
        few.append(row)
        count += row[name].shape[-1]
        if count >= positions:
            break
    return few
