from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from benchmark.runners import onnxruntime_runner, torch_runner
from compress.checkpoint import CheckpointError, build_model, save_model


def test_both_runtimes_return_the_same_tensor(checkpoint: Path, onnx_file: Path, image: np.ndarray) -> None:
    expected = torch_runner.infer(torch_runner.load(str(checkpoint), 1), image)
    actual = onnxruntime_runner.infer(onnxruntime_runner.load(str(onnx_file), 1), image)
    assert [output.shape for output in expected] == [output.shape for output in actual] == [(1, 7, 84)]
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-4, atol=1e-3)


def test_the_torch_runner_computes_what_the_unfused_model_computes(checkpoint: Path, image: np.ndarray) -> None:
    from compress.checkpoint import load_model

    with torch.no_grad():
        expected = load_model(checkpoint)(torch.from_numpy(image))[0].numpy()
    actual = torch_runner.infer(torch_runner.load(str(checkpoint), 1), image)[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)


def test_the_deployed_network_is_fused_and_takes_any_batch(checkpoint: Path, image: np.ndarray) -> None:
    session = torch_runner.load(str(checkpoint), 1)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in session.network.modules())
    assert torch_runner.infer(session, np.repeat(image, 3, axis=0))[0].shape == (3, 7, 84)


def test_torch_describes_itself(checkpoint: Path) -> None:
    facts = torch_runner.describe(torch_runner.load(str(checkpoint), 2))
    assert torch.get_num_threads() == 2
    assert (facts["runtime"], facts["version"], facts["threads"]) == ("torch", torch.__version__, 2)
    assert (facts["classes"], facts["end2end"], facts["input_shape"]) == (3, False, None)


def test_onnxruntime_describes_itself(onnx_file: Path) -> None:
    facts = onnxruntime_runner.describe(onnxruntime_runner.load(str(onnx_file), 2))
    assert facts == {
        "runtime": "onnxruntime",
        "version": onnxruntime.__version__,
        "threads": 2,
        "precision": "fp32",
        "providers": ["CPUExecutionProvider"],
        "memory_format": None,
        "input_shape": [1, 3, 64, 64],
        "task": "detect",
        "classes": 3,
        "keypoints": None,
        "end2end": False,
        "suppression": None,
    }


@pytest.mark.parametrize("names", ["not a literal (", "-" * 100_000 + "1"], ids=["no literal", "nested too deep"])
def test_what_a_foreign_file_does_not_tell_is_null(names: str, onnx_file: Path, tmp_path: Path) -> None:
    import onnx

    graph = onnx.load(onnx_file)
    del graph.metadata_props[:]
    graph.metadata_props.add(key="names", value=names)
    onnx.save(graph, tmp_path / "foreign.onnx")
    facts = onnxruntime_runner.describe(onnxruntime_runner.load(str(tmp_path / "foreign.onnx"), 1))
    assert (facts["classes"], facts["precision"], facts["end2end"]) == (None, None, False)


def test_sides_that_the_stride_does_not_divide_are_named(checkpoint: Path) -> None:
    session = torch_runner.load(str(checkpoint), 1)
    with pytest.raises(ValueError, match="takes images whose sides are multiples of 32 px, got 80×64"):
        torch_runner.infer(session, np.zeros((1, 3, 64, 80), np.float32))


def test_inputs_in_fp16_are_named(onnx_file: Path, tmp_path: Path) -> None:
    import onnx

    graph = onnx.load(onnx_file)
    images = graph.graph.input[0]
    cast = onnx.helper.make_node("Cast", [images.name], ["fp32"], to=onnx.TensorProto.FLOAT)
    for node in graph.graph.node:
        node.input[:] = ["fp32" if name == images.name else name for name in node.input]
    graph.graph.node.insert(0, cast)
    images.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(graph, tmp_path / "half.onnx")
    with pytest.raises(ValueError, match=r"half\.onnx takes images as tensor\(float16\), not tensor\(float\)"):
        onnxruntime_runner.load(str(tmp_path / "half.onnx"), 1)


def test_a_file_that_is_no_onnx_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.onnx").write_text("not a graph")
    with pytest.raises(ValueError, match=r"notes\.onnx cannot be opened by onnxruntime"):
        onnxruntime_runner.load(str(tmp_path / "notes.onnx"), 1)


def test_a_graph_without_one_image_input_is_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "vector", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "vector.onnx")
    with pytest.raises(ValueError, match=r"must have one input of shape \(n, 3, height, width\)"):
        onnxruntime_runner.load(str(tmp_path / "vector.onnx"), 1)


def test_models_of_unknown_heads_do_not_run(world: Path) -> None:
    with pytest.raises(CheckpointError, match="WorldDetect head"):
        torch_runner.load(str(world), 1)


def test_a_segmenter_has_two_outputs_and_says_so(tmp_path: Path, image: np.ndarray) -> None:
    save_model(build_model("yolov8n-seg.yaml", nc=3), tmp_path / "seg.pt", {})
    session = torch_runner.load(str(tmp_path / "seg.pt"), 1)
    assert [output.shape for output in torch_runner.infer(session, image)] == [(1, 39, 84), (1, 32, 16, 16)]
    assert (torch_runner.describe(session)["task"], torch_runner.describe(session)["classes"]) == ("segment", 3)


def test_a_pose_model_tells_its_key_points(tmp_path: Path) -> None:
    save_model(build_model("yolov8n-pose.yaml", nc=1), tmp_path / "pose.pt", {})
    assert torch_runner.describe(torch_runner.load(str(tmp_path / "pose.pt"), 1))["keypoints"] == [17, 3]
