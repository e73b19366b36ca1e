"""Is 2:4 faster here? Dense and sparse side by side on this GPU, each layer shape and the whole model, and the layers
where dense wins stay dense."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.benchmark import Timer

from ..card import markdown_table
from ..packing import open_packed
from ..report import text_table
from .semi_structured import (
    SEMI_STRUCTURED_FILE,
    Timing,
    available_backends,
    load_semi_structured,
    make_sparse,
    sparse_names,
    sparse_weight,
)

_HEADING = "## Speed on sparse tensor cores"


@dataclass(frozen=True)
class LayerTime:
    """One product of `tokens` rows with a matrix of `(out, in)`, in seconds: dense, and sparse by back end."""

    shape: tuple[int, int]
    tokens: int
    dense: float
    sparse: dict[str, float]


@dataclass(frozen=True)
class ModelTime:
    """One forward pass in seconds: dense and sparse, plain and through `torch.compile` (None: not run)."""

    batch: int
    length: int
    backend: str
    dense: float
    dense_compiled: float | None
    sparse: float
    sparse_compiled: float | None

    @property
    def speedup(self) -> float:
        """Best of sparse against best of dense; above 1 sparse is faster."""
        return _best(self.dense, self.dense_compiled) / _best(self.sparse, self.sparse_compiled)


@dataclass(frozen=True)
class TimingReport:
    """Every measurement, and what follows from them."""

    timing: Timing
    layers: tuple[LayerTime, ...]
    models: tuple[ModelTime, ...]

    def tables(self, show: Callable[[Sequence[str], Sequence[Sequence[object]]], str]) -> tuple[str, str]:
        """(by layer shape, whole model), milliseconds, drawn by `text_table` or `markdown_table`."""
        backends = sorted({name for layer in self.layers for name in layer.sparse})
        rows = []
        for layer in self.layers:
            times = [f"{1e3 * layer.sparse[name]:.3f}" for name in backends]
            best = layer.dense / min(layer.sparse.values())
            rows.append(
                ["x".join(map(str, layer.shape)), layer.tokens, f"{1e3 * layer.dense:.3f}", *times, f"{best:.2f}x"]
            )
        by_layer = show(["matrix", "tokens", "dense ms", *(f"{name} ms" for name in backends), "speed-up"], rows)
        rows = [
            [
                m.batch,
                m.length,
                m.backend,
                *map(_milliseconds, (m.dense, m.dense_compiled, m.sparse, m.sparse_compiled)),
            ]
            + [f"{m.speedup:.2f}x"]
            for m in self.models
        ]
        header = ["batch", "length", "back end", "dense ms", "compiled", "sparse ms", "compiled", "speed-up"]
        return by_layer, show(header, rows)

    @property
    def verdict(self) -> str:
        """One sentence on what the exported model does on this device."""
        if self.timing.backend is None:
            return f"On {self.timing.device} no layer choice beats dense at every shape: all layers stay dense there."
        return (
            f"On {self.timing.device} {len(self.timing.sparse)} matrices run sparse ({self.timing.backend}); the "
            "others are as fast dense, or faster."
        )

    def __str__(self) -> str:
        return "\n\n".join([*self.tables(text_table), self.verdict])

    def write_card(self, folder: str | os.PathLike) -> None:
        """Put the tables into the folder's model card, in place of those of an earlier timing."""
        path = Path(folder) / "README.md"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        text = re.sub(rf"\n*{re.escape(_HEADING)}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
        section = "\n\n".join([_HEADING, self.verdict, *self.tables(markdown_table)])
        path.write_text(f"{text.rstrip()}\n\n{section}\n".lstrip(), encoding="utf-8")


def time_export(
    folder: str | os.PathLike,
    batch_sizes: Sequence[int] = (1, 8, 32),
    lengths: Sequence[int] = (128,),
    device: str | torch.device = "cuda",
    compiled: bool = True,
) -> TimingReport:
    """Time an exported folder at every batch size and length, and write down which layers are worth being sparse.

    A matrix is sparse only if it was faster so at every shape; a back end is taken only if the whole model was, too,
    plain or through `torch.compile`, whichever is better on each side. `load_semi_structured` then follows it on the
    same kind of device, and the tables go into the folder's `README.md`.

    Args:
        compiled: also time through `torch.compile`.

    Raises:
        ValueError: no CUDA device with sparse kernels, or no exported file.
    """
    folder = Path(folder)
    backends = available_backends(device) if torch.cuda.is_available() else []
    if not backends:
        raise ValueError(
            f"timing {folder} needs a CUDA device of compute capability 8.0 or more and a torch with sparse kernels "
            "for it, and there is none here: the exported file is whole, time it where it will run"
        )
    names = sparse_names(open_packed(folder, SEMI_STRUCTURED_FILE, "export"))
    model = load_semi_structured(folder).to(device)
    tokens = sorted({batch * length for batch in batch_sizes for length in lengths})
    with torch.inference_mode():
        layers = time_layers(model, names, tokens, backends)
        models: list[ModelTime] = []
        for backend in backends:
            chosen = worthwhile(model, names, layers, backend)
            if chosen:
                models += time_models(model, chosen, backend, batch_sizes, lengths, compiled)
    backend = best_backend(models)
    sparse = [] if backend is None else worthwhile(model, names, layers, backend)
    report = TimingReport(Timing(torch.cuda.get_device_name(device), backend, sparse), tuple(layers), tuple(models))
    report.timing.save(folder)
    report.write_card(folder)
    return report


def time_layers(
    model: nn.Module, names: Sequence[str], tokens: Sequence[int], backends: Sequence[str]
) -> list[LayerTime]:
    """Each shape among the named matrices once, at each number of tokens."""
    examples = {tuple(model.get_parameter(name).shape): name for name in names}
    found = []
    for shape, name in examples.items():
        weight = model.get_parameter(name).detach()
        sparse = {backend: sparse_weight(name, weight, backend) for backend in backends}
        for count in tokens:
            rows = torch.randn(count, shape[1], dtype=weight.dtype, device=weight.device)
            dense = _seconds(lambda rows=rows, weight=weight: nn.functional.linear(rows, weight))
            times = {
                backend: _seconds(lambda rows=rows, packed=packed: nn.functional.linear(rows, packed))
                for backend, packed in sparse.items()
            }
            found.append(LayerTime(shape, count, dense, times))
    return found


def worthwhile(model: nn.Module, names: Sequence[str], layers: Sequence[LayerTime], backend: str) -> list[str]:
    """The matrices whose shape was faster sparse at every number of tokens."""
    lost = {layer.shape for layer in layers if layer.sparse[backend] >= layer.dense}
    return [name for name in names if tuple(model.get_parameter(name).shape) not in lost]


def time_models(
    model: nn.Module,
    chosen: Sequence[str],
    backend: str,
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    compiled: bool,
) -> list[ModelTime]:
    """Whole forward passes, with the chosen matrices dense and sparse."""
    sparse = copy.deepcopy(model)
    make_sparse(sparse, chosen, backend)
    device, found = next(model.parameters()).device, []
    for batch in batch_sizes:
        for length in lengths:
            ids = torch.randint(5, model.config.vocab_size, (batch, length), device=device)
            rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            times = []
            for each in (model, sparse):
                times.append(_seconds(lambda each=each, rows=rows: each(**rows)))
                fast = torch.compile(each, dynamic=False) if compiled else None
                times.append(_seconds(lambda fast=fast, rows=rows: fast(**rows)) if compiled else None)
            found.append(ModelTime(batch, length, backend, *times))
    return found


def best_backend(models: Sequence[ModelTime]) -> str | None:
    """The back end that was faster than dense at every shape, by the largest of its smallest speed-ups."""
    worst: dict[str, float] = {}
    for model in models:
        worst[model.backend] = min(model.speedup, worst.get(model.backend, float("inf")))
    best = max(worst, key=worst.get, default=None)
    return best if best is not None and worst[best] > 1 else None


def _seconds(job: Callable[[], object]) -> float:
    """Median of one call; the timer waits for the GPU."""
    job()  # compiles and warms up
    return Timer("job()", globals={"job": job}).blocked_autorange(min_run_time=0.2).median


def _best(plain: float, compiled: float | None) -> float:
    return plain if compiled is None else min(plain, compiled)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3f}"
