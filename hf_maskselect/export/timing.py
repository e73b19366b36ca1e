"""Time an exported 2:4 model against dense on this GPU, and choose the layers that are worth being sparse."""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.benchmark import Timer
from transformers import PreTrainedModel

from ..storage.derived import ORIGIN, SEMI_STRUCTURED_FILE, TIMING_FILE, write_section
from ..storage.pack import open_packed
from ..utils.folders import replacing_folder
from ..utils.tables import markdown_table, text_table
from ..utils.token_limits import longest_row
from .semi_structured import (
    MODES,
    Choice,
    Timing,
    available_backends,
    load_semi_structured,
    make_sparse,
    names_that_fit,
    sparse_names,
    sparse_weight,
)


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one product of `tokens` rows with a matrix `(out, in)`: dense, and sparse by back end."""

    shape: tuple[int, int]
    tokens: int
    mode: str
    dense: float
    sparse: dict[str, float]


@dataclass(frozen=True)
class ModelTime:
    """Seconds of one forward pass: dense, and with the chosen matrices sparse, by back end."""

    batch: int
    length: int
    mode: str
    dense: float
    sparse: dict[str, float]


@dataclass(frozen=True)
class TimingReport:
    """All measurements and the choices made from them."""

    timing: Timing
    layers: tuple[LayerTime, ...]
    models: tuple[ModelTime, ...]

    def tables(self, show: Callable[[Sequence[str], Sequence[Sequence[object]]], str]) -> tuple[str, str]:
        """Return two tables in milliseconds, by layer shape and of the whole model, formatted by `show`."""
        measured: list[LayerTime | ModelTime] = [*self.layers, *self.models]
        backends = sorted({name for time in measured for name in time.sparse})
        tail = ["dense ms", *(f"{name} ms" for name in backends), "best speed-up"]

        def times(time: LayerTime | ModelTime) -> list[str]:
            best = f"{time.dense / min(time.sparse.values()):.2f}x" if time.sparse else "-"
            shown = [f"{1e3 * time.sparse[name]:.3f}" if name in time.sparse else "-" for name in backends]
            return [f"{1e3 * time.dense:.3f}", *shown, best]

        by_layer = [["x".join(map(str, x.shape)), x.tokens, x.mode, *times(x)] for x in self.layers]
        by_model = [[x.batch, x.length, x.mode, *times(x)] for x in self.models]
        return (
            show(["matrix", "tokens", "mode", *tail], by_layer),
            show(["batch", "length", "mode", *tail], by_model),
        )

    @property
    def verdict(self) -> str:
        """One sentence a mode on how the exported model runs on this device."""
        sentences = []
        for mode, choice in self.timing.choices.items():
            if choice.backend is None:
                result = "nothing is faster than dense at every shape, so all layers stay dense."
            else:
                result = f"{len(choice.sparse)} matrices run sparse ({choice.backend}), the others are faster dense."
            sentences.append(f"On {self.timing.device}, {mode}: {result}")
        return " ".join(sentences)

    def __str__(self) -> str:
        return "\n\n".join([*self.tables(text_table), self.verdict])

    def write_card(self, folder: Path, new: Path) -> None:
        """Write the model card of `folder` into `new`, with the tables in place of those of an earlier timing."""
        write_section(folder, new, TIMING_FILE, "\n\n".join([self.verdict, *self.tables(markdown_table)]))


def time_export(
    folder: str | os.PathLike,
    batch_sizes: Sequence[int] = (1, 8, 32),
    lengths: Sequence[int] = (128,),
    device: str | torch.device = "cuda",
    modes: Sequence[str] = MODES,
) -> TimingReport:
    """Time an exported model at every batch size and length, and save which layers are worth being sparse.

    Plain and compiled use are timed and decided separately. In each, a matrix becomes sparse only if that was faster
    at every shape, and a back end is chosen only if the whole model was faster at every shape. `load_semi_structured`
    follows the choice on the same kind of device, and the tables go into the folder's `README.md`. Lengths are in
    tokens, modes are `"eager"`, `"compiled"` or both.

    Raises:
        ValueError: there is no CUDA device with sparse kernels or no exported text model, or a shape does not fit it.
    """
    folder = Path(folder)
    backends = available_backends(device) if torch.cuda.is_available() else []
    if not backends:
        raise ValueError(
            f"timing {folder} needs a CUDA device of compute capability 8.0 or more and a torch with sparse kernels "
            "for it, which this machine lacks: the exported file is complete, time it where it will run"
        )
    packed = open_packed(folder, SEMI_STRUCTURED_FILE, "export")
    names = sparse_names(packed)
    model = load_semi_structured(folder)
    check_shapes(model, batch_sizes, lengths)
    nn.Module.to(model, device)
    tokens = sorted({batch * length for batch in batch_sizes for length in lengths})
    layers: list[LayerTime] = []
    models: list[ModelTime] = []
    choices = {}
    with torch.inference_mode():
        for mode in modes:
            layer_times = time_layers(model, names, tokens, backends, mode)
            chosen = {backend: worthwhile(model, names, layer_times, backend) for backend in backends}
            model_times = time_models(model, chosen, batch_sizes, lengths, mode)
            backend = best_backend(model_times)
            choices[mode] = Choice(backend, [] if backend is None else chosen[backend])
            layers += layer_times
            models += model_times
    timing = Timing(
        torch.cuda.get_device_name(device), choices, packed.metadata.get(ORIGIN, ""), packed.metadata["checksum"]
    )
    report = TimingReport(timing, tuple(layers), tuple(models))
    with replacing_folder(folder) as new:
        timing.save(new)
        report.write_card(folder, new)
    return report


def check_shapes(model: PreTrainedModel, batch_sizes: Sequence[int], lengths: Sequence[int]) -> None:
    """Raise a ValueError unless the model takes token ids in these shapes."""
    if model.main_input_name != "input_ids":
        raise ValueError(f"{type(model).__name__} takes {model.main_input_name}: only text models can be timed")
    if not batch_sizes or not lengths or min(*batch_sizes, *lengths) < 1:
        raise ValueError(
            f"batch sizes {list(batch_sizes)} and lengths {list(lengths)} must be whole numbers of at least 1"
        )
    longest = longest_row(model)
    if max(lengths) > longest:
        raise ValueError(f"length {max(lengths)} exceeds the {longest} positions of the model: time shorter rows")


def time_layers(
    model: nn.Module, names: Sequence[str], tokens: Sequence[int], backends: Sequence[str], mode: str
) -> list[LayerTime]:
    """Time each shape among the named matrices once, at each number of tokens."""
    times = []
    for (out_features, in_features), name in {tuple(model.get_parameter(name).shape): name for name in names}.items():
        weight = model.get_parameter(name).detach()
        packed = {b: sparse_weight(name, weight, b) for b in backends if names_that_fit(model, [name], b)}
        for count in tokens:
            rows = torch.randn(count, in_features, dtype=weight.dtype, device=weight.device)
            dense = _seconds(nn.functional.linear, mode, rows, weight)
            sparse = {backend: _seconds(nn.functional.linear, mode, rows, packed[backend]) for backend in packed}
            times.append(LayerTime((out_features, in_features), count, mode, dense, sparse))
    return times


def worthwhile(model: nn.Module, names: Sequence[str], layers: Sequence[LayerTime], backend: str) -> list[str]:
    """Return the names of the matrices whose shape was faster sparse at every number of tokens."""
    slower = {layer.shape for layer in layers if layer.sparse.get(backend, layer.dense) >= layer.dense}
    return [name for name in names if tuple(model.get_parameter(name).shape) not in slower]


def time_models(
    model: PreTrainedModel,
    chosen: dict[str, list[str]],
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    mode: str,
) -> list[ModelTime]:
    """Time whole forward passes, dense and with the chosen matrices of each back end sparse."""
    sparse: dict[str, PreTrainedModel] = {}
    for backend, names in chosen.items():
        if names:
            sparse[backend] = copy.deepcopy(model)
            make_sparse(sparse[backend], names, backend)
    times = []
    for batch in batch_sizes:
        for length in lengths:
            ids = torch.randint(5, model.config.vocab_size, (batch, length), device=model.device)
            mask = torch.ones_like(ids)
            dense = _seconds(model, mode, ids, mask)
            by_backend = {backend: _seconds(each, mode, ids, mask) for backend, each in sparse.items()}
            times.append(ModelTime(batch, length, mode, dense, by_backend))
    return times


def best_backend(models: Sequence[ModelTime]) -> str | None:
    """Return the back end with the largest worst-case speed-up; None if it is not faster than dense at every shape."""
    worst: dict[str, float] = {}
    for model in models:
        for backend, seconds in model.sparse.items():
            worst[backend] = min(model.dense / seconds, worst.get(backend, float("inf")))
    best = max(worst, key=worst.__getitem__, default=None)
    return best if best is not None and worst[best] > 1 else None


def _seconds(job: Callable, mode: str, *inputs: torch.Tensor) -> float:
    """Return the median time of one call; the timer waits for the GPU."""
    if mode == "compiled":
        torch._dynamo.reset()  # after eight shapes torch stops compiling, and would time plain use
        job = torch.compile(job, dynamic=False)
    job(*inputs)  # compiles and warms up
    timer = Timer("job(*inputs)", globals={"job": job, "inputs": inputs})
    return timer.blocked_autorange(min_run_time=0.2).median
