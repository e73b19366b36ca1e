"""How far the outputs of one model are from those of another."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_MOST = 1 << 24  # numbers that are compared
_NEVER = -1e4  # the logit of a position of padding


class Judge:
    """Says how far a model's outputs are from those of the model that it was made with, over some batches.

    Both are models of transformers, with their `config`.
    """

    def __init__(self, model: Any, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self._batches = batches
        self._reference = self._outputs(model)

    def __call__(self, model: Any) -> float:
        """Return the mean KL divergence of the logits, in nats.

        With several labels a row, each label is a choice of two. In question answering, the choice of the first
        position and that of the last one count alike. For a model without classes it is the squared error of its first
        output, as a share of its variance. Padding does not count where the output has one entry a position.
        """
        pairs = list(zip(self._outputs(model), self._reference, strict=True))
        if self._classes:
            terms = [nn.functional.kl_div(a, b, log_target=True, reduction="none").sum(-1).flatten() for a, b in pairs]
            return max(0.0, float(torch.cat(terms).mean()))  # rounding may take it below
        errors = torch.cat([(a - b).square().flatten() for a, b in pairs])
        return float(errors.mean() / torch.cat([b.flatten() for _, b in pairs]).var().clamp(min=1e-12))

    @torch.no_grad()
    def _outputs(self, model: Any) -> list[Tensor]:
        several = model.config.problem_type == "multi_label_classification"
        return [self._compared(model(**batch), batch.get("attention_mask"), several) for batch in self._batches]

    def _compared(self, output: Any, mask: Tensor | None, several: bool) -> Tensor:
        """Return what is compared of one batch: log-probabilities, or else the first output.

        A language model has a choice among all tokens at each position. Of so many numbers only those of some evenly
        spread positions are kept.
        """
        if "start_logits" in output:
            self._classes = True
            spans = torch.cat([output.start_logits, output.end_logits]).double()
            if mask is not None:
                spans = spans.masked_fill(~torch.cat([mask, mask]).bool(), _NEVER)
            return spans.log_softmax(-1)
        self._classes = "logits" in output and (several or output.logits.shape[-1] > 1)
        if not self._classes:
            return _real(output[0], mask)
        logits = _real(output.logits, mask).flatten(0, -2)
        if several:
            logits = torch.stack([logits, torch.zeros_like(logits)], -1).flatten(0, 1)
        stride = -(-logits.numel() * len(self._batches) // _MOST)
        return logits[:: max(1, stride)].double().log_softmax(-1)


def _real(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the entries of real positions if `values` has one entry a position, else all of them."""
    if mask is None or values.dim() <= mask.dim() or values.shape[: mask.dim()] != mask.shape:
        return values
    return values[mask.bool()]
