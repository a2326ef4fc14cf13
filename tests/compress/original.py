"""The layers of the original YOLOv5 and YOLOv7 repositories, written out plainly: the reference for conversions.

Their classes claim the original module paths, so that checkpoints of them name what the originals name.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Rows = list[list[Any]]


class Conv(nn.Module):
    def __init__(self, cin: int, cout: int, k: int = 1, s: int = 1, p: int | None = None, g: int = 1, act: Any = None):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, k, s, k // 2 if p is None else p, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3, momentum=0.03)
        self.act = act or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        bn, weight = self.bn, self.conv.weight
        x = functional.conv2d(x, weight, None, self.conv.stride, self.conv.padding, groups=self.conv.groups)
        scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)  # type: ignore[operator]
        x = (x - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]  # type: ignore[index]
        return self.act(x)


class Bottleneck(nn.Module):
    def __init__(self, c: int, add: bool) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = Conv(c, c, 1), Conv(c, c, 3), add

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C3(nn.Module):
    def __init__(self, cin: int, cout: int, n: int = 1, add: bool = True) -> None:
        super().__init__()
        c = cout // 2
        self.cv1, self.cv2, self.cv3 = Conv(cin, c), Conv(cin, c), Conv(2 * c, cout)
        self.m = nn.Sequential(*(Bottleneck(c, add) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))


class SPP(nn.Module):
    def __init__(self, cin: int, cout: int, kernels: tuple[int, ...] = (5, 9, 13)) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(cin, cin // 2), Conv(cin // 2 * (len(kernels) + 1), cout)
        self.m = nn.ModuleList(nn.MaxPool2d(k, 1, k // 2) for k in kernels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(pool(x) for pool in self.m)], 1))


class SPPF(nn.Module):
    def __init__(self, cin: int, cout: int, k: int = 5) -> None:
        super().__init__()
        self.cv1, self.cv2, self.m = Conv(cin, cin // 2), Conv(cin * 2, cout), nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.cv1(x)
        b = self.m(a)
        c = self.m(b)
        return self.cv2(torch.cat([a, b, c, self.m(c)], 1))


class SPPCSPC(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.cv3, self.cv4 = Conv(cin, cout), Conv(cin, cout), Conv(cout, cout, 3), Conv(cout, cout)
        self.m = nn.ModuleList(nn.MaxPool2d(k, 1, k // 2) for k in (5, 9, 13))
        self.cv5, self.cv6, self.cv7 = Conv(4 * cout, cout), Conv(cout, cout, 3), Conv(2 * cout, cout)

    def forward(self, x: Tensor) -> Tensor:
        a = self.cv4(self.cv3(self.cv1(x)))
        a = self.cv6(self.cv5(torch.cat([a, *(pool(a) for pool in self.m)], 1)))
        return self.cv7(torch.cat([a, self.cv2(x)], 1))


class DownC(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.cv3 = Conv(cin, cin), Conv(cin, cout // 2, 3, 2), Conv(cin, cout // 2)
        self.mp = nn.MaxPool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.cv2(self.cv1(x)), self.cv3(self.mp(x))], 1)


def _space_to_depth(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)


class ReOrg(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _space_to_depth(x)


class Focus(nn.Module):
    def __init__(self, cin: int, cout: int, k: int = 1) -> None:
        super().__init__()
        self.conv = Conv(4 * cin, cout, k)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(_space_to_depth(x))


class MP(nn.Module):
    def __init__(self, k: int = 2) -> None:
        super().__init__()
        self.m = nn.MaxPool2d(k, k)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


class SP(nn.Module):
    def __init__(self, k: int = 3) -> None:
        super().__init__()
        self.m = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


class RepConv(nn.Module):
    def __init__(self, cin: int, cout: int, k: int = 3, s: int = 1) -> None:
        super().__init__()

        def branch(k: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(cin, cout, k, s, k // 2, bias=False), nn.BatchNorm2d(cout, eps=1e-3))

        self.act = nn.SiLU()
        self.rbr_identity = nn.BatchNorm2d(cin, eps=1e-3) if cin == cout and s == 1 else None
        self.rbr_dense, self.rbr_1x1 = branch(3), branch(1)

    def forward(self, x: Tensor) -> Tensor:
        identity = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return self.act(self.rbr_dense(x) + self.rbr_1x1(x) + identity)


class Concat(nn.Module):
    def __init__(self, d: int = 1) -> None:
        super().__init__()
        self.d = d

    def forward(self, xs: list[Tensor]) -> Tensor:
        return torch.cat(xs, self.d)


class GhostConv(nn.Module):
    """A kind that no conversion knows."""


class ImplicitA(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.zeros(1, c, 1, 1))


class ImplicitM(ImplicitA):
    pass


class Detect(nn.Module):
    def __init__(self, nc: int, channels: list[int]) -> None:
        super().__init__()
        self.nc, self.nl, self.no = nc, len(channels), nc + 5
        self.register_buffer("anchors", torch.ones(len(channels), 3, 2))
        self.m = nn.ModuleList(nn.Conv2d(c, 3 * self.no, 1) for c in channels)


class IDetect(Detect):
    def __init__(self, nc: int, channels: list[int]) -> None:
        super().__init__(nc, channels)
        self.ia = nn.ModuleList(ImplicitA(c) for c in channels)
        self.im = nn.ModuleList(ImplicitM(3 * self.no) for _ in channels)


class IAuxDetect(IDetect):
    def __init__(self, nc: int, channels: list[int]) -> None:
        main, auxiliary = channels[: len(channels) // 2], channels[len(channels) // 2 :]
        super().__init__(nc, main)
        self.m2 = nn.ModuleList(nn.Conv2d(c, 3 * self.no, 1) for c in auxiliary)


class Segment(Detect):
    """Another head."""


class Model(nn.Module):
    """A network of such layers.

    Args:
        rows: [from, repeats, kind, arguments without the input channels]; the head's inputs are its `from`.
        width: channels are these times the rows'.
    """

    def __init__(self, rows: Rows, nc: int = 3, width: float = 1.0, backbone: int = 1) -> None:
        super().__init__()
        channels: list[int] = []
        layers: list[nn.Module] = []
        for index, (source, repeats, kind, args) in enumerate(rows):
            sources = [s if s >= 0 else index + s for s in (source if isinstance(source, list) else [source])]
            inputs = [channels[s] if s >= 0 else 3 for s in sources]
            out = math.ceil(args[0] * width / 8) * 8 if args and isinstance(args[0], int) else 0
            if kind in HEADS:
                layer: nn.Module = HEADS[kind](nc, inputs)
            elif kind == "Concat":
                layer, out = Concat(), sum(inputs)
            elif kind == "Upsample":
                layer, out = nn.Upsample(None, 2, "nearest"), inputs[0]
            elif kind in ("MP", "SP"):
                layer, out = LAYERS[kind](*args), inputs[0]
            elif kind in ("ReOrg", "GhostConv"):
                layer, out = LAYERS[kind](), inputs[0] * 4
            elif kind == "C3":
                layer = C3(inputs[0], out, repeats, *args[1:])
            else:
                layer = LAYERS[kind](inputs[0], out, *args[1:])
            layer.i, layer.f, layer.type = index, source, f"models.common.{kind}"  # type: ignore[assignment]
            channels.append(out)
            layers.append(layer)
        self.model = nn.Sequential(*layers)
        self.yaml = {
            "depth_multiple": 1.0,
            "width_multiple": width,
            "backbone": rows[:backbone],
            "head": rows[backbone:],
        }
        self.nc, self.names = nc, [f"thing{i}" for i in range(nc)]


def feature_maps(layers: nn.Module, image: Tensor) -> list[Tensor]:
    """Return the output of every layer before the head."""
    maps: list[Tensor] = []
    with torch.inference_mode():
        for index, layer in enumerate(list(layers.children())[:-1]):
            source: Any = layer.f
            sources = [s if s >= 0 else index + s for s in (source if isinstance(source, list) else [source])]
            inputs = [maps[s] if s >= 0 else image for s in sources]
            maps.append(layer(inputs if isinstance(source, list) else inputs[0]))
    return maps


COMMON = (
    Conv,
    Bottleneck,
    C3,
    SPP,
    SPPF,
    SPPCSPC,
    DownC,
    ReOrg,
    Focus,
    MP,
    SP,
    RepConv,
    Concat,
    GhostConv,
    ImplicitA,
    ImplicitM,
)
YOLO = (Detect, IDetect, IAuxDetect, Segment, Model)
LAYERS: dict[str, Any] = {kind.__name__: kind for kind in COMMON}
HEADS: dict[str, Any] = {kind.__name__: kind for kind in YOLO[:-1]}
for _module, _kinds in (("models.common", COMMON), ("models.yolo", YOLO)):
    for _kind in _kinds:
        _kind.__module__ = _module


@contextlib.contextmanager
def original_modules() -> Iterator[None]:
    """Let pickle find these classes where the originals have them."""
    fakes = {name: ModuleType(name) for name in ("models", "models.common", "models.yolo")}
    for kind in (*COMMON, *YOLO):
        setattr(fakes[kind.__module__], kind.__name__, kind)
    sys.modules.update(fakes)
    try:
        yield
    finally:
        for name in fakes:
            del sys.modules[name]


def save(model: nn.Module, path: Path, legacy: bool = False, **more: Any) -> Path:
    """Write a checkpoint as the originals' train.py does, but in fp32."""
    content = {"epoch": -1, "best_fitness": None, "model": model, "ema": None, "optimizer": None, **more}
    with original_modules(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old format would store the source of each class, and these have none
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def load(path: Path) -> Model:
    """Open an original checkpoint with these classes in the place of its own; for trusted files only."""
    with original_modules():
        return torch.load(path, weights_only=False)["model"].float().eval()


# The published architectures, in the originals' own layers.


def yolov5(depth: float = 1.0, focus: bool = False) -> Rows:
    """YOLOv5 v6.0 to v7.0; with `focus` v5.0, whose pyramid pooling stands before the last C3."""

    def n(repeats: int) -> int:
        return max(round(repeats * depth), 1)

    first = [-1, 1, "Focus", [64, 3]] if focus else [-1, 1, "Conv", [64, 6, 2, 2]]
    rows: Rows = [first, [-1, 1, "Conv", [128, 3, 2]], [-1, n(3), "C3", [128]], [-1, 1, "Conv", [256, 3, 2]]]
    rows += [[-1, n(9 if focus else 6), "C3", [256]], [-1, 1, "Conv", [512, 3, 2]], [-1, n(9), "C3", [512]]]
    rows += [[-1, 1, "Conv", [1024, 3, 2]]]
    if focus:
        rows += [[-1, 1, "SPP", [1024, (5, 9, 13)]], [-1, n(3), "C3", [1024, False]]]
    else:
        rows += [[-1, n(3), "C3", [1024]], [-1, 1, "SPPF", [1024, 5]]]
    for c, route in ((512, 6), (256, 4)):
        rows += [
            [-1, 1, "Conv", [c]],
            [-1, 1, "Upsample", []],
            [[-1, route], 1, "Concat", []],
            [-1, n(3), "C3", [c, False]],
        ]
    for c, route in ((256, 14), (512, 10)):
        rows += [[-1, 1, "Conv", [c, 3, 2]], [[-1, route], 1, "Concat", []], [-1, n(3), "C3", [2 * c, False]]]
    return [*rows, [[17, 20, 23], 1, "Detect", []]]


def _elan(rows: Rows, hidden: int, out: int, taps: list[int], n: int, inner: int = 0, act: tuple = ()) -> int:
    """Append two 1×1 convolutions, n 3×3 ones in a row, and a 1×1 over those that `taps` name; return its index."""
    rows += [[-1, 1, "Conv", [hidden, 1, 1, *act]], [-2, 1, "Conv", [hidden, 1, 1, *act]]]
    rows += [[-1, 1, "Conv", [inner or hidden, 3, 1, *act]] for _ in range(n)]
    rows += [[taps, 1, "Concat", []], [-1, 1, "Conv", [out, 1, 1, *act]]]
    return len(rows) - 1


def _down(rows: Rows, c: int, *routes: int) -> None:
    rows += [[-1, 1, "MP", []], [-1, 1, "Conv", [c]], [-3, 1, "Conv", [c]], [-1, 1, "Conv", [c, 3, 2]]]
    rows += [[[-1, -3, *routes], 1, "Concat", []]]


def _up(rows: Rows, c: int, route: int, act: tuple = ()) -> None:
    one = [1, 1, *act] if act else []
    rows += [
        [-1, 1, "Conv", [c, *one]],
        [-1, 1, "Upsample", []],
        [route, 1, "Conv", [c, *one]],
        [[-1, -2], 1, "Concat", []],
    ]


def yolov7(head: str = "IDetect") -> Rows:
    backbone, neck = [-1, -3, -5, -6], [-1, -2, -3, -4, -5, -6]
    rows: Rows = [[-1, 1, "Conv", [c, 3, s]] for c, s in ((32, 1), (64, 2), (64, 1), (128, 2))]
    _elan(rows, 64, 256, backbone, 4)
    ends = []
    for c, hidden, out in ((128, 128, 512), (256, 256, 1024), (512, 256, 1024)):
        _down(rows, c)
        ends.append(_elan(rows, hidden, out, backbone, 4))
    rows += [[-1, 1, "SPPCSPC", [512]]]
    p5 = len(rows) - 1
    _up(rows, 256, ends[1])
    p4 = _elan(rows, 256, 256, neck, 4, 128)
    _up(rows, 128, ends[0])
    out = [_elan(rows, 128, 128, neck, 4, 64)]
    for c, route in ((128, p4), (256, p5)):
        _down(rows, c, route)
        out.append(_elan(rows, 2 * c, 2 * c, neck, 4, c))
    rows += [[end, 1, "RepConv", [c, 3, 1]] for end, c in zip(out, (256, 512, 1024), strict=True)]
    return [*rows, [[102, 103, 104], 1, head, []]]


def yolov7x() -> Rows:
    taps = [-1, -3, -5, -7, -8]
    rows: Rows = [[-1, 1, "Conv", [c, 3, s]] for c, s in ((40, 1), (80, 2), (80, 1), (160, 2))]
    _elan(rows, 64, 320, taps, 6)
    ends = []
    for c, hidden, out in ((160, 128, 640), (320, 256, 1280), (640, 256, 1280)):
        _down(rows, c)
        ends.append(_elan(rows, hidden, out, taps, 6))
    rows += [[-1, 1, "SPPCSPC", [640]]]
    p5 = len(rows) - 1
    _up(rows, 320, ends[1])
    p4 = _elan(rows, 256, 320, taps, 6)
    _up(rows, 160, ends[0])
    out = [_elan(rows, 128, 160, taps, 6)]
    for c, hidden, route in ((160, 256, p4), (320, 512, p5)):
        _down(rows, c, route)
        out.append(_elan(rows, hidden, 2 * c, taps, 6))
    rows += [[end, 1, "Conv", [c, 3]] for end, c in zip(out, (320, 640, 1280), strict=True)]
    return [*rows, [[118, 119, 120], 1, "IDetect", []]]


def yolov7_tiny() -> Rows:
    taps, act = [-1, -2, -3, -4], (None, 1, nn.LeakyReLU(0.1))
    rows: Rows = [[-1, 1, "Conv", [c, 3, 2, *act]] for c in (32, 64)]
    _elan(rows, 32, 64, taps, 2, act=act)
    ends = []
    for c in (64, 128, 256):
        rows += [[-1, 1, "MP", []]]
        ends.append(_elan(rows, c, 2 * c, taps, 2, act=act))
    one = [1, 1, *act]
    rows += [[-1, 1, "Conv", [256, *one]], [-2, 1, "Conv", [256, *one]]]
    rows += [[-1, 1, "SP", [5]], [-2, 1, "SP", [9]], [-3, 1, "SP", [13]], [taps, 1, "Concat", []]]
    rows += [[-1, 1, "Conv", [256, *one]], [[-1, -7], 1, "Concat", []], [-1, 1, "Conv", [256, *one]]]
    p5 = len(rows) - 1
    _up(rows, 128, ends[1], act)
    p4 = _elan(rows, 64, 128, taps, 2, act=act)
    _up(rows, 64, ends[0], act)
    out = [_elan(rows, 32, 64, taps, 2, act=act)]
    for c, route in ((64, p4), (128, p5)):
        rows += [[-1, 1, "Conv", [2 * c, 3, 2, *act]], [[-1, route], 1, "Concat", []]]
        out.append(_elan(rows, c, 2 * c, taps, 2, act=act))
    rows += [[end, 1, "Conv", [c, 3, 1, *act]] for end, c in zip(out, (128, 256, 512), strict=True)]
    return [*rows, [[74, 75, 76], 1, "IDetect", []]]


def yolov7_w6() -> Rows:
    backbone, neck = [-1, -3, -5, -6], [-1, -2, -3, -4, -5, -6]
    rows: Rows = [[-1, 1, "ReOrg", []], [-1, 1, "Conv", [64, 3, 1]]]
    ends = []
    for c in (128, 256, 512, 768, 1024):
        rows += [[-1, 1, "Conv", [c, 3, 2]]]
        ends.append(_elan(rows, c // 2, c, backbone, 4))
    rows += [[-1, 1, "SPPCSPC", [512]]]
    up = [len(rows) - 1]
    for c, route in ((384, ends[3]), (256, ends[2]), (128, ends[1])):
        _up(rows, c, route)
        up.append(_elan(rows, c, c, neck, 4, c // 2))
    down = [up[-1]]
    for c, route in ((256, up[2]), (384, up[1]), (512, up[0])):
        rows += [[-1, 1, "Conv", [c, 3, 2]], [[-1, route], 1, "Concat", []]]
        down.append(_elan(rows, c, c, neck, 4, c // 2))
    rows += [[end, 1, "Conv", [c, 3]] for end, c in zip(down, (256, 512, 768, 1024), strict=True)]
    rows += [[end, 1, "Conv", [c, 3]] for end, c in zip(up[::-1], (320, 640, 960, 1280), strict=True)]  # auxiliary
    return [*rows, [list(range(114, 122)), 1, "IAuxDetect", []]]
