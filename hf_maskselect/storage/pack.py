"""Write model folders as packed files, and packed files as model folders."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME

from ..masking.maskset import MaskSet, pack_bits, packed_digest, unpack_bits
from ..utils.digests import WeightsDigest
from ..utils.files import bytes_of, write_safetensors
from ..utils.folders import finish
from ..utils.reading import parse_json, typed
from .derived import ORIGIN, beside_model, check_derived, content_of, weights_beside
from .folders import check_output
from .models import config_digest, skeleton
from .packed_file import DENSE, PACKED_FILE, PackedFile, PackedWriter, PackItem
from .state import STATE_FILE, PruningState, changed_message
from .weights import check_weights, check_zeros, has_weights, saved_tensors


@dataclass(frozen=True)
class PackReport:
    """Sizes in bytes: the unpacked tensors (dense), the packed file, and the smallest size possible (bound).

    bound: the entropy of each sparse tensor's mask at its density, its kept values, and all other tensors, at the
    stored dtypes.
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

    Unpacking gives every weight to the bit, except for the sign of pruned zeros. One tensor is in memory at a time.

    Args:
        folder: a folder written by `PruningTrainer`, or any saved transformers model with zeros.
        output: another folder (created if needed), or `folder` itself to put the packed file beside the weights.
        values: `"bf16"` or `"fp16"` rounds all floating-point values (lossy).
        embeddings: `"int8"` rounds embedding tables to 255 steps a row (lossy).

    Raises:
        ValueError: there is no such model, its weights do not match its masks, or an option is unknown.
    """
    folder, output = Path(folder), Path(output)
    if embeddings not in (None, "int8"):
        raise ValueError(f"embeddings={embeddings!r} must be 'int8', or left out to keep every bit")
    writer = PackedWriter(values)
    model = skeleton(folder)
    model_shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    bits: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    fields: dict[str, str] = {}
    metadata = {"config": config_digest(folder)}
    if (folder / STATE_FILE).is_file():
        bits, shapes, fields = MaskSet.load_packed(folder / STATE_FILE)
        metadata["pruning"] = json.dumps({**fields, "masked": sorted(bits)}, sort_keys=True)

    digest = WeightsDigest()

    def items() -> Iterator[PackItem]:
        for name, tensor in saved_tensors(folder):
            digest.add(name, tensor)
            mask = unpack_bits(bits[name], shapes[name]) if name in bits else None
            if mask is not None:
                check_zeros(folder, name, tensor, mask)
            if embeddings and name in tables:
                yield PackItem(name, tensor, "int8")
            else:
                yield PackItem(name, tensor, "sparse" if model_shapes.get(name) == tensor.shape else "raw", mask)
        if bits and digest.hex() != fields.get("weights"):
            raise ValueError(changed_message(folder, "the weights are not those"))
        metadata[ORIGIN] = digest.hex()

    check_output(folder, output)
    with beside_model(folder, output, digest.hex) as new:
        writer.write(new / PACKED_FILE, items(), metadata)
    path = output / PACKED_FILE
    return PackReport(path, writer.dense_bytes, path.stat().st_size, writer.bound_bits / 8)


def unpack(folder: str | os.PathLike, output: str | os.PathLike) -> None:
    """Write the packed model of `folder` as an ordinary model in `output`, which may be `folder`.

    Raises:
        ValueError: there is no packed model, it is damaged, or it does not belong to its `config.json`.
    """
    folder, output = Path(folder), Path(output)
    packed = open_packed(folder)
    pruning = pruning_of(packed)
    if has_weights(output) and check_weights(output, {}) != content_of(packed):
        raise ValueError(f"{output} already holds the weights of a model: choose another output folder")
    bits: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def chunks() -> Iterator[memoryview]:
        for name, tensor, mask in tensors_and_masks(packed, pruning):
            if mask is not None:
                bits[name], shapes[name] = pack_bits(mask), tuple(mask.shape)
            yield bytes_of(tensor)

    weights = ""
    with beside_model(folder, output, lambda: weights) as new:
        with open(new / SAFE_WEIGHTS_NAME, "wb") as file:
            write_safetensors(file, packed.layout, chunks(), {"format": "pt"})
        if pruning is not None:
            pruning.check_digest(packed_digest(bits, shapes), packed)
        weights = check_weights(new, _Unpacked(bits, shapes))
        if pruning is not None:
            digests = {"weights": weights, "config": config_digest(folder)}
            MaskSet.save_packed(new / STATE_FILE, bits, shapes, pruning.state.fields | digests)


def open_packed(folder: str | os.PathLike, file: str = PACKED_FILE, command: str = "pack") -> PackedFile:
    """Open the packed file of a folder and check it against the `config.json` beside it.

    command: the console command that writes such files, for the message.

    Raises:
        ValueError: the file is missing, damaged, of another model, or made from other weights than those beside it.
    """
    folder = Path(folder)
    finish(folder)
    if not (folder / file).is_file():
        raise ValueError(f"{folder} has no {file}: give a folder that `hf-maskselect {command}` wrote")
    packed = PackedFile(folder / file)
    if config_digest(folder) != packed.metadata.get("config"):
        raise ValueError(f"{folder}: config.json is not the one that {file} was made with; restore the file")
    model_shapes = {name: tuple(tensor.shape) for name, tensor in skeleton(folder).state_dict().items()}
    for name, entry in packed.entries.items():
        # A sparse tensor may be far larger than its bytes: check its size before it is allocated.
        if entry.coding not in DENSE and model_shapes.get(name) != entry.shape:
            raise ValueError(
                f"{packed.path}: {name} has shape {entry.shape} but config.json describes {model_shapes.get(name)}; "
                "the file is of another model"
            )
    if weights := weights_beside(folder):
        check_derived(folder, weights)
    return packed


@dataclass(frozen=True)
class PackedPruning:
    """The pruning state in the header of a packed file.

    masked: names of the masked tensors; digest: `MaskSet.digest` of their masks; state: the state without masks.
    """

    masked: frozenset[str]
    digest: str
    state: PruningState

    def check_digest(self, digest: str, packed: PackedFile) -> None:
        """Raise a ValueError unless the decoded masks have the digest of the header."""
        if digest != self.digest:
            raise ValueError(f"{packed.path} is damaged: its masks do not match their digest; restore the file")


def pruning_of(packed: PackedFile) -> PackedPruning | None:
    """Read the pruning state from the header of a packed file; None for a model that PruningTrainer did not write."""
    if "pruning" not in packed.metadata:
        return None
    where = f"{packed.path}: pruning"
    fields = typed(parse_json(packed.metadata["pruning"], where), dict, where)
    masked = frozenset(typed(fields.pop("masked", None), list[str], f"{where}: masked"))
    try:
        typed(fields, dict[str, str], where)
        if not masked <= packed.entries.keys() or "digest" not in fields:
            raise ValueError("masks of tensors it does not hold")
        return PackedPruning(masked, fields["digest"], PruningState.from_fields(MaskSet({}), fields))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{packed.path} is damaged: its header does not describe masks ({error})") from error


def tensors_and_masks(
    packed: PackedFile, pruning: PackedPruning | None
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Decode one tensor after the other: (name, tensor, boolean mask or None where the tensor is not masked)."""
    masked = frozenset() if pruning is None else pruning.masked
    for name in packed.entries:
        tensor, mask = packed.tensor_and_mask(name)
        if name in masked:
            yield name, tensor, torch.ones_like(tensor, dtype=torch.bool) if mask is None else mask
        else:
            yield name, tensor, None


class _Unpacked(Mapping[str, Tensor]):
    """Packed masks that are unpacked one at a time, on access."""

    def __init__(self, bits: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
        self._bits, self._shapes = bits, shapes

    def __getitem__(self, name: str) -> Tensor:
        return unpack_bits(self._bits[name], self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)
