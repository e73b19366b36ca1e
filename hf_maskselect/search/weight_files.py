"""Weights that candidates have trained so far, waiting on disk for their next rung."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..utils.digests import header_checksum, weights_digest
from ..utils.files import replacing

FOLDER = "_survivors"  # uploads to the Hub leave out what begins with an underscore


class Survivors:
    """One file a candidate: the weights of its longest training, and the score of every rung it has run.

    A killed search finds them again, and so repeats no trial; they stay until another search begins or the run ends.

    Args:
        output_dir: where their folder lies. Ranks without a common disk each have their own.
    """

    def __init__(self, output_dir: str | os.PathLike) -> None:
        self.folder = Path(output_dir) / FOLDER
        self._remedy = f"delete {self.folder}, and its trials are repeated"
        self._key = ""

    def open(self, key: str) -> None:
        """Begin the search `key`: files of others go."""
        self._key = key[:16]
        for path in self.folder.glob("*"):
            if not path.name.startswith(self._key):
                path.unlink(missing_ok=True)

    def scores(self, digest: str) -> dict[int, float]:
        """Of the candidate with masks `digest`, by how many steps it had been trained; empty without a file.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._path(digest)
        if not path.is_file():
            return {}
        try:
            with safe_open(path, framework="pt") as file:
                told = dict(file.metadata() or {})
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): {self._remedy}") from error
        if told.pop("checksum", None) != header_checksum(told):
            raise ValueError(f"{path} is damaged, its header does not match its checksum: {self._remedy}")
        return {int(steps): score for steps, score in json.loads(told["scores"]).items()}

    def keep(self, digest: str, scores: Mapping[int, float], weights: Mapping[str, Tensor]) -> None:
        """Keep its weights and scores, in place of earlier ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
        told = {"scores": json.dumps(scores), "weights": weights_digest(whole)}
        with replacing(self._path(digest)) as temporary:
            save_file(whole, temporary, metadata=told | {"checksum": header_checksum(told)})

    def load(self, digest: str) -> dict[str, Tensor]:
        """The weights kept last.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._path(digest)
        try:
            with safe_open(path, framework="pt") as file:
                expected = (file.metadata() or {}).get("weights")
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): {self._remedy}") from error
        if weights_digest(weights) != expected:
            raise ValueError(f"{path} is damaged, its weights do not match their digest: {self._remedy}")
        return weights

    def gone(self, index: int) -> str:
        """What to say where the weights of a candidate are missing."""
        return (
            f"the weights that candidate {index} had trained are gone from {self.folder}: go on from the last "
            "checkpoint, and the search is repeated"
        )

    def forget(self) -> None:
        """Remove all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, digest: str) -> Path:
        return self.folder / f"{self._key}-{digest[:16]}.safetensors"
