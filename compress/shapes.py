"""The default data set: drawn objects that only their shape tells apart, on cluttered and textured pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.data.drawn import POSE_YAML, Task, crop, label
from compress.data.figures import OBJECTS
from compress.data.scene import draw_objects
from compress.errors import DataError, run_app

# Raise it whenever the same seed gives other pictures, so that a set of an older version is not taken for a new one.
GENERATOR = 1
SPLITS = ("train", "val", "test")
YAML = "shapes.yaml"
MARKER = "shapes.json"

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
