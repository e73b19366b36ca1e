"""ONNX through transformers' own exporter: for portability. ONNX Runtime has no sparse kernels, so zeros make nothing
faster there."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint import PruningState, load_strictly, model_class
from ..masking.targets import prunable_weights
from ..packing import copy_companions, find_folder

ONNX_FILE = "model.onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class OnnxReport:
    """What was written and how it compares.

    zeros: of the prunable matrices, found again in the graph; folded: names of those that the exporter multiplied with
    other constants, so that their zeros are gone; difference: largest absolute one between the outputs of the model
    and of ONNX Runtime, on inputs of another shape than that of the export.
    """

    path: Path
    zeros: int
    folded: tuple[str, ...]
    difference: float

    def __str__(self) -> str:
        gone = f" ({len(self.folded)} matrices became part of other constants)" if self.folded else ""
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
        model_or_path: a model of transformers, or a folder or Hub repository of one.
        output: a folder, made if need be; configuration and tokenizer are copied there.
        inputs: a batch of at least two rows to export with; by default token ids of two rows of eight.
        tolerance: how far outputs may differ, relative to the largest of the model's.

    Raises:
        ValueError: packages of the `onnx` extra are missing, no such model, or a graph with other outputs.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"export to ONNX needs {', '.join(missing)}: pip install 'hf_maskselect[onnx]'")
    from transformers.exporters import OnnxConfig, OnnxExporter

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    if isinstance(model_or_path, PreTrainedModel):
        model = model_or_path
    else:
        folder = find_folder(model_or_path)
        state = PruningState.find(folder)
        if state is not None:
            state.check_saved(folder)
        model = load_strictly(model_class(folder)[0], folder, folder, ("missing_keys",))
        copy_companions(folder, output)
    trains, device = model.training, model.device
    model.eval().cpu()
    try:
        inputs = _token_rows(model, 2, 8) if inputs is None else {name: t.cpu() for name, t in inputs.items()}
        with contextlib.redirect_stdout(io.StringIO()):  # its progress
            exported = OnnxExporter().export(model, dict(inputs), config=OnnxConfig(dynamic=True))
        exported.save_pretrained(output)
        zeros, folded = _find_zeros(output / ONNX_FILE, model)
        others = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in inputs.items()}
        difference, largest = _compare(output / ONNX_FILE, model, others)
    finally:
        model.train(trains).to(device)
    if not difference <= tolerance * max(1.0, largest):
        raise ValueError(
            f"{output / ONNX_FILE} computes something else: its outputs are up to {difference:.3g} from the model's; "
            "do not use it, and tell the versions of torch, onnx and onnxscript in a report"
        )
    return OnnxReport(output / ONNX_FILE, zeros, folded, difference)


def _token_rows(model: PreTrainedModel, rows: int, length: int) -> dict[str, Tensor]:
    """Ids that are no special tokens; the second row is shorter, so that the mask means something."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _find_zeros(path: Path, model: PreTrainedModel) -> tuple[int, tuple[str, ...]]:
    """(zeros of the prunable matrices in the graph, names of those that are not there): names and orientation change
    on the way, so a matrix is known by its shape and its number of zeros."""
    import onnx
    from onnx import numpy_helper

    found = []
    for initializer in onnx.load(path).graph.initializer:
        array = numpy_helper.to_array(initializer)
        found.append((sorted(array.shape), int((array == 0).sum())))
    zeros, folded = 0, []
    for name, weight in prunable_weights(model).items():
        wanted = sorted(weight.shape), int((weight == 0).sum())
        if wanted in found:
            found.remove(wanted)
            zeros += wanted[1]
        else:
            folded.append(name)
    return zeros, tuple(folded)


def _compare(path: Path, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
    """(largest difference, largest magnitude) over the outputs that both have."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = {node.name for node in session.get_inputs()}
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items() if name in names})
    with torch.no_grad():
        expected = model(**inputs).to_tuple()
    pairs = list(zip(outputs, expected, strict=True))
    difference = max(float((torch.from_numpy(found) - wanted).abs().max()) for found, wanted in pairs)
    return difference, max(float(wanted.abs().max()) for _, wanted in pairs)
