"""Ranges of the numbers that go in and out of linear layers, observed on calibration rows, and what 8 bits cost."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..storage.text_files import text_rows
from ..storage.tokenizer import load_tokenizer
from ..utils.token_limits import TokenLimits
from .linears import Step

RANGES = ("minmax", "percentile", "mse")
_SAMPLES = 2048  # values of one batch that are kept for percentiles and errors
_TAIL = 1e-4  # share of the values beyond each end that a percentile leaves out
_ROOM = 1.1  # of a channel's range, beyond the largest magnitude that was seen in it
Batch = Mapping[str, Tensor]


def batches_of(calibration: Iterable[Mapping[str, Any]], model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Return calibration rows or batches as batches of what the model takes, without labels.

    Raises:
        ValueError: there are fewer than two, a row is no mapping, or its token ids are not of this model.
    """
    name, batches = model.main_input_name, []
    limits = TokenLimits.of(model) if name == "input_ids" else None
    for row in calibration:
        if not isinstance(row, Mapping) or name not in row:
            raise ValueError(
                f"a calibration row is {type(row).__name__} without {name}: give tokenized rows or batches"
            )
        kept = {key: value for key, value in row.items() if key in (name, "attention_mask", "token_type_ids")}
        batch = {key: torch.as_tensor(value) for key, value in kept.items()}
        if limits is not None:
            limits.check(batch[name], "a calibration row")
            batch = {key: value[None] if value.dim() == 1 else value for key, value in batch.items()}
        batches.append(batch)
    if len(batches) < 2:
        raise ValueError(
            f"calibration has {len(batches)} rows: give tokenized rows of the train split, such as 128, since int8 "
            "needs the ranges of the activations, or pass int8=False (--dtype fp32)"
        )
    return batches


def rows_of_file(path: str | os.PathLike, tokenizer_folder: str | os.PathLike, count: int) -> list[dict[str, Any]]:
    """Tokenize up to `count` rows of a file that `text_rows` reads: all of its columns of text, in their order.

    Raises:
        ValueError: the file or the tokenizer cannot be read, or there are no columns of text.
    """
    rows = text_rows(path, "give calibration rows of the train split")
    tokenizer = load_tokenizer(tokenizer_folder)
    return [
        dict(tokenizer(*(row[name] for name in rows.column_names), truncation=True))
        for row in rows.select(range(min(count, len(rows))))
    ]


@dataclass
class Observed:
    """Values of one tensor over all calibration rows: extremes, largest magnitudes of each channel, and a sample."""

    low: float = 0.0
    high: float = 0.0
    samples: Tensor = torch.empty(0)
    largest: Tensor = torch.zeros(1)

    def add(self, values: Tensor) -> None:
        """Observe a tensor."""
        values = values.detach().float()
        if values.numel():
            self.largest = torch.maximum(self.largest, values.abs().reshape(-1, values.shape[-1]).amax(0))
            values = values.reshape(-1)
            self.low = min(self.low, float(values.min()))
            self.high = max(self.high, float(values.max()))
            stride = max(1, values.numel() // _SAMPLES)
            self.samples = torch.cat([self.samples, values[::stride]])

    def ends(self, how: str) -> tuple[float, float]:
        """Return the range that 8 bits cover: all, all but the tails, or that of the least squared error."""
        if how == "percentile":
            low, high = self.samples.quantile(torch.tensor([_TAIL, 1 - _TAIL])).tolist()
            return min(low, 0.0), max(high, 0.0)
        if how == "mse":
            shares = [1 - 0.04 * step for step in range(20)]
            return min(((self.low * s, self.high * s) for s in shares), key=lambda ends: self._error(*ends))
        return self.low, self.high

    def step(self, how: str) -> Step:
        """Return the steps over the range."""
        low, high = self.ends(how)
        scale = max((high - low) / 255, 1e-12)
        return Step(scale, min(255, max(0, round(-low / scale))))

    def centred(self, how: str) -> Step:
        """Return steps with zero in the middle."""
        low, high = self.ends(how)
        return Step(max(-low, high, 1e-10) / 127, 128)

    def units(self) -> Tensor:
        """Return the unit of each channel, float32 (channels,), with room for what calibration has not seen."""
        units = self.largest * (_ROOM / 127)
        # A channel that hardly moves gets a unit that no bias overflows.
        return units.clamp(min=max(float(units.max()) * 1e-4, 1e-10))

    def _error(self, low: float, high: float) -> float:
        scale = max((high - low) / 255, 1e-12)
        zero = min(255, max(0, round(-low / scale)))
        rounded = torch.fake_quantize_per_tensor_affine(self.samples, scale, zero, 0, 255)
        return float((rounded - self.samples).square().mean())


@torch.no_grad()
def observe(model: nn.Module, names: Sequence[str], batches: Iterable[Batch]) -> dict[str, tuple[Observed, Observed]]:
    """Return what goes into and out of the named linear layers, over all batches."""
    seen = {name: (Observed(), Observed()) for name in names}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name][0].add(inputs[0])
            seen[name][1].add(output)

        return record

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        for batch in batches:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen
