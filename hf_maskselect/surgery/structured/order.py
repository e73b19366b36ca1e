"""The order in which neurons and heads go: that of Optimal Brain Surgeon.

For the columns S of a consumer W that belong to a neuron or a head, and H = 2/n x.T x + damping, the removal costs
`sum_i W[i,S] (H^-1[S,S])^-1 W[i,S].T` if the other columns take over as well as they can (ZipLM, arXiv 2302.04089).
"""

import torch
from torch import Tensor

from .moments import Gram

_DAMPING = 1e-2  # of the mean of the diagonal
_LEFT = 0.9  # share of the columns; when fewer are left, the matrices are made smaller


@torch.no_grad()
def removal_order(weight: Tensor, gram: Gram, size: int = 1, at_once: int = 8) -> Tensor:
    """Return the structures of a consumer in the order of their removal: int64 `(columns / size,)`.

    Args:
        weight: `(out, columns)`, any float dtype.
        gram: of the columns' inputs.
        size: columns of a structure: 1 for a neuron, the size of a head for a head.
        at_once: structures that are removed between two updates of the others.
    """
    w, columns = weight.float().clone(), weight.shape[1]
    hessian = gram.matrix.double() * (2 / gram.count)
    hessian.diagonal().add_(_DAMPING * hessian.diagonal().mean().clamp(min=1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian)).float()
    left, order = torch.arange(columns // size, device=weight.device), []  # structures that `w` still has
    numbers = left  # of these, in `weight`
    while len(left):
        costs = _costs(w, inverse, left, size)
        gone = costs.argsort(stable=True)[:at_once]
        order.append(numbers[left[gone]])
        columns_of = _columns(left[gone], size)
        left = left[_others(len(left), gone)]
        block = torch.linalg.inv(inverse[columns_of][:, columns_of].double()).float()
        take = block @ inverse[columns_of]
        w.addmm_(w[:, columns_of], take, alpha=-1)
        inverse.addmm_(inverse[:, columns_of], take, alpha=-1)
        if len(left) * size < _LEFT * w.shape[1]:
            rest = _columns(left, size)
            w, inverse = w[:, rest], inverse[rest][:, rest]
            numbers, left = numbers[left], torch.arange(len(left), device=weight.device)
    return torch.cat(order)


def _costs(weight: Tensor, inverse: Tensor, structures: Tensor, size: int) -> Tensor:
    if size == 1:
        return weight[:, structures].square().sum(0) / inverse.diagonal()[structures].clamp(min=1e-12)
    costs = []
    for structure in structures.tolist():
        part = slice(structure * size, (structure + 1) * size)
        block = torch.linalg.inv(inverse[part, part].double()).float()
        costs.append(((weight[:, part] @ block) * weight[:, part]).sum())
    return torch.stack(costs)


def _columns(structures: Tensor, size: int) -> Tensor:
    return (structures[:, None] * size + torch.arange(size, device=structures.device)).flatten()


def _others(count: int, chosen: Tensor) -> Tensor:
    keep = torch.ones(count, dtype=torch.bool, device=chosen.device)
    keep[chosen] = False
    return keep
