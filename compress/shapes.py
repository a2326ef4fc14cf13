"""The default data set: drawn objects that only their shape tells apart, on cluttered and textured pictures.

Every picture is made from its own seed, so that picture k is the same however many others are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.data.drawn import POSE_YAML, Task, crop, label
from compress.errors import DataError, run_app

if TYPE_CHECKING:
    import numpy as np

    # An outline in a disc of radius 1: polygons filled together by the even-odd rule (a hole is a polygon within).
    # A figure is the union of such parts.
    Figure = list[list[np.ndarray]]

    # Draws a thing at 255 into a fine mask that shows `margin` pixels (the second argument) more on every side.
    Painter = Callable[[np.ndarray, int], None]

# Raise it whenever the same seed gives other pictures, so that a set of an older version is not taken for a new one.
GENERATOR = 1
SPLITS = ("train", "val", "test")
YAML = "shapes.yaml"
MARKER = "shapes.json"

_SCALE = (0.08, 0.45)  # diameter of a figure as a share of the image side
_HIDDEN = 0.6  # an object of which more is covered or outside of the picture is not labelled
_OVERSAMPLING = 3  # masks are this much finer than pixels, for smooth edges and boxes to a third of a pixel
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class Shapes:
    """What identifies a generated set: number of images of each split, image side in pixels, seed, task."""

    train: int = 480
    val: int = 120
    test: int = 120
    imgsz: int = 192
    seed: int = 0
    task: Task = "detect"


def generate(folder: Path, shapes: Shapes = Shapes()) -> Path:
    """Write the data set to `folder`, unless it is there already, and return its YAML (to classify: the folder).

    To classify, every picture is cut to its largest object; one without objects is left out.

    It is made in a folder beside, which gets its name when all of it is there. An interrupted start is resumed.

    Raises:
        DataError: `folder` holds something else, or a set with other parameters.
        RunError: another process is writing it.
    """
    from compress import manifest

    if not _is_complete(folder, shapes):
        with manifest.lock(folder):
            if not _is_complete(folder, shapes):
                _write(folder, shapes)
    return folder if shapes.task == "classify" else folder / YAML


def draw(seed: list[int], side: int) -> tuple[np.ndarray, list[tuple[int, float, float, float, float]]]:
    """Return one picture (side × side × 3, uint8, BGR) and its labels (class, then x, y, w, h as shares of the side).

    The boxes enclose what is visible of an object.
    """
    image, objects = draw_objects(seed, side)
    boxes = [(class_id, label("detect", seen)) for class_id, seen in objects]
    return image, [(class_id, x, y, width, height) for class_id, (x, y, width, height) in boxes]


def draw_objects(seed: list[int], side: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Return one picture as `draw`, and the class of each object with the mask of what is visible of it (finer)."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(seed)
    image = _background(rng, side)
    margin = side // 3
    fine = (side + 2 * margin) * _OVERSAMPLING
    window = slice(margin * _OVERSAMPLING, (margin + side) * _OVERSAMPLING)
    owner = np.zeros((fine, fine), np.uint8)  # which object is seen at a place, 0 for none
    objects: list[tuple[int, int, int]] = []  # number in owner, class, area with nothing in front
    light = rng.uniform(0, 2 * np.pi)
    for class_id, paint in _scene(rng, side):
        mask = np.zeros((fine, fine), np.uint8)
        paint(mask, margin)
        number = 0
        if class_id is not None:
            number = len(objects) + 1
            objects.append((number, class_id, cv2.countNonZero(mask)))
        owner[mask > 0] = number
        cover = cv2.resize(mask[window, window], (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        image = _blend(rng, image, cover, light)
    seen = owner[window, window]
    visible = [(class_id, seen == number, area) for number, class_id, area in objects]
    kept = [(class_id, mask) for class_id, mask, area in visible if mask.sum() >= (1 - _HIDDEN) * area]
    return _photograph(rng, image), kept


# ---------------------------------------------------------------------------------------------------------- figures


def _polygon(corners: int, radius: float = 1.0, centre: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    import numpy as np

    angles = np.arange(corners) * (2 * np.pi / corners)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius + np.asarray(centre)


def _circle(radius: float = 1.0, centre: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    return _polygon(64, radius, centre)


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    import numpy as np

    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _spiky(radii: list[float]) -> np.ndarray:
    """Return a closed outline whose corners lie at equal angles and at the given distances from the centre."""
    import numpy as np

    return _polygon(len(radii)) * np.asarray(radii)[:, None]


def _ring(rng: np.random.Generator) -> Figure:
    return [[_circle(), _circle(rng.uniform(0.45, 0.7))]]


def _triangle(rng: np.random.Generator) -> Figure:
    return [[_spiky([rng.uniform(0.8, 1.0), 1.0, 1.0])]]


def _star(rng: np.random.Generator) -> Figure:
    return [[_spiky([1.0, rng.uniform(0.38, 0.5)] * 5)]]


def _cross(rng: np.random.Generator) -> Figure:
    half = rng.uniform(0.17, 0.3)
    return [[_box(-1, -half, 1, half)], [_box(-half, -1, half, 1)]]


def _gear(rng: np.random.Generator) -> Figure:
    teeth, root = int(rng.integers(7, 11)), rng.uniform(0.68, 0.78)
    return [[_spiky([1.0, 1.0, root, root] * teeth), _circle(rng.uniform(0.22, 0.36))]]


def _key(rng: np.random.Generator) -> Figure:
    bow, half = rng.uniform(0.42, 0.5), rng.uniform(0.09, 0.13)
    left, end = bow - 1.25, 1.25
    bits = [end - 0.05 - 0.32 * number for number in range(int(rng.integers(2, 4)))]
    teeth = [[_box(x - 0.18, 0, x, half + rng.uniform(0.2, 0.35))] for x in bits]
    return [
        [_circle(bow, (left, 0)), _circle(bow * 0.55, (left, 0))],
        [_box(left + bow * 0.8, -half, end, half)],
        *teeth,
    ]


def _disc(rng: np.random.Generator) -> Figure:  # noqa: ARG001
    return [[_circle()]]


def _rectangle(rng: np.random.Generator) -> Figure:
    half = rng.uniform(0.25, 0.8)
    return [[_box(-1, -half, 1, half)]]


def _half_disc(rng: np.random.Generator) -> Figure:  # noqa: ARG001
    return [[_circle()[:33]]]


def _hexagon(rng: np.random.Generator) -> Figure:  # noqa: ARG001
    return [[_polygon(6)]]


def _angle(rng: np.random.Generator) -> Figure:
    width = rng.uniform(0.35, 0.55)
    return [[_box(-0.8, -0.8, width - 0.8, 0.8)], [_box(-0.8, 0.8 - width, 0.8, 0.8)]]


OBJECTS: dict[str, Callable[[np.random.Generator], Figure]] = {
    "ring": _ring,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "gear": _gear,
    "key": _key,
}
_DISTRACTORS = (_disc, _rectangle, _half_disc, _hexagon, _angle)


# ------------------------------------------------------------------------------------------------------------ scene


def _scene(rng: np.random.Generator, side: int) -> list[tuple[int | None, Painter]]:
    """Return what is in the picture, from back to front: the class, or None for clutter, and how to draw it."""
    kinds: list[int | None] = [int(kind) for kind in rng.integers(0, len(OBJECTS), int(rng.integers(1, 7)))]
    kinds += [None] * int(rng.integers(0, 4))
    rng.shuffle(kinds)
    things: list[tuple[int | None, Painter]] = []
    placed: list[tuple[float, float, float]] = []
    figures = list(OBJECTS.values())
    for kind in kinds:
        place = _place(rng, side, placed)
        if place is None:
            continue
        placed.append(place)
        make = _DISTRACTORS[int(rng.integers(0, len(_DISTRACTORS)))] if kind is None else figures[kind]
        things.append((kind, _figure_painter(rng, make(rng), place)))
    for _ in range(int(rng.integers(0, 4))):
        things.insert(int(rng.integers(0, len(things) + 1)), (None, _line_painter(rng, side)))
    return things


def _place(
    rng: np.random.Generator, side: int, placed: list[tuple[float, float, float]]
) -> tuple[float, float, float] | None:
    """Return x, y and radius in pixels that leave the centres of other things free; None where there is no room."""
    import numpy as np

    radius = rng.uniform(*_SCALE) * side / 2
    for _ in range(20):
        x, y = (float(value) for value in rng.uniform(0.03 * side, 0.97 * side, 2))
        if all(np.hypot(x - other[0], y - other[1]) > 0.8 * max(radius, other[2]) for other in placed):
            return x, y, radius
    return None


def _figure_painter(rng: np.random.Generator, figure: Figure, place: tuple[float, float, float]) -> Painter:
    import cv2
    import numpy as np

    x, y, radius = place
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    # Seen somewhat from the side: squeezed and sheared.
    tilt = np.array([[1.0, rng.uniform(-0.15, 0.15)], [0.0, rng.uniform(0.75, 1.0)]])
    if rng.random() < 0.5:
        tilt[1] *= -1
    matrix = rotation @ tilt * radius

    def paint(mask: np.ndarray, margin: int) -> None:
        # cv2 counts from the middle of the first pixel, in 1/16 of a pixel (shift=4).
        centre = np.array([x + margin, y + margin])
        for part in figure:
            outlines = [((outline @ matrix.T + centre) * _OVERSAMPLING - 0.5) * 16 for outline in part]
            cv2.fillPoly(mask, [np.rint(outline).astype(np.int32) for outline in outlines], 255, shift=4)

    return paint


def _line_painter(rng: np.random.Generator, side: int) -> Painter:
    """Return a painter of a thin crooked line from one place of the picture to another."""
    import cv2
    import numpy as np

    ends = rng.uniform(-0.1 * side, 1.1 * side, (2, 2))
    bend = rng.normal(0, 0.04 * side, (5, 2)) * np.array([0, 1, 1, 1, 0])[:, None]
    points = ends[0] + np.linspace(0, 1, 5)[:, None] * (ends[1] - ends[0]) + bend
    width = rng.uniform(0.004, 0.016) * side

    def paint(mask: np.ndarray, margin: int) -> None:
        fine = np.rint((points + margin) * _OVERSAMPLING).astype(np.int32)
        cv2.polylines(mask, [fine], isClosed=False, color=255, thickness=max(1, round(width * _OVERSAMPLING)))

    return paint


# ------------------------------------------------------------------------------------------------- colour and light


def _colour(rng: np.random.Generator) -> np.ndarray:
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


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    """Return a textured ground (side × side × 3, float32, 0 to 255): two colours, mixed by two textures."""
    import numpy as np

    first = _colour(rng)
    second = first + np.float32(rng.uniform(0.15, 0.6)) * (_colour(rng) - first)
    mixed = 0.75 * _texture(rng, side) + 0.25 * _clouds(rng, side, 4)
    return first + mixed[:, :, None] * (second - first)


def _blend(rng: np.random.Generator, image: np.ndarray, cover: np.ndarray, light: float) -> np.ndarray:
    """Return the picture with one more thing before it: its shadow, its own shaded and textured colour.

    `cover` is the share of every pixel that it covers, `light` the direction in which light falls, in radians.
    """
    import cv2
    import numpy as np

    side = len(cover)
    inside = cover > 0.5
    ground = image[inside].mean(axis=0) if inside.any() else np.zeros(3, np.float32)
    colour = _colour(rng)
    for _ in range(20):
        if np.abs(colour - ground).max() > 80:
            break
        colour = _colour(rng)
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
    return shaded + cover[:, :, None] * (colour * surface[:, :, None] - shaded)


def _photograph(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
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


# ------------------------------------------------------------------------------------------------------------ files


def _marker(shapes: Shapes) -> dict[str, Any]:
    content = {"generator": GENERATOR, **asdict(shapes)}
    if shapes.task == "detect":
        del content["task"]  # as sets were marked before there were other tasks
    return content


def _is_complete(folder: Path, shapes: Shapes) -> bool:
    """Tell whether this very set is there, rather than nothing."""
    from compress import manifest

    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / MARKER).is_file():
        raise DataError(f"{folder} exists and holds no data set of shapes: choose another --output, or move it away")
    found, wanted = manifest.read_json(folder / MARKER), _marker(shapes)
    if found != wanted:
        raise DataError(
            f"{folder} was generated with other parameters ({found}, not {wanted}): "
            f"delete it, choose another --output, or use it as it is with --data {folder / YAML}"
        )
    return True


def _write(folder: Path, shapes: Shapes) -> None:
    import shutil

    from compress import manifest
    from compress.progress import track

    part, marker = folder.with_name(f".{folder.name}.part"), _marker(shapes)
    if part.exists() and (not (part / MARKER).is_file() or manifest.read_json(part / MARKER) != marker):
        shutil.rmtree(part)
    classifies = shapes.task == "classify"
    for split in SPLITS:
        for place in OBJECTS if classifies else ("images", "labels"):
            (part / split / place if classifies else part / place / split).mkdir(parents=True, exist_ok=True)
    manifest.write_json(part / MARKER, marker)
    jobs = [(split, index) for split in SPLITS for index in range(getattr(shapes, split))]
    for split, index in track(jobs, f"drawing {folder.name}"):
        (_write_object if classifies else _write_picture)(part, split, index, shapes)
    if not classifies:
        _write_yaml(part, shapes)
    if folder.exists():
        folder.rmdir()
    part.rename(folder)


def _write_yaml(folder: Path, shapes: Shapes) -> None:
    from compress import manifest

    splits = "".join(f"{split}: images/{split}\n" for split in SPLITS)
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(OBJECTS))
    header = f"# Drawn by python -m compress.shapes; the parameters are in {MARKER}\n"
    points = POSE_YAML if shapes.task == "pose" else ""
    manifest.write_bytes_atomic(folder / YAML, f"{header}{splits}{points}names:\n{names}".encode())


def _write_picture(folder: Path, split: str, index: int, shapes: Shapes) -> None:
    """Write an image and then its label file, unless an earlier start has got so far."""
    import cv2

    from compress import manifest

    labels = folder / "labels" / split / f"{index:06d}.txt"
    if labels.exists():
        return
    image, objects = draw_objects([shapes.seed, SPLITS.index(split), index], shapes.imgsz)
    _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    manifest.write_bytes_atomic(folder / "images" / split / f"{index:06d}.jpg", jpeg.tobytes())
    lines = [
        " ".join([str(class_id), *(f"{value:.6f}" for value in label(shapes.task, seen))]) for class_id, seen in objects
    ]
    manifest.write_bytes_atomic(labels, "".join(f"{line}\n" for line in lines).encode())


def _write_object(folder: Path, split: str, index: int, shapes: Shapes) -> None:
    """Write the largest object of a picture into the folder of its class, unless an earlier start has got so far."""
    import cv2

    from compress import manifest

    if any((folder / split).glob(f"*/{index:06d}.jpg")):
        return
    image, objects = draw_objects([shapes.seed, SPLITS.index(split), index], shapes.imgsz)
    if not objects:
        return
    class_id, seen = max(objects, key=lambda item: item[1].sum())
    _, jpeg = cv2.imencode(".jpg", crop(image, seen), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    manifest.write_bytes_atomic(folder / split / list(OBJECTS)[class_id] / f"{index:06d}.jpg", jpeg.tobytes())


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="folder of the data set")],
    train: Annotated[int, typer.Option(min=1, help="training images")] = Shapes.train,
    val: Annotated[int, typer.Option(min=1, help="validation images")] = Shapes.val,
    test: Annotated[int, typer.Option(min=1, help="test images")] = Shapes.test,
    imgsz: Annotated[int, typer.Option(min=64, help="side of the square images, in pixels")] = Shapes.imgsz,
    seed: Annotated[int, typer.Option(min=0, help="the same seed gives the same pictures")] = Shapes.seed,
    task: Annotated[Task, typer.Option(help="detect, segment, obb, pose or classify: what the labels say")] = "detect",
) -> None:
    """Generate the default data set: drawn objects on cluttered, textured, unevenly lit pictures."""
    print(f"data set: {generate(output, Shapes(train, val, test, imgsz, seed, task))}")


if __name__ == "__main__":
    run_app(app)
