"""Put faster layers into a model, in place of its linear layers or of its whole layers, and smaller embeddings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from ..masking.targets import prunable_weights
from .embeddings import Int8Embedding, Int8Table
from .layers import LINEARS, fuse, names_of
from .linears import Choice, Int8Linear, Int8Plan, exact_linear

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class ExactPlan:
    """A linear layer without 8-bit numbers: its kinds, weight (out, in) and bias (out,)."""

    choice: Choice
    weight: Tensor
    bias: Tensor | None


LinearPlan = ExactPlan | Int8Plan
Plans = Mapping[str, LinearPlan | Int8Table]  # token embeddings without a plan stay as they are


@dataclass(frozen=True)
class Attention:
    """How whole layers are computed.

    fused: in 8 bits where all six linear layers are. bf16: the length from which attention is in bf16; 0 is never.
    """

    fused: bool = True
    bf16: int = 0


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that may be replaced: those of the encoder.

    Raises:
        ValueError: there are none.
    """
    names = [name.removesuffix(".weight") for name in prunable_weights(model)]
    linears = [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
    if not linears:
        raise ValueError(
            f"{type(model).__name__} has no linear layers in its encoder: the CPU runtime has nothing to do"
        )
    return linears


def layers_of(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return the layers that can be fused: name -> {task: name of its linear layer}."""
    found = {}
    for name, module in model.named_modules():
        if (names := names_of(module)) is not None:
            found[name] = {task: f"{name}.{names[task]}" for task in LINEARS}
    return found


def install(model: M, plans: Plans, attention: Attention) -> M:
    """Replace layers in place, and return the model in eval mode, without gradients.

    Each plan is asked for when its layer is built.
    """
    left = dict.fromkeys(plans)
    for name, tasks in layers_of(model).items():
        if not attention.fused or not left.keys() >= set(tasks.values()):
            continue
        six = {task: plans[linear] for task, linear in tasks.items()}
        chosen = {task: plan for task, plan in six.items() if isinstance(plan, Int8Plan)}
        if len(chosen) == len(LINEARS):
            model.set_submodule(name, fuse(model.get_submodule(name), chosen, attention.bf16))
            for linear in tasks.values():
                del left[linear]
    for name in left:
        plan = plans[name]
        old: Any = model.get_submodule(name)
        model.set_submodule(name, _built(plan, old))
    return model.eval().requires_grad_(False)


def _built(plan: LinearPlan | Int8Table, old: Any) -> nn.Module:
    """Build what takes the place of the module `old`."""
    if isinstance(plan, Int8Table):
        return Int8Embedding(plan, old.padding_idx)
    return Int8Linear(plan) if isinstance(plan, Int8Plan) else exact_linear(plan.choice, plan.weight, plan.bias)
