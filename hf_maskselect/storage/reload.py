"""Save a model so that plain transformers loads it again in a fresh process, with the same outputs to the bit."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..utils.folders import replacing_folder
from .derived import CARD, of_weights
from .folders import check_output, copy_companions

# Runs without this package: arguments are the folder, the file of inputs and expected outputs, and the threads.
_SCRIPT = """
import sys
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
    output = model.eval()(**tensors)[0]
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

    A fresh process loads it by plain transformers, without this package, and must get the same first output, to the
    bit, for `batch`.

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
        _check_reload(model, new, {name: value.cpu() for name, value in batch.items()}, output)


def check_apart(folder: Path, output: Path) -> None:
    """Raise a ValueError if `output` holds a model, be it that of `folder`."""
    if output.resolve() == folder.resolve():
        raise ValueError(f"{output} holds the model to start from: choose another output folder")
    check_output(folder, output)


@torch.no_grad()
def _check_reload(model: PreTrainedModel, folder: Path, batch: Mapping[str, Tensor], output: Path) -> None:
    training = model.training
    expected = model.eval()(**batch)[0]
    model.train(training)
    with tempfile.TemporaryDirectory() as temporary:
        file = os.path.join(temporary, "batch.safetensors")
        save_file({"": expected.contiguous(), **{name: value.contiguous() for name, value in batch.items()}}, file)
        command = [sys.executable, "-c", _SCRIPT, str(folder), file, str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"the model for {output} does not reload by plain transformers ({reason}): nothing was saved")
