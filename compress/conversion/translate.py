"""Layers of the original YOLOv5 and YOLOv7 repositories, one after another, as rows of a model YAML with their weights.

Nothing is guessed from shapes: each kind of layer has a rule that says which rows compute the same, and connections are
those that the checkpoint's layers name. A kind without a rule is an error that names it.

Sources: models/common.py of https://github.com/ultralytics/yolov5 (v5.0 to v7.0) and
https://github.com/WongKinYiu/yolov7.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.conversion.foreign import StandIn
from compress.conversion.layers import RULES
from compress.conversion.reading import Weights, kind_of, modules, number_of, square_of, weight_of, weights_of
from compress.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

HEADS = ("Detect", "IDetect", "IAuxDetect")


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


def translate(layers: list[StandIn], backbone: int) -> Translation:
    """Translate the layers of a network up to its head.

    Args:
        layers: the modules of the original `model.model`, the head last.
        backbone: how many of them its YAML counts as backbone.

    Raises:
        CheckpointError: a layer without a rule, a fused layer, or a connection to nowhere; each is named.
    """
    return Translator(layers).run(backbone)


def spread(weight: Tensor) -> Tensor:
    """Return the weight, on the image itself, of a convolution on space-to-depth: (o, 4c, k, k) to (o, c, 2k, 2k).

    Both repositories order the four groups of channels alike: pixels at (0, 0), (1, 0), (0, 1), (1, 1) of each 2 × 2.
    """
    out, channels, k, _ = weight.shape
    parts = weight.reshape(out, 2, 2, channels // 4, k, k)  # out, column, row, channel, kernel rows, kernel columns
    return parts.permute(0, 3, 4, 2, 5, 1).reshape(out, channels // 4, 2 * k, 2 * k)


class Translator:
    """The rows so far, and how the layers of the original connect; the rules of `layers` add to them."""

    def __init__(self, layers: list[StandIn]) -> None:
        self.layers = layers
        self.rows: list[Row] = []
        self.row_of: dict[int, int] = {-1: -1}  # the row that holds a layer's output; layer -1 is the image
        self.reorganised: dict[int, int] = {}  # a ReOrg, and the layer that it reads
        self.pools: dict[int, list[tuple[int, int]]] = {}  # by the layer that stride-1 pools read: (kernel, row)
        self.activations: dict[str, str] = {}  # and the first layer that has it

    def run(self, backbone: int) -> Translation:
        """Translate all layers that the head needs, see `translate`."""
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
        """Return what messages call a layer."""
        return f"layer {index} ({kind_of(self.layers[index])})"

    def sources(self, index: int) -> list[int]:
        """Return the layers that a layer reads; -1 for the image."""
        named = self.layers[index].state.get("f")
        listed: list[Any] = named if isinstance(named, list) else [named]
        if not listed or any(type(source) is not int or not -max(index, 1) <= source < index for source in listed):
            raise CheckpointError(f"{self.place(index)} reads {named}, which is no layer before it")
        return [source if source >= 0 else index + source for source in listed]

    def ancestors(self, ends: list[int]) -> set[int]:
        """Return these layers and all that they read, and so on."""
        found, waiting = set(), [index for index in ends if index >= 0]
        while waiting:
            index = waiting.pop()
            if index not in found:
                found.add(index)
                waiting += [source for source in self.sources(index) if source >= 0]
        return found

    def output(self, index: int, reader: int) -> int:
        """Return the row that holds the output of a layer, which another one reads."""
        if index in self.reorganised:
            raise CheckpointError(f"{self.place(reader)} reads a ReOrg, which only a Conv can")
        return self.row_of[index]

    def translate(self, index: int) -> None:
        """Append the rows of a layer."""
        layer = self.layers[index]
        rule = RULES.get(kind_of(layer))
        if rule is None:
            raise CheckpointError(
                f"{self.place(index)} is of a kind that has no rule ({layer.kind}): convertible are "
                f"{', '.join(sorted(RULES))}"
            )
        self.refuse_fused(layer, index)
        try:
            rule(self, layer, index)
        except (KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{self.place(index)} lacks a part that its kind has ({error})") from None
        if index not in self.reorganised:
            self.row_of[index] = len(self.rows) - 1

    def refuse_fused(self, layer: StandIn, index: int) -> None:
        """Raise an error for a layer whose batch norms are folded into its convolutions."""
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
                row.eps[path] = number_of(inner, "eps", float, self.place(index))
            if kind_of(inner) in ("Conv", "DWConv"):
                self.note_activation(inner, index)
        self.rows.append(row)
        return len(self.rows) - 1

    def note_activation(self, conv: StandIn, index: int) -> None:
        """Keep the activation of a convolution, of which a network may have one only."""
        act = modules(conv).get("act")
        kind = kind_of(act)
        if act is None or kind not in ("SiLU", "LeakyReLU", "ReLU", "Hardswish"):
            raise CheckpointError(f"{self.place(index)} has the activation {kind if act is not None else None}")
        slope = f"{number_of(act, 'negative_slope', float, self.place(index))}" if kind == "LeakyReLU" else ""
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
        """Append a Conv that reads these rows, and return its index."""
        return self.add(sources, "Conv", self.conv_args(layer, index), index, layer)

    def focus(self, conv: StandIn, source: int, index: int) -> None:
        """Append the one convolution that equals space-to-depth and a convolution."""
        channels, kernel, stride, *more = self.conv_args(conv, index)
        padding, groups, dilation = [*more, *[kernel // 2, 1, 1][len(more) :]]
        if (groups, dilation) != (1, 1):
            raise CheckpointError(f"{self.place(index)} has a grouped or dilated convolution on space-to-depth")
        inputs = weight_of(modules(conv)["conv"], self.place(index)).size[1]
        if inputs % 4:
            raise CheckpointError(f"{self.place(index)} reads {inputs} channels of space-to-depth, no multiple of 4")
        row = self.add([source], "Conv", [channels, 2 * kernel, 2 * stride, 2 * padding], index, conv)
        self.rows[row].spread = True

    def conv_args(self, layer: StandIn, index: int) -> list[Any]:
        """Return the arguments of a Conv: channels, kernel, stride, and what differs from the defaults."""
        place = self.place(index)
        inner = modules(layer).get("conv")
        shape = weight_of(inner, place).size
        if len(shape) != 4 or shape[2] != shape[3]:
            raise CheckpointError(f"{place} has a convolution of shape {list(shape)}: only square kernels are known")
        stride, padding, dilation = (square_of(inner, name, place) for name in ("stride", "padding", "dilation"))
        groups = number_of(inner, "groups", int, place)
        args = [shape[0], shape[2], stride]
        more = [padding, groups, dilation]
        usual = [(dilation * (shape[2] - 1) + 1) // 2, 1, 1]
        while more and more[-1] == usual[len(more) - 1]:
            more.pop()
        return args + more
