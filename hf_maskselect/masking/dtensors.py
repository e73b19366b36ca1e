"""One set of functions for weights that FSDP2 has sharded by rows (`DTensor`) and for ordinary ones.

A function that gathers is a collective: all processes call it, in the same order.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from .sharded import Shards


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only its rows."""
    return isinstance(tensor, DTensor)


def shards_of(weights: Mapping[str, Tensor]) -> Shards | None:
    """The processes that hold the rows of all `weights`; None for ordinary ones.

    Raises:
        ValueError: some are not sharded as FSDP2 does it, by rows.
    """
    sharded = {name: weight for name, weight in weights.items() if isinstance(weight, DTensor)}
    if not sharded:
        return None
    for name in weights:
        if name not in sharded or sharded[name].placements != (Shard(0),):
            how = str(sharded[name].placements) if name in sharded else "whole"
            raise ValueError(
                f"{name} is placed {how}, but masks of sharded weights need FSDP2's (Shard(0),) over one mesh "
                "dimension: leave out tensor parallelism and hybrid sharding"
            )
    one = next(iter(sharded.values()))
    return Shards(one.device_mesh.get_group(), local_rows(one).device)


def local_rows(tensor: Tensor) -> Tensor:
    """The rows of this process, which share the memory of `tensor`; an ordinary tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """All rows, on every process; an ordinary tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def in_strides_of(like: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` in the strides of `like`, which has the same shape: itself if it has them, else a copy.

    Fused optimizers read a parameter, its gradient and its moments in the order in which they lie in memory, and do
    not look at strides.
    """
    same = tensor.stride() == like.stride()
    return tensor if same else torch.empty_like(like, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


@torch.no_grad()
def close_gaps_(weight: nn.Parameter) -> None:
    """Give a parameter memory of its own, in row-major order, if its entries have gaps between them or share memory.

    Such are slices of columns and expanded tensors. No gradient could have their strides. Dense memory in another
    order, such as channels last, stays as it is.
    """
    if not isinstance(weight, DTensor) and weight.stride() != torch.empty_like(weight, device="meta").stride():
        weight.data = weight.data.contiguous()


@torch.no_grad()
def swap_data(weight: nn.Parameter, rows: Tensor) -> Tensor:
    """Give a parameter other local rows, in its own strides, which its gradient takes over; return those it had."""
    if not isinstance(weight, DTensor):
        before, weight.data = weight.data, in_strides_of(weight, rows)
        return before
    own = local_rows(weight.detach())  # copied, since FSDP reads the memory that it has sharded
    before = own.clone()
    own.copy_(rows)
    return before


def from_local_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `local_rows`: the rows of all processes as one tensor that is sharded like `weight`."""
    if not isinstance(weight, DTensor):
        return rows
    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())


def sharded_like(tensor: Tensor, weight: Tensor) -> Tensor:
    """A tensor that every process has whole, on the device of `weight` and sharded like it; nothing is sent."""
    if not isinstance(weight, DTensor):
        return tensor.to(weight.device)
    # Rows are split as torch.chunk does it: the last processes may get fewer, or none.
    mesh, count = weight.device_mesh, local_rows(weight).shape[0]
    chunk = -(-weight.shape[0] // mesh.size())
    first = min(chunk * mesh.get_local_rank(), weight.shape[0])
    return from_local_rows(tensor[first : first + count].to(local_rows(weight).device), weight)


def reshard(model: nn.Module) -> None:
    """Shard again the weights that a forward pass without a backward pass left gathered.

    While weights are gathered, the model's parameters are other objects, and the next forward pass does not see what
    is written into their rows.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def class_name(model: nn.Module) -> str:
    """Name of the model's own class, without the class that `fully_shard` puts before it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule)).__name__


@torch.no_grad()
def squared_norm(rows: Tensor, weight: Tensor) -> float:
    """Sum of squares over the rows of all processes; `rows` are those of this one, sharded like `weight`."""
    square, shards = rows.float().square().sum(), shards_of({"": weight})
    return float(square if shards is None else shards.add(square))
