"""Convert a checkpoint of the original YOLOv5 or YOLOv7 repository: backbone and neck are kept, the head becomes new.

The file is read without the code that it was written with, and nothing in it is run (see `foreign`). Its layers are
translated one by one (see `translate`), and every tensor is checked by name and shape. The result is an ordinary
checkpoint: it has to be fine-tuned, because its anchor-free head has not seen an image.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress import checkpoint, manifest
from compress.errors import CheckpointError, RunError, SettingsError, printable, run_app

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.conversion.foreign import Foreign, StandIn
    from compress.conversion.translate import Row, Translation

_YOLOV7 = {
    "SPPCSPC",
    "DownC",
    "RepConv",
    "MP",
    "SP",
    "ReOrg",
    "IDetect",
    "IAuxDetect",
}  # kinds that YOLOv5 does not have


def convert(model: Path, nc: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model with the weights of a YOLOv5 or YOLOv7 checkpoint and a new head, and the report of it.

    Args:
        model: checkpoint of https://github.com/ultralytics/yolov5 or https://github.com/WongKinYiu/yolov7.
        nc: number of classes of the new head; the checkpoint's own number, and then also its names, if not given.

    Returns:
        The model, in fp32 and evaluation mode, and `family`, `depth_multiple` and `width_multiple` (as the checkpoint's
        own YAML has them, or null), `classes`, `carried_over` and `new` (tensors, parameters, and the share
        of all parameters), `left_behind` (layers of the checkpoint), `layers` (from, layer, kind, tensors, parameters).

    Raises:
        CheckpointError: the file cannot be read, is not such a detector, or a layer or shape does not fit.
    """
    from compress.conversion.foreign import read_foreign
    from compress.conversion.reading import kind_of
    from compress.conversion.translate import translate

    foreign = read_foreign(model)
    network = _network(foreign)
    layers = _layers(network, model)
    found = network.state.get("yaml")
    yaml: dict[str, Any] = found if isinstance(found, dict) else {}
    try:
        translation = translate(layers, _length(yaml.get("backbone"), len(layers) - 1))
        names = _class_names(network, layers[-1], nc)
        built = _build(translation, names)
        tensors, parameters = _load(built, translation, foreign)
        _check_strides(built, network, foreign)
    except CheckpointError as error:
        raise CheckpointError(f"{model} cannot be converted: {str(error).removeprefix(f'{model} ')}") from None
    family = "YOLOv7" if _YOLOV7 & {kind_of(layer) for layer in layers} else "YOLOv5"
    total = sum(p.numel() for p in built.parameters())
    state = built.state_dict()
    report = {
        "family": family,
        "depth_multiple": _finite(yaml.get("depth_multiple")),
        "width_multiple": _finite(yaml.get("width_multiple")),
        "classes": names,
        "carried_over": {"tensors": tensors, "parameters": parameters, "share": parameters / total},
        "new": {"tensors": len(state) - tensors, "parameters": total - parameters, "share": 1 - parameters / total},
        "left_behind": [f"{translation.rows[-1].origin}: anchor head", *translation.unused],
        "layers": _table(built, translation),
    }
    return built, report


def _network(foreign: Foreign) -> StandIn:
    from compress.conversion.foreign import StandIn

    content, path = foreign.content, foreign.path
    if isinstance(content, dict):
        content = content["ema"] if isinstance(content.get("ema"), StandIn) else content.get("model")
    if not isinstance(content, StandIn):
        raise CheckpointError(
            f"{path} holds no model, only {'tensors or settings' if content is not None else 'nothing'}: "
            "give the checkpoint that YOLOv5's or YOLOv7's train.py wrote"
        )
    if content.kind.startswith("ultralytics."):
        raise CheckpointError(f"{path} is an Ultralytics checkpoint already: every command opens it as it is")
    if content.kind.rpartition(".")[0].split(".")[-2:] != ["models", "yolo"]:
        raise CheckpointError(f"{path} holds a {content.kind}, which is no model of the YOLOv5 or YOLOv7 repositories")
    return content


def _layers(network: StandIn, path: Path) -> list[StandIn]:
    from compress.conversion.foreign import StandIn
    from compress.conversion.reading import modules

    sequence = modules(network).get("model")
    layers = list(modules(sequence).values()) if isinstance(sequence, StandIn) else []
    if not layers or not all(isinstance(layer, StandIn) for layer in layers):
        raise CheckpointError(f"{path} holds a {network.kind} without layers")
    return layers


def _class_names(network: StandIn, head: StandIn, nc: int | None) -> dict[int, str]:
    """Return the names by class, and check that there are as many as the head knows."""
    known, names = head.state.get("nc"), network.state.get("names")
    if type(known) is not int or known < 1:
        raise CheckpointError(f"its head knows {known!r} classes")
    listed = [str(name) for name in (names.values() if isinstance(names, dict) else names or ())]
    wanted = nc or known
    if len(listed) == wanted:
        return dict(enumerate(listed))
    if nc is None:
        raise CheckpointError(f"its head knows {known} classes, but it names {len(listed)}: give --nc")
    return {index: f"class{index}" for index in range(wanted)}


def _build(translation: Translation, names: dict[int, str]) -> nn.Module:
    """Build the network that the rows describe; its head is the same at every start."""
    import torch

    rows = [row.spelled(index) for index, row in enumerate(translation.rows)]
    first = translation.rows[0]
    channels = next((ref.size[1] for name, ref in first.weights.items() if name.endswith("conv.weight")), 3)
    cfg = {
        "nc": len(names),
        "channels": channels // 4 if first.spread else channels,
        "activation": translation.activation,
        "backbone": rows[: translation.backbone],
        "head": rows[translation.backbone :],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = checkpoint.build_model(cfg)
    model.names = names
    return model


def _load(model: Any, translation: Translation, foreign: Foreign) -> tuple[int, int]:
    """Put the weights into the built model and return how many tensors and parameters were carried over.

    Raises:
        CheckpointError: a tensor is missing, has no place, or has another shape than its place.
    """
    import torch

    from compress.conversion.translate import spread

    tensors = parameters = 0
    for layer, row in zip(model.model[:-1], translation.rows, strict=False):
        places = layer.state_dict()
        if places.keys() != row.weights.keys():
            odd = sorted(places.keys() ^ row.weights.keys())
            raise CheckpointError(f"{row.origin} and {row.kind} differ in their tensors: {', '.join(odd[:4])}")
        values: dict[str, Tensor] = {}
        for name, ref in row.weights.items():
            values[name] = foreign.tensor(ref).to(places[name].dtype)
            if row.spread and name == "conv.weight":
                values[name] = spread(values[name])
            if values[name].shape != places[name].shape:
                raise CheckpointError(
                    f"{row.origin}: {name} has the shape {list(values[name].shape)}, "
                    f"its place has {list(places[name].shape)}"
                )
            if not bool(torch.isfinite(values[name]).all()):
                raise CheckpointError(f"{row.origin}: {name} holds numbers that are not finite")
        _match_epsilon(layer, row, values)
        layer.load_state_dict(values)
        tensors += len(values)
        parameters += sum(p.numel() for p in layer.parameters())
    return tensors, parameters


def _check_strides(model: Any, network: StandIn, foreign: Foreign) -> None:
    from compress.conversion.foreign import TensorRef

    ref, ours = network.state.get("stride"), model.stride.tolist()
    theirs = foreign.tensor(ref).flatten().tolist()[: len(ours)] if isinstance(ref, TensorRef) else ours
    if theirs != ours:
        raise CheckpointError(f"its head has the strides {theirs}, the translated layers have {ours}")


def _match_epsilon(layer: Any, row: Row, values: dict[str, Tensor]) -> None:
    """Let batch norms compute what they did: Ultralytics gives all of them the same ε, so another one goes into γ."""
    for name, eps in row.eps.items():
        ours = layer.get_submodule(name.removesuffix(".")).eps
        if eps != ours:
            variance = values[f"{name}running_var"]
            values[f"{name}weight"] = values[f"{name}weight"] * ((variance + ours) / (variance + eps)).sqrt()


def _table(model: Any, translation: Translation) -> list[dict[str, Any]]:
    return [
        {
            "from": row.origin if index < len(translation.rows) - 1 else "new",
            "layer": index,
            "kind": row.kind,
            "tensors": len(layer.state_dict()),
            "parameters": sum(p.numel() for p in layer.parameters()),
        }
        for index, (layer, row) in enumerate(zip(model.model, translation.rows, strict=True))
    ]


def _length(value: Any, otherwise: int) -> int:
    return len(value) if isinstance(value, list) else otherwise


def _finite(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < 1e6 else None


def convert_file(model: Path, output: Path, nc: int | None = None) -> dict[str, Any]:
    """Write the converted checkpoint, and beside it its report as `NAME.json`; return the report.

    Nothing is done when both are there from the same input; the checkpoint appears last, and whole.

    Raises:
        CheckpointError: as `convert`.
        RunError: `output` is not a new .pt file.
    """
    if output.suffix != ".pt":
        raise RunError(f"{output} must end in .pt: it becomes a checkpoint")
    inputs = manifest.input_hashes({"model": model})
    path = output.with_suffix(".json")
    with manifest.lock(output):
        if output.exists():
            if path.is_file() and _is_of(report := manifest.read_json(path), output, inputs, nc):
                print(f"convert: finished before, unchanged: {output}")
                return report
            raise RunError(f"{output} exists: choose another --output")
        if path.exists() and not (path.is_file() and _is_report(path)):
            raise RunError(f"{path} exists, where the report goes, and is none: choose another --output")
        built, report = convert(model, nc)
        # The checkpoint gets its name last, so that none is ever without its report.
        scratch = output.with_name(f".{output.name}.tmp")
        try:
            checkpoint.save_model(built, scratch, {"task": "detect"})
            head = {"schema": manifest.SCHEMA, "stage": "convert", "config": {"nc": nc}, "parents": inputs}
            files = {output.name: manifest.sha256_file(scratch)}
            report = {**head, "tools": manifest.tool_versions(), "files": files, **report}
            manifest.write_json(path, report)
            scratch.replace(output)
        finally:
            scratch.unlink(missing_ok=True)
    return report


def _is_report(path: Path) -> bool:
    """Tell whether a file is the report of a conversion, as a crash may have left it without its checkpoint."""
    try:
        content = manifest.read_json(path)
    except RunError:
        return False
    return isinstance(content, dict) and content.get("stage") == "convert"


def _is_of(report: Any, output: Path, inputs: dict[str, str], nc: int | None) -> bool:
    wanted = ("convert", {"nc": nc}, inputs, {output.name: manifest.sha256_file(output)})
    return isinstance(report, dict) and tuple(map(report.get, ("stage", "config", "parents", "files"))) == wanted


def print_report(report: dict[str, Any]) -> None:
    """Print what became of each layer, and the sums."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{report['family']}, {len(report['classes'])} classes")
    for heading in ("from", "layer", "kind"):
        table.add_column(heading, no_wrap=True, justify="right" if heading == "layer" else "left")
    for heading in ("tensors", "parameters"):
        table.add_column(heading, justify="right")
    for row in report["layers"]:
        names = (escape(printable(name)) for name in (row["from"], str(row["layer"]), row["kind"]))
        table.add_row(*names, str(row["tensors"]), f"{row['parameters']:,}")
    console = Console()
    console.print(table)
    for name in ("carried_over", "new"):
        part = report[name]
        words = f"{part['tensors']} tensors, {part['parameters']:,} parameters ({part['share']:.1%})"
        console.print(f"{name.replace('_', ' '):>12}: {words}")
    console.print(printable(f" left behind: {', '.join(report['left_behind'])}"), markup=False)  # a stranger's names


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="the checkpoint to write (.pt); its report lies beside it (.json)")],
    model: Annotated[Path | None, typer.Argument(help="checkpoint of the original YOLOv5 or YOLOv7 repository")] = None,
    model_option: Annotated[Path | None, typer.Option("--model", help="the same, as other commands name it")] = None,
    nc: Annotated[int | None, typer.Option(min=1, help="classes of the new head, if other than the model's")] = None,
) -> None:
    """Convert a YOLOv5 or YOLOv7 detector: its backbone and neck with a new, anchor-free head, to be fine-tuned."""
    given = [path for path in (model, model_option) if path is not None]
    if len(given) != 1:
        raise SettingsError("name one model: python -m compress.convert MODEL --output NEW.pt")
    print_report(report := convert_file(given[0], output, nc))
    print(f"convert: {output} ({report['carried_over']['share']:.1%} of its parameters are the old ones; fine-tune it)")


if __name__ == "__main__":
    run_app(app)
