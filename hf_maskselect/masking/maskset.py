"""Boolean masks by parameter name, in memory and as packed bits on disk."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..utils.digests import header_checksum
from ..utils.wrappers import plain_model
from .base import Pattern
from .dtensors import gathered
from .tensor_files import MOST_AXES, TensorFile

FORMAT_VERSION = 1
_BESIDE = "beside/"  # no parameter name holds a slash
_SIZES = re.compile(rf"[0-9]{{1,18}}(,[0-9]{{1,18}}){{0,{MOST_AXES - 1}}}")
# Gathers the low bits of eight little-endian bytes into the top byte of their product, first byte highest.
_BITS = 0x8040201008040201 - (1 << 64)


class MaskSet(Mapping[str, Tensor]):
    """Boolean masks (True = kept) by parameter name; they exist beside a pruned model, never inside its modules."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise ValueError(f"the mask of {name} must be boolean, got {mask.dtype}")
        self._masks = dict(masks)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    @classmethod
    def ones(cls, weights: Mapping[str, Tensor]) -> MaskSet:
        """Masks that keep every weight."""
        return cls({name: torch.ones(w.shape, dtype=torch.bool, device=w.device) for name, w in weights.items()})

    @classmethod
    def from_zeros(cls, model: nn.Module, target_modules=None, exclude_modules=None) -> MaskSet:
        """Masks of the zeros that a model has, over `prunable_weights(model, target_modules, exclude_modules)`."""
        from .targets import prunable_weights

        weights = prunable_weights(model, target_modules, exclude_modules)
        return cls({name: gathered(weight.detach() != 0) for name, weight in weights.items()})

    # -- counts and digests ------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Number of prunable weights."""
        return sum(mask.numel() for mask in self.values())

    @property
    def kept(self) -> int:
        """Number of True entries."""
        return sum(int(torch.count_nonzero(mask)) for mask in self.values())

    def density(self) -> float:
        """Share of prunable weights that are kept, in [0, 1]."""
        return self.kept / self.total

    def sparsity(self) -> float:
        """Share of prunable weights that are pruned, in [0, 1]."""
        return (self.total - self.kept) / self.total

    def overlap(self, other: MaskSet) -> float:
        """Share of the kept weights that `other` keeps too, in [0, 1]."""
        common = sum(int(torch.count_nonzero(mask & other[name])) for name, mask in self.items())
        return common / max(self.kept, 1)

    def reaches(self, pattern: Pattern, sparsity: float) -> bool:
        """Whether every mask has the pattern, and no more weights are kept than `pattern` keeps at `sparsity`."""
        if self.kept > pattern.keeps([mask.shape for mask in self.values()], sparsity):
            return False
        return all(pattern.holds(mask, sparsity) for mask in self.values())

    def digest(self) -> str:
        """SHA-256 over names, shapes and bits. Equal digests mean equal masks, on any process and machine."""
        return packed_digest(self.pack(), {name: tuple(mask.shape) for name, mask in self.items()})

    def digests(self) -> dict[str, str]:
        """The `digest` of every mask alone, by name."""
        return {name: MaskSet({name: mask}).digest() for name, mask in self.items()}

    # -- weights ------------------------------------------------------------------------------------------------------

    def check_fits(self, weights: Mapping[str, Tensor]) -> None:
        """Raise a ValueError unless the masks have exactly the names and shapes of `weights`."""
        for name in [*weights.keys() - self.keys(), *self.keys() - weights.keys()]:
            where = "the model but not the masks" if name in weights else "the masks but not the model"
            raise ValueError(
                f"the masks do not fit the model: {name} is prunable in {where} ({len(self)} masks, {len(weights)} "
                "prunable weights); use the model, target_modules and exclude_modules that the masks were made with"
            )
        for name, weight in weights.items():
            if weight.shape != self[name].shape:
                raise ValueError(
                    f"the masks do not fit the model: {name} has shape {tuple(weight.shape)} but its mask has "
                    f"{tuple(self[name].shape)}; use the model that the masks were made with"
                )

    @torch.no_grad()
    def apply_(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Zero the pruned weights in place."""
        if isinstance(model, nn.Module):
            weights: Mapping[str, Tensor] = dict(plain_model(model).named_parameters(remove_duplicate=False))
        else:
            weights = model
        for name, mask in self.items():
            weights[name].mul_(mask.to(weights[name].device, weights[name].dtype))

    # -- bits --------------------------------------------------------------------------------------------------------

    def pack(self) -> dict[str, Tensor]:
        """Masks as uint8 on the CPU, 8 weights a byte, the first in the highest bit, the last byte padded with 0."""
        return {name: pack_bits(mask) for name, mask in self.items()}

    @classmethod
    def unpack(cls, packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> MaskSet:
        """The inverse of `pack`, on the CPU."""
        return cls({name: unpack_bits(packed[name], shapes[name]) for name in packed})

    def save(
        self,
        path: str | os.PathLike,
        metadata: Mapping[str, str] | None = None,
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write packed masks, `metadata`, and the tensors `beside` (which `load_beside` reads) as safetensors."""
        shapes = {name: tuple(mask.shape) for name, mask in self.items()}
        self.save_packed(path, self.pack(), shapes, metadata, beside)

    @staticmethod
    def save_packed(
        path: str | os.PathLike,
        packed: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        metadata: Mapping[str, str] | None = None,
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`save` for masks that are packed already."""
        header = {f"shape.{name}": ",".join(map(str, shape)) for name, shape in shapes.items()}
        header |= {"format": "hf_maskselect.masks", "format_version": str(FORMAT_VERSION)}
        header |= {"digest": packed_digest(packed, shapes), **(metadata or {})}
        others = {_BESIDE + name: tensor.detach().cpu().contiguous() for name, tensor in (beside or {}).items()}
        if others:
            header["beside"] = _tensor_digest(others)
        save_file({**packed, **others}, path, metadata=header | {"checksum": header_checksum(header)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> tuple[MaskSet, dict[str, str]]:
        """Read masks (to the CPU) and the metadata that `save` wrote.

        Raises:
            ValueError: the file is another one, has another format version, or is damaged.
        """
        packed, shapes, header = cls.load_packed(path)
        return cls.unpack(packed, shapes), header

    @staticmethod
    def load_packed(
        path: str | os.PathLike,
    ) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]], dict[str, str]]:
        """Packed masks, their shapes and the metadata: `load` with an eighth of its memory."""
        file = TensorFile(path, "masks", "restore the file or point to another checkpoint")
        header = file.metadata
        if header.get("format") != "hf_maskselect.masks" or header.get("format_version") != str(FORMAT_VERSION):
            raise ValueError(
                f"{path} does not hold masks of format version {FORMAT_VERSION} (header says {header.get('format')!r} "
                f"{header.get('format_version')!r}); point to a pruning_state.safetensors written by this version"
            )
        if header_checksum({k: v for k, v in header.items() if k != "checksum"}) != header.get("checksum"):
            raise ValueError(f"{path} is damaged: its header does not match its checksum; restore the file")
        written = {k.removeprefix("shape."): v for k, v in header.items() if k.startswith("shape.")}
        shapes = {
            name: tuple(map(int, sizes.split(","))) for name, sizes in written.items() if _SIZES.fullmatch(sizes)
        }
        packed = file.tensors(name for name in file.shapes if not name.startswith(_BESIDE))
        if not shapes.keys() == written.keys() == packed.keys() or any(
            packed[n].dtype != torch.uint8 or packed[n].dim() != 1 or packed[n].numel() != (math.prod(s) + 7) // 8
            for n, s in shapes.items()
        ):
            raise ValueError(f"{path} is damaged: its tensors do not match its header; restore the file")
        if packed_digest(packed, shapes) != header.get("digest"):
            raise ValueError(f"{path} is damaged: its bits do not match its digest; restore the file")
        return packed, shapes, {k: v for k, v in header.items() if not k.startswith("shape.")}

    @staticmethod
    def load_beside(path: str | os.PathLike) -> dict[str, Tensor]:
        """Read the tensors that `save` wrote beside the masks, to the CPU. Call `load` first, which checks the header.

        Raises:
            ValueError: they do not match the digest in the header.
        """
        file = TensorFile(path, "masks")
        beside = file.tensors(name for name in file.shapes if name.startswith(_BESIDE))
        if (_tensor_digest(beside) if beside else None) != file.metadata.get("beside"):
            raise ValueError(f"{path} is damaged: its tensors do not match their digest; restore the file")
        return {name.removeprefix(_BESIDE): tensor for name, tensor in beside.items()}


def packed_digest(packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """`MaskSet.digest` for masks that are packed already."""
    sha = hashlib.sha256()
    for name, bits in sorted(packed.items()):
        sha.update(f"{name}:{shapes[name]}:".encode())
        sha.update(bits.numpy().data)
    return sha.hexdigest()


def _tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a boolean tensor of n entries into ceil(n / 8) bytes on the CPU."""
    flat = mask.detach().contiguous().view(-1)
    padding = -flat.numel() % 8
    if padding or flat.storage_offset() % 8:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    # Eight 0/1 bytes are one int64, whose product has them in its top byte. One pass, no loop over weights.
    words = flat.view(torch.uint8).view(torch.int64)
    return ((words * _BITS) >> 56).to(torch.uint8).cpu()


def unpack_bits(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of `pack_bits`."""
    count = torch.Size(shape).numel()
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    table = ((torch.arange(256, dtype=torch.uint8)[:, None] >> shifts) & 1).contiguous().view(torch.int64).squeeze(1)
    return table[packed.long()].view(torch.uint8)[:count].bool().view(shape)


def diverged(what: str, when: str = "") -> str:
    """Error message for NaN or infinity in `what`, which was trained; `when` is a suffix such as " at step 3"."""
    remedy = "use a lower learning_rate or a smaller max_grad_norm"
    return f"{what} holds NaN or infinity{when}, training has diverged: {remedy}"
