"""Folders of saved models to and from the packed file, and `load_pruned`, which reads either."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..masking.maskset import MaskSet, pack_bits, packed_digest, unpack_bits
from ..utils.digests import WeightsDigest
from ..utils.files import bytes_of, replacing, write_safetensors
from .load import _COMPANIONS, _pruning_fields, open_packed
from .models import skeleton
from .packed_file import PACKED_FILE, PackedWriter
from .state import STATE_FILE, PruningState, changed
from .weights import check_weights, check_zeros, config_digest, saved_tensors

_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
_LEFT_OUT = (SAFE_WEIGHTS_INDEX_NAME, "trainer_state.json")


@dataclass(frozen=True)
class PackReport:
    """Sizes in bytes: of the tensors unpacked, of the packed file, and the least that the file could have.

    bound: the entropy of each sparse tensor's mask at its density, plus its kept values, plus all else, at the dtypes
    stored.
    """

    path: Path
    dense: int
    packed: int
    bound: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.packed / 1e6:,.2f} MB, {self.dense / self.packed:.2f}x smaller than the dense "
            f"{self.dense / 1e6:,.2f} MB and {self.packed / self.bound:.4f}x the entropy bound"
        )


def pack(
    folder: str | os.PathLike,
    output: str | os.PathLike,
    values: str | None = None,
    embeddings: str | None = None,
) -> PackReport:
    """Write the model saved in `folder` as `output/packed_model.safetensors`, with its configuration and tokenizer.

    Every weight comes back to the bit, but for the sign of a pruned zero. One tensor is in memory at a time.

    Args:
        folder: a folder of `PruningTrainer`, or of any saved model of transformers with zeros.
        output: another folder (made if need be), or `folder` itself to put the packed file beside the weights.
        values: `"bf16"` or `"fp16"` rounds all floating values (lossy).
        embeddings: `"int8"` rounds embedding tables to 255 steps a row (lossy).

    Raises:
        ValueError: no such model, weights that are not those of its masks, or an option that does not exist.
    """
    folder, output = Path(folder), Path(output)
    if embeddings not in (None, "int8"):
        raise ValueError(f"embeddings={embeddings!r} must be 'int8', or left out to keep every bit")
    writer = PackedWriter(values)
    model = skeleton(folder)
    known = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    bits, shapes, fields = {}, {}, {}
    metadata = {"config": config_digest(folder)}
    if (folder / STATE_FILE).is_file():
        bits, shapes, fields = MaskSet.load_packed(folder / STATE_FILE)
        metadata["pruning"] = json.dumps({**fields, "masked": sorted(bits)})

    def encoded() -> Iterator[tuple[str, Tensor, str, Tensor | None]]:
        digest = WeightsDigest()
        for name, tensor in saved_tensors(folder):
            digest.add(name, tensor)
            mask = unpack_bits(bits[name], shapes[name]) if name in bits else None
            if mask is not None:
                check_zeros(folder, name, tensor, mask)
            if embeddings and name in tables:
                yield name, tensor, "int8", None
            else:
                yield name, tensor, "sparse" if known.get(name) == tensor.shape else "raw", mask
        if bits and digest.hex() != fields["weights"]:
            raise ValueError(changed(folder, "the weights are not those"))

    check_output(folder, output)
    output.mkdir(parents=True, exist_ok=True)
    copy_companions(folder, output)
    path = output / PACKED_FILE
    writer.write(path, encoded(), metadata)
    return PackReport(path, writer.dense_bytes, path.stat().st_size, writer.bound_bits / 8)


def unpack(folder: str | os.PathLike, output: str | os.PathLike) -> None:
    """Write the packed model of `folder` as an ordinary one in `output` (it may be `folder`).

    Raises:
        ValueError: no packed model there, damaged, or not of the model that its `config.json` describes.
    """
    folder, output = Path(folder), Path(output)
    packed = open_packed(folder)
    names, state = _pruning_fields(packed)
    if (output / SAFE_WEIGHTS_NAME).exists() or (output / SAFE_WEIGHTS_INDEX_NAME).exists():
        raise ValueError(f"{output} holds weights already: choose another output folder")
    bits, shapes = {}, {}

    def chunks() -> Iterator[memoryview]:
        for name in packed.entries:
            tensor, mask = packed.tensor_and_mask(name)
            if name in names:
                mask = torch.ones_like(tensor, dtype=torch.bool) if mask is None else mask
                bits[name], shapes[name] = pack_bits(mask), tuple(mask.shape)
            yield bytes_of(tensor)

    check_output(folder, output)
    output.mkdir(parents=True, exist_ok=True)
    copy_companions(folder, output)
    with replacing(output / SAFE_WEIGHTS_NAME) as temporary:
        with open(temporary, "wb") as file:
            write_safetensors(file, packed.layout, chunks(), {"format": "pt"})
        if names and packed_digest(bits, shapes) != state["digest"]:
            raise ValueError(f"{packed.path} is damaged: its masks do not match their digest; restore the file")
    if names:
        masks = _Unpacked(bits, shapes)
        told = {"weights": check_weights(output, masks), "config": config_digest(output)}
        state = {name: text for name, text in state.items() if name in PruningState.from_fields(masks, state).fields}
        with replacing(output / STATE_FILE) as temporary:
            MaskSet.save_packed(temporary, bits, shapes, {**state, **told})


class _Unpacked(Mapping[str, Tensor]):
    """Masks that are unpacked one at a time, when they are asked for."""

    def __init__(self, bits: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
        self._bits, self._shapes = bits, shapes

    def __getitem__(self, name: str) -> Tensor:
        return unpack_bits(self._bits[name], self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)


def check_output(folder: Path, output: Path) -> None:
    """Raise a ValueError where writing a model into `output` would mix two models."""
    if output.resolve() != folder.resolve() and any((output / name).exists() for name in _WEIGHTS):
        raise ValueError(f"{output} holds the weights of a model already: choose another output folder")


def copy_companions(folder: Path, output: Path) -> None:
    """Copy what belongs to a model besides its weights; the output folder is there."""
    if output.resolve() == folder.resolve():
        return
    for pattern in _COMPANIONS:
        for file in sorted(folder.glob(pattern)):
            if file.name not in _LEFT_OUT and not file.name.startswith("optimizer"):
                shutil.copyfile(file, output / file.name)
