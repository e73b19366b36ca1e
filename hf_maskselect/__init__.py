"""Prune BERT-family models while you fine-tune them: a Trainer that draws, tries and keeps the best sparsity masks."""

from .adapters import merge_adapter_with_masks
from .checkpoint import PruningState, verify
from .config import PruningConfig
from .distillation import Distiller
from .masking.maskset import MaskSet
from .masking.scores import WeightStats
from .masking.targets import prunable_weights
from .packing import PackReport, load_pruned, pack, unpack
from .report import SparsityReport, sparsity_report
from .trainer import PruningTrainer

__version__ = "0.1.0"

__all__ = [
    "Distiller",
    "MaskSet",
    "PackReport",
    "PruningConfig",
    "PruningState",
    "PruningTrainer",
    "SparsityReport",
    "WeightStats",
    "load_pruned",
    "merge_adapter_with_masks",
    "pack",
    "prunable_weights",
    "sparsity_report",
    "unpack",
    "verify",
]
