"""The sections of what is exported."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compress.settings.strict import Strict


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
    def _fits(self) -> Export:
        if self.nms and self.parity_map:
            raise ValueError("parity_map needs the boxes that nms removes: ask for one of them")
        if not self.nms and (asked := self.changed("conf", "iou", "max_det")):
            raise ValueError(f"{asked} goes with nms: without, all boxes leave the graph")
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
    seed: int = Field(default=0, ge=0, description="of the choice of calibration images")


class Quantize(Quantization):
    """ONNX export in 8 bits."""

    target: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    method: Literal["minmax", "percentile", "entropy"] = Field(
        default="percentile", description="how calibration finds the range of a tensor"
    )
    reduce_range: bool | None = Field(
        default=None, description="weights of 7 bits; not given: for onnxruntime, where this CPU has no VNNI"
    )
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
