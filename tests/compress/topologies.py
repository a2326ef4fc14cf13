"""Small networks, one topology each, with batch norms that are not at their initial state."""

from __future__ import annotations

import torch
from torch import nn


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm statistics, scales and shifts as a trained one has them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def calibrated(model: nn.Module, imgsz: int) -> nn.Module:
    """Give every batch norm the statistics of noise, so that signals keep their size and attention attends."""
    norms = [module for module in randomised(model).modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(4, 3, imgsz, imgsz, generator=torch.Generator().manual_seed(0)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


class Block(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, cin: int, cout: int, k: int = 3, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = Block(3, 8), Block(8, 12), nn.Conv2d(12, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(x)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = Block(3, 8), Block(8, 8), Block(8, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        x = x + self.b(x)
        return self.head(x + self.c(x))


class Concat(nn.Module):
    """A branch is read alone and inside a concatenation, in another order than it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = Block(3, 8), Block(8, 6), Block(8, 10), nn.Conv2d(24, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.head(torch.cat((self.c(x), x, self.b(x)), 1))


class ChunkTie(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = Block(3, 16), Block(8, 8), nn.Conv2d(24, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.a(x).chunk(2, 1)
        return self.head(torch.cat((first, second, second + self.b(second)), 1))


class SplitFixed(nn.Module):
    """A split by sizes that only this module knows: nothing of it may be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = Block(3, 12), Block(4, 6), nn.Conv2d(14, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.a(x).split((8, 4), 1)
        return self.head(torch.cat((first, self.b(second)), 1))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.dw, self.multiplied = Block(3, 8), Block(8, 8, groups=8), Block(8, 16, groups=8)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.multiplied(self.dw(self.a(x))))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.grouped, self.head = Block(3, 16), Block(16, 24, groups=4), nn.Conv2d(24, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.grouped(self.a(x)))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.head = Block(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.up(self.a(x))))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up = Block(3, 8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        gate = self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True))))
        return self.head(x * gate.sigmoid())


class FlattenLinear(nn.Module):
    """Each channel becomes a block of 16 features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool, self.b, self.c = Block(3, 8), nn.AdaptiveAvgPool2d(4), nn.Linear(128, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.b(self.pool(self.a(x)).flatten(1))))


class SharedLayer(nn.Module):
    """One layer called twice: its input and its output channels are the same in both calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shared, self.head = Block(3, 8), Block(8, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.head(x + self.shared(x) + self.shared(x * 0.5))


class LayerScale(nn.Module):
    """A learned scale per channel, which is neither a layer nor a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = Block(3, 8), Block(8, 8), nn.Conv2d(8, 4, 1)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8).reshape(8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.head(x + self.b(x) * self.scale)


class InPlace(nn.Module):
    """Activations in place, so that two names stand for one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        y = self.act(x)
        return self.head(x + self.act(self.b(y)))


class ChannelShuffle(nn.Module):
    """Two halves interleaved by reshape and transpose, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = Block(3, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        return self.head(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class SpatialGate(nn.Module):
    """A mean over channels: removing one would change it, so what reaches it stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b, self.head = (
            Block(3, 8),
            nn.Conv2d(1, 1, 3, padding=1),
            Block(8, 8),
            nn.Conv2d(8, 4, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.head(self.b(x * self.gate(x.mean(1, keepdim=True)).sigmoid()))


ALL = {
    cls.__name__: cls
    for cls in (
        *(Chain, Residual, Concat, ChunkTie, SplitFixed, Depthwise, Grouped, Transposed, SqueezeExcite, FlattenLinear),
        *(SharedLayer, LayerScale, InPlace, ChannelShuffle, SpatialGate),
    )
}
