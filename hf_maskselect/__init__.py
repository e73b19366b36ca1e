"""Prune BERT-family models while you fine-tune them: a Trainer that draws, tries and keeps the best sparsity masks."""

from .config import PruningConfig
from .distillation.distiller import Distiller
from .export.onnx import OnnxReport, export_onnx
from .export.semi_structured import ExportReport, export_semi_structured, load_semi_structured
from .masking.maskset import MaskSet
from .masking.scores import WeightStats
from .masking.targets import prunable_weights
from .reporting.latency import LatencyPoint, plot_latency
from .reporting.sparsity import SparsityReport, sparsity_report
from .runtime.export import export_cpu
from .runtime.load import load_cpu
from .runtime.report import CpuReport
from .storage.free_shapes import register_loader
from .storage.load import load_pruned
from .storage.pack import PackReport, pack, unpack
from .storage.state import PruningState
from .storage.trim import trim_folder
from .storage.verify import verify
from .surgery.merge_adapter import merge_adapter_with_masks
from .surgery.permute_channels import PermutationReport, permute_channels
from .surgery.refit import Refit, refit
from .surgery.structured.report import ShrinkReport
from .surgery.structured.shrink import shrink_model
from .surgery.trim_vocabulary import TrimReport, trim_vocabulary
from .trainer import PruningTrainer

__version__ = "0.1.0"

register_loader()

__all__ = [
    "CpuReport",
    "Distiller",
    "ExportReport",
    "LatencyPoint",
    "MaskSet",
    "OnnxReport",
    "PackReport",
    "PermutationReport",
    "PruningConfig",
    "PruningState",
    "PruningTrainer",
    "Refit",
    "ShrinkReport",
    "SparsityReport",
    "TrimReport",
    "WeightStats",
    "export_cpu",
    "export_onnx",
    "export_semi_structured",
    "load_cpu",
    "load_pruned",
    "load_semi_structured",
    "merge_adapter_with_masks",
    "pack",
    "permute_channels",
    "plot_latency",
    "prunable_weights",
    "refit",
    "shrink_model",
    "sparsity_report",
    "trim_folder",
    "trim_vocabulary",
    "unpack",
    "verify",
]
