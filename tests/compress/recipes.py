"""The blocks of the usual "improved YOLO" recipes, each small, between two convolutions that must stay prunable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from topologies import Block

WIDTH = 16


class SE(nn.Module):
    """Squeeze-and-excitation (Hu et al., CVPR 2018)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(c, c // 4), nn.Linear(c // 4, c)

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.shape
        gate = self.up(torch.relu(self.down(x.mean((2, 3)).view(b, c)))).sigmoid()
        return x * gate.view(b, c, 1, 1).expand_as(x)


class CBAM(nn.Module):
    """Channel attention, then spatial attention over the mean and the maximum of all channels (Woo et al., 2018)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(c, c // 4, 1), nn.ReLU(), nn.Conv2d(c // 4, c, 1))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = functional.adaptive_avg_pool2d(x, 1), functional.adaptive_max_pool2d(x, 1)
        x = x * (self.mlp(pooled[0]) + self.mlp(pooled[1])).sigmoid()
        maps = torch.cat((x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]), 1)
        return x * self.spatial(maps).sigmoid()


class CoordAtt(nn.Module):
    """Gates for rows and for columns from pooled strips (Hou et al., CVPR 2021)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.shared, self.rows, self.columns = Block(c, 8, 1), nn.Conv2d(8, c, 1), nn.Conv2d(8, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        strips = torch.cat((x.mean(3, keepdim=True), x.mean(2, keepdim=True).permute(0, 1, 3, 2)), 2)
        rows, columns = torch.split(self.shared(strips), [height, width], dim=2)
        return x * self.rows(rows).sigmoid() * self.columns(columns.permute(0, 1, 3, 2)).sigmoid()


class ECA(nn.Module):
    """A convolution along the channels (Wang et al., CVPR 2020): neighbours cannot go without being missed."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.mean((2, 3), keepdim=True).squeeze(-1).transpose(-1, -2))
        return x * y.transpose(-1, -2).unsqueeze(-1).sigmoid()


class SimAM(nn.Module):
    """A gate without parameters, from the variance over space (Yang et al., ICML 2021)."""

    def __init__(self, c: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[2] * x.shape[3] - 1
        square = (x - x.mean((2, 3), keepdim=True)).pow(2)
        energy = square / (4 * (square.sum((2, 3), keepdim=True) / n + 1e-4)) + 0.5
        return x * energy.sigmoid()


class BiFPN(nn.Module):
    """Learned, normalised weights for the maps that are added (Tan et al., CVPR 2020)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weights, self.other, self.out = nn.Parameter(torch.tensor([1.0, 0.5])), Block(c, c), Block(c, c)

    def forward(self, x: Tensor) -> Tensor:
        share = torch.relu(self.weights)
        share = share / (share.sum() + 1e-4)
        return self.out(share[0] * x + share[1] * self.other(x))


class ASFF(nn.Module):
    """A softmax over levels at every position says how they are mixed (Liu et al., 2019)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.other, self.first, self.second, self.mix = Block(c, c), Block(c, 8, 1), Block(c, 8, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(x)
        level = self.mix(torch.cat((self.first(x), self.second(y)), 1)).softmax(1)
        return x * level[:, 0:1] + y * level[:, 1:2]


class GSConv(nn.Module):
    """Half dense, half depthwise, then shuffled with numbers taken from the tensor (Li et al., 2022)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.dense, self.cheap = Block(c, c // 2), Block(c // 2, c // 2, 5, groups=c // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense(x)
        x = torch.cat((x, self.cheap(x)), 1)
        b, c, h, w = x.shape
        x = x.reshape(b * c // 2, 2, h * w).permute(1, 0, 2).reshape(2, -1, c // 2, h, w)
        return torch.cat((x[0], x[1]), 1)


class VoVGSCSP(nn.Module):
    """A cross-stage block of shuffled convolutions."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b, self.inner, self.out = Block(c, 8, 1), Block(c, 8, 1), GSConv(8), Block(16, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat((self.b(x), self.inner(self.a(x))), 1))


class SPDConv(nn.Module):
    """Space to depth instead of a stride (Sunkara and Luo, 2022)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = Block(4 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)
        return functional.interpolate(self.conv(x), scale_factor=2)


class ELAN(nn.Module):
    """Outputs of several depths side by side (YOLOv7)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.out = (
            Block(c, 8, 1),
            Block(c, 8, 1),
            Block(8, 8),
            Block(8, 8),
            Block(32, c, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        b = self.b(x)
        c = self.c(b)
        return self.out(torch.cat((self.d(c), c, b, self.a(x)), 1))


class GnConv(nn.Module):
    """Recursive gates of growing width, split by sizes that the module keeps (Rao et al., NeurIPS 2022)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.dims = [c // 4, c // 2, c]
        self.enter = nn.Conv2d(c, 2 * c, 1)
        self.depthwise = nn.Conv2d(sum(self.dims), sum(self.dims), 3, padding=1, groups=sum(self.dims))
        self.up = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(self.dims[:-1], self.dims[1:], strict=True))
        self.out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = torch.split(self.enter(x), [self.dims[0], sum(self.dims)], dim=1)
        parts = torch.split(self.depthwise(rest), self.dims, dim=1)
        y = first * parts[0]
        for up, part in zip(self.up, parts[1:], strict=True):
            y = up(y) * part
        return self.out(y)


class RepGFPN(nn.Module):
    """Re-parametrised residual convolutions in a cross-stage block (DAMO-YOLO)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b, self.out = Block(c, 8, 1), Block(c, 8, 1), Block(16, c, 1)
        self.wide, self.narrow, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(x)
        y = y + torch.relu(self.wide(y) + self.narrow(y) + self.norm(y))
        return self.out(torch.cat((self.a(x), y), 1))


class Involution(nn.Module):
    """A kernel for every position, shared by groups of channels of a fixed size (Li et al., CVPR 2021)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.groups, self.each = c // 8, 8
        self.reduce, self.span = Block(c, 8, 1), nn.Conv2d(8, 9 * self.groups, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        kernel = self.span(self.reduce(x)).view(b, self.groups, 9, h, w).unsqueeze(2)
        patches = functional.unfold(x, 3, padding=1).view(b, self.groups, self.each, 9, h, w)
        return (kernel * patches).sum(3).view(b, self.groups * self.each, h, w)


class Swin(nn.Module):
    """Attention in windows, then a perceptron, both behind layer norms (Liu et al., ICCV 2021)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.heads, self.window = 2, 4
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.mlp = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        s = self.window
        x = x.permute(0, 2, 3, 1)
        y = self.norm1(x).view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        q, k, v = self.qkv(y).reshape(-1, s * s, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q * 0.25) @ k.transpose(-2, -1)).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(-1, s * s, c))
        y = y.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + y
        return (x + self.mlp(self.norm2(x))).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Heads whose width is taken from the tensor: of a stranger, although it has the name of Ultralytics' own."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = (layer(x).view(b, 2, -1, h * w) for layer in (self.q, self.k, self.v))
        y = v @ ((q * 0.25).transpose(-2, -1) @ k).softmax(-1).transpose(-2, -1)
        return x + self.proj(y.reshape(b, -1, h, w))


class Hourglass(nn.Module):
    """Pixel unshuffle and shuffle, with a group norm and PReLU between them."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.down, self.a, self.b = nn.PixelUnshuffle(2), nn.Conv2d(4 * c, c, 1), nn.Conv2d(c, 4 * c, 1)
        self.norm, self.act, self.up = nn.GroupNorm(4, c), nn.PReLU(c), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.b(self.act(self.norm(self.a(self.down(x))))))


class Wide(nn.Module):
    """A shuffle by a number in the code: it breaks when channels go, and nothing of it says so before."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a = Block(c, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return x.view(x.shape[0], 4, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


class Recipe(nn.Module):
    """A block between convolutions, beside a branch that has nothing to do with it."""

    def __init__(self, block: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.before, self.enter, self.block = Block(3, 8), Block(8, WIDTH), block(WIDTH)
        self.after, self.side, self.head = Block(WIDTH, 8), Block(8, 8), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.head(torch.cat((self.after(self.block(self.enter(x))), self.side(x)), 1))


# What can be pruned of each block and of the layer before it ("enter"), and a word of what is frozen, if anything is.
RECIPES: dict[type[nn.Module], tuple[set[str], str | None]] = {
    SE: ({"enter.conv", "block.down"}, None),
    CBAM: ({"block.mlp.0"}, "mean over channels in block"),
    CoordAtt: ({"enter.conv", "block.shared.conv"}, None),
    ECA: (set(), "channels outside dimension 1 reach block.conv"),
    SimAM: ({"enter.conv"}, None),
    BiFPN: ({"enter.conv", "block.out.conv"}, "sum over channels in block"),
    ASFF: ({"enter.conv", "block.first.conv", "block.second.conv"}, "softmax over channels in block"),
    GSConv: ({"enter.conv", "block.dense.conv"}, None),
    VoVGSCSP: ({"enter.conv", "block.a.conv", "block.b.conv", "block.inner.dense.conv", "block.out.conv"}, None),
    SPDConv: ({"enter.conv", "block.conv.conv"}, None),
    ELAN: ({"enter.conv", "block.a.conv", "block.b.conv", "block.c.conv", "block.d.conv", "block.out.conv"}, None),
    GnConv: ({"enter.conv", "block.out"}, "split into fixed sizes [4, 28] in block"),
    RepGFPN: ({"enter.conv", "block.a.conv", "block.b.conv", "block.out.conv"}, None),
    Involution: ({"block.reduce.conv"}, "block"),
    Swin: ({"block.mlp.0"}, "layer norm over channels in block.norm1"),
    Attention: ({"enter.conv", "block.q[0:8]", "block.q[8:16]", "block.v[0:8]", "block.v[8:16]"}, None),
    Hourglass: ({"enter.conv", "block.a", "block.b"}, None),
    Wide: ({"enter.conv"}, "block does not run with fewer channels"),
}
