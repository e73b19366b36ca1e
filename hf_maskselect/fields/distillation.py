"""Distillation from a teacher: the fields."""

from dataclasses import dataclass

from .rules import check_types, option


@dataclass
class DistillFields:
    """Fields of [`PruningConfig`] for distillation; used when there is a teacher (losses of arXiv 2310.13183).

    Args:
        distill_logits, distill_hidden (`float`, default 1): weights of the soft-label and hidden-state losses.
        distill_attention (`float`, defaults to 0): weight of the attention-map loss; 1 in the paper. Needs eager
            attention, which it switches on.
        distill_temperature (`float`, defaults to 1): temperature of the soft labels.
        hard_label_weight (`float`, defaults to 0): weight of the label loss beside the teacher's.
    """

    distill_logits: float = option(1.0, "Weight of the soft-label loss.")
    distill_hidden: float = option(1.0, "Weight of the hidden-state loss.")
    distill_attention: float = option(0.0, "Weight of the attention-map loss.")
    distill_temperature: float = option(1.0, "Temperature of the soft labels.")
    hard_label_weight: float = option(0.0, "Weight of the label loss beside the teacher's.")

    def _check_distill_values(self) -> None:
        """Check each of these fields by itself; the distiller checks them against the models."""
        check_types(self, DistillFields)
