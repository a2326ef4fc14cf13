"""A whole pipeline: all sections together, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from compress.errors import SettingsError
from compress.settings.budget import budget_content
from compress.settings.exports import Export, ExportNcnn, ExportTrt
from compress.settings.names import AUTO, Runtime
from compress.settings.reading import apply_override, load_yaml
from compress.settings.stages import Finetune, Prune, Sparsity, Training
from compress.settings.strict import Strict, parse


class Benchmark(Strict):
    """Latency and accuracy of the dense and the pruned model."""

    runtimes: tuple[Runtime, ...] = Field(default=("torch", "onnxruntime"), min_length=1)
    threads: int = Field(default=1, ge=1)
    mode: Literal["quick", "standard", "mlperf"] = "quick"
    split: Literal["train", "val", "test"] = "val"


def _device(value: Any) -> Any:
    """Read Ultralytics' 0 and [0, 1], which are numbers in YAML, as "0" and "0,1"."""
    numbers = value if isinstance(value, list) else [value]
    return ",".join(map(str, numbers)) if all(type(number) is int for number in numbers) else value


class Run(Strict):
    """A whole pipeline, as configs/pipelines/*.yaml spell it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run folder is runs/NAME")
    model: str = Field(description="a checkpoint (.pt) or an architecture (.yaml)")
    data: str = Field(description="a data set YAML of Ultralytics' form, or 'shapes' for the generated one")
    imgsz: int = Field(default=640, ge=32)
    device: Annotated[str, BeforeValidator(_device)] = Field(default="cpu", description="cpu, 0, 0,1 …")
    workers: int = Field(default=8, ge=0)
    seed: int = Field(default=0, ge=0)
    iterations: int = Field(default=1, ge=1, description="rounds of sparsify, prune and finetune, in equal ratios")
    map_budget: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="loss of mAP50-95, of a classifier top-1, on the val split that ends the rounds",
    )
    train: Training
    sparsify: Sparsity
    prune: Prune
    finetune: Finetune
    export: Export = Export()
    ncnn: ExportNcnn = ExportNcnn()
    trt: ExportTrt = ExportTrt()
    benchmark: Benchmark = Benchmark()

    @model_validator(mode="after")
    def _one_size(self) -> Run:
        if self.trt.imgsz not in (None, str(self.imgsz)):
            raise ValueError(f"trt.imgsz is {self.trt.imgsz} and imgsz {self.imgsz}: leave trt.imgsz out")
        return self

    @model_validator(mode="after")
    def _rounds(self) -> Run:
        if self.map_budget is not None and self.iterations == 1:
            raise ValueError("map_budget ends rounds of pruning: set iterations above 1")
        if self.iterations > 1 and self.prune.by_latency:
            raise ValueError("iterations need a target of percent, macs or params: a latency is reached in one cut")
        if self.iterations > 1 and self.prune.sensitivity is not None:
            raise ValueError(
                "prune.sensitivity is of the dense model, iterations cut others too: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _importance_is_known(self) -> Run:
        if self.prune.keep_importance is None:
            return self
        if self.sparsify.fade:
            raise ValueError(
                "sparsify.fade takes the importance of what it fades, and prune.keep_importance would cut once more: "
                "set sparsify.fade=false, or ask for a latency"
            )
        if self.sparsify.sr == AUTO and self.sparsify.share is None:
            raise ValueError(
                "sr: auto cannot tell how many channels prune.keep_importance will remove: set sparsify.share"
            )
        return self

    @model_validator(mode="after")
    def _measures_its_target(self) -> Run:
        runtime, threads = self.prune.runtime or "onnxruntime", self.prune.threads or 1  # as configs/devices/cpu.yaml
        known = runtime in self.benchmark.runtimes and threads == self.benchmark.threads
        if self.prune.by_latency and self.prune.device == "cpu" and not known:
            raise ValueError(
                f"prune asks for a latency in {runtime} with threads={threads}, which benchmark does not measure: "
                "set benchmark.runtimes and benchmark.threads to it"
            )
        return self


def load_run(path: Path, overrides: list[str], texts: Mapping[str, str] | None = None) -> Run:
    """Read a pipeline YAML and apply `key=value` overrides such as `finetune.epochs=20`.

    `prune.budget` may name a file of configs/budgets/ or a device instead of holding the rules itself.

    Args:
        texts: values by key that are taken as they are, such as paths; values in `overrides` are YAML.

    Raises:
        SettingsError: all the mistakes at once, one after another.
    """
    content = load_yaml(path)
    for override in overrides:
        apply_override(content, override)
    content.update(texts or {})
    prune = content.get("prune")
    if isinstance(prune, dict) and isinstance(prune.get("budget"), str):
        prune["budget"] = budget_content(Path(prune["budget"]))
    return parse(Run, content, str(path))


def check_imgsz(imgsz: int, stride: int) -> None:
    """Check that an image size, px, fits a model's stride.

    Raises:
        SettingsError: it does not; the message names the nearest one that does.
    """
    if imgsz < stride or imgsz % stride:
        nearest = max(stride, round(imgsz / stride) * stride)
        raise SettingsError(f"imgsz {imgsz} must be a multiple of the model's stride {stride}: use {nearest}")
