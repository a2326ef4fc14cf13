"""Layers of the original YOLOv5 and YOLOv7 repositories, one after another, as rows of a model YAML with their weights.

Nothing is guessed from shapes: each kind of layer has a rule that says which rows compute the same, and connections are
those that the checkpoint's layers name. A kind without a rule is an error that names it.

Sources: models/common.py of https://github.com/ultralytics/yolov5 (v5.0 to v7.0) and
https://github.com/WongKinYiu/yolov7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.conversion.foreign import StandIn, TensorRef
from compress.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Weights = dict[str, TensorRef]
HEADS = ("Detect", "IDetect", "IAuxDetect")
_DEEPEST = 16  # modules within modules; YOLOv5's deepest weight is five down
_RENAMED = {  # names of a YOLOv7 RepConv, and those of Ultralytics'
    "rbr_dense.0.": "conv1.conv.",
    "rbr_dense.1.": "conv1.bn.",
    "rbr_1x1.0.": "conv2.conv.",
    "rbr_1x1.1.": "conv2.bn.",
    "rbr_identity.": "bn.",
}


@dataclass
class Row:
    """One row of a model YAML.

    Attributes:
        sources: the rows that it reads, -1 for the image.
        origin: the layer that it comes from, in words.
        layer: index of that layer.
        weights: by the names that the row's module gives them.
        eps: epsilon of each batch norm, by its name.
        spread: its convolution was one on space-to-depth, and its weight has to go through `spread`.
    """

    sources: list[int]
    kind: str
    args: list[Any]
    origin: str
    layer: int
    repeats: int = 1
    weights: Weights = field(default_factory=dict)
    eps: dict[str, float] = field(default_factory=dict)
    spread: bool = False

    def spelled(self, index: int) -> list[Any]:
        """Return the row as a model YAML spells it; the row before is -1."""
        sources = [-1 if source == index - 1 else source for source in self.sources]
        return [sources if self.kind in ("Concat", "Detect") else sources[0], self.repeats, self.kind, self.args]


@dataclass
class Translation:
    """A network as rows; the last is the new head. `unused` layers feed only the auxiliary heads of a training."""

    rows: list[Row]
    activation: str
    unused: list[str]
    backbone: int


def modules(module: StandIn) -> dict[str, Any]:
    """Return a module's children that are there, by name."""
    children = module.state.get("_modules")
    return {k: v for k, v in children.items() if v is not None} if isinstance(children, dict) else {}


def kind_of(module: Any) -> str:
    """Return the last part of a class's name."""
    return module.kind.rpartition(".")[2] if isinstance(module, StandIn) else type(module).__name__


def weights_of(module: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, StandIn, Weights]]:
    """Yield (dotted name, module, its own tensors) of a module and all below it.

    Raises:
        CheckpointError: modules nest without an end.
    """
    if not isinstance(module, StandIn):
        raise CheckpointError(f"'{name}' of a layer is no module but {kind_of(module)}")
    if depth > _DEEPEST:
        raise CheckpointError(f"modules of the checkpoint nest more than {_DEEPEST} deep at '{name}'")
    tensors: Weights = {}
    for group in ("_parameters", "_buffers"):
        content = module.state.get(group)
        if isinstance(content, dict):
            tensors |= {str(key): value for key, value in content.items() if isinstance(value, TensorRef)}
    yield name, module, tensors
    for child, inner in modules(module).items():
        yield from weights_of(inner, f"{name}.{child}" if name else str(child), depth + 1)


def translate(layers: list[StandIn], backbone: int) -> Translation:
    """Translate the layers of a network up to its head.

    Args:
        layers: the modules of the original `model.model`, the head last.
        backbone: how many of them its YAML counts as backbone.

    Raises:
        CheckpointError: a layer without a rule, a fused layer, or a connection to nowhere; each is named.
    """
    return _Translator(layers).run(backbone)


def spread(weight: Tensor) -> Tensor:
    """Return the weight, on the image itself, of a convolution on space-to-depth: (o, 4c, k, k) to (o, c, 2k, 2k).

    Both repositories order the four groups of channels alike: pixels at (0, 0), (1, 0), (0, 1), (1, 1) of each 2 × 2.
    """
    out, channels, k, _ = weight.shape
    parts = weight.reshape(out, 2, 2, channels // 4, k, k)  # out, column, row, channel, kernel rows, kernel columns
    return parts.permute(0, 3, 4, 2, 5, 1).reshape(out, channels // 4, 2 * k, 2 * k)


class _Translator:
    def __init__(self, layers: list[StandIn]) -> None:
        self.layers = layers
        self.rows: list[Row] = []
        self.row_of: dict[int, int] = {-1: -1}  # the row that holds a layer's output; layer -1 is the image
        self.reorganised: dict[int, int] = {}  # a ReOrg, and the layer that it reads
        self.pools: dict[int, list[tuple[int, int]]] = {}  # by the layer that stride-1 pools read: (kernel, row)
        self.activations: dict[str, str] = {}  # and the first layer that has it

    def run(self, backbone: int) -> Translation:
        head = self.layers[-1]
        if kind_of(head) not in HEADS:
            raise CheckpointError(
                f"its last layer is {kind_of(head)}, not {', '.join(HEADS)}: only detectors of YOLOv5 and YOLOv7 with "
                "an anchor head can be converted"
            )
        inputs = self.sources(len(self.layers) - 1)
        if kind_of(head) == "IAuxDetect":  # its second half feeds the auxiliary heads of the training
            inputs = inputs[: len(inputs) // 2]
        needed = self.ancestors(inputs)
        for index in sorted(needed):
            self.translate(index)
        edge = max(1, sum(row.layer < backbone for row in self.rows))  # Ultralytics looks at its first row
        sources = [self.output(index, len(self.layers) - 1) for index in inputs]
        self.rows.append(Row(sources, "Detect", ["nc"], self.place(len(self.layers) - 1), len(self.layers) - 1))
        unused = [self.place(index) for index in range(len(self.layers) - 1) if index not in needed]
        return Translation(self.rows, self.activation(), unused, edge)

    def place(self, index: int) -> str:
        return f"layer {index} ({kind_of(self.layers[index])})"

    def sources(self, index: int) -> list[int]:
        """Return the layers that a layer reads; -1 for the image."""
        named = self.layers[index].state.get("f")
        listed: list[Any] = named if isinstance(named, list) else [named]
        if not listed or any(type(source) is not int or not -max(index, 1) <= source < index for source in listed):
            raise CheckpointError(f"{self.place(index)} reads {named}, which is no layer before it")
        return [source if source >= 0 else index + source for source in listed]

    def ancestors(self, ends: list[int]) -> set[int]:
        found, waiting = set(), [index for index in ends if index >= 0]
        while waiting:
            index = waiting.pop()
            if index not in found:
                found.add(index)
                waiting += [source for source in self.sources(index) if source >= 0]
        return found

    def output(self, index: int, reader: int) -> int:
        if index in self.reorganised:
            raise CheckpointError(f"{self.place(reader)} reads a ReOrg, which only a Conv can")
        return self.row_of[index]

    def translate(self, index: int) -> None:
        layer = self.layers[index]
        rule = _RULES.get(kind_of(layer))
        if rule is None:
            raise CheckpointError(
                f"{self.place(index)} is of a kind that has no rule ({layer.kind}): convertible are "
                f"{', '.join(sorted(_RULES))}"
            )
        self.refuse_fused(layer, index)
        try:
            rule(self, layer, index)
        except (KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{self.place(index)} lacks a part that its kind has ({error})") from None
        if index not in self.reorganised:
            self.row_of[index] = len(self.rows) - 1

    def refuse_fused(self, layer: StandIn, index: int) -> None:
        for name, module, _ in weights_of(layer):
            if (kind_of(module) in ("Conv", "DWConv") and "bn" not in modules(module)) or (
                kind_of(module) == "RepConv" and "rbr_reparam" in modules(module)
            ):
                where = f"{self.place(index)}{f' at {name}' if name else ''}"
                raise CheckpointError(
                    f"{where} is fused for inference: without batch norm it can be neither trained nor pruned well; "
                    "convert the checkpoint that the training left"
                )

    def add(self, sources: list[int], kind: str, args: list[Any], index: int, module: Any = None) -> int:
        """Append a row that takes over the weights of `module`, and return its index."""
        row = Row(sources, kind, args, self.place(index), index)
        for name, inner, tensors in weights_of(module) if module is not None else ():
            path = f"{name}." if name else ""
            row.weights |= {f"{path}{key}": ref for key, ref in tensors.items()}
            if kind_of(inner) == "BatchNorm2d":
                row.eps[path] = _number(inner, "eps", float, self.place(index))
            if kind_of(inner) in ("Conv", "DWConv"):
                self.note_activation(inner, index)
        self.rows.append(row)
        return len(self.rows) - 1

    def note_activation(self, conv: StandIn, index: int) -> None:
        act = modules(conv).get("act")
        kind = kind_of(act)
        if act is None or kind not in ("SiLU", "LeakyReLU", "ReLU", "Hardswish"):
            raise CheckpointError(f"{self.place(index)} has the activation {kind if act is not None else None}")
        slope = f"{_number(act, 'negative_slope', float, self.place(index))}" if kind == "LeakyReLU" else ""
        self.activations.setdefault(f"torch.nn.{kind}({slope})", self.place(index))

    def activation(self) -> str:
        """Return the one activation of all layers."""
        if len(self.activations) != 1:
            found = ", ".join(f"{kind} in {place}" for kind, place in self.activations.items())
            raise CheckpointError(f"its layers must have one activation, they have: {found or 'none'}")
        return next(iter(self.activations))

    def read(self, index: int, count: int = 1) -> list[int]:
        """Return the rows that a layer with `count` inputs reads."""
        sources = self.sources(index)
        if len(sources) != count:
            raise CheckpointError(f"{self.place(index)} reads {len(sources)} layers instead of {count}")
        return [self.output(source, index) for source in sources]

    def conv(self, layer: StandIn, sources: list[int], index: int) -> int:
        return self.add(sources, "Conv", self.conv_args(layer, index), index, layer)

    def focus(self, conv: StandIn, source: int, index: int) -> None:
        """Append the one convolution that equals space-to-depth and a convolution."""
        channels, kernel, stride, *more = self.conv_args(conv, index)
        padding, groups, dilation = [*more, *[kernel // 2, 1, 1][len(more) :]]
        if (groups, dilation) != (1, 1):
            raise CheckpointError(f"{self.place(index)} has a grouped or dilated convolution on space-to-depth")
        inputs = _weight(modules(conv)["conv"], self.place(index)).size[1]
        if inputs % 4:
            raise CheckpointError(f"{self.place(index)} reads {inputs} channels of space-to-depth, no multiple of 4")
        row = self.add([source], "Conv", [channels, 2 * kernel, 2 * stride, 2 * padding], index, conv)
        self.rows[row].spread = True

    def conv_args(self, layer: StandIn, index: int) -> list[Any]:
        """Return the arguments of a Conv: channels, kernel, stride, and what differs from the defaults."""
        place = self.place(index)
        inner = modules(layer).get("conv")
        shape = _weight(inner, place).size
        if len(shape) != 4 or shape[2] != shape[3]:
            raise CheckpointError(f"{place} has a convolution of shape {list(shape)}: only square kernels are known")
        stride, padding, dilation = (_square(inner, name, place) for name in ("stride", "padding", "dilation"))
        groups = _number(inner, "groups", int, place)
        args = [shape[0], shape[2], stride]
        more = [padding, groups, dilation]
        usual = [(dilation * (shape[2] - 1) + 1) // 2, 1, 1]
        while more and more[-1] == usual[len(more) - 1]:
            more.pop()
        return args + more


def _conv(t: _Translator, layer: StandIn, index: int) -> None:
    source = t.sources(index)[0]
    if source in t.reorganised:
        t.focus(layer, t.output(t.reorganised[source], index), index)
    else:
        t.conv(layer, t.read(index), index)


def _reorg(t: _Translator, _: StandIn, index: int) -> None:
    t.read(index)
    t.reorganised[index] = t.sources(index)[0]


def _focus(t: _Translator, layer: StandIn, index: int) -> None:
    t.focus(modules(layer)["conv"], t.read(index)[0], index)


def _c3(t: _Translator, layer: StandIn, index: int) -> None:
    place, parts = t.place(index), modules(layer)
    blocks = list(modules(parts["m"]).values())
    kinds = sorted({kind_of(block) for block in blocks})
    if kinds != ["Bottleneck"]:
        raise CheckpointError(f"{place} holds {', '.join(kinds) or 'nothing'}, not Bottleneck")
    adds = {block.state.get("add") for block in blocks}
    if len(adds) != 1 or type(add := adds.pop()) is not bool:
        raise CheckpointError(f"{place} has bottlenecks with and without a shortcut")
    width = _weight(modules(parts["cv3"]).get("conv"), place).size[0]
    row = t.add(t.read(index), "C3", [width] if add else [width, False], index, layer)
    t.rows[row].repeats = len(blocks)


def _sppf(t: _Translator, layer: StandIn, index: int) -> None:
    place, parts = t.place(index), modules(layer)
    kernel = _square(parts["m"], "kernel_size", place)
    t.add(t.read(index), "SPPF", [_weight(modules(parts["cv2"]).get("conv"), place).size[0], kernel], index, layer)


def _spp(t: _Translator, layer: StandIn, index: int) -> None:
    place, parts = t.place(index), modules(layer)
    kernels = [_square(pool, "kernel_size", place) for pool in modules(parts["m"]).values()]
    t.add(t.read(index), "SPP", [_weight(modules(parts["cv2"]).get("conv"), place).size[0], kernels], index, layer)


def _sppcspc(t: _Translator, layer: StandIn, index: int) -> None:
    parts, source = modules(layer), t.read(index)
    kernels = [_square(pool, "kernel_size", t.place(index)) for pool in modules(parts["m"]).values()]
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


def _down_c(t: _Translator, layer: StandIn, index: int) -> None:
    place, parts, source = t.place(index), modules(layer), t.read(index)
    row = t.conv(parts["cv2"], [t.conv(parts["cv1"], source, index)], index)
    pool = [_square(parts["mp"], name, place) for name in ("kernel_size", "stride")]
    side = t.conv(parts["cv3"], [t.add(source, "nn.MaxPool2d", pool, index)], index)
    t.add([row, side], "Concat", [1], index)


def _pool(t: _Translator, layer: StandIn, index: int) -> None:
    place, source = t.place(index), t.read(index)
    pool = layer if kind_of(layer) == "MaxPool2d" else modules(layer)["m"]
    kernel, stride, padding = (_square(pool, name, place) for name in ("kernel_size", "stride", "padding"))
    if stride != 1 or padding != kernel // 2:
        t.add(source, "nn.MaxPool2d", [kernel, stride, *([padding] if padding else [])], index)
        return
    # As in _sppcspc: a larger pool goes on from a smaller one of the same input.
    rows = t.pools.setdefault(source[0], [])
    before, start = max((entry for entry in rows if entry[0] < kernel), default=(1, source[0]))
    size = kernel - before + 1
    rows.append((kernel, t.add([start], "nn.MaxPool2d", [size, 1, size // 2], index)))


def _concat(t: _Translator, layer: StandIn, index: int) -> None:
    if layer.state.get("d") != 1:
        raise CheckpointError(f"{t.place(index)} joins along dimension {layer.state.get('d')}, not along channels")
    t.add(t.read(index, len(t.sources(index))), "Concat", [1], index)


def _upsample(t: _Translator, layer: StandIn, index: int) -> None:
    scale, mode = layer.state.get("scale_factor"), layer.state.get("mode")
    if scale not in (2, 2.0) or mode != "nearest" or layer.state.get("size") is not None:
        raise CheckpointError(f"{t.place(index)} scales by {scale} in mode {mode}: only by 2, nearest, is known")
    t.add(t.read(index), "nn.Upsample", [None, 2, "nearest"], index)


def _rep_conv(t: _Translator, layer: StandIn, index: int) -> None:
    place, parts = t.place(index), modules(layer)
    shape = _weight(modules(parts["rbr_dense"]).get("0"), place).size
    convolution = modules(parts["rbr_dense"])["0"]
    stride, groups = _square(convolution, "stride", place), _number(convolution, "groups", int, place)
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


_RULES: dict[str, Callable[[_Translator, StandIn, int], None]] = {
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


def _weight(convolution: Any, place: str) -> TensorRef:
    found = convolution.state.get("_parameters", {}).get("weight") if isinstance(convolution, StandIn) else None
    if not isinstance(found, TensorRef):
        raise CheckpointError(f"{place} has no convolution with weights")
    return found


def _number(module: Any, name: str, kind: type, place: str) -> Any:
    value = module.state.get(name) if isinstance(module, StandIn) else None
    if type(value) is not kind:
        raise CheckpointError(f"{place}: '{name}' must be {kind.__name__}, it is {value!r}")
    return value


def _square(module: Any, name: str, place: str) -> int:
    value = module.state.get(name) if isinstance(module, StandIn) else None
    value = value[0] if isinstance(value, (tuple, list)) and len(set(map(str, value))) == 1 else value
    if type(value) is not int:
        raise CheckpointError(f"{place}: '{name}' must be one whole number for both directions, it is {value!r}")
    return value
