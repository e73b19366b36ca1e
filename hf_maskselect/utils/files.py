"""Files that are either whole or not there, and safetensors written one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def sync(path: str | os.PathLike) -> None:
    """Return when a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name to write under. When the block ends well the file is on the disk and takes the place of
    `path` in one rename; when it raises, `path` is as it was."""
    path = Path(path)
    temporary = path.with_name(f"_{path.name}.tmp")  # uploads to the Hub leave out what begins so
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def read_object(path: str | os.PathLike, remedy: str) -> dict:
    """The object that a JSON file holds.

    Raises:
        ValueError: it holds none; the sentence ends with `remedy`.
    """
    try:
        found = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; {remedy}")
    return found


def write_json(path: str | os.PathLike, content: object) -> None:
    """JSON under a checksum of its own, whole or not at all; `read_json` takes nothing else."""
    text = json.dumps(content)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text}))


def read_json(path: str | os.PathLike, remedy: str) -> object:
    """What `write_json` wrote.

    Raises:
        ValueError: it is damaged, or another hand wrote it; the sentence ends with `remedy`.
    """
    found = read_object(path, remedy)
    content = found.get("content")
    if not isinstance(content, str) or hashlib.sha256(content.encode()).hexdigest() != found.get("sha256"):
        raise ValueError(f"{path} is damaged, its content does not match its checksum: {remedy}")
    return json.loads(content)


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, without a copy where it is contiguous on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def write_safetensors(
    file: BinaryIO,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    chunks: Iterable[bytes | memoryview],
    metadata: Mapping[str, str],
) -> None:
    """What `safetensors.torch.save_file` writes, without having all tensors in memory.

    Args:
        layout: name -> (dtype, shape), in the order of the data.
        chunks: the bytes of all tensors, in that order, cut anywhere.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for chunk in chunks:
        file.write(chunk)
