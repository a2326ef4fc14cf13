"""The builder script against every version of TensorRT whose names are known, and its parts."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from export import trt_builder
from tensorrt_standin import NAMES, VERSIONS, StandIn, instance

WEAK = [name for name in VERSIONS if name in ("tensorrt 8.6.1", "tensorrt 10.3.0")]
STRONG = [name for name in VERSIONS if name not in WEAK]
REQUEST = {
    "action": "build",
    "flavour": "auto",
    "onnx": "model.onnx",
    "engine": "model.engine",
    "timing_cache": None,
    "precision": "fp16",
    "rest": "fp32",
    "float_nodes": ["/model.22/Mul_2"],
    "profiles": {},
    "workspace_mib": 256,
    "version_compatible": False,
    "hardware_compatible": False,
    "dla": None,
}
GPU = {"gpu": "Orin", "compute_capability": "8.7", "cuda": "12.6", "gpu_memory_bytes": 8 << 30}
NO_GPU = dict.fromkeys(GPU)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the script find a stand-in, on a machine with a GPU or without."""

    def install(trt: StandIn, gpu: dict[str, Any] = GPU) -> StandIn:
        for name in trt_builder.FLAVOURS:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, trt.__name__, trt)
        monkeypatch.setattr(trt_builder, "cuda_facts", lambda: dict(gpu))
        return trt

    return install


def ask(folder: Path, **changes: Any) -> dict[str, Any]:
    (folder / trt_builder.REQUEST).write_text(json.dumps({**REQUEST, **changes}))
    code = trt_builder.main(folder / trt_builder.REQUEST)
    result = json.loads((folder / trt_builder.RESULT).read_text())
    assert code == int("failure" in result)
    return result


def test_names_of_all_kinds_of_versions_are_known() -> None:
    assert len(WEAK) == 2
    assert {"tensorrt", "tensorrt_rtx"} == {name.split()[0] for name in STRONG}
    assert len(VERSIONS) >= 6
    # What the two paths of the builder rest on.
    assert all("FP16" in NAMES[name]["BuilderFlag"].split() for name in WEAK)
    assert "FP16" not in NAMES["tensorrt 11.4.0.106"]["BuilderFlag"].split()


def test_the_installed_bindings_have_the_names_that_are_written_down() -> None:
    """tensorrt_cu13_bindings is in the extra `dev`; its libraries are not needed for its names."""
    found = importlib.util.find_spec("tensorrt_bindings")
    if found is None or not found.submodule_search_locations or shutil.which("cc") is None:
        pytest.skip("needs the package tensorrt_cu13_bindings and a C compiler")
    from scripts.tensorrt_names import read_names

    version, names = read_names(Path(found.submodule_search_locations[0]))
    assert {kind: " ".join(values) for kind, values in names.items()} == NAMES[f"tensorrt {version}"]


@pytest.mark.parametrize("version", STRONG)
def test_a_strongly_typed_build_uses_no_name_that_is_not_there(version: str, use: Any, tmp_path: Path) -> None:
    trt = use(StandIn(version))
    result = ask(tmp_path, precision="tf32")
    assert result["facts"]["strongly_typed"] is True
    assert result["built"]["bytes"] == len(b"engine")
    assert (tmp_path / "model.engine").read_bytes() == b"engine"
    trt.builder.create_network.assert_called_once_with(1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert trt.flags() == {"TF32"}
    trt.config.set_memory_pool_limit.assert_called_once_with(trt.MemoryPoolType.WORKSPACE, 256 << 20)


@pytest.mark.parametrize("version", WEAK)
def test_a_weakly_typed_build_allows_a_precision_and_keeps_the_decoding_in_fp32(
    version: str, use: Any, tmp_path: Path
) -> None:
    trt = use(StandIn(version))
    result = ask(tmp_path)
    assert result["facts"]["strongly_typed"] is False
    explicit = 1 << trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH if version == "tensorrt 8.6.1" else 0
    trt.builder.create_network.assert_called_once_with(explicit)
    assert trt.flags() == {"FP16", "PREFER_PRECISION_CONSTRAINTS"}
    trt.config.clear_flag.assert_called_once_with(trt.BuilderFlag.TF32)
    conv, decode = trt.layers
    conv.set_output_type.assert_not_called()
    decode.set_output_type.assert_called_once_with(0, trt.DataType.FLOAT)
    assert decode.precision == trt.DataType.FLOAT


@pytest.mark.parametrize(
    ("precision", "rest", "flags"),
    [
        ("fp32", "fp32", set()),
        ("tf32", "fp32", {"TF32"}),
        ("bf16", "fp32", {"BF16", "PREFER_PRECISION_CONSTRAINTS"}),
        ("int8", "fp32", {"INT8", "PREFER_PRECISION_CONSTRAINTS"}),
        ("int8", "fp16", {"INT8", "FP16", "PREFER_PRECISION_CONSTRAINTS"}),
    ],
)
def test_flags_of_a_weakly_typed_build(precision: str, rest: str, flags: set[str], use: Any, tmp_path: Path) -> None:
    trt = use(StandIn("tensorrt 10.3.0"))
    assert "built" in ask(tmp_path, precision=precision, rest=rest)
    assert trt.flags() == flags


def test_a_precision_that_a_version_lacks_is_named(use: Any, tmp_path: Path) -> None:
    use(StandIn("tensorrt 8.6.1"))
    assert ask(tmp_path, precision="bf16")["failure"] == {
        "kind": "unsupported",
        "message": "TensorRT 8.6.1 has no BF16",
    }
    assert not (tmp_path / "model.engine").exists()


@pytest.mark.parametrize("version", [name for name in VERSIONS if name.startswith("tensorrt ")])
def test_compatible_engines_timing_cache_and_dla(version: str, use: Any, tmp_path: Path) -> None:
    trt = use(StandIn(version, dla_cores=2))
    (tmp_path / "timing.cache").write_bytes(b"before")
    wanted = {"version_compatible": True, "hardware_compatible": True, "dla": 1, "timing_cache": "timing.cache"}
    assert ask(tmp_path, **wanted)["built"]["loaded"] is True
    assert {"VERSION_COMPATIBLE", "GPU_FALLBACK"} <= trt.flags()
    assert trt.config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert (trt.config.DLA_core, trt.config.default_device_type) == (1, trt.DeviceType.DLA)
    trt.config.create_timing_cache.assert_called_once_with(b"before")
    assert (tmp_path / "timing.cache").read_bytes() == b"timed"
    assert trt.runtime.engine_host_code_allowed is True


def test_a_timing_cache_of_another_gpu_is_left_alone_and_an_empty_one_begun(use: Any, tmp_path: Path) -> None:
    trt = use(StandIn("tensorrt 10.3.0"))
    (tmp_path / "timing.cache").write_bytes(b"other")
    trt.config.set_timing_cache.side_effect = [False, True]
    assert "built" in ask(tmp_path, timing_cache="timing.cache")
    assert [call.args[0] for call in trt.config.create_timing_cache.call_args_list] == [b"other", b""]


def test_a_dla_that_is_not_there_is_refused(use: Any, tmp_path: Path) -> None:
    use(StandIn("tensorrt 10.3.0", dla_cores=0))
    assert ask(tmp_path, dla=0)["failure"] == {"kind": "unsupported", "message": "this machine has 0 DLA cores"}


def test_a_dynamic_input_needs_a_profile_that_fits(use: Any, tmp_path: Path) -> None:
    trt = use(StandIn("tensorrt 11.4.0.106", image_shape=(-1, 3, -1, -1)))
    assert ask(tmp_path)["failure"]["kind"] == "shape"
    shapes = [[1, 3, 64, 64], [2, 3, 96, 96], [4, 3, 128, 128]]
    assert "built" in ask(tmp_path, profiles={"images": shapes})
    trt.profile.set_shape.assert_called_once_with("images", *map(tuple, shapes))
    trt.config.add_optimization_profile.return_value = -1
    assert "does not fit" in ask(tmp_path, profiles={"images": shapes})["failure"]["message"]


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("Error Code 2: OutOfMemory (no further information)", "memory"),
        ("Cuda Runtime (cudaError 2: out of memory)", "memory"),
        ("Error Code 10: Could not find any implementation for node /model.0/conv/Conv.", "build"),
    ],
)
def test_a_build_that_fails_says_why(said: str, kind: str, use: Any, tmp_path: Path) -> None:
    trt = use(StandIn("tensorrt 10.3.0"))

    def fail(*_: Any) -> None:
        trt.logger.log(trt.ILogger.Severity.ERROR, said)

    trt.builder.build_serialized_network.side_effect = fail
    assert ask(tmp_path)["failure"] == {"kind": kind, "message": said}
    assert said in (tmp_path / trt_builder.LOG).read_text()
    assert not (tmp_path / "model.engine").exists()


@pytest.mark.parametrize(
    ("version", "named"), [("tensorrt 8.6.1", "node 3"), ("tensorrt 10.3.0", "node /model.0/odd (NonZero)")]
)
def test_a_graph_that_the_parser_refuses_says_why(version: str, named: str, use: Any, tmp_path: Path) -> None:
    trt = use(StandIn(version))
    error = instance(version, "ParserError")
    error.desc.return_value, error.node.return_value = "UNSUPPORTED_NODE:\n no importer", 3
    if "10" in version:
        error.node_name.return_value, error.node_operator.return_value = "/model.0/odd", "NonZero"
    trt.parser.parse_from_file.return_value = False
    trt.parser.num_errors = 1
    trt.parser.get_error.return_value = error
    message = f"{named}: UNSUPPORTED_NODE: no importer"
    assert ask(tmp_path)["failure"] == {"kind": "parse", "message": message}


def test_without_a_gpu_tensorrt_has_no_builder(use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = use(StandIn("tensorrt 11.4.0.106"), NO_GPU)

    def refuse(_: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, "Builder", refuse)
    failure = ask(tmp_path)["failure"]
    assert failure == {"kind": "gpu", "message": "TensorRT 11.4.0.106 finds no NVIDIA GPU and driver"}


@pytest.mark.parametrize(("version", "fails"), [("tensorrt 10.3.0", True), ("tensorrt_rtx 1.7.1.116", False)])
def test_only_an_rtx_engine_may_be_for_another_gpu(version: str, fails: bool, use: Any, tmp_path: Path) -> None:
    trt = use(StandIn(version))
    trt.runtime.deserialize_cuda_engine.return_value = None
    result = ask(tmp_path)
    if fails:
        message = "the engine cannot be loaded where it was built"
        assert result["failure"] == {"kind": "build", "message": message}
    else:
        assert result["built"]["loaded"] is False


def test_what_an_engine_was_loaded_as_is_what_is_reported(use: Any, tmp_path: Path) -> None:
    trt = use(StandIn("tensorrt 11.4.0.106"))
    (layer,) = ask(tmp_path)["built"]["layers"]
    assert (layer["name"], layer["precision"], layer["outputs"]) == ("conv", "fp16", ["fp32"])
    trt.runtime.deserialize_cuda_engine.assert_called_once_with(b"engine")


def test_a_full_disk_is_a_disk_failure(use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    use(StandIn("tensorrt 10.3.0"))
    write = trt_builder._write

    def fail(path: Path, content: Any) -> None:
        if path.name == "model.engine":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(trt_builder, "_write", fail)
    assert ask(tmp_path)["failure"]["kind"] == "disk"


def test_missing_tensorrt_is_named_for_each_flavour(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in trt_builder.FLAVOURS:
        monkeypatch.setitem(sys.modules, name, None)
    failure = ask(tmp_path, action="probe")["failure"]
    assert failure["kind"] == "missing"
    assert failure["message"].startswith("tensorrt: ")
    assert "; tensorrt_rtx: " in failure["message"]


def test_layers_of_every_format_that_inspectors_write() -> None:
    text = """Layers:
Name: a, LayerType: runtime_fusion, Inputs: [ { Name: x, Dimensions: [1,3], Datatype: Half, Format: (NHWC) }], \
Constants: [ { Name: w, Datatype: Float, Format: (Linear) }], Outputs: [ { Name: y, Datatype: Half }], Metadata: [FP32]
Name: conv, LayerType: CaskConvolution, Inputs: [ { Name: x, Dimensions: [1,32,8,8], Format/Datatype: \
Thirty-two wide channel vectorized row major Int8 format }], Outputs: [ { Name: y, Format/Datatype: \
Row major linear FP32 }], ParameterType: Convolution
Name: cut, LayerType: kgen, Inputs: [ { Name: x, Datatype: BFloat16 }, { Name: i, Datatype: Int32 }], \
Outputs: [ { Name: y, Datatype: BFloat16 }], Metadata: [ONNX Layer: /model.2/Split]
Name: wait^4, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: t
Bindings:
images
"""
    assert trt_builder.read_layers(text) == [
        {"name": "a", "type": "runtime_fusion", "inputs": ["fp16", "fp32"], "outputs": ["fp16"], "precision": "fp16"},
        {"name": "conv", "type": "CaskConvolution", "inputs": ["int8"], "outputs": ["fp32"], "precision": "int8"},
        {"name": "cut", "type": "kgen", "inputs": ["bf16", "int32"], "outputs": ["bf16"], "precision": "bf16"},
        {"name": "wait^4", "type": "wait", "inputs": [], "outputs": [], "precision": None},
    ]


@pytest.mark.parametrize(
    ("flavour", "version", "strong"),
    [
        ("tensorrt", "8.5.2.2", False),
        ("tensorrt", "10.3.0", False),
        ("tensorrt", "10.9.0.34", False),
        ("tensorrt", "10.12.0.36", True),
        ("tensorrt", "11.4.0.106", True),
        ("tensorrt_rtx", "1.7.1.116", True),
    ],
)
def test_typing_follows_the_version(flavour: str, version: str, strong: bool) -> None:
    assert trt_builder.is_strongly_typed(flavour, version) is strong


def test_a_jetson_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/etc/nv_tegra_release": "# R36 (release), REVISION: 4.0, GCID: 1, BOARD: generic\nmore\n",
        "/var/lib/dpkg/status": "Package: a\nVersion: 1\n\nPackage: nvidia-jetpack\nStatus: ok\nVersion: 6.1+b123\n\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda self, **_: files[str(self)])
    assert (trt_builder._l4t(), trt_builder._jetpack()) == ("36.4.0", "6.1+b123")


def test_the_script_is_python_3_8_and_needs_nothing_else() -> None:
    source = Path(trt_builder.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
    later = {"removeprefix", "removesuffix", "is_relative_to", "pairwise", "bit_count"}
    assert not later & {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
