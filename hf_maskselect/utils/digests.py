"""Checksums of headers and SHA-256 digests of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .files import bytes_of


def header_checksum(header: Mapping[str, str]) -> str:
    """SHA-256 over the fields of a file's header."""
    return hashlib.sha256(repr(sorted(header.items())).encode()).hexdigest()


class WeightsDigest:
    """SHA-256 over names, dtypes, shapes and bits of tensors, in whatever order they come."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        content = hashlib.sha256(bytes_of(tensor)).hexdigest()
        self._lines[name] = f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:{content}"

    @property
    def names(self) -> set[str]:
        return set(self._lines)

    def hex(self) -> str:
        return hashlib.sha256("\n".join(sorted(self._lines.values())).encode()).hexdigest()


def weights_digest(weights: dict[str, Tensor]) -> str:
    """Of names and contents together, as text."""
    digest = WeightsDigest()
    for name, weight in weights.items():
        digest.add(name, weight)
    return digest.hex()
