"""Layers that take the place of `nn.Linear`, each with the products that were the fastest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import ZERO_KINDS, exact_product, int8_product, prepared
from .threads import pieces_of, share


@dataclass(frozen=True)
class Step:
    """How a float becomes a number of 8 bits: `round(x / scale) + zero`, between 0 and 255."""

    scale: float
    zero: int

    def quantize(self, rows: Tensor) -> Tensor:
        """Round float32 to quint8."""
        return torch.quantize_per_tensor(rows, self.scale, self.zero, torch.quint8)


CENTRED = Step(1.0, 128)  # whole numbers from -128 to 127


@dataclass(frozen=True)
class Choice:
    """Which product multiplies how many rows: up to `limit` rows `kind`, the last one any number.

    `kinds` has (limit, kind) in rising order; the last limit does not count.
    """

    kinds: tuple[tuple[int, str], ...]

    @classmethod
    def always(cls, kind: str) -> "Choice":
        """Choose one kind for any number of rows."""
        return cls(((0, kind),))

    def kind(self, rows: int) -> str:
        """Return the kind for this number of rows."""
        return next((kind for limit, kind in self.kinds[:-1] if rows <= limit), self.kinds[-1][1])

    def names(self) -> set[str]:
        """Return the kinds that are needed."""
        return {kind for _, kind in self.kinds}


class Unsaved(nn.Module):
    """A module whose weights are packed, so that `save_pretrained` would lose them silently."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise ValueError("a CPU model cannot be saved as an ordinary one: save the model that it was made from")


class CpuLinear(Unsaved):
    """A linear layer for inference. Takes float32 (..., in), returns float32 (..., out); there are no gradients."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.out_features, self.in_features = shape

    @torch.compiler.disable  # the products are compiled or packed already
    def forward(self, input: Tensor) -> Tensor:
        """Multiply and add the bias.

        Raises:
            ValueError: the input is not float32 on the CPU.
        """
        if input.dtype != torch.float32 or input.device.type != "cpu":
            raise ValueError(
                f"the CPU model got {input.dtype} on {input.device}: call it outside of autocast, with float32 inputs "
                "on the CPU"
            )
        rows = input.detach().reshape(-1, self.in_features)
        with torch.no_grad():
            output = self.product(rows)
        return output.view(*input.shape[:-1], self.out_features)

    def product(self, rows: Tensor) -> Tensor:
        """Multiply rows (n, in)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Name the sizes, as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class ExactLinear(CpuLinear):
    """A linear layer in float32, dense or CSR, or with weights and inputs rounded to bf16.

    Args:
        choice: kinds by the number of rows.
        weight: float32 (out, in).
        bias: float32 (out,), or None.
    """

    def __init__(self, choice: Choice, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape)
        self.choice = choice
        self._weights = {kind: prepared(kind, weight.detach()) for kind in sorted(choice.names())}
        self._bias = None if bias is None else bias.detach()

    def product(self, rows: Tensor) -> Tensor:
        """Multiply rows (n, in); sparse products in blocks of rows, which threads share."""
        kind = self.choice.kind(len(rows))
        weight = self._weights[kind]
        if kind not in ZERO_KINDS:
            return exact_product(kind, rows, weight, self._bias)
        output = rows.new_empty(len(rows), self.out_features)

        def work(piece: slice) -> None:
            output[piece] = exact_product(kind, rows[piece], weight, self._bias)

        share(work, pieces_of(len(rows)))
        return output


def exact_linear(choice: Choice, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return an `ExactLinear`, or an `nn.Linear` where the product is always the dense one, which is then faster."""
    if choice.names() != {"dense"}:
        return ExactLinear(choice, weight, bias)
    linear = nn.Linear(weight.shape[1], len(weight), bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


class Int8Product:
    """Maps quantized rows to float32, by the kind of product that fits their number.

    Args:
        choice: kinds by the number of rows.
        values: int8 (out, in).
        scales: float32 (out,), one a row.
        bias: float32 (out,), or None.
        output: how outputs are rounded: one step for all, or the unit of each, float32 (out,).
    """

    def __init__(
        self, choice: Choice, values: Tensor, scales: Tensor, bias: Tensor | None, output: Step | Tensor
    ) -> None:
        self._choice = choice
        self._units: Tensor | None = None
        self._output = CENTRED if isinstance(output, Tensor) else output
        if isinstance(output, Tensor):  # outputs leave the product as whole numbers
            scales, bias = scales / output, None if bias is None else bias / output
            self._units = output
        self._products = {kind: int8_product(kind, values, scales, bias) for kind in sorted(choice.names())}

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply quint8 rows (n, in); returns float32 (n, out), which torch's products round to 8 bits."""
        output = self._numbers(rows)
        return output if self._units is None else output.mul_(self._units)

    def plus(self, rows: Tensor, other: Tensor) -> Tensor:
        """Multiply quint8 rows and add float32 (n, out)."""
        output = self._numbers(rows)
        return output.add_(other) if self._units is None else torch.addcmul(other, output, self._units)

    def then(self, function: Callable[[Tensor], Tensor], step: Step) -> Callable[[Tensor], Tensor]:
        """Return a map from quint8 rows to quint8: the product, an elementwise function, and its rounding by `step`.

        Products that can look the function up do so, since it has 256 values only.
        """
        if self._units is not None:
            return lambda rows: step.quantize(function(self(rows)))
        scale, zero = self._output.scale, self._output.zero
        table = step.quantize(function((torch.arange(256.0) - zero) * scale))

        def apply(rows: Tensor) -> Tensor:
            return self._products[self._choice.kind(len(rows))].mapped(rows, scale, zero, function, table)

        return apply

    def _numbers(self, rows: Tensor) -> Tensor:
        product = self._products[self._choice.kind(len(rows))]
        return product(rows, self._output.scale, self._output.zero)


@dataclass(frozen=True)
class Int8Plan:
    """A linear layer in 8 bits that is not packed yet.

    Args:
        choice: kinds by the number of rows.
        values: int8 (out, in).
        scales: float32 (out,), one a row.
        bias: float32 (out,), or None.
        input: how inputs are rounded.
        output: how outputs are rounded: one step for all, or the unit of each, float32 (out,).
    """

    choice: Choice
    values: Tensor
    scales: Tensor
    bias: Tensor | None
    input: Step
    output: Step | Tensor


class Int8Linear(CpuLinear):
    """A linear layer with 8-bit weights, inputs and outputs, by dense or by 1x4 products."""

    def __init__(self, plan: Int8Plan) -> None:
        super().__init__(plan.values.shape)
        self.input = plan.input
        self._product = Int8Product(plan.choice, plan.values, plan.scales, plan.bias, plan.output)

    def product(self, rows: Tensor) -> Tensor:
        """Multiply rows (n, in) in blocks that threads share."""
        pieces = pieces_of(len(rows))
        if len(pieces) == 1:
            return self._product(self.input.quantize(rows))
        output = rows.new_empty(len(rows), self.out_features)

        def work(piece: slice) -> None:
            output[piece] = self._product(self.input.quantize(rows[piece]))

        share(work, pieces)
        return output
