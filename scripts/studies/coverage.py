"""Prove that every model of `zoo.py` can be pruned as it is: docs/results/coverage.json and docs/coverage.md.

usage: python -m scripts.studies.coverage [MODEL …] [--jobs 2] [--output docs/results/coverage.json]

For each model: its channel graph, three random plans (30, 45 and 60 % of the prunable channels) against the masked
dense model, a step of an optimizer, a round trip through a file, and ONNX in onnxruntime against PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import re
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import manifest
from compress.channels.coverage import prunable_share
from compress.channels.graph import Graph, build_graph
from compress.checkpoint import load_model, save_model, structure_hash
from compress.errors import EspalierError
from compress.pruning.budget import Target, choose
from compress.pruning.importance import importance
from compress.pruning.oracle import noise, oracle_error
from compress.pruning.plan import make_plan, parse_plan
from compress.pruning.surgery import apply_plan
from compress.settings import Budget
from scripts.studies import zoo

RESULT, PAGE = Path("docs/results/coverage.json"), Path("docs/coverage.md")
PEER = Path("docs/results/coverage_torch_pruning.json")
SHARES = (0.3, 0.45, 0.6)
_ANY_WIDTH = Budget(multiple_of=1, min_width=1, max_removed=0.9)


def row(name: str) -> dict[str, Any]:
    """Return all that the table says of one model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    model = with_trained_norms(zoo.build(name), zoo.imgsz(name))
    graph = build_graph(model, zoo.imgsz(name))
    traced = time.perf_counter()
    whole = replace(graph, training_only=frozenset())  # both heads of an end-to-end model can be pruned
    result: dict[str, Any] = {
        "model": name,
        "imgsz": zoo.imgsz(name),
        "groups": len(graph.groups),
        "prunable_params": prunable_share(whole, whole.params) * whole.params(whole.widths) / parameters(model),
        "prunable_macs": prunable_share(whole, whole.macs),
        "params": parameters(model),
        "frozen": reasons(graph),
        "graph_s": round(traced - start, 2),
    }
    cuts = [cut(graph, model, share, seed) for seed, share in enumerate(SHARES)]
    result["oracle"] = [error for _, _, error in cuts]
    pruned, plan, _ = cuts[-1]
    result["params_left"] = parameters(pruned) / parameters(model)
    image = noise(graph, model)
    result["round_trip"] = round_trip_error(model, pruned, plan, image)
    result["onnx"] = onnx_error(pruned, image)
    result["trained"] = takes_a_step(pruned, image)
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def cut(graph: Graph, model: nn.Module, share: float, seed: int) -> tuple[nn.Module, dict[str, Any], float]:
    """Remove a share of the prunable channels at random; return the pruned model, its plan and the oracle's error."""
    choice = choose(graph, importance(graph, model, "random", seed), Target("percent", share), _ANY_WIDTH)
    plan = make_plan(graph, choice, structure_hash(model), f"percent {share}", "random")
    pruned = apply_plan(model, plan)
    return pruned, plan.model_dump(mode="json"), oracle_error(graph, pruned, choice.keep, noise(graph, model, seed))


def with_trained_norms(model: nn.Module, imgsz: int) -> nn.Module:
    """Give every batch norm scales and shifts of its own and the statistics of noise, as a trained model has its own.

    With fresh ones signals fade on their way, and an attention of tiny products returns the mean of its values however
    wrongly it was cut.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.3, 0.3)
        norm.momentum = 1.0
    for name, parameter in model.named_parameters():
        if name.endswith((".gamma", ".layer_scale")):  # these begin at 0.01 or less, and a branch behind them unseen
            nn.init.uniform_(parameter, 0.5, 1.5)
    with torch.no_grad():
        model.train()(torch.rand(4, 3, imgsz, imgsz))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return model.eval()


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def reasons(graph: Graph) -> dict[str, int]:
    """Return how many channels are frozen, by operation; what the model returns is not counted."""
    found: Counter[str] = Counter()
    for group in graph.groups:
        if group.frozen and not group.frozen.endswith("output of the model"):
            reason = re.sub(r"^\S+ computes its weight", "computed weight", group.frozen)
            found[re.split(r" in |:| \[", reason)[0]] += group.width * group.unit
    return dict(found.most_common())


def flat(outputs: Any) -> list[torch.Tensor]:
    """Return the floating-point tensors of what a model returns, in order."""
    from torch.utils import _pytree as pytree

    return [
        value for value in pytree.tree_leaves(outputs) if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]


def relative_error(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest difference as a share of the largest magnitude of each output."""
    assert len(outputs) == len(expected) > 0
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in zip(outputs, expected, strict=True)
    )


def round_trip_error(model: nn.Module, pruned: nn.Module, plan: dict[str, Any], image: torch.Tensor) -> float:
    """Save and load the pruned model and compare outputs: as a checkpoint, or as a plan and weights for strangers."""
    import tempfile

    if hasattr(model, "yaml"):
        with tempfile.TemporaryDirectory() as folder:
            save_model(pruned, Path(folder) / "pruned.pt", {})
            again = load_model(Path(folder) / "pruned.pt")
        pruned = copy.deepcopy(pruned).half().float()  # as checkpoints store it
    else:
        stream = io.BytesIO()
        torch.save(pruned.state_dict(), stream)
        again = apply_plan(model, parse_plan(json.loads(json.dumps(plan)), "plan"))
        again.load_state_dict(torch.load(io.BytesIO(stream.getvalue()), weights_only=True))
    with torch.inference_mode():
        return relative_error(flat(again.eval()(image)), flat(pruned.eval()(image)))


def onnx_error(pruned: nn.Module, image: torch.Tensor) -> float:
    """Export the pruned model as it is deployed and compare onnxruntime with PyTorch."""
    import onnxruntime

    network: Any = copy.deepcopy(pruned).eval()
    if hasattr(network, "fuse"):
        network.fuse(verbose=False)
        network.model[-1].export = True
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = flat(network(image))
        stream: Any = io.BytesIO()
        torch.onnx.export(network, (image,), stream, dynamo=False, opset_version=17, input_names=["images"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(stream.getvalue(), options, providers=["CPUExecutionProvider"])
    outputs = flat([torch.from_numpy(value) for value in session.run(None, {"images": image.numpy()})])
    if "RTDETR" in type(network).__name__:  # its queries are sorted by score, and equal scores may swap places
        outputs, expected = ([value.sort(dim=1).values for value in values] for values in (outputs, expected))
    return relative_error(outputs, expected)


def takes_a_step(pruned: nn.Module, image: torch.Tensor) -> bool:
    """Tell whether a step of SGD in training mode moves weights of the pruned model and leaves all of them finite."""
    model = copy.deepcopy(pruned).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    batch = torch.cat([image, image.flip(-1)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sum(value.square().mean() for value in flat(model(batch))).backward()  # type: ignore[union-attr]
    optimizer.step()
    before = dict(pruned.named_parameters())
    moved = [not torch.equal(value, before[name]) for name, value in model.named_parameters()]
    return any(moved) and all(bool(value.isfinite().all()) for value in model.parameters())


def measure(name: str) -> dict[str, Any]:
    """Return the row of a model, or what stopped it."""
    try:
        return row(name)
    except (EspalierError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError, KeyError) as error:
        return {"model": name, "error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def page(rows: list[dict[str, Any]], peer: list[dict[str, Any]]) -> str:
    """Return the table as Markdown, the peer's result beside ours where there is one."""
    theirs = {found["model"]: found for found in peer}
    lines = [
        "| model | groups | params, M | prunable params | prunable MACs | frozen inside, channels | oracle error | "
        "step | file | ONNX | s | Torch-Pruning |",
        "|---|--:|--:|--:|--:|---|--:|---|--:|--:|--:|---|",
    ]
    for found in rows:
        beside = _peer(theirs.get(found["model"]))
        if "error" in found:
            lines.append(f"| {found['model']} | | | | | {found['error']} | | | | | | {beside} |")
            continue
        frozen = ", ".join(f"{reason} {count}" for reason, count in found["frozen"].items()) or "–"
        lines.append(
            f"| {found['model']} | {found['groups']} | {found['params'] / 1e6:.2f} | {found['prunable_params']:.1%} | "
            f"{found['prunable_macs']:.1%} | {frozen} | {max(found['oracle']):.1e} | "
            f"{'yes' if found['trained'] else 'NO'} | {found['round_trip']:.0e} | {found['onnx']:.1e} | "
            f"{found['seconds']:.0f} | {beside} |"
        )
    return "\n".join(lines) + "\n"


def _peer(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not measured"
    if found["status"] == "ok":
        return f"{found['prunable_params']:.1%}, {found['oracle_error']:.0e}"
    error = re.search(r"\w+Error", found["error"])
    return "no answer in 100 s" if found["status"] == "timeout" else error[0] if error else found["error"]


def write_page(rows: list[dict[str, Any]]) -> None:
    """Put the table into docs/coverage.md, below its head."""
    text = PAGE.read_text(encoding="utf-8")
    peer = manifest.read_json(PEER)["rows"] if PEER.is_file() else []
    manifest.write_bytes_atomic(PAGE, (text[: text.index("| model |")] + page(rows, peer)).encode())


def main() -> None:
    """Measure what is missing in the record and write it, with the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of zoo.py; all of them if none is given")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--output", type=Path, default=RESULT, help="models that it has already are not run again")
    given = parser.parse_args()
    names = given.models or zoo.names()
    record = manifest.read_json(given.output) if given.output.is_file() else {"rows": []}
    done = {found["model"]: found for found in record["rows"]}
    start = time.perf_counter()
    with ProcessPoolExecutor(given.jobs) as pool:
        waiting = {pool.submit(measure, name) for name in names if name not in done or "error" in done[name]}
        for number, future in enumerate(as_completed(waiting), start=1):
            found = future.result()
            done[found["model"]] = found
            print(f"{number}/{len(waiting)}", {key: found[key] for key in found if key != "frozen"}, flush=True)
            rows = [done[name] for name in zoo.names() if name in done]
            manifest.write_json(given.output, {"tools": manifest.tool_versions(), "rows": rows})
    rows = [done[name] for name in zoo.names() if name in done]
    proven = [found for found in rows if "error" not in found and max(found["oracle"]) <= 1e-4]
    print(f"{len(proven)} of {len(rows)} models pass the oracle; {time.perf_counter() - start:.0f} s")
    if given.output == RESULT:
        write_page(rows)


if __name__ == "__main__":
    main()
