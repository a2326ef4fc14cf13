"""What the documentation tells users to type is understood, and its tree is the tree."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "results.md", *sorted((ROOT / "configs").glob("**/*.yaml"))]
COMMANDS = sorted(
    {
        command
        for document in DOCUMENTS
        for command in re.findall(r"(python -m (?:compress|export|benchmark)\.[^`\n]*)", document.read_text("utf-8"))
    }
)
STUDIES = sorted(
    set(re.findall(r"\n    python (?:-m )?(scripts[./](?:studies|peers)[./].*)", DOCUMENTS[1].read_text("utf-8")))
)


def parse(command: str) -> None:
    """Let the command's own parser read its options, without running it."""
    _, _, module, *arguments = shlex.split(command, comments=True)
    app = importlib.import_module(module).app
    typer.main.get_command(app).make_context(module, arguments)


def test_commands_are_found() -> None:
    assert len(COMMANDS) >= 10
    assert len(STUDIES) >= 15
    modules = {command.split()[2] for command in COMMANDS}
    assert {"compress.run", "compress.sparsify", "compress.finetune", "export.onnx", "benchmark.latency"} <= modules


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_are_understood(command: str) -> None:
    parse(command)


def test_a_wrong_command_is_seen() -> None:
    with pytest.raises(Exception, match="--no-such") as caught:
        parse("python -m compress.run --config x.yaml --no-such")
    assert type(caught.value).__name__ == "NoSuchOption"


@pytest.mark.parametrize("command", STUDIES)
def test_the_commands_of_the_studies_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(command.replace("…", ""))
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    parse_args = argparse.ArgumentParser.parse_args
    understood = []

    def only_parse(parser: argparse.ArgumentParser, *_: Any) -> None:
        understood.append(parse_args(parser, arguments))
        raise KeyboardInterrupt  # before the study begins

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    with pytest.raises(KeyboardInterrupt):
        module.main()
    assert len(understood) == 1


def test_the_files_that_documents_name_exist() -> None:
    for document in DOCUMENTS[:2]:
        text = document.read_text("utf-8")
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
        named = re.findall(r"(?:configs|scripts|docs)/[\w./-]+\.(?:yaml|sh|md|json|py)", text)
        missing = [
            name
            for name in {*links, *named}
            if not (document.parent / name).exists() and not (ROOT / name).exists() and "NAME" not in name
        ]
        assert missing == [], document


def test_the_tree_of_the_readme_names_every_command_and_package() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    tree = text[text.index("## The tree") : text.index("## When something is off")]
    for package in ("compress", "export", "benchmark"):
        named = re.findall(r"[\w.]+", tree[tree.index(f"    {package}/ ") :])
        for path in (ROOT / package).iterdir():
            if path.suffix == ".py" and "run_app(" in path.read_text("utf-8") and path.name != "errors.py":
                assert path.stem in named or path.name in named, path
            elif (path / "__init__.py").is_file():
                assert path.name in named, path
