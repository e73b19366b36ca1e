"""2:4 models for sparse tensor cores: checked, packed into one file, and loaded on any device.

The file is the packed format (`docs/packed-format.md`) with the coding "2:4": values and metadata as torch's sparse
kernels take them. On a GPU of compute capability 8.0 or more they become `SparseSemiStructuredTensor` weights;
anywhere else the exact dense weights.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)
from transformers import PreTrainedModel

from ..masking.targets import prunable_weights, transposed_weights
from ..storage.load import find_folder, open_packed
from ..storage.models import load_strictly, model_class, own_names, skeleton
from ..storage.pack import check_output, copy_companions
from ..storage.packed_file import PackedFile, PackedWriter
from ..storage.state import PruningState
from ..storage.two_of_four import check_groups, compress, layout_of
from ..storage.weights import check_present, config_digest, saved_tensors
from ..utils.files import read_json, write_json
from ..utils.tables import without_section

SEMI_STRUCTURED_FILE = "semi_structured_model.safetensors"
TIMING_FILE = "semi_structured_timing.json"
MODES = ("eager", "compiled")
EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}
SPEED_HEADING = "## Speed on sparse tensor cores"
BACKENDS = {"cusparselt": SparseSemiStructuredTensorCUSPARSELT, "cutlass": SparseSemiStructuredTensorCUTLASS}
# Rows and columns of a bfloat16 or float16 matrix must be multiples of these for torch to take it.
_MULTIPLES = {"cusparselt": (16, 16), "cutlass": (32, 64)}


@dataclass(frozen=True)
class Choice:
    """The best back end (None: dense wins) and the tensors that are faster sparse at every shape that was timed."""

    backend: str | None
    sparse: list[str]


@dataclass(frozen=True)
class Timing:
    """What `time_export` found out on one kind of device: a choice for plain ("eager") and for compiled use."""

    device: str
    choices: dict[str, Choice]

    def save(self, folder: str | os.PathLike) -> None:
        write_json(Path(folder) / TIMING_FILE, asdict(self))

    @classmethod
    def find(cls, folder: str | os.PathLike) -> Timing | None:
        """That of a folder, if it has one.

        Raises:
            ValueError: it is damaged.
        """
        path = Path(folder) / TIMING_FILE
        if not path.is_file():
            return None
        found = read_json(path, "delete it, and time the file again")
        return cls(found["device"], {mode: Choice(**choice) for mode, choice in found["choices"].items()})


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    sparse: names of the 2:4 tensors in the packed layout; dense: prunable ones that it cannot hold, stored as they
    are; excluded: left out by the caller. dense_bytes, packed_bytes: all tensors at the exported dtype, and the file.
    """

    path: Path
    sparse: tuple[str, ...]
    dense: tuple[str, ...]
    excluded: tuple[str, ...]
    dense_bytes: int
    packed_bytes: int

    def __str__(self) -> str:
        text = (
            f"{self.path}: {len(self.sparse)} matrices as 2:4, {self.packed_bytes / 1e6:,.2f} MB, "
            f"{self.dense_bytes / self.packed_bytes:.2f}x smaller than {self.dense_bytes / 1e6:,.2f} MB dense"
        )
        for names, why in ((self.dense, "their shape does not fit the layout"), (self.excluded, "excluded")):
            if names:
                text += f"\n{len(names)} left dense, {why}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        return text


def export_semi_structured(
    model_or_path: PreTrainedModel | str | os.PathLike,
    output: str | os.PathLike,
    dtype: str = "bf16",
    exclude_modules: str | Sequence[str] | None = None,
) -> ExportReport:
    """Write a 2:4 model as `output/semi_structured_model.safetensors`, with its configuration and tokenizer.

    Every prunable matrix is checked along its input axis, the reduction axis of the matrix product, before anything is
    written; packing one that is not 2:4 would drop weights silently.

    Args:
        model_or_path: a model of transformers, or a folder or Hub repository of one.
        output: a folder, made if need be.
        dtype: of all weights: `"bf16"` (default) or `"fp16"`; `"int8"` rounds the 2:4 matrices to 255 steps a row
            and the rest to bfloat16, and is multiplied as bfloat16.
        exclude_modules: names (suffix or regex, as for `prunable_weights`) of modules that stay dense.

    Raises:
        ValueError: a prunable matrix is not 2:4 (it is named), a value that float16 cannot hold, or no such model.
    """
    if dtype not in EXPORT_DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(EXPORT_DTYPES)}")
    if isinstance(model_or_path, nn.Module):
        if not isinstance(model_or_path, PreTrainedModel):
            raise ValueError(
                f"{type(model_or_path).__name__} is no model of transformers, so there is no configuration to load it "
                "with: use torch.sparse.to_sparse_semi_structured on its weights"
            )
        with tempfile.TemporaryDirectory() as folder:
            with own_names(model_or_path):
                model_or_path.save_pretrained(folder)
            return export_semi_structured(folder, output, dtype, exclude_modules)
    folder, output = find_folder(model_or_path), Path(output)
    check_output(folder, output)
    state = PruningState.find(folder)
    if state is not None:
        state.check_saved(folder)
    chosen, excluded = _choose(folder, None if state is None else state.masks.keys(), exclude_modules)
    wide = EXPORT_DTYPES[dtype]
    stored = torch.int8 if dtype == "int8" else wide
    check_present(folder, chosen, (name for name, _ in saved_tensors(folder)))
    sparse, dense = [], []
    for name, tensor in saved_tensors(folder):
        if wide == torch.float16 and bool((tensor.to(wide).isinf() & ~tensor.isinf()).any()):
            raise ValueError(
                f"{name} has values up to {float(tensor.abs().max()):.3g}, which fp16 cannot hold: use dtype='bf16'"
            )
        if name in chosen:
            check_groups(name, tensor)
            fits = layout_of(stored, tuple(tensor.shape)) is not None
            (sparse if fits else dense).append(name)
    if not sparse:
        raise ValueError(
            f"{folder}: none of its {len(chosen)} prunable matrices fits the packed 2:4 layout, whose rows and "
            "columns are multiples of 32: keep the model as it is"
        )
    wish = "2:4 int8" if dtype == "int8" else "2:4"

    def encoded() -> Iterator[tuple[str, Tensor, str, Tensor | None]]:
        for name, tensor in saved_tensors(folder):
            narrow = tensor.to(wide) if tensor.is_floating_point() else tensor
            yield name, narrow, wish if name in sparse else "raw", None

    output.mkdir(parents=True, exist_ok=True)
    path, writer = output / SEMI_STRUCTURED_FILE, PackedWriter()
    writer.write(path, encoded(), {"config": config_digest(folder)})
    copy_companions(folder, output)
    # Times and their table are of an earlier file.
    (output / TIMING_FILE).unlink(missing_ok=True)
    card = output / "README.md"
    if card.is_file():
        card.write_text(without_section(card.read_text(encoding="utf-8"), SPEED_HEADING), encoding="utf-8")
    return ExportReport(path, tuple(sparse), tuple(dense), tuple(excluded), writer.dense_bytes, path.stat().st_size)


def _choose(folder: Path, masked: Sequence[str] | None, exclude_modules) -> tuple[set[str], list[str]]:
    """(names of the matrices that must be 2:4, names of those left out)."""
    model = skeleton(folder)
    modules = None if masked is None else [name.removesuffix(".weight") for name in masked]
    every = prunable_weights(model, modules)
    chosen = set(prunable_weights(model, modules, exclude_modules))
    if turned := sorted(chosen & transposed_weights(model)):
        raise ValueError(
            f"{turned[0]} belongs to a Conv1D, which stores it transposed, and sparse kernels take linear layers "
            "only: leave it dense with exclude_modules"
        )
    return chosen, [name for name in every if name not in chosen]


def load_semi_structured(
    path_or_repo: str | os.PathLike,
    device: str | torch.device = "cpu",
    backend: str | None = None,
    mode: str = "eager",
) -> PreTrainedModel:
    """The exported model, in eval mode, at its exported dtype.

    Args:
        path_or_repo: a folder that `export_semi_structured` wrote, or a Hub repository of one.
        device: where it goes. On a CUDA device for which torch has sparse kernels (compute capability 8.0 or more) its
            2:4 matrices become `SparseSemiStructuredTensor`; elsewhere they are the exact dense weights. Where
            `time_export` has timed the file on the same kind of device, matrices that it found faster dense stay so.
        backend: `"cusparselt"` or `"cutlass"`, which makes every 2:4 matrix sparse that it takes; by default the one
            that was timed best, else the first that torch has.
        mode: `"eager"`, or `"compiled"` where the model will go through `torch.compile`: which of the timings counts.

    Raises:
        ValueError: no such file, damaged, of another model, or a device or back end that is not there.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} must be one of {', '.join(MODES)}")
    possible = available_backends(device)
    if backend is not None and backend not in possible:
        raise ValueError(
            f"backend={backend!r} does not run on {device} with this torch, which has {', '.join(possible) or 'none'} "
            "there: leave backend unset"
        )
    folder = find_folder(path_or_repo, weights=[SEMI_STRUCTURED_FILE, TIMING_FILE])
    packed = open_packed(folder, SEMI_STRUCTURED_FILE, "export")
    tensors = {name: packed.tensor(name) for name in packed.entries}
    cls, config = model_class(folder)
    dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    model = load_strictly(cls, folder, None, ("missing_keys",), config=config, state_dict=tensors, dtype=dtype)
    model.to(device).eval()
    names = sparse_names(packed)
    if backend is None and possible:
        backend = possible[0]
        timed = Timing.find(folder)
        if timed is not None and timed.device == torch.cuda.get_device_name(device) and mode in timed.choices:
            choice = timed.choices[mode]
            if choice.backend is None or choice.backend in possible:
                backend, names = choice.backend, choice.sparse
    if backend is not None:
        make_sparse(model, names_that_fit(model, names, backend), backend)
    return model


def sparse_names(packed: PackedFile) -> list[str]:
    """The tensors of an exported file that are stored as 2:4."""
    return [name for name, entry in packed.entries.items() if entry.coding == "2:4"]


def available_backends(device: str | torch.device) -> list[str]:
    """Back ends that run on a device, the usually faster one first; none but on CUDA.

    CUTLASS kernels of torch are built for compute capability 8.x only; cuSPARSELt comes with some builds of torch.

    Raises:
        ValueError: no such device.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is unknown to torch: use 'cpu' or 'cuda'") from error
    if kind != "cuda":
        return []
    if not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r} is not there, or this torch is built without CUDA: use 'cpu'")
    major, _ = torch.cuda.get_device_capability(device)
    found = ["cusparselt"] if major >= 8 and torch.backends.cusparselt.is_available() else []
    return [*found, "cutlass"] if major == 8 else found


def names_that_fit(model: nn.Module, names: Sequence[str], backend: str) -> list[str]:
    """Those of the named matrices that a back end takes: all but some whose sides are no multiples of 64."""
    rows, columns = _MULTIPLES[backend]
    shapes = {name: model.get_parameter(name).shape for name in names}
    return [name for name, shape in shapes.items() if shape[0] % rows == 0 and shape[1] % columns == 0]


def make_sparse(model: nn.Module, names: Sequence[str], backend: str) -> None:
    """Turn 2:4 weights of linear layers into sparse tensors, in place; the model can then only be run, not trained.

    names: of matrices that the back end takes.
    """
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.weight = nn.Parameter(sparse_weight(name, module.weight.detach(), backend), requires_grad=False)


def sparse_weight(name: str, weight: Tensor, backend: str) -> SparseSemiStructuredTensor:
    """One 2:4 matrix as the tensor that torch's sparse kernels take, on its device."""
    check_groups(name, weight)
    kind = BACKENDS[backend]
    if kind is SparseSemiStructuredTensorCUSPARSELT:  # its layout is known to the library only
        return kind.from_dense(weight.contiguous())
    values, meta = compress(name, weight.contiguous())
    return kind(weight.shape, values, meta, None, None, None)
