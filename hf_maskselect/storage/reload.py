"""Save a model so that a fresh process loads it again, with the same outputs to the bit."""

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..surgery.structured.layer_shapes import LayerShapes
from ..utils.clock import least_seconds
from ..utils.folders import replacing_folder
from .derived import CARD, of_weights
from .folders import check_output, copy_companions
from .models import load_strictly, model_class

_SECONDS = 1.0  # spent on timing a model

# Runs without this package if the configuration says the shape. Arguments are the folder, the file of inputs and
# expected outputs, and the threads. Weights that are mapped from a file may lie at odd addresses, where products are
# rounded in another way, so they are copied.
_SCRIPT = """
import copy, sys
import torch, transformers
from safetensors.torch import load_file

folder, file, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
config = transformers.AutoConfig.from_pretrained(folder)
cls = getattr(transformers, config.architectures[0])
model, info = cls.from_pretrained(folder, dtype="auto", output_loading_info=True)
tensors = load_file(file)
expected = tensors.pop("")
with torch.no_grad():
    output = copy.deepcopy(model).eval()(**tensors)[0]
wrong = [kind for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]]
if wrong:
    sys.exit(f"{wrong[0]}: {sorted(map(str, info[wrong[0]]))[0]}")
if not torch.equal(output, expected):
    sys.exit(f"its outputs differ by up to {(output - expected).abs().max():.2g}")
"""


def save_reloadable(
    model: PreTrainedModel, output: str | os.PathLike, batch: Mapping[str, Tensor], folder: str | os.PathLike
) -> None:
    """Write a model to `output`, which is either whole and reloads or is left as it was.

    A fresh process loads it and must get the same first output, to the bit, for `batch`. It uses plain transformers,
    without this package, or imports this package first if the shapes of the layers differ.

    Args:
        model: a model of transformers; it is moved to the CPU.
        output: folder to write, created if needed.
        batch: the inputs of one call.
        folder: that of the model it was made of, whose tokenizer and other files are copied, but not its card.

    Raises:
        ValueError: `output` holds another model, or what was written does not reload.
    """
    output, folder = Path(output), Path(folder)
    check_apart(folder, output)
    with replacing_folder(output, keeps=lambda name: not of_weights(name)) as new:
        copy_companions(folder, new)
        (new / CARD).unlink(missing_ok=True)
        model.cpu().save_pretrained(new)
        reason = _difference(model, new, {name: value.cpu() for name, value in batch.items()})
        if reason:
            raise ValueError(
                f"the model for {output} does not reload by {loaders(model)} ({reason}): nothing was saved"
            )


def check_apart(folder: Path, output: Path) -> None:
    """Raise a ValueError if `output` holds a model, be it that of `folder`."""
    if output.resolve() == folder.resolve():
        raise ValueError(f"{output} holds the model to start from: choose another output folder")
    check_output(folder, output)


def check_reloads(model: PreTrainedModel, folder: str | os.PathLike, shape: Sequence[int]) -> None:
    """Check that a fresh process, as in `save_reloadable`, gets the same first output for random inputs of a shape.

    Args:
        model: what the folder holds, on the CPU.
        folder: of the saved model.
        shape: of its main input.

    Raises:
        ValueError: the outputs differ, or the model does not load.
    """
    if reason := _difference(model, Path(folder), _random_batch(model, shape)):
        raise ValueError(f"{folder} does not reload by {loaders(model)} ({reason}): save the model again")


def seconds_of_call(folder: str | os.PathLike, shape: Sequence[int]) -> float:
    """Return the least time of one call of a saved model on the CPU, for inputs of a shape as in `check_reloads`."""
    model = load_strictly(model_class(folder)[0], folder, dtype="auto").eval()
    batch = _random_batch(model, shape)
    with torch.inference_mode():
        return least_seconds({"call": lambda: model(**batch)}, _SECONDS)["call"]


def _random_batch(model: PreTrainedModel, shape: Sequence[int]) -> dict[str, Tensor]:
    name, generator = model.main_input_name, torch.Generator().manual_seed(0)
    if name == "input_ids":
        return {name: torch.randint(model.config.vocab_size, tuple(shape), generator=generator)}
    return {name: torch.rand(tuple(shape), generator=generator).to(model.dtype)}


@torch.no_grad()
def _difference(model: PreTrainedModel, folder: Path, batch: Mapping[str, Tensor]) -> str:
    """Return why a fresh process does not get the same output from a folder; empty if it does."""
    expected = copy.deepcopy(model).eval()(**batch)[0]  # a copy here too, since the weights may be mapped
    with tempfile.TemporaryDirectory() as temporary:
        file = os.path.join(temporary, "batch.safetensors")
        save_file({"": expected.contiguous(), **{name: value.contiguous() for name, value in batch.items()}}, file)
        script = "import hf_maskselect" * needs_import(model) + _SCRIPT
        command = [sys.executable, "-c", script, str(folder), file, str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else ""


def needs_import(model: PreTrainedModel) -> bool:
    """Return whether a saved model loads only after `import hf_maskselect`."""
    return LayerShapes.of(model.config) is not None


def loaders(model: PreTrainedModel) -> str:
    """Return what loads a saved model, in words."""
    return "transformers after `import hf_maskselect`" if needs_import(model) else "plain transformers"
