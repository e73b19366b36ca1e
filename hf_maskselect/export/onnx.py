"""ONNX through transformers' own exporter: for portability. ONNX Runtime has no sparse kernels, so zeros make nothing
faster there."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..masking.targets import prunable_weights
from ..storage.load import find_folder
from ..storage.models import load_strictly, model_class
from ..storage.pack import check_output, copy_companions
from ..storage.state import PruningState
from ..storage.weights import check_unpacked

ONNX_FILE = "model.onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime", "transformers.exporters")


@dataclass(frozen=True)
class OnnxReport:
    """What was written and how it compares.

    zeros: of the prunable matrices, found again in the graph; folded: number of those that the exporter multiplied
    with other constants, so that their zeros are gone; difference: largest absolute one between the outputs of the
    model and of ONNX Runtime, on inputs of another shape than that of the export.
    """

    path: Path
    zeros: int
    folded: int
    difference: float

    def __str__(self) -> str:
        gone = f" ({self.folded} matrices became part of other constants)" if self.folded else ""
        return (
            f"{self.path}: {self.zeros:,} zeros kept{gone}, outputs within {self.difference:.1e} of the model's in "
            "ONNX Runtime (which has no sparse kernels: this is for portability, not speed)"
        )


def export_onnx(
    model_or_path: PreTrainedModel | str | os.PathLike,
    output: str | os.PathLike,
    inputs: Mapping[str, Tensor] | None = None,
    tolerance: float = 1e-3,
) -> OnnxReport:
    """Write `output/model.onnx` (weights in `model.onnx.data`), with dynamic batch and length, and compare it.

    Args:
        model_or_path: a float32 model of transformers, or a folder or Hub repository of one, which is read as float32.
        output: a folder, made if need be; configuration and tokenizer of a folder are copied there.
        inputs: a batch of at least two rows to export with; by default token ids of two rows of eight, for models
            that take them.
        tolerance: how far outputs may differ, relative to the largest of the model's.

    Raises:
        ValueError: packages of the `onnx` extra are missing, no such model, or a graph with other outputs (nothing is
            written then).
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"export to ONNX needs {', '.join(missing)}: pip install -U 'hf_maskselect[onnx]'")
    output, folder = Path(output), None
    if isinstance(model_or_path, PreTrainedModel):
        model = model_or_path
    elif isinstance(model_or_path, nn.Module):
        raise ValueError(f"{type(model_or_path).__name__} is no model of transformers: use torch.onnx.export")
    else:
        folder = find_folder(model_or_path)
        check_unpacked(folder)
        check_output(folder, output)
        state = PruningState.find(folder)
        if state is not None:
            state.check_saved(folder)
        model = load_strictly(model_class(folder)[0], folder, folder, ("missing_keys",), dtype=torch.float32)
    if model.dtype != torch.float32:
        raise ValueError(f"the model is {model.dtype}, which ONNX Runtime's CPU kernels lack: export model.float()")
    if inputs is None and model.main_input_name != "input_ids":
        raise ValueError(f"{type(model).__name__} takes {model.main_input_name}: pass a batch of them as inputs")
    trains, device = model.training, model.device
    model.eval().cpu()
    output.mkdir(parents=True, exist_ok=True)
    try:
        # Aside, and in its place when it has been compared; uploads leave out what begins with an underscore.
        with tempfile.TemporaryDirectory(dir=output, prefix="_onnx-") as aside:
            report = _export(model, Path(aside), inputs, tolerance)
            for path in sorted(Path(aside).iterdir()):
                os.replace(path, output / path.name)
    finally:
        model.train(trains).to(device)
    if folder is not None:
        copy_companions(folder, output)
    return replace(report, path=output / ONNX_FILE)


def _export(model: PreTrainedModel, folder: Path, inputs: Mapping[str, Tensor] | None, tolerance: float) -> OnnxReport:
    """Write the graph into `folder` and compare it."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    if inputs is None:
        given, others = _token_rows(model, 2, 8), _token_rows(model, 3, 11)
    else:
        given = {name: tensor.cpu() for name, tensor in inputs.items()}
        others = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in given.items()}
    with contextlib.redirect_stdout(io.StringIO()):  # its progress
        exported = OnnxExporter().export(model, dict(given), config=OnnxConfig(dynamic=True))
    exported.save_pretrained(folder)
    zeros, folded = _find_zeros(folder / ONNX_FILE, model)
    difference, largest = _compare(folder / ONNX_FILE, model, others)
    if not difference <= tolerance * max(1.0, largest):
        raise ValueError(
            f"the graph computes something else, its outputs are up to {difference:.3g} from the model's, so it was "
            "not written: try other versions of torch, onnx and onnxscript"
        )
    return OnnxReport(folder / ONNX_FILE, zeros, folded, difference)


def _token_rows(model: PreTrainedModel, rows: int, length: int) -> dict[str, Tensor]:
    """Ids that are no special tokens; the second row is shorter, so that the mask means something."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _find_zeros(path: Path, model: PreTrainedModel) -> tuple[int, int]:
    """(zeros of the prunable matrices in the graph, number of those that are not there): names and orientation change
    on the way, so a matrix is known by its shape and its number of zeros."""
    import onnx
    from onnx import numpy_helper

    found = []
    for initializer in onnx.load(path).graph.initializer:
        array = numpy_helper.to_array(initializer)
        found.append((sorted(array.shape), int((array == 0).sum())))
    zeros = folded = 0
    for weight in prunable_weights(model).values():
        wanted = sorted(weight.shape), int((weight == 0).sum())
        if wanted in found:
            found.remove(wanted)
            zeros += wanted[1]
        else:
            folded += 1
    return zeros, folded


def _compare(path: Path, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
    """(largest difference, largest magnitude) over the tensors that both return under one name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    takes = {node.name for node in session.get_inputs()}
    names = [node.name for node in session.get_outputs()]
    found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items() if name in takes})
    with torch.no_grad():
        expected = {name: value for name, value in model(**inputs).items() if isinstance(value, Tensor)}
    pairs = [(torch.from_numpy(f), expected[name]) for name, f in zip(names, found, strict=True) if name in expected]
    if not pairs:
        raise ValueError(
            f"the graph returns {', '.join(names)}, and the model {', '.join(expected)}: nothing to compare"
        )
    return max(float((f - e).abs().max()) for f, e in pairs), max(float(e.abs().max()) for _, e in pairs)
