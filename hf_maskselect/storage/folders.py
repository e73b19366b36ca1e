"""Find model folders, on disk or on the Hub, and prepare the folders that models are written to."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..utils.folders import finish
from ..utils.reading import check_file
from .state import STATE_FILE
from .weights import has_weights

# The files of a model besides its weights. Checkpoints also hold files for the trainer: those are skipped.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.png")
_SKIPPED = (SAFE_WEIGHTS_INDEX_NAME, "trainer_state.json")
_WEIGHT_FILES = ("model*.safetensors", SAFE_WEIGHTS_INDEX_NAME)


def find_folder(path_or_repo: str | os.PathLike, weights: Sequence[str] = _WEIGHT_FILES, **download: Any) -> Path:
    """Return a local folder, or download the files of a Hub repository that loading needs.

    weights: names or globs of the weight files; download: `revision`, `token` and `cache_dir`.

    Raises:
        ValueError: there is neither such a folder nor such a repository.
    """
    if Path(path_or_repo).is_dir():
        finish(path_or_repo)
        return Path(path_or_repo)
    repo = os.fspath(path_or_repo)
    try:
        return Path(snapshot_download(repo, allow_patterns=[*COMPANIONS, STATE_FILE, *weights], **download))
    except (OSError, HTTPError, HFValidationError) as error:
        raise ValueError(
            f"{repo} is not a folder and cannot be downloaded from the Hub ({str(error).splitlines()[0]}): check the "
            "name and the connection"
        ) from error


def check_output(folder: Path, output: Path) -> None:
    """Raise a ValueError if writing the model of `folder` into `output` would mix two models."""
    if output.resolve() != folder.resolve() and has_weights(output):
        raise ValueError(f"{output} already holds the weights of a model: choose another output folder")


def copy_companions(folder: Path, output: Path) -> None:
    """Copy the files of a model besides its weights (configuration, tokenizer, card) to another, existing folder."""
    for pattern in COMPANIONS:
        for file in sorted(folder.glob(pattern)):
            if file.name not in _SKIPPED and not file.name.startswith("optimizer"):
                shutil.copyfile(check_file(file), output / file.name)
