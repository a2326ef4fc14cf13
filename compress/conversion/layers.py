"""Which rows of a model YAML compute the same as each kind of layer of the original YOLOv5 and YOLOv7 repositories.

A rule receives the translation and a layer, and appends the layer's rows. A kind without a rule is an error that names
it. Sources: see `translate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from compress.conversion.foreign import StandIn
from compress.conversion.reading import kind_of, modules, number_of, square_of, weight_of
from compress.errors import CheckpointError

if TYPE_CHECKING:
    from compress.conversion.translate import Translator

_RENAMED = {  # names of a YOLOv7 RepConv, and those of Ultralytics'
    "rbr_dense.0.": "conv1.conv.",
    "rbr_dense.1.": "conv1.bn.",
    "rbr_1x1.0.": "conv2.conv.",
    "rbr_1x1.1.": "conv2.bn.",
    "rbr_identity.": "bn.",
}


def _conv(t: Translator, layer: StandIn, index: int) -> None:
    source = t.sources(index)[0]
    if source in t.reorganised:
        t.focus(layer, t.output(t.reorganised[source], index), index)
    else:
        t.conv(layer, t.read(index), index)


def _reorg(t: Translator, _: StandIn, index: int) -> None:
    t.read(index)
    t.reorganised[index] = t.sources(index)[0]


def _focus(t: Translator, layer: StandIn, index: int) -> None:
    t.focus(modules(layer)["conv"], t.read(index)[0], index)


def _c3(t: Translator, layer: StandIn, index: int) -> None:
    place, parts = t.place(index), modules(layer)
    blocks = list(modules(parts["m"]).values())
    kinds = sorted({kind_of(block) for block in blocks})
    if kinds != ["Bottleneck"]:
        raise CheckpointError(f"{place} holds {', '.join(kinds) or 'nothing'}, not Bottleneck")
    adds = {block.state.get("add") for block in blocks}
    if len(adds) != 1 or type(add := adds.pop()) is not bool:
        raise CheckpointError(f"{place} has bottlenecks with and without a shortcut")
    width = weight_of(modules(parts["cv3"]).get("conv"), place).size[0]
    row = t.add(t.read(index), "C3", [width] if add else [width, False], index, layer)
    t.rows[row].repeats = len(blocks)


def _sppf(t: Translator, layer: StandIn, index: int) -> None:
    place, parts = t.place(index), modules(layer)
    kernel = square_of(parts["m"], "kernel_size", place)
    t.add(t.read(index), "SPPF", [weight_of(modules(parts["cv2"]).get("conv"), place).size[0], kernel], index, layer)


def _spp(t: Translator, layer: StandIn, index: int) -> None:
    place, parts = t.place(index), modules(layer)
    kernels = [square_of(pool, "kernel_size", place) for pool in modules(parts["m"]).values()]
    t.add(t.read(index), "SPP", [weight_of(modules(parts["cv2"]).get("conv"), place).size[0], kernels], index, layer)


def _sppcspc(t: Translator, layer: StandIn, index: int) -> None:
    parts, source = modules(layer), t.read(index)
    kernels = [square_of(pool, "kernel_size", t.place(index)) for pool in modules(parts["m"]).values()]
    row = t.conv(parts["cv1"], source, index)
    row = t.conv(parts["cv3"], [row], index)
    pooled = [row := t.conv(parts["cv4"], [row], index)]
    before = 1
    for kernel in kernels:
        # A maximum over 5 of maxima over 5 is one over 9: the same values, and no device refuses a pool that small.
        size = kernel - before + 1
        if size < 3 or size % 2 == 0:
            raise CheckpointError(f"{t.place(index)} has pools of {kernels}, which are not odd and rising")
        pooled.append(t.add([pooled[-1]], "nn.MaxPool2d", [size, 1, size // 2], index))
        before = kernel
    row = t.add(pooled, "Concat", [1], index)
    row = t.conv(parts["cv5"], [row], index)
    row = t.conv(parts["cv6"], [row], index)
    side = t.conv(parts["cv2"], source, index)
    t.conv(parts["cv7"], [t.add([row, side], "Concat", [1], index)], index)


def _down_c(t: Translator, layer: StandIn, index: int) -> None:
    place, parts, source = t.place(index), modules(layer), t.read(index)
    row = t.conv(parts["cv2"], [t.conv(parts["cv1"], source, index)], index)
    pool = [square_of(parts["mp"], name, place) for name in ("kernel_size", "stride")]
    side = t.conv(parts["cv3"], [t.add(source, "nn.MaxPool2d", pool, index)], index)
    t.add([row, side], "Concat", [1], index)


def _pool(t: Translator, layer: StandIn, index: int) -> None:
    place, source = t.place(index), t.read(index)
    pool = layer if kind_of(layer) == "MaxPool2d" else modules(layer)["m"]
    kernel, stride, padding = (square_of(pool, name, place) for name in ("kernel_size", "stride", "padding"))
    if stride != 1 or padding != kernel // 2:
        t.add(source, "nn.MaxPool2d", [kernel, stride, *([padding] if padding else [])], index)
        return
    # As in _sppcspc: a larger pool goes on from a smaller one of the same input.
    rows = t.pools.setdefault(source[0], [])
    before, start = max((entry for entry in rows if entry[0] < kernel), default=(1, source[0]))
    size = kernel - before + 1
    rows.append((kernel, t.add([start], "nn.MaxPool2d", [size, 1, size // 2], index)))


def _concat(t: Translator, layer: StandIn, index: int) -> None:
    if layer.state.get("d") != 1:
        raise CheckpointError(f"{t.place(index)} joins along dimension {layer.state.get('d')}, not along channels")
    t.add(t.read(index, len(t.sources(index))), "Concat", [1], index)


def _upsample(t: Translator, layer: StandIn, index: int) -> None:
    scale, mode = layer.state.get("scale_factor"), layer.state.get("mode")
    if scale not in (2, 2.0) or mode != "nearest" or layer.state.get("size") is not None:
        raise CheckpointError(f"{t.place(index)} scales by {scale} in mode {mode}: only by 2, nearest, is known")
    t.add(t.read(index), "nn.Upsample", [None, 2, "nearest"], index)


def _rep_conv(t: Translator, layer: StandIn, index: int) -> None:
    place, parts = t.place(index), modules(layer)
    shape = weight_of(modules(parts["rbr_dense"]).get("0"), place).size
    convolution = modules(parts["rbr_dense"])["0"]
    stride, groups = square_of(convolution, "stride", place), number_of(convolution, "groups", int, place)
    if kind_of(parts.get("act")) != "SiLU":
        raise CheckpointError(f"{place} has the activation {kind_of(parts.get('act'))}; Ultralytics' RepConv has SiLU")
    args = [shape[1] * groups, shape[0], shape[2], stride]
    if groups != 1 or "rbr_identity" in parts:
        args += [1, groups, 1, True, "rbr_identity" in parts]
    row = t.rows[t.add(t.read(index), "RepConv", args, index, layer)]
    row.weights = {_renamed(name): ref for name, ref in row.weights.items()}
    row.eps = {_renamed(name): eps for name, eps in row.eps.items()}
    # Ultralytics takes a RepConv's input width for its output width; this passes its input on and says the right one.
    t.add([len(t.rows) - 1], "Index", [shape[0], "()"], index)


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


RULES: dict[str, Callable[[Translator, StandIn, int], None]] = {
    "Conv": _conv,
    "DWConv": _conv,
    "Focus": _focus,
    "ReOrg": _reorg,
    "C3": _c3,
    "SPP": _spp,
    "SPPF": _sppf,
    "SPPCSPC": _sppcspc,
    "DownC": _down_c,
    "MP": _pool,
    "SP": _pool,
    "MaxPool2d": _pool,
    "Concat": _concat,
    "Upsample": _upsample,
    "RepConv": _rep_conv,
}
