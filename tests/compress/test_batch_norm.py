from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from compress.data.pixels import centre_crop, letterbox
from compress.errors import DataError
from compress.pruning.batch_norm import recalibrate_batch_norm


class Net(nn.Module):
    """Two batch norms: the second sees what the first one normalised anew."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4, momentum=0.03)
        self.drop = nn.Dropout(0.5)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, eps=1e-3, momentum=0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(self.drop(x)))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    model = Net()
    for norm in (model.bn1, model.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        assert norm.running_mean is not None
        norm.running_mean.fill_(99.0)  # statistics of another model
    return model


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{number:02}.png" for number in range(34)]
    for path in paths:
        cv2.imwrite(str(path), generator.integers(0, 256, (24, 32, 3), np.uint8) // generator.integers(1, 9))
    return paths


def letterboxed(paths: list[Path]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([letterbox(path, 32) for path in paths]))


def statistics(model: Net, batches: list[list[Path]]) -> dict[str, torch.Tensor]:
    """Return mean and unbiased variance of what reaches each batch norm, averaged over the batches."""
    found: dict[str, list[torch.Tensor]] = {"bn1": [], "bn2": []}
    with torch.no_grad():
        for batch in batches:
            x = model.conv1(letterboxed(batch))
            found["bn1"].append(torch.stack((x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=True))))
            x = functional.batch_norm(x, None, None, model.bn1.weight, model.bn1.bias, training=True, eps=model.bn1.eps)
            x = model.conv2(torch.relu(x))
            found["bn2"].append(torch.stack((x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=True))))
    return {name: torch.stack(values).mean(0) for name, values in found.items()}


def assert_statistics(model: Net, batches: list[list[Path]]) -> None:
    for name, (mean, variance) in statistics(model, batches).items():
        norm = model.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, mean, msg=f"mean of {name}")
        torch.testing.assert_close(norm.running_var, variance, msg=f"variance of {name}")


def test_statistics_are_those_of_the_images(model: Net, images: list[Path]) -> None:
    """34 images: two batches of 16, which count alike, and one of 2."""
    recalibrate_batch_norm(model, images, 32)
    assert_statistics(model, [images[:16], images[16:32], images[32:]])


@pytest.mark.parametrize("count", [2, 16])
def test_one_batch(model: Net, images: list[Path], count: int) -> None:
    recalibrate_batch_norm(model, images[:count], 32)
    assert_statistics(model, [images[:count]])


def test_a_last_image_alone_is_left_out(model: Net, images: list[Path]) -> None:
    recalibrate_batch_norm(model, images[:17], 32)
    assert_statistics(model, [images[:16]])


def test_one_image_is_enough_for_maps_of_one_pixel(images: list[Path]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 32, bias=False), nn.BatchNorm2d(2))
    recalibrate_batch_norm(model, images[:1], 32)
    with torch.no_grad():
        found = model[0](letterboxed(images[:1])).flatten()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    torch.testing.assert_close(norm.running_mean, found)
    torch.testing.assert_close(norm.running_var, torch.zeros(2))


def test_nothing_else_changes(model: Net, images: list[Path]) -> None:
    before = copy.deepcopy(model.state_dict())
    model.train()
    recalibrate_batch_norm(model, images[:16], 32)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {
        f"{norm}.{name}" for norm in ("bn1", "bn2") for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert (model.bn1.momentum, model.bn2.momentum) == (0.03, 0.2)
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())
    model.train()(letterboxed(images[:2])).sum().backward()  # it can be trained on


def test_a_second_estimate_forgets_the_first(model: Net, images: list[Path]) -> None:
    recalibrate_batch_norm(model, images[:16], 32)
    recalibrate_batch_norm(model, images[16:32], 32)
    assert_statistics(model, [images[16:32]])


def test_letterboxed_by_hand(tmp_path: Path) -> None:
    """A red image of 2 : 1 fills the middle half of the square; the rest is Ultralytics' grey, 114."""
    path = tmp_path / "red.png"
    cv2.imwrite(str(path), np.full((16, 32, 3), (0, 0, 255), np.uint8))  # OpenCV writes blue, green, red
    found = letterbox(path, 64)
    assert (found.shape, found.dtype) == ((1, 3, 64, 64), np.float32)
    assert found[0, :, 32, 32].tolist() == [1.0, 0.0, 0.0]
    assert found[0, :, 0, 0].tolist() == pytest.approx([114 / 255] * 3)
    assert (found[0, 0] == 1.0).sum() == 32 * 64


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(DataError, match=r"broken\.png is not an image that can be read: mend or remove it"):
        letterbox(tmp_path / "broken.png", 32)


def test_a_classifier_sees_the_middle_of_images(images: list[Path], architectures: dict[str, dict[str, Any]]) -> None:
    from compress.checkpoint import build_model

    model: Any = build_model(architectures["classify"])
    recalibrate_batch_norm(model, images[:4], 32)
    pixels = torch.from_numpy(np.concatenate([centre_crop(path, 32) for path in images[:4]]))
    assert pixels.shape == (4, 3, 32, 32)
    assert 0.0 <= float(pixels.min()) < float(pixels.max()) <= 1.0
    first = model.model[0]
    with torch.no_grad():
        torch.testing.assert_close(first.bn.running_mean.clone(), first.conv(pixels).mean((0, 2, 3)))
