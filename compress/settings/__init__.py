"""The configuration of a run: strict, complete, and with all its mistakes reported at once."""

from compress.settings.budget import Budget, LayerRule, load_budget
from compress.settings.exports import Export, ExportNcnn, ExportTrt, Quantization, Quantize, QuantizeNcnn
from compress.settings.names import AUTO, LATENCY_TARGETS, TARGETS, Importance, Runtime, Share, Variant
from compress.settings.reading import load_yaml, training_args
from compress.settings.run import Benchmark, Run, check_imgsz, load_run
from compress.settings.stages import OPTIMIZERS, Finetune, Prune, Sparsity, Training
from compress.settings.strict import Strict, parse

__all__ = [
    "AUTO",
    "LATENCY_TARGETS",
    "OPTIMIZERS",
    "TARGETS",
    "Benchmark",
    "Budget",
    "Export",
    "ExportNcnn",
    "ExportTrt",
    "Finetune",
    "Importance",
    "LayerRule",
    "Prune",
    "Quantization",
    "Quantize",
    "QuantizeNcnn",
    "Run",
    "Runtime",
    "Share",
    "Sparsity",
    "Strict",
    "Training",
    "Variant",
    "check_imgsz",
    "load_budget",
    "load_run",
    "load_yaml",
    "parse",
    "training_args",
]
