"""Export 2:4 models for sparse tensor cores to one file, and load it on any device.

The file has the packed format (`docs/packed-format.md`) with the coding "2:4": values and metadata in the layout of
torch's sparse kernels. On a GPU of compute capability 8.0 or more they become `SparseSemiStructuredTensor` weights;
elsewhere they become the exact dense weights.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)
from transformers import PreTrainedModel

from ..masking.targets import prunable_weights, transposed_weights
from ..storage.derived import (
    ORIGIN,
    SEMI_STRUCTURED_FILE,
    TIMING_FILE,
    beside_model,
    weights_beside,
    write_section,
)
from ..storage.folders import check_output, find_folder
from ..storage.models import config_digest, load_strictly, model_class, own_names, skeleton
from ..storage.pack import open_packed
from ..storage.packed_file import PackedFile, PackedWriter, PackItem
from ..storage.state import PruningState
from ..storage.two_of_four import check_groups, compress, layout_of
from ..storage.weights import check_present, saved_tensors
from ..utils.files import read_json, write_json
from ..utils.reading import build, typed
from ..utils.wrappers import plain_model

MODES = ("eager", "compiled")
EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}
BACKENDS = {"cusparselt": SparseSemiStructuredTensorCUSPARSELT, "cutlass": SparseSemiStructuredTensorCUTLASS}
# torch accepts bfloat16 and float16 matrices whose rows and columns are multiples of these.
_MULTIPLES = {"cusparselt": (16, 16), "cutlass": (32, 64)}


@dataclass(frozen=True)
class Choice:
    """The fastest back end (None: dense) and the tensors that were faster sparse at every shape that was timed."""

    backend: str | None
    sparse: list[str]


@dataclass(frozen=True)
class Timing:
    """The result of `time_export` on one kind of device: a choice for plain ("eager") and for compiled use.

    weights: digest of the weights that the timed file was made from; file: checksum of its header. Both are empty in
    files of earlier versions.
    """

    device: str
    choices: dict[str, Choice]
    weights: str = ""
    file: str = ""

    def save(self, folder: str | os.PathLike) -> None:
        """Write the choices into the folder of the exported file."""
        write_json(Path(folder) / TIMING_FILE, asdict(self))

    @classmethod
    def find(cls, folder: str | os.PathLike) -> Timing | None:
        """Read the timing of a folder, or None; raises a ValueError if the file is damaged."""
        path = Path(folder) / TIMING_FILE
        if not path.is_file():
            return None
        remedy = "delete it, and time the file again"
        stored = typed(read_json(path, remedy), dict, path, remedy)
        choices = typed(stored.get("choices"), dict[str, Any], f"{path}: choices", remedy)
        chosen = {mode: build(Choice, choice, path, remedy) for mode, choice in choices.items()}
        return build(cls, {**stored, "choices": chosen}, path, remedy)


@dataclass(frozen=True)
class ExportReport:
    """The file that `export_semi_structured` wrote.

    sparse: names of the tensors in the packed 2:4 layout; dense, excluded: names of prunable tensors stored dense,
    because the layout cannot hold them or the caller excluded them; dense_bytes, packed_bytes: size of all tensors at
    the exported dtype, and of the file.
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

    Before anything is written, every prunable matrix is checked along its input axis, the reduction axis of the matrix
    product: packing a matrix that is not 2:4 would drop weights silently.

    Args:
        model_or_path: a transformers model, or a folder or Hub repository.
        output: a folder, created if needed.
        dtype: of all weights: `"bf16"` (default) or `"fp16"`; `"int8"` rounds the 2:4 matrices to 255 steps a row
            and the rest to bfloat16, and is multiplied as bfloat16.
        exclude_modules: names (suffix or regex, as for `prunable_weights`) of modules that stay dense.

    Raises:
        ValueError: a prunable matrix is not 2:4, float16 cannot hold a value, or there is no such model.
    """
    if dtype not in EXPORT_DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(EXPORT_DTYPES)}")
    model_or_path = plain_model(model_or_path)
    if isinstance(model_or_path, nn.Module):
        if not isinstance(model_or_path, PreTrainedModel):
            raise ValueError(
                f"{type(model_or_path).__name__} is not a transformers model, so there is no configuration to load it "
                "with: use torch.sparse.to_sparse_semi_structured on its weights"
            )
        with tempfile.TemporaryDirectory() as temporary:
            with own_names(model_or_path):
                model_or_path.save_pretrained(temporary)
            return export_semi_structured(temporary, output, dtype, exclude_modules)
    folder, output = find_folder(model_or_path), Path(output)
    check_output(folder, output)
    state = PruningState.find(folder)
    if state is not None:
        state.check_saved(folder)
    weights = weights_beside(folder)
    chosen, excluded = _choose(folder, None if state is None else list(state.masks), exclude_modules)
    wide = EXPORT_DTYPES[dtype]
    stored = torch.int8 if dtype == "int8" else wide
    check_present(folder, chosen, (name for name, _ in saved_tensors(folder)))
    sparse: list[str] = []
    dense: list[str] = []
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
            f"{folder}: none of its {len(chosen)} prunable matrices fits the packed 2:4 layout, which needs rows and "
            "columns that are multiples of 32: use the model without export"
        )
    coding = "2:4 int8" if dtype == "int8" else "2:4"

    def items() -> Iterator[PackItem]:
        for name, tensor in saved_tensors(folder):
            narrow = tensor.to(wide) if tensor.is_floating_point() else tensor
            yield PackItem(name, narrow, coding if name in sparse else "raw")

    path, writer = output / SEMI_STRUCTURED_FILE, PackedWriter()
    with beside_model(folder, output, lambda: weights, outdated=TIMING_FILE) as new:
        writer.write(new / SEMI_STRUCTURED_FILE, items(), {"config": config_digest(folder), ORIGIN: weights})
        write_section(output, new, TIMING_FILE)  # those of an earlier file
    return ExportReport(path, tuple(sparse), tuple(dense), tuple(excluded), writer.dense_bytes, path.stat().st_size)


def _choose(
    folder: Path, masked: Sequence[str] | None, exclude_modules: str | Sequence[str] | None
) -> tuple[set[str], list[str]]:
    """Return (names of the matrices that must be 2:4, names of the excluded ones)."""
    model = skeleton(folder)
    modules = None if masked is None else [name.removesuffix(".weight") for name in masked]
    every = prunable_weights(model, modules)
    chosen = set(prunable_weights(model, modules, exclude_modules))
    if transposed := sorted(chosen & transposed_weights(model)):
        raise ValueError(
            f"{transposed[0]} belongs to a Conv1D, which stores it transposed, and sparse kernels support linear "
            "layers only: leave it dense with exclude_modules"
        )
    return chosen, [name for name in every if name not in chosen]


def load_semi_structured(
    path_or_repo: str | os.PathLike,
    device: str | torch.device = "cpu",
    backend: str | None = None,
    mode: str = "eager",
) -> PreTrainedModel:
    """Load an exported model in eval mode, at its exported dtype.

    Args:
        path_or_repo: a folder that `export_semi_structured` wrote, or a Hub repository.
        device: device of the model. On a CUDA device for which torch has sparse kernels (compute capability 8.0 or
            more) 2:4 matrices become `SparseSemiStructuredTensor`; elsewhere they are the exact dense weights. If
            `time_export` has timed the file on the same kind of device, matrices that were faster dense stay dense.
        backend: `"cusparselt"` or `"cutlass"` makes every 2:4 matrix sparse that it supports; the default is the
            fastest in the timing, otherwise the first that torch has.
        mode: `"compiled"` follows the timing for models in `torch.compile`, `"eager"` the one for plain use.

    Raises:
        ValueError: the file is missing, damaged or of another model, or the device or back end is not available.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} must be one of {', '.join(MODES)}")
    available = available_backends(device)
    if backend is not None and backend not in available:
        raise ValueError(
            f"backend={backend!r} does not run on {device} with this torch, which has "
            f"{', '.join(available) or 'none'} there: leave backend unset"
        )
    folder = find_folder(path_or_repo, weights=[SEMI_STRUCTURED_FILE, TIMING_FILE])
    packed = open_packed(folder, SEMI_STRUCTURED_FILE, "export")
    tensors = {name: packed.tensor(name) for name in packed.entries}
    cls, config = model_class(folder)
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    model = load_strictly(cls, folder, config=config, state_dict=tensors, dtype=dtype)
    nn.Module.to(model, device).eval()
    names = sparse_names(packed)
    if backend is None and available:
        backend = available[0]
        timing = Timing.find(folder)
        if timing is not None and timing.file not in ("", packed.metadata["checksum"]):
            raise ValueError(f"{folder / TIMING_FILE} is of another file: delete it, and time the file again")
        if timing is not None and timing.device == torch.cuda.get_device_name(device) and mode in timing.choices:
            choice = timing.choices[mode]
            if choice.backend is None or choice.backend in available:
                backend, names = choice.backend, choice.sparse
    if backend is not None:
        make_sparse(model, names_that_fit(model, names, backend), backend)
    return model


def sparse_names(packed: PackedFile) -> list[str]:
    """Return the names of the tensors that an exported file stores as 2:4."""
    return [name for name, entry in packed.entries.items() if entry.coding == "2:4"]


def available_backends(device: str | torch.device) -> list[str]:
    """Return the back ends that run on a device, the usually faster one first; empty unless it is CUDA.

    CUTLASS kernels of torch are built for compute capability 8.x only; cuSPARSELt comes with some builds of torch.
    Raises a ValueError if there is no such device.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is unknown to torch: use 'cpu' or 'cuda'") from error
    if kind != "cuda":
        return []
    if not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r} is not available, or this torch is built without CUDA: use 'cpu'")
    major, _ = torch.cuda.get_device_capability(device)
    backends = ["cusparselt"] if major >= 8 and torch.backends.cusparselt.is_available() else []
    return [*backends, "cutlass"] if major == 8 else backends


def names_that_fit(model: nn.Module, names: Sequence[str], backend: str) -> list[str]:
    """Return the names of the matrices whose shape a back end supports."""
    rows, columns = _MULTIPLES[backend]
    shapes = {name: model.get_parameter(name).shape for name in names}
    return [name for name, shape in shapes.items() if shape[0] % rows == 0 and shape[1] % columns == 0]


def make_sparse(model: nn.Module, names: Sequence[str], backend: str) -> None:
    """Turn 2:4 weights of linear layers, of a supported shape, into sparse tensors in place. Prevents training."""
    for name in names:
        weight = sparse_weight(name, model.get_parameter(name).detach(), backend)
        model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(weight, requires_grad=False)


def sparse_weight(name: str, weight: Tensor, backend: str) -> SparseSemiStructuredTensor:
    """Convert a 2:4 matrix to a tensor of torch's sparse kernels, on its device."""
    check_groups(name, weight)
    kind = BACKENDS[backend]
    if kind is SparseSemiStructuredTensorCUSPARSELT:  # only the library knows its layout
        return kind.from_dense(weight.contiguous())
    values, meta = compress(name, weight.contiguous())
    return kind(weight.shape, values, meta, None, None, None)
