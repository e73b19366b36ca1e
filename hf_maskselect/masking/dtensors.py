"""Weights that FSDP2 has cut by rows among the ranks (`DTensor`), and ordinary ones, behind the same few functions.

What gathers is a collective: all ranks call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from .sharded import Shards


def is_cut(tensor: Tensor) -> bool:
    """Whether this rank holds only its rows."""
    return isinstance(tensor, DTensor)


def shards_of(weights: Mapping[str, Tensor]) -> Shards | None:
    """The ranks among which all `weights` are cut; None for ordinary ones.

    Raises:
        ValueError: they are cut in another way than FSDP2's by rows.
    """
    cut = {name: weight for name, weight in weights.items() if is_cut(weight)}
    if not cut:
        return None
    for name in weights:
        if name not in cut or cut[name].placements != (Shard(0),):
            how = str(cut[name].placements) if name in cut else "whole"
            raise ValueError(
                f"{name} is placed {how}, but masks of sharded weights need FSDP2's (Shard(0),) over one mesh "
                "dimension: leave out tensor parallelism and hybrid sharding"
            )
    one = next(iter(cut.values()))
    return Shards(one.device_mesh.get_group(), part(one).device)


def part(tensor: Tensor) -> Tensor:
    """This rank's rows, which share their memory; an ordinary tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows, on every rank; an ordinary tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def exchange(weight: nn.Parameter, rows: Tensor) -> Tensor:
    """Put `rows` in the place of a parameter's own, which are returned. FSDP reads the memory that it cut, so there
    they are copied."""
    if not isinstance(weight, DTensor):
        before, weight.data = weight.data, rows
        return before
    own = part(weight.detach())
    before = own.clone()
    own.copy_(rows)
    return before


def of_parts(rows: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `part`: every rank's `rows` as one tensor that is cut like `weight`."""
    if not isinstance(weight, DTensor):
        return rows
    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())


def like(tensor: Tensor, weight: Tensor) -> Tensor:
    """A tensor that every rank has whole, on the device of `weight` and cut as it is; nothing is sent."""
    if not isinstance(weight, DTensor):
        return tensor.to(weight.device)
    # Rows are cut as torch.chunk does: the last ranks may get fewer, or none.
    mesh, count = weight.device_mesh, part(weight).shape[0]
    chunk = -(-weight.shape[0] // mesh.size())
    first = min(chunk * mesh.get_local_rank(), weight.shape[0])
    return of_parts(tensor[first : first + count].to(part(weight).device), weight)


def reshard(model: nn.Module) -> None:
    """Cut again what a forward pass without a backward one left gathered. While it is, the model's parameters are
    other objects, and what is written into the rows is not seen by the next forward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def class_name(model: nn.Module) -> str:
    """Of the model's own class: `fully_shard` puts one of its own before it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule)).__name__


@torch.no_grad()
def squared_norm(rows: Tensor, weight: Tensor) -> float:
    """Sum of squares over the rows of all ranks. rows: of this rank, cut like `weight`."""
    square = rows.float().square().sum()
    return float(shards_of({"": weight}).add(square) if is_cut(weight) else square)
