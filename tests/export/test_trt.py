"""TensorRT export: with the real parser and builder of TensorRT-RTX, which need no GPU, and a stand-in for devices."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from compress import manifest
from compress.checkpoint import build_model, save_model
from compress.errors import EspalierError, ExportError, ParityError, SettingsError
from compress.settings import Export, ExportTrt, parse
from export import qdq, trt, trt_builder, trt_onnx, trt_target
from export.onnx import export_onnx
from export.trt_target import Local, Ssh

IMGSZ = 64
DEVICE = {
    "flavour": "tensorrt",
    "version": "10.3.0",
    "strongly_typed": False,
    "python": "3.10.12",
    "machine": "aarch64",
    "cuda": "12.6",
    "gpu": "Orin",
    "compute_capability": "8.7",
    "gpu_memory_bytes": 8 << 30,
    "l4t": "36.4.0",
    "jetpack": "6.1",
    "free_bytes": 1 << 30,
}


@pytest.fixture(scope="session")
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install tensorrt-rtx")


@pytest.fixture(scope="module")
def dynamic(detector: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dynamic(detector, tmp_path_factory.mktemp("dynamic") / "dynamic.onnx")


def write_dynamic(model: Path, path: Path) -> Path:
    """Write the ONNX file of a checkpoint with dynamic batch and size."""
    from benchmark.runners.torch_runner import inference_network

    network: Any = inference_network(str(model))
    network.model[-1].dynamic = True
    stream = io.BytesIO()
    axes = {"images": {0: "batch", 2: "height", 3: "width"}, "output0": {0: "batch", 2: "anchors"}}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images: Any = (torch.zeros(1, 3, IMGSZ, IMGSZ),)
        torch.onnx.export(
            network,
            images,
            stream,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=17,
            input_names=["images"],
            output_names=["output0"],
            dynamic_axes=axes,
        )
    path.write_bytes(stream.getvalue())
    return path


def write_quantized(path: Path, output: Path) -> Path:
    """Write the Q/DQ graph of an ONNX file, as if all its tensors were between -4 and 4."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData

    loaded, ends = qdq.load(path), (np.float32(-4), np.float32(4))
    names = ["images", *(name for node in loaded.graph.node for name in node.output)]
    ranges = TensorsData(CalibrationMethod.MinMax, dict.fromkeys(names, ends))
    made = qdq.quantize(loaded, ranges, qdq.SCHEMES["tensorrt"], list(qdq.layers_of(loaded)))
    output.write_bytes(made.SerializeToString())
    return output


def settings(**changes: Any) -> ExportTrt:
    return ExportTrt(**changes)


# --- the real builder ------------------------------------------------------------------------------------------------


@pytest.fixture
def in_process(rtx: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the real builder work in this process, which saves its start."""

    def run(target: trt_target.Target, job: Path) -> Any:
        return subprocess.CompletedProcess([], trt_builder.main(job / trt_builder.REQUEST), "", "")

    monkeypatch.setattr(trt_target, "_run_here", run)


@pytest.mark.parametrize("cfg", ["yolov5n.yaml", "yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml", "yolov10n.yaml"])
def test_every_family_is_built_by_the_real_builder(cfg: str, in_process: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_model(build_model(cfg, nc=3).eval(), tmp_path / "m.pt", {"task": "detect"})
    source = export_onnx(tmp_path / "m.pt", tmp_path / "m.onnx", imgsz=IMGSZ, settings=Export(simplify=False))
    (output,) = onnx.load(source).graph.output
    shape = [part.dim_value for part in output.type.tensor_type.shape.dim]
    convolutions = len(qdq.layers_of(onnx.load(source)))
    facts = trt.probe(Local(), "tensorrt_rtx")
    for precision, onnx_file in (("fp16", source), ("int8", write_quantized(source, tmp_path / "q.onnx"))):
        wanted = settings(precision=precision)
        made = tmp_path / f"{precision}.onnx"
        trt_onnx.make_onnx(onnx_file, made, wanted, facts["strongly_typed"], None, None)
        record = trt.build(made, tmp_path / f"{precision}.engine", wanted, Local(), facts)
        assert record["inputs"] == [{"name": "images", "shape": [1, 3, IMGSZ, IMGSZ], "dtype": "fp32"}]
        assert record["outputs"] == [{"name": "output0", "shape": shape, "dtype": "fp32"}]
        # Some convolutions share a fused layer with another.
        assert record["precisions"][precision] >= convolutions // 2


def test_a_pruned_model_is_built_and_is_smaller(in_process: None, tmp_path: Path) -> None:
    from compress.planning import plan_pruning
    from compress.pruning.surgery import apply_plan
    from compress.settings import Prune

    model = build_model("yolov8n.yaml", nc=3)
    planned = plan_pruning(model, Prune(percent=0.5, importance="random"), IMGSZ)
    save_model(model.eval(), tmp_path / "dense.pt", {"task": "detect"})
    save_model(apply_plan(planned.model, planned.plan), tmp_path / "pruned.pt", {})
    records = {}
    for name in ("dense", "pruned"):
        source = export_onnx(
            tmp_path / f"{name}.pt", tmp_path / f"{name}.onnx", imgsz=IMGSZ, settings=Export(simplify=False)
        )
        records[name] = trt.export_stage(source, settings(), Local(), tmp_path / name)
    assert records["pruned"]["engine_bytes"] < 0.7 * records["dense"]["engine_bytes"]
    assert records["pruned"]["outputs"] == records["dense"]["outputs"]
    assert records["pruned"]["precisions"]["fp16"] > 50


@pytest.mark.parametrize(
    ("precision", "counted", "absent"),
    [("fp32", "fp32", "fp16"), ("tf32", "fp32", "fp16"), ("fp16", "fp16", "bf16"), ("bf16", "bf16", "fp16")],
)
def test_layers_get_the_precision_that_was_asked_for(
    precision: str, counted: str, absent: str, onnx_file: Path, rtx: None, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    record = trt.export_stage(onnx_file, settings(precision=precision), Local(), output)
    assert max(record["precisions"], key=record["precisions"].get) == counted
    assert absent not in record["precisions"]
    assert json.loads((output / "tiny.engine.json").read_text()) == record
    assert record["engine_sha256"] == manifest.sha256_file(output / "tiny.engine")
    assert record["onnx_sha256"] == manifest.sha256_file(output / "tiny.onnx")
    assert record["model_sha256"] == manifest.sha256_file(onnx_file)
    layers = json.loads((output / "tiny.layers.json").read_text())
    assert sum(layer["precision"] == counted for layer in layers) == record["precisions"][counted]
    assert {path.name for path in output.iterdir()} == {
        *(f"tiny{ending}" for ending in (".engine", ".engine.json", ".layers.json", ".build.log", ".onnx")),
        manifest.MANIFEST,
    }


def test_what_int8_leaves_over_can_be_fp16(detector: Path, rtx: None, tmp_path: Path) -> None:
    dense = export_onnx(detector, tmp_path / "tiny.onnx", imgsz=IMGSZ, settings=Export(opset=19, simplify=False))
    quantized = write_quantized(dense, tmp_path / "q.onnx")
    record = trt.export_stage(quantized, settings(precision="int8", rest="fp16"), Local(), tmp_path / "out")
    assert record["precisions"]["int8"] > record["precisions"]["fp16"] > record["precisions"].get("fp32", 0)


def test_a_dynamic_graph_is_built_for_a_range(dynamic: Path, rtx: None, tmp_path: Path) -> None:
    wanted = settings(batch="1:2:4", imgsz="64:96:128")
    record = trt.export_stage(dynamic, wanted, Local(), tmp_path / "out")
    assert record["profiles"] == {"images": [[1, 3, 64, 64], [2, 3, 96, 96], [4, 3, 128, 128]]}
    assert record["inputs"][0]["shape"] == [-1, 3, -1, -1]
    assert record["precisions"]["fp16"] > 50


def test_a_graph_that_tensorrt_cannot_build_leaves_a_log_and_no_engine(rtx: None, tmp_path: Path) -> None:
    node = helper.make_node("NoSuchLayer", ["images"], ["output0"], name="odd", domain="nowhere")
    shape = [1, 3, 8, 8]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("images", "output0")]
    made = helper.make_model(
        helper.make_graph([node], "odd", ends[:1], ends[1:]),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("nowhere", 1)],
        ir_version=8,
    )
    onnx.save(made, tmp_path / "odd.onnx")
    with pytest.raises(
        ExportError, match=r"TensorRT cannot read the ONNX file on this machine \(node odd \(NoSuchLayer\): "
    ):
        trt.export_stage(tmp_path / "odd.onnx", settings(precision="fp32"), Local(), tmp_path / "out")
    assert (tmp_path / "out" / "odd.build.log").read_text() != ""
    assert not list((tmp_path / "out").glob("*.engine*"))


def test_the_runner_says_why_an_engine_does_not_fit_here(onnx_file: Path, rtx: None, tmp_path: Path) -> None:
    from benchmark.runners import tensorrt_runner

    trt.export_stage(onnx_file, settings(), Local(), tmp_path / "out")
    engine = tmp_path / "out" / "tiny.engine"
    sidecar = tensorrt_runner.read_sidecar(engine)
    assert tensorrt_runner.reasons_against(sidecar, sidecar["facts"]) == []
    if sidecar["facts"]["gpu"] is None:
        with pytest.raises(ValueError, match="needs an NVIDIA GPU and its driver"):
            tensorrt_runner.load(str(engine), 1)


# --- a device that is not here ---------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Stand for a target: what it is can be changed, and every request that it got is kept."""
    requests: list[dict[str, Any]] = []
    facts = dict(DEVICE)

    def run(target: trt_target.Target, job: Path) -> dict[str, Any]:
        request = json.loads((job / trt_builder.REQUEST).read_text())
        requests.append(request)
        if request["action"] == "probe":
            return {"facts": facts}
        request["job"] = {path.name: path.read_bytes() for path in job.iterdir()}
        (job / request["engine"]).write_bytes(b"engine")
        (job / trt_builder.LOG).write_text("log")
        if request["timing_cache"]:
            (job / request["timing_cache"]).write_bytes(b"timed")
        layer = {"name": "a", "type": "conv", "inputs": ["fp16"], "outputs": ["fp16"], "precision": "fp16"}
        tensor = {"name": "images", "shape": [1, 3, IMGSZ, IMGSZ], "dtype": "fp32"}
        built = {
            "seconds": 1.0,
            "bytes": 6,
            "loaded": True,
            "network_layers": 3,
            "inputs": [tensor],
            "outputs": [tensor],
            "layers": [layer, {**layer, "precision": None}],
        }
        return {"facts": facts, "built": built}

    def change(**changes: Any) -> list[dict[str, Any]]:
        facts.update(changes)
        return requests

    monkeypatch.setattr(trt_target, "run", run)
    return change


def test_a_weakly_typed_target_gets_fp32_and_the_nodes_that_stay_so(
    device: Any, onnx_file: Path, tmp_path: Path
) -> None:
    record = trt.export_stage(onnx_file, settings(), Ssh("jetson"), tmp_path / "out", cache=tmp_path / "cache")
    request = device()[-1]
    sent = onnx.load_model_from_string(request["job"]["model.onnx"])
    assert {item.data_type for item in sent.graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}
    assert set(request["float_nodes"]) == qdq.behind_layers(sent)
    assert request["float_nodes"]
    assert record["facts"]["jetpack"] == "6.1"
    assert record["precisions"] == {"fp16": 1}
    assert trt.summary(record) == "tensorrt 10.3.0, Orin, fp16; layers by precision: 1 fp16; loaded and inspected"


def test_a_strongly_typed_target_gets_the_types_in_the_file(device: Any, onnx_file: Path, tmp_path: Path) -> None:
    device(version="11.4.0", strongly_typed=True)
    trt.export_stage(onnx_file, settings(), Ssh("jetson"), tmp_path / "out")
    request = device()[-1]
    sent = onnx.load_model_from_string(request["job"]["model.onnx"])
    assert TensorProto.FLOAT16 in {item.data_type for item in sent.graph.initializer}
    assert request["float_nodes"] == []


def test_a_timing_cache_is_kept_for_each_version_and_gpu(device: Any, onnx_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    trt.export_stage(onnx_file, settings(), Ssh("jetson"), tmp_path / "a", cache=cache)
    assert "timing.cache" not in device()[-1]["job"]
    trt.export_stage(onnx_file, settings(precision="fp32"), Ssh("jetson"), tmp_path / "b", cache=cache)
    assert device()[-1]["job"]["timing.cache"] == b"timed"
    device(gpu="NVIDIA RTX 4090", compute_capability="8.9")
    trt.export_stage(onnx_file, settings(), Ssh("jetson"), tmp_path / "c", cache=cache)
    assert "timing.cache" not in device()[-1]["job"]
    assert sorted(path.name for path in cache.iterdir()) == [
        "10.3.0-NVIDIA-RTX-4090-8.9.timing",
        "10.3.0-Orin-8.7.timing",
    ]


@pytest.mark.parametrize("args", ["[1]", "5", "-" * 100_000 + "1", "{'nms': True, 'conf': 0.5}"])
def test_what_a_stranger_wrote_into_an_onnx_file_is_no_reason_to_fail(
    args: str, device: Any, onnx_file: Path, tmp_path: Path
) -> None:
    graph = onnx.load(onnx_file)
    for entry in graph.metadata_props:
        entry.value = args if entry.key == "args" else entry.value
    onnx.save(graph, tmp_path / "odd.onnx")
    record = trt.export_stage(tmp_path / "odd.onnx", settings(), Ssh("jetson"), tmp_path / "out")
    expected = {"conf": 0.5, "iou": None, "max_det": None} if "nms" in args else None
    assert (record["suppression"], record["names"]) == (expected, {"0": "circle", "1": "square", "2": "star"})


def test_an_unchanged_engine_is_kept_and_a_stale_one_built_again(
    device: Any, onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    first = trt.export_stage(onnx_file, settings(), Ssh("jetson"), output)
    assert trt.export_stage(onnx_file, settings(), Ssh("jetson"), output) == first
    assert "finished before, unchanged" in capsys.readouterr().out
    builds = [request for request in device() if request["action"] == "build"]
    assert len(builds) == 1
    device(version="10.7.0", jetpack="6.2")
    again = trt.export_stage(onnx_file, settings(), Ssh("jetson"), output)
    said = capsys.readouterr().out
    assert "tiny.engine is stale, it is built again: version was 10.3.0, now it is 10.7.0" in said
    assert "jetpack was 6.1, now it is 6.2" in said
    assert again["facts"]["version"] == "10.7.0"
    (output / "tiny.engine").write_bytes(b"other")
    trt.export_stage(onnx_file, settings(), Ssh("jetson"), output)
    assert "a file of it is missing or has changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "wanted", "message"),
    [
        ({"version": "8.2.1"}, {}, "TensorRT 8.2.1 is too old: 8.5"),
        ({"version": "8.5.2"}, {"version_compatible": True}, "TensorRT 8.5.2 builds no compatible engines, 8.6 does"),
        ({"version": "8.6.2"}, {"precision": "bf16"}, "TensorRT 8.6.2 has no bf16, 10.0 has: use --precision fp16"),
        ({"version": "8.6.2"}, {"precision": "int8", "dla": 0}, "TensorRT 8.6.2 runs no Q/DQ nodes on a DLA"),
        ({"flavour": "tensorrt_rtx"}, {"hardware_compatible": True}, "TensorRT-RTX has no such option"),
        ({"flavour": "tensorrt_rtx"}, {"dla": 0}, "TensorRT-RTX has no DLA"),
    ],
)
def test_what_a_version_cannot_do_is_refused_before_anything_is_made(
    changes: dict[str, Any], wanted: dict[str, Any], message: str, device: Any, onnx_file: Path, tmp_path: Path
) -> None:
    device(**changes)
    with pytest.raises(ExportError, match=message):
        trt.export_stage(onnx_file, settings(**wanted), Ssh("jetson"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dla_takes_fixed_shapes_only(device: Any, dynamic: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="a DLA runs fixed shapes only"):
        trt.export_stage(dynamic, settings(dla=0, batch="1:2:4", imgsz="64"), Ssh("jetson"), tmp_path / "out")
    trt.export_stage(dynamic, settings(dla=0, batch="2", imgsz="64"), Ssh("jetson"), tmp_path / "fixed")
    assert device()[-1]["profiles"] == {"images": [[2, 3, 64, 64]] * 3}


def test_a_build_that_fails_leaves_the_log_alone(
    device: Any, onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = trt_target.run

    def fail(target: trt_target.Target, job: Path) -> dict[str, Any]:
        if json.loads((job / trt_builder.REQUEST).read_text())["action"] == "probe":
            return known(target, job)
        (job / trt_builder.LOG).write_text("what TensorRT said")
        (job / "model.engine").write_bytes(b"half of it")
        raise ExportError("out of memory")

    monkeypatch.setattr(trt_target, "run", fail)
    with pytest.raises(ExportError, match="out of memory"):
        trt.export_stage(onnx_file, settings(), Ssh("jetson"), tmp_path / "out")
    assert (tmp_path / "out" / "tiny.build.log").read_text() == "what TensorRT said"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tiny.build.log", "tiny.onnx", manifest.STARTED}


@pytest.mark.parametrize(("precision", "judged"), [("fp16", "fp16"), ("bf16", "int8")])
def test_a_checkpoint_is_proven_before_it_is_built(
    precision: str, judged: str, device: Any, detector: Path, data: Path, tmp_path: Path
) -> None:
    device(strongly_typed=True, version="11.4.0")
    wanted = settings(precision=precision, imgsz=str(IMGSZ), parity_images=2)
    record = trt.export_stage(detector, wanted, Ssh("jetson"), tmp_path / "out", data=data)
    assert record["parity"]["passed"] is True
    assert record["parity"]["precision"] == judged
    assert record["engine_parity"] is None  # it runs elsewhere
    assert record["names"] == {"0": "circle", "1": "square", "2": "star"}


def test_an_engine_that_can_run_here_is_compared_with_pytorch(
    device: Any, detector: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import parity

    compare, engines = parity.compare, []

    def stand_in(model: Path, artefact: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        if artefact.suffix != ".engine":
            return compare(model, artefact, *arguments, **options)
        assert artefact.with_name(artefact.name + ".json").is_file()
        engines.append(options["precision"])
        record = compare(model, tmp_path / "out" / "tiny.onnx", *arguments, **options)
        return {**record, "passed": len(engines) == 1}

    monkeypatch.setattr(parity, "compare", stand_in)
    wanted = settings(precision="tf32", imgsz=str(IMGSZ), parity_images=1)
    record = trt.export_stage(detector, wanted, Local(), tmp_path / "out", data=data)
    assert record["engine_parity"]["passed"] is True
    assert engines == ["fp16"]
    device(version="10.4.0")
    with pytest.raises(ExportError, match=r"tiny.engine does not equal PyTorch on .*; kept as tiny.rejected.engine"):
        trt.export_stage(detector, wanted, Local(), tmp_path / "out", data=data)
    assert (tmp_path / "out" / "tiny.rejected.engine").read_bytes() == b"engine"
    assert not (tmp_path / "out" / "tiny.engine").exists()


@pytest.mark.parametrize(("strongly_typed", "opset"), [(True, 19), (False, 17)])
def test_a_checkpoint_is_quantized_for_tensorrt(
    strongly_typed: bool, opset: int, device: Any, detector: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from export import quantize

    def export_int8(model: Path, output: Path, *arguments: Any) -> dict[str, Any]:
        *_, imgsz, wanted = arguments
        assert (wanted.target, wanted.opset, imgsz) == ("tensorrt", opset, IMGSZ)
        dense = export_onnx(
            model, tmp_path / "dense.onnx", imgsz=imgsz, settings=Export(opset=wanted.opset, simplify=False)
        )
        write_quantized(dense, output)
        return {"passed": True, "precision": "int8"}

    monkeypatch.setattr(quantize, "export_int8", export_int8)
    device(strongly_typed=strongly_typed)
    wanted = settings(precision="int8", rest="fp16", imgsz=str(IMGSZ), parity_images=1)
    monkeypatch.setattr(trt_onnx, "_prove_half", lambda *_: {"passed": True, "precision": "int8, then fp16"})
    record = trt.export_stage(detector, wanted, Ssh("jetson"), tmp_path / "out", data=data)
    assert record["parity"]["precision"] == ("int8, then fp16" if strongly_typed else "int8")
    sent = onnx.load_model_from_string(device()[-1]["job"]["model.onnx"])
    half = TensorProto.FLOAT16 in {item.data_type for item in sent.graph.initializer}
    assert half is strongly_typed


def test_a_quantization_that_fails_names_the_command_that_has_its_options(
    device: Any, detector: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import quantize

    def fail(*_: object) -> None:
        raise ParityError("0.3 is needed: raise --map-budget")

    monkeypatch.setattr(quantize, "export_int8", fail)
    message = r"raise --map-budget \(export\.quantize --target tensorrt has these options"
    with pytest.raises(ParityError, match=message):
        trt.export_stage(
            detector, settings(precision="int8", imgsz=str(IMGSZ)), Ssh("jetson"), tmp_path / "out", data=data
        )


def test_what_a_killed_start_left_is_cleared(device: Any, onnx_file: Path, tmp_path: Path) -> None:
    trt_onnx.make_onnx(onnx_file, tmp_path / "m.onnx", settings(), True, None, None)
    (tmp_path / ".job.old").mkdir()
    (tmp_path / ".job.old" / "model.engine").write_bytes(b"half")
    trt.build(tmp_path / "m.onnx", tmp_path / "m.engine", settings(), Ssh("jetson"), DEVICE)
    assert not (tmp_path / ".job.old").exists()


def test_a_pipeline_that_measures_tensorrt_needs_a_gpu_and_builds_engines(
    device: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress import run
    from compress.settings import load_run
    from export import onnx as exporter

    pipeline = load_run(root / "configs/pipelines/demo.yaml", ["benchmark.runtimes=[torch, tensorrt]"])
    device(gpu=None)
    with pytest.raises(SettingsError, match="names tensorrt, but this machine has no NVIDIA GPU"):
        run._check_tensorrt(pipeline.trt)
    device(gpu="Orin")
    run._check_tensorrt(pipeline.trt)
    built = {}

    def export_stage(model: Path, wanted: ExportTrt, target: Any, output: Path, **options: Any) -> dict[str, Any]:
        built[options["name"]] = (model, wanted.imgsz, target, output)
        return {"engine_parity": {"passed": True}}

    monkeypatch.setattr(exporter, "export_stage", lambda *_: {"dense": {}})
    monkeypatch.setattr(trt, "export_stage", export_stage)
    records = run.export({"dense": tmp_path / "model.pt"}, tmp_path / "data.yaml", pipeline, tmp_path)
    assert records == {"dense": {}, "dense, tensorrt": {"passed": True}}
    place = tmp_path / "trt" / "dense"
    assert built == {"dense": (tmp_path / "model.pt", str(pipeline.imgsz), Local(), place)}


# --- input -----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_onnx_is_named(onnx_file: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(onnx_file.read_bytes()[:100_000])
    (tmp_path / "text.onnx").write_text("not a model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    # A field of text that is none: protobuf decodes it, and Python then cannot.
    (tmp_path / "torn.onnx").write_bytes(onnx_file.read_bytes().replace(b"Sigmoid", b"\xffigmoid"))
    for name in ("cut", "text", "empty", "torn"):
        with pytest.raises(ExportError, match=rf"{name}\.onnx is not an ONNX file, or is damaged .*: export it again"):
            trt_onnx.load_onnx(tmp_path / f"{name}.onnx")
    with pytest.raises(ExportError, match="does not exist"):
        trt_onnx.load_onnx(tmp_path / "none.onnx")
    onnx.save(onnx.load(onnx_file), tmp_path / "far.onnx", save_as_external_data=True, location="weights")
    with pytest.raises(ExportError, match="keeps its weights in other files: save it as one file"):
        trt_onnx.load_onnx(tmp_path / "far.onnx")


@pytest.mark.parametrize("name", ["", "node"])
def test_nodes_without_a_name_of_their_own_compute_as_those_with_one(
    name: str, onnx_file: Path, tmp_path: Path
) -> None:
    graph = onnx.load(onnx_file)
    for node in graph.graph.node:
        node.name = name
    onnx.save(graph, tmp_path / "unnamed.onnx")
    for source, made in ((onnx_file, "a.onnx"), (tmp_path / "unnamed.onnx", "b.onnx")):
        trt_onnx.make_onnx(source, tmp_path / made, settings(), True, None, None)
    first, second = ([node.op_type for node in onnx.load(tmp_path / made).graph.node] for made in ("a.onnx", "b.onnx"))
    assert first == second
    assert first.count("Cast") == 7  # of what decodes the head, which stays in fp32, and the image


@pytest.mark.parametrize(
    ("batch", "imgsz", "message"),
    [
        (None, None, "has a dynamic batch: give --batch N or --batch MIN:OPT:MAX"),
        ("1", None, "has a dynamic imgsz: give --imgsz"),
        ("4:2:1", "64", r"--batch must be a number or MIN:OPT:MAX in rising order, got '4:2:1'"),
        ("1:2", "64", "--batch must be a number or MIN:OPT:MAX"),
        ("0", "64", "--batch must be a number"),
        ("1", "64:x:128", "--imgsz must be a number"),
    ],
)
def test_a_dynamic_graph_needs_its_ranges(batch: str | None, imgsz: str | None, message: str, dynamic: Path) -> None:
    with pytest.raises(ExportError, match=message):
        trt_onnx.profiles_of("d.onnx", onnx.load(dynamic), batch, imgsz)


def test_a_dynamic_graph_of_a_known_stride_takes_its_multiples(dynamic: Path) -> None:
    graph = onnx.load(dynamic)
    assert trt_onnx.profiles_of("d.onnx", graph, "1", "64:70:128")["images"][1] == [1, 3, 70, 70]
    graph.metadata_props.add(key="stride", value="32")
    with pytest.raises(SettingsError, match="imgsz 70 must be a multiple of the model's stride 32: use 64"):
        trt_onnx.profiles_of("d.onnx", graph, "1", "64:70:128")
    assert trt_onnx.profiles_of("d.onnx", graph, "1", "64:96:128")["images"][1] == [1, 3, 96, 96]


def test_a_static_graph_takes_its_own_shape_only(onnx_file: Path) -> None:
    loaded = onnx.load(onnx_file)
    assert trt_onnx.profiles_of("s.onnx", loaded, None, None) == {}
    assert trt_onnx.profiles_of("s.onnx", loaded, "1", str(IMGSZ)) == {}
    with pytest.raises(ExportError, match=rf"s.onnx was exported for imgsz {IMGSZ}, --imgsz is 640: leave it out"):
        trt_onnx.profiles_of("s.onnx", loaded, None, "640")
    with pytest.raises(ExportError, match=r"s.onnx was exported for batch 1, --batch is 1:2:4"):
        trt_onnx.profiles_of("s.onnx", loaded, "1:2:4", None)


def test_types_that_contradict_the_precision_are_named(onnx_file: Path, tmp_path: Path) -> None:
    def make(source: Path, **wanted: Any) -> None:
        trt_onnx.check_precision(source, trt_onnx.load_onnx(source), settings(**wanted))
        trt_onnx.make_onnx(source, tmp_path / "made.onnx", settings(**wanted), True, None, None)

    with pytest.raises(ExportError, match=r"has no Q/DQ nodes, which int8 needs: make it with export.quantize"):
        make(onnx_file, precision="int8")
    quantized = write_quantized(onnx_file, tmp_path / "q.onnx")
    with pytest.raises(ExportError, match=r"q.onnx is quantized: use --precision int8"):
        make(quantized, precision="fp16")
    with pytest.raises(ExportError, match="16-bit scales of Q/DQ nodes need opset 19, the graph has 17"):
        make(quantized, precision="int8", rest="fp16")
    make(onnx_file, precision="bf16")
    (tmp_path / "made.onnx").rename(tmp_path / "half.onnx")
    with pytest.raises(ExportError, match=r"half.onnx has bf16 weights: use --precision bf16, or give the fp32 file"):
        make(tmp_path / "half.onnx", precision="fp16")
    make(tmp_path / "half.onnx", precision="bf16")
    assert (tmp_path / "made.onnx").read_bytes() == (tmp_path / "half.onnx").read_bytes()


def test_checkpoints_and_other_files(device: Any, detector: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"--data is missing: real images prove the ONNX file of tiny.pt"):
        trt.export_stage(detector, settings(), Ssh("jetson"), tmp_path / "out")
    for shape, dynamic in (
        ({"imgsz": "64:96:128"}, "size"),
        ({"batch": "4"}, "batch"),
        ({"imgsz": "64:96:128", "batch": "1:2:4"}, "both"),
    ):
        with pytest.raises(ExportError, match=rf"for others give the .onnx file that export.onnx --dynamic {dynamic}"):
            trt.export_stage(detector, settings(**shape), Ssh("jetson"), tmp_path / "out", data=data)
    with pytest.raises(ExportError, match=r"must be a checkpoint \(.pt\) or an ONNX file"):
        trt.export_stage(data, settings(), Ssh("jetson"), tmp_path / "out")


def test_an_engine_of_a_file_in_its_own_folder_is_refused_and_moves_nothing(
    device: Any, onnx_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    trt.export_stage(onnx_file, settings(), Ssh("jetson"), output)
    with pytest.raises(ExportError, match=r"tiny\.onnx lies in --output, .*: choose another --output"):
        trt.export_stage(output / "tiny.onnx", settings(workspace=64), Ssh("jetson"), output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_mistakes_leave_what_is_there(
    device: Any, onnx_file: Path, dynamic: Path, detector: Path, world: Path, data: Path, tmp_path: Path
) -> None:
    """What was built earlier is not moved aside by a start that cannot begin."""
    output = tmp_path / "out"
    trt.export_stage(onnx_file, settings(), Ssh("jetson"), output)
    before = {path: path.read_bytes() for path in output.iterdir()}
    other = tmp_path / "other.yaml"
    other.write_text(data.read_text("utf-8").replace("names:", f"path: {data.parent}\nnames: {{0: a}}\nold:"), "utf-8")
    for model, changes, message in (
        (detector, {"imgsz": "70"}, "imgsz 70 must be a multiple of the model's stride 32: use 64"),
        (detector, {"batch": "4"}, "a checkpoint is exported for batch 1"),
        (world, {}, "has a WorldDetect head"),
        (detector, {"precision": "int8"}, "predicts 3 classes, "),
        (dynamic, {"imgsz": "128:96:64", "batch": "1"}, "--imgsz must be a number or MIN:OPT:MAX in rising order"),
        (dynamic, {"imgsz": "64:96:128", "batch": "1", "dla": 0}, "a DLA runs fixed shapes only"),
        (onnx_file, {"precision": "int8"}, "has no Q/DQ nodes, which int8 needs"),
    ):
        with pytest.raises(EspalierError, match=message):
            trt.export_stage(model, settings(**changes), Ssh("jetson"), output, data=other)
        assert {path: path.read_bytes() for path in output.iterdir()} == before
    assert not (tmp_path / "out.1").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"precision": "fp16", "rest": "fp16"}, "rest goes with precision int8 only, precision is fp16"),
        ({"precision": "fp32", "dla": 0}, "a DLA computes in fp16 or int8 only, precision is fp32"),
        ({"workspace": 0}, "workspace"),
        ({"precision": "int4"}, "precision"),
    ],
)
def test_settings_that_contradict_each_other_are_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(ExportTrt, content, "trt")


def test_the_script_for_a_version_builds_nothing(onnx_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    path = trt.write_script(onnx_file, settings(), trt._facts_of("auto", "8.6.1"), output)
    text = path.read_text()
    assert "--onnx=tiny.onnx" in text
    assert "--saveEngine=tiny.engine" in text
    assert "--fp16" in text
    assert path.stat().st_mode & 0o111
    assert {item.name for item in output.iterdir()} == {"tiny.onnx", "tiny.trtexec.sh"}
    with pytest.raises(ExportError, match=r"lies in --output"):
        trt.write_script(output / "tiny.onnx", settings(), trt._facts_of("auto", "8.6.1"), output)
    assert trt.write_script(onnx_file, settings(), trt._facts_of("auto", "10.3"), output) == path
    path.unlink()  # as an engine's own folder has none
    with pytest.raises(ExportError, match=r"tiny\.onnx is there, and no earlier --script wrote it: choose another"):
        trt.write_script(onnx_file, settings(), trt._facts_of("auto", "10.3"), output)
    with pytest.raises(ExportError, match=r"--trt-version must be a version such as 10.3, got 'new'"):
        trt._facts_of("auto", "new")


def test_the_command_says_what_does_not_go_together(onnx_file: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    arguments = ["--model", str(onnx_file), "--output", str(tmp_path / "out"), "--trt-version", "10.3"]
    result = CliRunner().invoke(trt.app, arguments)
    assert str(result.exception) == (
        "--trt-version goes with --script: an engine is built by the version that the target has"
    )
    result = CliRunner().invoke(trt.app, [*arguments, "--script", "--calibration", "shapes"])
    assert str(result.exception) == "--calibration goes with --precision int8, precision is fp16"
    as_it_is = "goes with a checkpoint, tiny.onnx is built as it is: leave it out"
    for words, message in (
        (["--data", "shapes"], f"--data {as_it_is}"),
        (["--calibration", "shapes", "--precision", "int8"], f"--calibration {as_it_is}"),
        (["--opset", "13"], f"--opset {as_it_is}"),
        (["--parity-images", "3"], f"--parity-images {as_it_is}"),
        (["--python", "python3"], "--trt-version stands for asking the target: leave out --target and --python"),
        (["--target", "ssh://a"], "--trt-version stands for asking the target: leave out --target and --python"),
        (
            ["--cache", "a"],
            "--cache goes with a build, a script keeps its cache beside the engine: leave it out",
        ),
    ):
        assert str(CliRunner().invoke(trt.app, [*arguments, "--script", *words]).exception) == message
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(trt.app, [*arguments, "--script", "--precision", "bf16"]).exit_code == 0
    assert "--bf16" in (tmp_path / "out" / "tiny.trtexec.sh").read_text()


def test_images_without_labels_prove_what_is_not_quantized(detector: Path, data: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    folder = tmp_path / "unlabelled"
    shutil.copytree(data.parent / "images", folder / "images")
    shutil.copyfile(data, folder / "data.yaml")
    arguments = ["--model", detector, "--data", folder / "data.yaml", "--imgsz", IMGSZ, "--output", tmp_path / "out"]
    words = [*map(str, arguments), "--script", "--trt-version", "10.3"]
    assert CliRunner().invoke(trt.app, words).exit_code == 0
    assert (tmp_path / "out" / "tiny.trtexec.sh").is_file()
    result = CliRunner().invoke(trt.app, [*words, "--precision", "int8"])
    assert "none of its 3 images has a labelled object" in str(result.exception)
