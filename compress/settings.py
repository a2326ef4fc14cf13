"""The configuration of a run: strict, complete, and with all its mistakes reported at once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from compress.errors import SettingsError

Importance = Literal["bn", "l1", "l2", "fpgm", "taylor", "random"]
Runtime = Literal["torch", "onnxruntime", "ncnn", "tensorrt"]
# Other ways to run the files of a runtime, which devices name: `benchmark.runtimes.VARIANTS`.
Variant = Literal[
    "torch-compiled",
    "torch-cuda",
    "torch-cuda-fp16",
    "torch-cudagraph",
    "torch-cudagraph-fp16",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "ncnn-vulkan",
]
AUTO = "auto"
Section = TypeVar("Section", bound="Strict")
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
TARGETS = ("percent", "macs", "params", "latency", "speedup")


def _times(value: Any) -> Any:
    """Read "2x" as 2.0."""
    import re

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[x×]?", value) if isinstance(value, str) else None
    return float(found[1]) if found else value


class Strict(BaseModel):
    """A settings section: an unknown key is an error, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Grown(Strict):
    """A section with settings that came later: unless they are set, it is written as before, and old runs are found."""

    later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content = handler(self)
        fields = type(self).model_fields
        unset = {name for name in self.later if getattr(self, name) == fields[name].default}
        return {key: value for key, value in content.items() if key not in unset}


class LayerRule(Strict):
    """What the layers whose names match a glob may keep; a value that is not given is inherited."""

    layers: str = Field(description="glob over layer names, such as 'model.0.*' or 'model.22.cv2.*'")
    multiple_of: int | None = Field(default=None, ge=1)
    power_of_two: bool | None = None
    min_width: int | None = Field(default=None, ge=1)
    max_removed: float | None = Field(default=None, ge=0.0, le=1.0)
    freeze: bool = False


class Budget(Strict):
    """The widths that a device likes. See configs/budgets/ for measured ones."""

    multiple_of: int = Field(default=8, ge=1, description="channel counts are multiples of this")
    power_of_two: bool = Field(default=False, description="channel counts are powers of two")
    min_width: int = Field(default=8, ge=1, description="no layer becomes narrower than this")
    max_removed: float = Field(
        default=0.75, ge=0.0, le=1.0, description="largest share of channels that one group may lose"
    )
    rules: tuple[LayerRule, ...] = Field(default=(), description="per-layer overrides, the last match wins")
    source: str = Field(default="", description="where the rule comes from")


class Training(Strict):
    """One training: Ultralytics' names, Ultralytics' meanings."""

    epochs: int = Field(ge=0)
    batch: int = Field(default=16, ge=1)
    optimizer: str = "auto"
    lr0: float = Field(default=0.01, gt=0.0)
    lrf: float = Field(default=0.01, gt=0.0)
    cos_lr: bool = False
    warmup_epochs: float = Field(default=3.0, ge=0.0)
    close_mosaic: int = Field(default=10, ge=0)
    amp: bool = True
    args: dict[str, Any] = Field(default_factory=dict, description="any other Ultralytics training argument")


class Sparsity(Training):
    """Sparsity training: a training with an L1 penalty on the batch-norm scales γ of prunable channels."""

    # Adam would divide the constant pull of the penalty by its own magnitude, and λ would mean nothing.
    optimizer: str = "SGD"

    sr: Annotated[float, Field(ge=0.0)] | Literal["auto"] = Field(
        default=1e-4, description="penalty λ, added to the gradient of γ as λ·γ/‖γ‖ per coupled unit; or auto"
    )
    share: Share | None = Field(
        default=None, description="share of γ that auto brings near zero; what `prune` will remove when not given"
    )
    sr_decay: float = Field(
        default=0.1, gt=0.0, le=1.0, description="share of λ that is left at the last epoch (linear)"
    )
    fade: bool = Field(default=False, description="choose the channels that `prune` removes early, and fade them out")
    start: Literal["train", "model"] = Field(
        default="train", description="start from the trained model or from `model` itself"
    )


class Finetune(Training, Grown):
    """Fine-tuning of the pruned model, with the dense model as the teacher unless told otherwise."""

    later = ("teacher", "cwd", "cwd_temperature", "ld", "ld_temperature", "distil_off_epochs")

    distill: bool = Field(default=True, description="distil from the dense model, or from `teacher`")
    teacher: str | None = Field(default=None, description="a checkpoint to distil from in place of the dense model")
    dis: float = Field(default=6.0, ge=0.0, description="weight of Ultralytics' feature distillation")
    cwd: float = Field(default=0.0, ge=0.0, description="weight of channel-wise distillation of the same features")
    cwd_temperature: float = Field(default=4.0, gt=0.0)
    ld: float = Field(default=0.0, ge=0.0, description="weight of the distillation of box distributions")
    ld_temperature: float = Field(default=10.0, gt=0.0)
    distil_off_epochs: int = Field(default=0, ge=0, description="last epochs, in which the teacher is not asked")

    @model_validator(mode="after")
    def _something_to_learn(self) -> Finetune:
        if self.distill and not (self.dis or self.cwd or self.ld):
            raise ValueError("dis, cwd and ld are all 0: leave out the teacher (distill: false)")
        return self

    @property
    def terms(self) -> dict[str, float]:
        """Return what a trainer must know beside Ultralytics' arguments; empty where that is nothing."""
        if not (self.cwd or self.ld or self.distil_off_epochs):
            return {}
        return {name: getattr(self, name) for name in self.later if name != "teacher"}


class Prune(Strict):
    """How much to remove (one of `TARGETS`), by which importance, under which budget.

    `latency` and `speedup` are predicted by a latency table of `benchmark.profile` and measured after the cut.
    """

    percent: float | None = Field(default=None, ge=0.0, lt=1.0, description="share of the prunable channels to remove")
    macs: Share | None = Field(default=None, description="MACs of the pruned model as a share of the dense model's")
    params: Share | None = Field(
        default=None, description="parameters of the pruned model as a share of the dense model's"
    )
    latency: str | None = Field(
        default=None, pattern=r"^\d+(\.\d+)?\s*(ms|M)$", description="such as 12ms, or 120M instructions"
    )
    speedup: Annotated[float, BeforeValidator(_times), Field(gt=1.0)] | None = Field(
        default=None, description="dense latency over that of the pruned model, such as 2x"
    )
    memory: str | None = Field(
        default=None,
        pattern=r"^\d+(\.\d+)?\s*[kMG]i?B$",
        description="with latency or speedup: weights and peak, such as 8MB",
    )
    device: str = Field(default="cpu", description="of latency and speedup: where the model will run")
    host: str | None = Field(default=None, description="of latency and speedup: how the device is reached")
    runtime: Runtime | Variant | None = Field(
        default=None, description="of latency and speedup; the device's first one"
    )
    threads: int | None = Field(default=None, ge=1, description="of latency and speedup; the device's own")
    table: str | None = Field(
        default=None, description="latency table; not given: the one that benchmark.profile wrote"
    )
    importance: Importance = "bn"
    sensitivity: str | None = Field(
        default=None, description="sensitivity.json of compress.sensitivity: what a group may lose was measured"
    )
    budget: Budget = Budget()
    recalibrate_images: int = Field(
        default=256, ge=0, description="training images that re-estimate batch-norm statistics"
    )

    @model_validator(mode="after")
    def _one_target(self) -> Prune:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(TARGETS)} is needed, got {', '.join(given) or 'none'}")
        if self.memory is not None and not self.by_latency:
            raise ValueError("memory goes with latency or speedup")
        return self

    @property
    def by_latency(self) -> bool:
        """Tell whether a measured latency is the target."""
        return self.latency is not None or self.speedup is not None


class Export(Strict):
    """ONNX export."""

    opset: int = Field(default=17, ge=13, le=22)
    simplify: bool = True
    batch: int = Field(default=1, ge=1, description="images at once; with a dynamic batch, that of the traced example")
    dynamic: Literal["batch", "size", "both"] | None = Field(
        default=None, description="what of the input's shape is left open"
    )
    half: bool = Field(default=False, description="weights and computation in fp16, inputs and outputs in fp32")
    nms: bool = Field(default=False, description="suppress overlapping boxes inside the graph")
    conf: float = Field(default=0.25, ge=0.0, lt=1.0, description="least score of a detection, with nms")
    iou: float = Field(default=0.7, gt=0.0, le=1.0, description="boxes that overlap by more are one, with nms")
    max_det: int = Field(default=300, ge=1, description="how many detections an image may have, with nms")
    parity_images: int = Field(default=16, ge=1, description="real images on which ONNX must equal PyTorch")
    parity_map: bool = Field(default=False, description="compare the mAP on the val split too")

    @model_validator(mode="after")
    def _map_of_all_boxes(self) -> Export:
        if self.nms and self.parity_map:
            raise ValueError("parity_map needs the boxes that nms removes: ask for one of them")
        return self


class ExportNcnn(Strict):
    """ncnn export; a pipeline does it where `benchmark.runtimes` asks for ncnn."""

    half: bool = Field(default=False, description="store weights in fp16, and let the device compute in fp16")
    dynamic: Literal["size"] | None = Field(default=None, description="what of the input's shape is left open")
    parity_images: int = Field(default=16, ge=1, description="real images on which ncnn must equal PyTorch")
    parity_map: bool = Field(default=False, description="compare the mAP on the val split too")


class Quantization(Strict):
    """What every 8-bit export is told."""

    calibration_images: int = Field(default=32, ge=1, description="training images that the ranges are found on")
    map_budget: float = Field(default=0.010, ge=0.0, le=1.0, description="largest loss of mAP50-95 on the val split")
    parity_images: int = Field(default=16, ge=1, description="real images that are compared with PyTorch")
    seed: int = Field(default=0, description="of the choice of calibration images")


class Quantize(Quantization):
    """ONNX export in 8 bits."""

    target: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    method: Literal["minmax", "percentile", "entropy"] = Field(
        default="percentile", description="how calibration finds the range of a tensor"
    )
    reduce_range: bool = Field(default=False, description="7-bit weights, for x86 CPUs without VNNI")
    opset: int = Field(default=17, ge=13, le=22)


class QuantizeNcnn(Quantization):
    """ncnn export in 8 bits."""

    method: Literal["percentile", "kl"] = Field(
        default="percentile", description="how calibration finds the range of a tensor"
    )
    map_budget: float = Field(default=0.015, ge=0.0, le=1.0, description="largest loss of mAP50-95 on the val split")


class ExportTrt(Strict):
    """A TensorRT engine; a pipeline builds one on its own machine where `benchmark.runtimes` asks for tensorrt."""

    precision: Literal["fp32", "tf32", "fp16", "bf16", "int8"] = "fp16"
    rest: Literal["fp32", "fp16"] = Field(default="fp32", description="what int8 leaves in float computes in this")
    flavour: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
    batch: str | None = Field(default=None, description="N, or MIN:OPT:MAX for a dynamic ONNX file")
    imgsz: str | None = Field(default=None, description="px, or MIN:OPT:MAX for a dynamic ONNX file")
    workspace: int | None = Field(default=None, ge=1, description="MiB that the builder and the engine may use")
    version_compatible: bool = Field(default=False, description="later versions of TensorRT can load it")
    hardware_compatible: bool = Field(default=False, description="every GPU from Ampere on can load it")
    dla: int | None = Field(default=None, ge=0, description="DLA core; what it cannot do falls back to the GPU")
    opset: int = Field(default=17, ge=13, le=22)
    parity_images: int = Field(default=16, ge=1, description="real images on which the ONNX file must equal PyTorch")

    @model_validator(mode="after")
    def _fits(self) -> ExportTrt:
        if self.rest == "fp16" and self.precision != "int8":
            raise ValueError(f"rest goes with precision int8 only, precision is {self.precision}")
        if self.dla is not None and self.precision not in ("fp16", "int8"):
            raise ValueError(f"a DLA computes in fp16 or int8 only, precision is {self.precision}")
        return self


class Benchmark(Strict):
    """Latency and accuracy of the dense and the pruned model."""

    runtimes: tuple[Runtime, ...] = ("torch", "onnxruntime")
    threads: int = Field(default=1, ge=1)
    mode: Literal["quick", "standard", "mlperf"] = "quick"
    split: Literal["train", "val", "test"] = "val"


class Run(Grown):
    """A whole pipeline, as configs/pipelines/*.yaml spell it."""

    later = ("iterations", "map_budget")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run folder is runs/NAME")
    model: str = Field(description="a checkpoint (.pt) or an architecture (.yaml)")
    data: str = Field(description="a data set YAML of Ultralytics' form, or 'shapes' for the generated one")
    imgsz: int = Field(default=640, ge=32)
    device: str = "cpu"
    workers: int = Field(default=8, ge=0)
    seed: int = 0
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
    def _rounds(self) -> Run:
        if self.map_budget is not None and self.iterations == 1:
            raise ValueError("map_budget ends rounds of pruning: set iterations above 1")
        if self.iterations > 1 and self.prune.by_latency:
            raise ValueError("iterations need a target of percent, macs or params: a latency is reached in one cut")
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


def check_imgsz(imgsz: int, stride: int) -> None:
    """Check that an image size, px, fits a model's stride.

    Raises:
        SettingsError: it does not; the message names the nearest one that does.
    """
    if imgsz < stride or imgsz % stride:
        nearest = max(stride, round(imgsz / stride) * stride)
        raise SettingsError(f"imgsz {imgsz} must be a multiple of the model's stride {stride}: use {nearest}")


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader.

    Raises:
        SettingsError: the file is missing, is not YAML, or is not a mapping.
    """
    import yaml

    try:
        content = _parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path} does not exist: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise SettingsError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold a mapping of keys to values, it holds {type(content).__name__}")
    return content


def _parse_yaml(text: str) -> Any:
    """Read YAML with the safe loader; 1e-4 is a number, as in YAML 1.2 (for PyYAML it is a word without a dot)."""
    import re

    from yaml import SafeLoader

    class Loader(SafeLoader):
        pass

    exponent = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+.0123456789"))
    return Loader(text).get_single_data()


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
        _apply_override(content, override)
    content.update(texts or {})
    prune = content.get("prune")
    if isinstance(prune, dict) and isinstance(prune.get("budget"), str):
        prune["budget"] = _budget_content(Path(prune["budget"]))
    return parse(Run, content, str(path))


def load_budget(path: Path) -> Budget:
    """Read a file of configs/budgets/, or the budget of a device: `rpi5`, `rpi5:onnxruntime`, a file of its own.

    Raises:
        SettingsError: there is no such file or device, or it does not hold a budget.
    """
    return parse(Budget, _budget_content(path), str(path))


def _budget_content(path: Path) -> dict[str, Any]:
    if path.suffix in (".yaml", ".yml") or path.exists():
        content = load_yaml(path)
        if "budgets" not in content:
            return content
    from compress.devices import device_budget

    return device_budget(str(path)).model_dump(mode="json")


def training_args(pairs: list[str]) -> dict[str, Any]:
    """Read `key=value` pairs as Ultralytics training arguments, such as `nbs=16`.

    Raises:
        SettingsError: a pair without a key or without a value.
    """
    content: dict[str, Any] = {}
    for pair in pairs:
        _apply_override(content, pair)
    return content


def parse(kind: type[Section], content: dict[str, Any], source: str) -> Section:
    """Check a mapping against a settings section and return the section; report every mistake in one error."""
    import json

    try:
        # Through JSON, so that strict typing still takes a YAML list where a tuple is meant.
        text = json.dumps(content, default=str)
    except (TypeError, ValueError) as error:  # a date as a key, or a mapping that holds itself
        raise SettingsError(f"{source} holds what a configuration cannot: {error}") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        # Of a number that may be a word too, pydantic says twice what is wrong: as a number, and as a word.
        items = [item for item in error.errors() if not str(["", *item["loc"]][-1]).startswith("literal[")]
        mistakes = [_describe(item, kind) for item in items]
        raise SettingsError(f"{source}: {'; '.join(mistakes)}") from None


def _describe(item: Any, kind: type[Strict]) -> str:
    """Say in a few words what pydantic found wrong, and what may have been meant."""
    where = ".".join(str(part) for part in item["loc"]).removesuffix(".constrained-float") or "settings"
    if item["type"] == "extra_forbidden":
        *parents, last = item["loc"]
        close = difflib.get_close_matches(str(last), _keys(kind, parents), n=1)
        return f"unknown key '{where}'" + (f", did you mean '{close[0]}'?" if close else "")
    if item["type"] == "missing":
        return f"'{where}' is missing"
    got = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
    text = f"{where}: {item['msg'].removeprefix('Value error, ')}{got}"
    if item["type"] in ("less_than", "less_than_equal") and 1 < item["input"] <= 100:
        text += f": a share is meant, such as {item['input'] / 100:g}"
    return text


def _keys(kind: Any, parents: list[str | int]) -> list[str]:
    """Return the keys of the section that lies at a place inside a section."""
    for name in parents:
        if isinstance(name, str):  # a number is a place in a list of sections
            annotation = kind.model_fields[name].annotation
            inner = (annotation, *get_args(annotation))
            kind = next(part for part in inner if isinstance(part, type) and issubclass(part, Strict))
    return list(kind.model_fields)


def _apply_override(content: dict[str, Any], override: str) -> None:
    import yaml

    key, separator, text = override.partition("=")
    if not separator or not key:
        raise SettingsError(f"'{override}' must have the form key=value, such as finetune.epochs=20")
    *parents, last = key.split(".")
    section = content
    for name in parents:
        inner = section.get(name, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"'{key}': '{name}' is a value, not a section")
        section[name] = dict(inner)  # a copy: a YAML alias may show the same section in another place
        section = section[name]
    try:
        section[last] = _parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"'{override}' has a value that is not valid YAML: {error}") from None
