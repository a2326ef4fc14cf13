"""Which image size a data set needs: how small its objects become at each, and what each costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.errors import DataError, SettingsError, run_app

if TYPE_CHECKING:
    import numpy as np

STEP = 32
LIMITS_PX = (8, 16)  # the finest stride of a detector and its double: below, an object is hardly more than one cell
MAX_TINY_SHARE = 0.05
_SAMPLE = 5000


@dataclass(frozen=True)
class Objects:
    """What was read of a split.

    Attributes:
        sides: shorter side of every object as a share of the longer side of its image, shape (objects,).
        images: number of images that were read.
        native: longer side of the images, px, the median.
    """

    sides: np.ndarray
    images: int
    native: int


@dataclass(frozen=True)
class Row:
    """One image size, px: shares of objects whose shorter side is below each of `LIMITS_PX`, and the relative cost."""

    imgsz: int
    below: tuple[float, ...]
    cost: float


def read_objects(data: Path, split: str = "train") -> Objects:
    """Read the sizes of the images and objects of a split, of at most 5000 images evenly over it.

    Raises:
        DataError: a data set without boxes, an image that cannot be opened, a label that is none, or no object in the
            split.
    """
    import numpy as np
    from PIL import Image
    from ultralytics.data.utils import exif_size

    from compress.data.dataset import check_label, class_names, images, keypoints, label_file, unreadable
    from compress.progress import track

    if data.is_dir():
        raise DataError(f"{data} is a data set of classified images, which has no objects: give a detector's .yaml")
    files, classes, points = images(data, split), len(class_names(data)), keypoints(data)
    sides: list[float] = []
    longest: list[int] = []
    files = files[:: -(-len(files) // _SAMPLE)]
    for path in track(files, "objects"):
        try:
            with Image.open(path) as image:
                width, height = exif_size(image)
        except (OSError, ImportError, Image.DecompressionBombError) as error:  # as in `dataset`
            raise unreadable(path, error) from None
        longest.append(max(width, height))
        label = label_file(path)
        lines = label.read_text(encoding="utf-8-sig", errors="replace").splitlines() if label.is_file() else []
        for number, line in enumerate(lines, 1):
            if fields := line.split():
                check_label(fields, classes, points, f"{label}:{number}")  # nobody has checked those of `test`
                w, h = _box([float(value) for value in fields[1:]], points is not None)
                sides.append(min(w * width, h * height) / longest[-1])
    if not sides:
        raise DataError(f"{data}: no image of '{split}' has a labelled object: choose another --split")
    return Objects(np.array(sides), len(files), int(np.median(longest)))


def _box(values: list[float], points: bool) -> tuple[float, float]:
    """Return width and height of a label: of a box, or of the box around a polygon."""
    if points or len(values) == 4:
        return values[2], values[3]
    return max(values[::2]) - min(values[::2]), max(values[1::2]) - min(values[1::2])


def table(found: Objects, lowest: int, highest: int) -> list[Row]:
    """Return a row for every multiple of 32 between two image sizes; the cost is relative to the highest.

    An image is scaled so that its longer side is imgsz. The work of a convolutional network grows with imgsz².
    """
    return [
        Row(
            imgsz,
            tuple(float((found.sides * imgsz < limit).mean()) for limit in LIMITS_PX),
            (imgsz / highest) ** 2,
        )
        for imgsz in range(lowest, highest + 1, STEP)
    ]


def sentence(found: Objects, rows: list[Row]) -> str:
    """Return what the table says, in a sentence."""
    tiny = f"below {LIMITS_PX[0]} px"
    good = next((row for row in rows if row.below[0] <= MAX_TINY_SHARE), None)
    if good is None:
        last = rows[-1]
        return (
            f"Even at {last.imgsz} px {last.below[0]:.1%} of the objects are {tiny}: try a larger --highest, "
            "or cut the images into tiles."
        )
    least = "the least looked at, and already there" if good is rows[0] else "the least at which"
    text = f"{good.imgsz} px is {least} no more than {MAX_TINY_SHARE:.0%} of the objects are {tiny}"
    text += f" ({good.below[0]:.1%}); it costs {good.cost:.0%} of {rows[-1].imgsz} px"
    if good.imgsz > found.native:
        text += f", but the images have {found.native} px only, and what is beyond adds nothing"
    return text + ". A sweep over imgsz near it says what that is worth in mAP."


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    data: Annotated[str, typer.Option(help="data set YAML, or 'shapes' for the generated one")],
    split: Annotated[str, typer.Option(help="train, val or test")] = "train",
    lowest: Annotated[int, typer.Option(min=STEP, help="smallest image size, px")] = 160,
    highest: Annotated[int, typer.Option(min=STEP, help="largest image size, px")] = 640,
) -> None:
    """Say which image size a data set needs, by the sizes of its objects."""
    from rich.console import Console
    from rich.table import Table

    from compress.data.dataset import resolve

    if lowest % STEP or highest % STEP or lowest > highest:
        raise SettingsError(f"--lowest {lowest} and --highest {highest} must be multiples of {STEP}, in this order")
    found = read_objects(resolve(data), split)
    rows = table(found, lowest, highest)
    shown = Table(title=f"{len(found.sides)} objects in {found.images} images of {found.native} px")
    for heading in ("imgsz", *(f"below {limit} px" for limit in LIMITS_PX), f"cost, {highest} px = 100%"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(str(row.imgsz), *(f"{share:.1%}" for share in row.below), f"{row.cost:.0%}")
    console = Console()
    console.print(shown)
    print(sentence(found, rows))


if __name__ == "__main__":
    run_app(app)
