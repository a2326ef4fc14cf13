"""A stand-in for a version of TensorRT that is not installed: it has the names of that version, and no others.

The names are read from NVIDIA's own bindings by scripts/tensorrt_names.py.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import NonCallableMock

NAMES: dict[str, dict[str, str]] = json.loads((Path(__file__).parent / "tensorrt_names.json").read_text())
VERSIONS = sorted(NAMES)
ENUMS = (
    "BuilderFlag",
    "DataType",
    "DeviceType",
    "HardwareCompatibilityLevel",
    "LayerInformationFormat",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "ProfilingVerbosity",
    "TensorIOMode",
)


def names_of(version: str, kind: str) -> list[str]:
    return NAMES[version][kind].split()


def instance(version: str, kind: str, **values: Any) -> Any:
    """An object of a class that has the names of that class only, to be read and to be set."""
    made = NonCallableMock(spec_set=names_of(version, kind))
    for name, value in values.items():
        setattr(made, name, value)
    return made


class StandIn(ModuleType):
    """The module, and what it was asked to build.

    Attributes:
        config: the IBuilderConfig; its set_flag, set_timing_cache … are mocks.
        network: with one input, one output and two layers.
        builder, parser, profile, engine: likewise.
    """

    def __init__(self, version: str, *, image_shape: tuple[int, ...] = (1, 3, 64, 64), dla_cores: int = 0) -> None:
        flavour, number = version.split()
        super().__init__(flavour)
        self.__version__ = number
        known = NAMES[version]
        for name in ENUMS:
            if name in known:
                members = [item for item in known[name].split() if item not in ("name", "value", "itemsize")]
                setattr(self, name, enum.IntEnum(name, members, start=0))
        severity = enum.IntEnum("Severity", known["ILogger.Severity"].split())
        self.ILogger = type("ILogger", (), {"Severity": severity})
        float_type = self.DataType.FLOAT  # type: ignore[attr-defined]
        image, output = (
            instance(version, "ITensor", shape=shape, dtype=float_type) for shape in (image_shape, (1, 7, 84))
        )
        image.name, output.name = "images", "output0"
        self.layers = [instance(version, "ILayer") for _ in range(2)]
        for layer, name in zip(self.layers, ("/model.0/conv/Conv", "/model.22/Mul_2"), strict=True):
            layer.name = name
            layer.get_output.return_value = output
        self.network = instance(version, "INetworkDefinition", num_inputs=1, num_outputs=1, num_layers=2)
        self.network.get_input.return_value, self.network.get_output.return_value = image, output
        self.network.get_layer.side_effect = self.layers.__getitem__
        self.profile = instance(version, "IOptimizationProfile")
        self.cache = instance(version, "ITimingCache")
        self.cache.serialize.return_value = b"timed"
        self.config = instance(version, "IBuilderConfig")
        self.config.add_optimization_profile.return_value = 0
        self.config.create_timing_cache.return_value = self.cache
        self.config.get_timing_cache.return_value = self.cache
        self.config.set_timing_cache.return_value = True
        self.builder = instance(version, "Builder", num_DLA_cores=dla_cores)
        self.builder.create_network.return_value = self.network
        self.builder.create_builder_config.return_value = self.config
        self.builder.create_optimization_profile.return_value = self.profile
        self.builder.build_serialized_network.return_value = b"engine"
        self.parser = instance(version, "OnnxParser", num_errors=0)
        self.parser.parse_from_file.return_value = True
        inspector = instance(version, "EngineInspector")
        inspector.get_engine_information.return_value = (
            "Name: conv, LayerType: CaskConvolution, Inputs: [ { Name: images, Dimensions: [1,3,64,64], "
            "Format/Datatype: Row major linear FP16 format }], Outputs: [ { Name: x, Dimensions: [1,7,84], "
            "Format/Datatype: Row major linear FP32 }], TacticName: t\n"
        )
        self.engine = instance(version, "ICudaEngine")
        self.engine.create_engine_inspector.return_value = inspector
        self.runtime = instance(version, "Runtime")
        self.runtime.deserialize_cuda_engine.return_value = self.engine

    def Builder(self, logger: Any) -> Any:  # noqa: N802  (TensorRT's own name)
        self.logger = logger
        return self.builder

    def OnnxParser(self, network: Any, logger: Any) -> Any:  # noqa: N802
        return self.parser

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        return self.runtime

    def flags(self) -> set[str]:
        """Names of the builder flags that were set."""
        return {call.args[0].name for call in self.config.set_flag.call_args_list}
