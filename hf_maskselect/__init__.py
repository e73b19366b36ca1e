"""Prune BERT-family models while you fine-tune them: a Trainer that draws, tries and keeps the best sparsity masks."""

from .adapters import merge_adapter_with_masks
from .checkpoint import PruningState, verify
from .config import PruningConfig
from .distillation import Distiller
from .export.onnx import OnnxReport, export_onnx
from .export.semi_structured import ExportReport, export_semi_structured, load_semi_structured
from .masking.maskset import MaskSet
from .masking.scores import WeightStats
from .masking.targets import prunable_weights
from .packing import PackReport, load_pruned, pack, unpack
from .permutation import PermutationReport, permute_channels
from .refitting import Refit, refit
from .report import SparsityReport, sparsity_report
from .trainer import PruningTrainer

__version__ = "0.1.0"

__all__ = [
    "Distiller",
    "ExportReport",
    "MaskSet",
    "OnnxReport",
    "PackReport",
    "PermutationReport",
    "PruningConfig",
    "PruningState",
    "PruningTrainer",
    "Refit",
    "SparsityReport",
    "WeightStats",
    "export_onnx",
    "export_semi_structured",
    "load_pruned",
    "load_semi_structured",
    "merge_adapter_with_masks",
    "pack",
    "permute_channels",
    "prunable_weights",
    "refit",
    "sparsity_report",
    "unpack",
    "verify",
]
