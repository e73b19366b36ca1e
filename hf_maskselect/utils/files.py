"""Write files that are either complete or absent, and safetensors files one tensor at a time."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .reading import parse_json, read_object

# The names that safetensors has for the dtypes.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def sync(path: str | os.PathLike) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file completely or not at all: yields a temporary path that replaces `path` when the block ends.

    If the block raises, `path` keeps its old content.
    """
    path = Path(path)
    temporary = path.with_name(f"_{path.name}.tmp")  # uploads to the Hub skip names that begin with an underscore
    temporary.unlink(missing_ok=True)  # it may be a link, through which another file would be written
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def write_json(path: str | os.PathLike, content: object) -> None:
    """Write `content` as JSON together with its checksum, completely or not at all. `read_json` reads it."""
    text = json.dumps(content)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"sha256": _sha256(text), "content": text}))


def read_json(path: str | os.PathLike, remedy: str) -> Any:
    """Read the content that `write_json` wrote; raises a ValueError that ends with `remedy` if it is damaged."""
    stored = read_object(path, remedy)
    content = stored.get("content")
    if not isinstance(content, str) or _sha256(content) != stored.get("sha256"):
        raise ValueError(f"{path} is damaged, its content does not match its checksum: {remedy}")
    return parse_json(content, path, remedy)


def _sha256(text: str) -> str:
    # Half of a surrogate pair can stand in a JSON text, but has no UTF-8.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes in row-major order, without a copy if it is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_safetensors(
    file: BinaryIO,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    chunks: Iterable[bytes | memoryview],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file from a stream of bytes, so that the tensors need not be in memory together.

    Args:
        file: file opened for binary writing.
        layout: name -> (dtype, shape), in the order of the data.
        chunks: the bytes of all tensors in that order, cut anywhere.
        metadata: text fields of the header.
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
