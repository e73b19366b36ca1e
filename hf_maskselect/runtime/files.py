"""The files of a CPU model: weights in the packed format, and beside them what runs how, as JSON."""

import os
import platform
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..storage.derived import CPU_JSON
from ..storage.packed_file import PackedFile, PackedWriter, PackItem
from ..utils.files import read_json, write_json
from ..utils.reading import build, typed
from .embeddings import FLOAT32, INT8, TIED, Int8Table
from .kernels import KINDS
from .linears import Choice, Int8Plan, Step
from .model import Attention, ExactPlan, LinearPlan, Plans

_SCALES, _UNITS = ".scales", ".units"
_REMEDY = "export the model again"


@dataclass(frozen=True)
class LayerRecord:
    """How one linear layer runs.

    kinds: (largest number of rows, kind) in rising order, where the last number does not count. input, output: scale
    and zero point of its 8-bit numbers. Other kinds have none, and an output with one unit per channel stores
    the units as a tensor.
    """

    kinds: list[list[Any]]
    input: list[float] | None = None
    output: list[float] | None = None

    def choice(self, where: object) -> Choice:
        """Return the kinds; raises a ValueError if there is no such kind."""
        pairs = [tuple(pair) for pair in self.kinds]
        if not pairs or not all(
            len(pair) == 2 and type(pair[0]) is int and isinstance(pair[1], str) and pair[1] in KINDS for pair in pairs
        ):
            raise ValueError(f"{where}: {self.kinds!r:.60} are no kinds of products: {_REMEDY}")
        return Choice(tuple(pairs))


@dataclass(frozen=True)
class ShapeTime:
    """Milliseconds of the whole model at one shape.

    ms: median and 95th percentile of each way to run it, by the names of `timing`. Empty if the products were timed
    again on another machine.
    """

    batch: int
    length: int
    ms: dict[str, list[float]] = field(default_factory=dict)

    def check(self, where: object) -> None:
        """Raise a ValueError if a number is impossible."""
        pairs = all(len(pair) == 2 and 0 < pair[0] <= pair[1] < float("inf") for pair in self.ms.values())
        if self.batch < 1 or self.length < 1 or not pairs:
            raise ValueError(f"{where}: {self!r:.60} is no time at a shape: {_REMEDY}")


@dataclass(frozen=True)
class Runtime:
    """How a CPU model runs, and how fast it was where it was timed.

    cpu, threads, torch: where. source: digest of the weights that it was made from. weights: checksum of the header of
    the file of weights. fused, bf16: see `Attention`. divergence: of the outputs from those in float32, on calibration
    rows that were held out (see `Judge`), None without such rows. ranges: how the ranges of 8-bit numbers were found.
    zero_blocks: share of the 1x4 blocks of its matrices that are zero. layers: by name. scores: of the float32 model
    and of this one by the names of `timing`, if the export had `evaluate`. embeddings: how the token embeddings are
    stored, by the name of their module; empty for exact models and in earlier files, which have float32.
    """

    cpu: str
    threads: int
    torch: str
    source: str
    weights: str
    fused: bool
    bf16: int
    divergence: float | None
    ranges: str
    zero_blocks: float
    layers: dict[str, LayerRecord]
    times: list[ShapeTime] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    embeddings: dict[str, str] = field(default_factory=dict)

    @property
    def attention(self) -> Attention:
        """How whole layers run."""
        return Attention(self.fused, self.bf16)

    def check_weights(self, packed: PackedFile) -> None:
        """Raise a ValueError unless this was written together with the file of weights."""
        if packed.metadata.get("checksum") != self.weights:
            raise ValueError(f"{packed.path} is not the file that {CPU_JSON} was written with: {_REMEDY}")

    def save(self, folder: str | os.PathLike) -> None:
        """Write the JSON."""
        write_json(Path(folder) / CPU_JSON, asdict(self))

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Runtime":
        """Read the JSON; raises a ValueError if it is missing or damaged."""
        path = Path(folder) / CPU_JSON
        stored = dict(typed(read_json(path, _REMEDY), dict, path, _REMEDY))
        layers = typed(stored.get("layers"), dict[str, Any], f"{path}: layers", _REMEDY)
        stored["layers"] = {
            name: build(LayerRecord, each, f"{path}: {name}", _REMEDY) for name, each in layers.items()
        }
        times = typed(stored.get("times"), list[Any], f"{path}: times", _REMEDY)
        stored["times"] = [build(ShapeTime, each, f"{path}: times", _REMEDY) for each in times]
        for time in stored["times"]:
            time.check(path)
        runtime = build(cls, stored, path, _REMEDY)
        for name, kind in runtime.embeddings.items():
            if kind not in (INT8, FLOAT32, TIED):
                raise ValueError(f"{path}: {name} is stored as {kind!r:.60}, which is unknown: {_REMEDY}")
        return runtime


def record_of(plan: LinearPlan) -> LayerRecord:
    """Return what is written of a plan beside its weights."""
    kinds = [list(pair) for pair in plan.choice.kinds]
    if isinstance(plan, ExactPlan):
        return LayerRecord(kinds)
    output = [plan.output.scale, plan.output.zero] if isinstance(plan.output, Step) else None
    return LayerRecord(kinds, [plan.input.scale, plan.input.zero], output)


def write_weights(path: Path, model: PreTrainedModel, plans: Plans, metadata: Mapping[str, str]) -> PackedWriter:
    """Write the weights of a float32 model, with int8 for what is in 8 bits."""

    def items() -> Iterator[PackItem]:
        written: set[tuple[int, torch.Size]] = set()
        for name, tensor in model.state_dict().items():
            key = tensor.data_ptr(), tensor.shape
            if key in written and tensor.numel():
                continue  # tied
            written.add(key)
            plan = plans.get(name.removesuffix(".weight"))
            if isinstance(plan, Int8Plan) and name.endswith(".weight"):
                yield PackItem(name, plan.values, "sparse")
                yield PackItem(name + _SCALES, plan.scales, "raw")
                if isinstance(plan.output, Tensor):
                    yield PackItem(name + _UNITS, plan.output, "raw")
            elif isinstance(plan, Int8Table):
                yield PackItem(name, plan.values, "raw")
                yield PackItem(name + _SCALES, plan.scales, "raw")
            else:
                yield PackItem(name, tensor, "raw" if plan is None else "sparse")

    writer = PackedWriter()
    writer.write(path, items(), metadata)
    return writer


class StoredPlans(Mapping[str, LinearPlan | Int8Table]):
    """The plans of the linear layers and token embeddings in a file, by name.

    Each is decoded when it is asked for, so few take memory.

    Raises:
        ValueError: the JSON and the weights do not belong together; when a plan is asked for also if it is damaged.
    """

    def __init__(
        self,
        packed: PackedFile,
        runtime: Runtime,
        adapt: Callable[[LinearPlan], LinearPlan] = lambda plan: plan,
    ) -> None:
        runtime.check_weights(packed)
        self.tables = [name for name, kind in runtime.embeddings.items() if kind == INT8]
        self._names = dict.fromkeys([*runtime.layers, *self.tables])
        for name in self._names:
            if f"{name}.weight" not in packed.entries:
                raise ValueError(f"{packed.path}: {name} has no weight: {_REMEDY}")
        for name in packed.entries:
            if name + _SCALES in packed.entries and not _belongs(name, self._names):
                raise ValueError(f"{packed.path}: {name} has 8 bits, of which {CPU_JSON} says nothing: {_REMEDY}")
        self._packed, self._layers, self._adapt = packed, runtime.layers, adapt

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights."""
        return {name: self._packed.entries[f"{name}.weight"].shape for name in self}

    def others(self) -> dict[str, Tensor]:
        """Return the tensors of the rest of the model, by name."""
        packed, names = self._packed, self._names
        return {name: packed.tensor(name) for name in packed.entries if not _belongs(name, names)}

    def __getitem__(self, name: str) -> LinearPlan | Int8Table:
        return self.linear(name) if name in self._layers else self._table(name)

    def linear(self, name: str) -> LinearPlan:
        """Return the plan of a linear layer."""
        packed, record, where = self._packed, self._layers[name], f"{self._packed.path}: {name}"
        weight, choice = packed.tensor(f"{name}.weight"), record.choice(where)
        bias = packed.tensor(f"{name}.bias") if f"{name}.bias" in packed.entries else None
        if record.input is None:
            return self._adapt(ExactPlan(choice, _checked(weight, torch.float32, where), bias))
        scales, output = _of_rows(packed, f"{name}.weight{_SCALES}", len(weight)), record.output
        units = _of_rows(packed, f"{name}.weight{_UNITS}", len(weight)) if output is None else _step(output, where)
        input = _step(record.input, where)
        return self._adapt(Int8Plan(choice, _checked(weight, torch.int8, where), scales, bias, input, units))

    def _table(self, name: str) -> Int8Table:
        packed = self._packed
        values = _checked(packed.tensor(f"{name}.weight"), torch.int8, f"{packed.path}: {name}")
        return Int8Table(values, _of_rows(packed, f"{name}.weight{_SCALES}", len(values), zero=True))


def dense_bytes(packed: PackedFile) -> int:
    """Return the bytes that the model's tensors have in float32; a tensor with two names counts once."""
    return sum(4 * entry.total for name, entry in packed.entries.items() if not name.endswith((_SCALES, _UNITS)))


def cpu_name() -> str:
    """Return the name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _belongs(name: str, names: Collection[str]) -> bool:
    weight = name.removesuffix(_SCALES).removesuffix(_UNITS)
    return weight.endswith(".weight") and weight.removesuffix(".weight") in names


def _of_rows(packed: PackedFile, name: str, rows: int, zero: bool = False) -> Tensor:
    """Read a positive number for each row of a matrix. zero: rows of zeros may have 0."""
    if name not in packed.entries:
        raise ValueError(f"{packed.path} has no {name}: {_REMEDY}")
    numbers = packed.tensor(name)
    if numbers.shape != (rows,) or numbers.dtype != torch.float32 or not _fit(numbers, zero):
        raise ValueError(f"{packed.path}: {name} is no positive number for each of {rows} rows: {_REMEDY}")
    return numbers


def _fit(numbers: Tensor, zero: bool) -> bool:
    return bool(((numbers >= 0 if zero else numbers > 0) & numbers.isfinite()).all())


def _checked(weight: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    if weight.dtype != dtype or weight.dim() != 2:
        raise ValueError(f"{where} is {weight.dtype} of {weight.dim()} axes, not a matrix of {dtype}: {_REMEDY}")
    return weight


def _step(numbers: list[float], where: str) -> Step:
    scale, zero = numbers if len(numbers) == 2 else (0.0, 0)
    if not 0 < scale < float("inf") or zero not in range(256):
        raise ValueError(f"{where}: {numbers!r:.60} are no scale and zero point: {_REMEDY}")
    return Step(float(scale), int(zero))
