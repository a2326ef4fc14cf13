"""Whether 8-bit products add up on this CPU.

x86 CPUs without VNNI multiply unsigned activations by signed weights in pairs, and hold the sum of two products in 16
bits (instruction VPMADDUBSW): 2 · 255 · 127 does not fit. Weights of 7 bits always do.
"""

from __future__ import annotations

import numpy as np

_CHANNELS = 64


def saturates() -> bool:
    """Tell whether onnxruntime gets a sum of 8-bit products wrong on this CPU, by asking for one that is known."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    images = np.full((1, _CHANNELS, 4, 4), 255, np.uint8)
    constants = {
        "scale": np.array(1, np.float32),
        "zero": np.array(0, np.uint8),
        "weights": np.full((_CHANNELS, _CHANNELS, 1, 1), 127, np.int8),
        "weights_zero": np.array(0, np.int8),
        "step": np.array(255 * 127 * _CHANNELS / 200, np.float32),
    }
    inputs = ["images", "scale", "zero", "weights", "scale", "weights_zero", "step", "zero"]
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", inputs, ["sums"])],
        "saturation",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, images.shape)],
        [helper.make_tensor_value_info("sums", TensorProto.UINT8, images.shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return bool((np.asarray(session.run(None, {"images": images})[0]) != 200).any())
