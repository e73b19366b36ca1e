"""SHA-256 checksums of file headers and digests of tensors."""

import hashlib
from collections.abc import Mapping

from torch import Tensor

from .files import bytes_of


def header_checksum(header: Mapping[str, str]) -> str:
    """Return the SHA-256 of a file header's fields."""
    return hashlib.sha256(repr(sorted(header.items())).encode()).hexdigest()


class WeightsDigest:
    """SHA-256 over the names, dtypes, shapes and bits of tensors, independent of their order."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor.

        Raises:
            ValueError: there is one of that name already.
        """
        if name in self._lines:
            raise ValueError(f"{name} is there twice: save the model again")
        content = hashlib.sha256(bytes_of(tensor)).hexdigest()
        self._lines[name] = f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:{content}"

    @property
    def names(self) -> set[str]:
        """Names of the tensors added so far."""
        return set(self._lines)

    def hex(self) -> str:
        """Return the digest of the tensors added so far, in hexadecimal."""
        return hashlib.sha256("\n".join(sorted(self._lines.values())).encode()).hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return the `WeightsDigest` of tensors by name, in hexadecimal."""
    digest = WeightsDigest()
    for name, weight in weights.items():
        digest.add(name, weight)
    return digest.hex()
