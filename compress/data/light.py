"""Colour and light of drawn pictures: textured grounds, things with their colour and shadow, a camera's faults."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def colour(rng: np.random.Generator) -> np.ndarray:
    """Return a colour, neither grey nor glaring: (3,), float32, BGR, 0 to 255."""
    import cv2
    import numpy as np

    hsv = np.array([[[rng.integers(0, 180), rng.integers(20, 230), rng.integers(50, 240)]]], np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float32)


def _clouds(rng: np.random.Generator, side: int, cells: int, octaves: int = 3) -> np.ndarray:
    """Return smooth noise from 0 to 1 (side × side), with `cells` blobs across and finer ones within."""
    import cv2
    import numpy as np

    total = np.zeros((side, side), np.float32)
    for octave in range(octaves):
        grid = rng.random((cells << octave, cells << octave), dtype=np.float32)
        total += cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC) / (1 << octave)
    return _stretch(total)


def _slope(rng: np.random.Generator, side: int) -> np.ndarray:
    """Return a plane from 0 to 1 (side × side) that rises in some direction."""
    import numpy as np

    turn = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    return _stretch(np.float32(np.cos(turn)) * axis[None, :] + np.float32(np.sin(turn)) * axis[:, None])


def _stretch(field: np.ndarray) -> np.ndarray:
    low, high = field.min(), field.max()
    return (field - low) / max(high - low, 1e-6)


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Return one of five textures, from 0 to 1 (side × side): clouds, stripes, grain of wood, tiles, speckles."""
    import numpy as np

    kind = int(rng.integers(0, 5))
    if kind == 0:
        return _clouds(rng, side, int(rng.integers(2, 8)))
    if kind == 1:
        return np.sin(_slope(rng, side) * rng.uniform(20, 90)).astype(np.float32) / 2 + 0.5
    if kind == 2:
        bent = _slope(rng, side) * rng.uniform(4, 10) + _clouds(rng, side, 3, 2) * rng.uniform(2, 5)
        return bent.astype(np.float32) % 1.0
    if kind == 3:
        step = max(2, round(side * rng.uniform(0.06, 0.2)))
        index = np.arange(side) // step
        shades = rng.random((side, side), dtype=np.float32)[np.ix_(index, index)]
        joint = (np.arange(side) % step) < max(1, step // 12)
        return np.where(joint[:, None] | joint[None, :], np.float32(0.0), 0.35 + 0.65 * shades)
    return (_clouds(rng, side, side // 6, 2) > rng.uniform(0.5, 0.7)).astype(np.float32)


def background(rng: np.random.Generator, side: int) -> np.ndarray:
    """Return a textured ground (side × side × 3, float32, 0 to 255): two colours, mixed by two textures."""
    import numpy as np

    first = colour(rng)
    second = first + np.float32(rng.uniform(0.15, 0.6)) * (colour(rng) - first)
    mixed = 0.75 * _texture(rng, side) + 0.25 * _clouds(rng, side, 4)
    return first + mixed[:, :, None] * (second - first)


def blend(rng: np.random.Generator, image: np.ndarray, cover: np.ndarray, light: float) -> np.ndarray:
    """Return the picture with one more thing before it: its shadow, its own shaded and textured colour.

    `cover` is the share of every pixel that it covers, `light` the direction in which light falls, in radians.
    """
    import cv2
    import numpy as np

    side = len(cover)
    inside = cover > 0.5
    ground = image[inside].mean(axis=0) if inside.any() else np.zeros(3, np.float32)
    own = colour(rng)
    for _ in range(20):
        if np.abs(own - ground).max() > 80:
            break
        own = colour(rng)
    surface = 1 + np.float32(rng.uniform(0.1, 0.5)) * (_slope(rng, side) - 0.5)
    if rng.random() < 0.4:
        surface = surface + np.float32(rng.uniform(0.1, 0.3)) * (_texture(rng, side) - 0.5)
    # A bright edge towards the light and a dark one away from it.
    soft = cv2.GaussianBlur(cover, (0, 0), side / 120)
    slope_x, slope_y = (cv2.Sobel(soft, cv2.CV_32F, dx, 1 - dx, ksize=3) for dx in (1, 0))
    edge = np.float32(np.cos(light)) * slope_x + np.float32(np.sin(light)) * slope_y
    surface = surface + np.float32(rng.uniform(0, 0.4)) * edge
    away = 0.015 * side * np.array([np.cos(light), np.sin(light)])
    shift = np.array([[1, 0, away[0]], [0, 1, away[1]]])
    shadow = cv2.warpAffine(soft, shift, (side, side)) * np.float32(rng.uniform(0, 0.5))
    shaded = image * (1 - shadow)[:, :, None]
    return shaded + cover[:, :, None] * (own * surface[:, :, None] - shaded)


def photograph(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Return the picture as a camera sees it: uneven light, blur, noise; uint8."""
    import cv2
    import numpy as np

    side = len(image)
    light = rng.uniform(0.75, 1.15) + rng.uniform(0, 0.7) * (_slope(rng, side) - 0.5)
    image = image * light.astype(np.float32)[:, :, None]
    if rng.random() < 0.6:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.0) * side / 192)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(1, 9))
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)
