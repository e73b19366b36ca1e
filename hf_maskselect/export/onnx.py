"""Export to ONNX by the exporter of transformers, for portability: ONNX Runtime has no kernels that use zeros."""

import contextlib
import importlib.util
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..masking.targets import prunable_weights
from ..storage.derived import ONNX_FILE, ORIGIN, beside_model, weights_beside
from ..storage.folders import check_output, find_folder
from ..storage.models import load_strictly, model_class
from ..storage.state import PruningState
from ..storage.weights import check_unpacked
from ..utils.wrappers import eager, plain_model

_PACKAGES = ("onnx", "onnxscript", "onnxruntime", "transformers.exporters")


@dataclass(frozen=True)
class OnnxReport:
    """The file that was written and its comparison with the model.

    zeros: number of the prunable matrices' zeros in the graph; folded: number of prunable matrices that the exporter
    multiplied with other constants, which lost the zeros; difference: largest absolute difference between the outputs
    of the model and of ONNX Runtime, on inputs of another shape than that of the export.
    """

    path: Path
    zeros: int
    folded: int
    difference: float

    def __str__(self) -> str:
        folded = f" ({self.folded} matrices became part of other constants)" if self.folded else ""
        return (
            f"{self.path}: {self.zeros:,} zeros kept{folded}, outputs within {self.difference:.1e} of the model's in "
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
        model_or_path: a float32 transformers model, or a folder or Hub repository, which is read as float32.
        output: a folder, created if needed. The configuration and tokenizer of a folder are copied there.
        inputs: a batch of at least two rows to export with; by default token ids of two rows of eight.
        tolerance: largest difference of outputs, relative to the model's largest output.

    Raises:
        ValueError: packages of the `onnx` extra are missing, there is no such model, or the graph has other outputs
            (nothing is written then).
    """
    check_packages("export to ONNX")
    output = Path(output)
    folder: Path | None = None
    weights = ""
    model_or_path = plain_model(model_or_path)
    if isinstance(model_or_path, PreTrainedModel):
        model = model_or_path
    elif isinstance(model_or_path, nn.Module):
        raise ValueError(f"{type(model_or_path).__name__} is not a transformers model: use torch.onnx.export")
    else:
        folder = find_folder(model_or_path)
        check_unpacked(folder)
        check_output(folder, output)
        state = PruningState.find(folder)
        if state is not None:
            state.check_saved(folder)
        weights = weights_beside(folder)
        model = load_strictly(model_class(folder)[0], folder, dtype=torch.float32)
    if model.dtype != torch.float32:
        raise ValueError(f"the model is {model.dtype}, which ONNX Runtime lacks on the CPU: export model.float()")
    if inputs is None and model.main_input_name != "input_ids":
        raise ValueError(f"{type(model).__name__} takes {model.main_input_name}: pass a batch of that as inputs")
    training, device = model.training, model.device
    model.eval().cpu()
    try:
        with beside_model(folder, output, lambda: weights) as new:
            report = _export(model, new, inputs, tolerance)
            if weights:
                _name_weights(new / ONNX_FILE, weights)
    finally:
        model.train(training).to(device)
    return replace(report, path=output / ONNX_FILE)


def check_packages(work: str) -> None:
    """Raise a ValueError if packages of the `onnx` extra are missing that `work` needs."""
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{work} needs {', '.join(missing)}: pip install -U 'hf_maskselect[onnx]'")


def _export(model: PreTrainedModel, folder: Path, inputs: Mapping[str, Tensor] | None, tolerance: float) -> OnnxReport:
    """Write the graph into `folder` and compare it."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    if inputs is None:
        batch, other_batch = _token_rows(model, 2, 8), _token_rows(model, 3, 11)
    else:
        batch = {name: tensor.cpu() for name, tensor in inputs.items()}
        other_batch = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in batch.items()}
    with eager(), contextlib.redirect_stdout(io.StringIO()):  # the exporter prints its progress
        exported = OnnxExporter().export(model, dict(batch), config=OnnxConfig(dynamic=True))
    exported.save_pretrained(folder)
    zeros, folded = _find_zeros(folder / ONNX_FILE, model)
    difference, largest = _compare(folder / ONNX_FILE, model, other_batch)
    if not difference <= tolerance * max(1.0, largest):
        raise ValueError(
            f"the graph computes something else (its outputs differ from the model's by up to {difference:.3g}) and "
            "was not written: try other versions of torch, onnx and onnxscript"
        )
    return OnnxReport(folder / ONNX_FILE, zeros, folded, difference)


def _name_weights(path: Path, digest: str) -> None:
    """Write the digest of the weights into a graph, whose large constants stay in their own file."""
    import onnx

    graph = onnx.load(path, load_external_data=False)
    graph.metadata_props.add(key=ORIGIN, value=digest)
    onnx.save(graph, path)


def _token_rows(model: PreTrainedModel, rows: int, length: int) -> dict[str, Tensor]:
    """Make rows of ordinary token ids; the last row is half as long, so that the attention mask matters."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _find_zeros(path: Path, model: PreTrainedModel) -> tuple[int, int]:
    """Count the prunable matrices' zeros in the graph, and the matrices that are not there.

    The export changes names and orientation, so a matrix is recognised by its shape and its number of zeros.
    """
    import onnx
    from onnx import numpy_helper

    constants = []
    for initializer in onnx.load(path).graph.initializer:
        array = numpy_helper.to_array(initializer)
        constants.append((sorted(array.shape), int((array == 0).sum())))
    zeros = folded = 0
    for weight in prunable_weights(model).values():
        matrix = sorted(weight.shape), int((weight == 0).sum())
        if matrix in constants:
            constants.remove(matrix)
            zeros += matrix[1]
        else:
            folded += 1
    return zeros, folded


def _compare(path: Path, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return (largest difference, largest magnitude) over the outputs that have the same name in both."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    arguments = {node.name for node in session.get_inputs()}
    names = [node.name for node in session.get_outputs()]
    outputs = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items() if name in arguments})
    with torch.no_grad():
        expected = {name: value for name, value in model(**inputs).items() if isinstance(value, Tensor)}
    pairs = [(torch.from_numpy(o), expected[name]) for name, o in zip(names, outputs, strict=True) if name in expected]
    if not pairs:
        raise ValueError(
            f"the graph returns {', '.join(names)} and the model {', '.join(expected)}: there is nothing to compare"
        )
    return max(float((o - e).abs().max()) for o, e in pairs), max(float(e.abs().max()) for _, e in pairs)
