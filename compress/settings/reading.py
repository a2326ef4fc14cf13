"""YAML and `key=value` pairs, read with the safe loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.errors import SettingsError


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader; `configs/…` that is not below the current folder is Espalier's own.

    Raises:
        SettingsError: the file is missing, is not YAML, or is not a mapping.
    """
    import yaml

    import configs

    own = Path(configs.__file__).parents[1] / path
    if path.parts[:1] == ("configs",) and not path.exists() and own.is_file():
        path = own
    try:
        content = _parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path} does not exist: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise SettingsError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold a mapping of keys to values, it holds {type(content).__name__}")
    return content


def _parse_yaml(text: str) -> Any:
    """Read YAML with the safe loader; 1e-4 is a number, as in YAML 1.2 (for PyYAML it is a word without a dot)."""
    import re

    from yaml import SafeLoader

    class Loader(SafeLoader):
        pass

    exponent = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+.0123456789"))
    return Loader(text).get_single_data()


def training_args(pairs: list[str]) -> dict[str, Any]:
    """Read `key=value` pairs as Ultralytics training arguments, such as `nbs=16`.

    Raises:
        SettingsError: a pair without a key or without a value.
    """
    content: dict[str, Any] = {}
    for pair in pairs:
        apply_override(content, pair)
    return content


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set a value such as `finetune.epochs=20` in a mapping of mappings.

    Raises:
        SettingsError: it has no key or no value, or the value is not YAML.
    """
    import yaml

    key, separator, text = override.partition("=")
    if not separator or not key:
        raise SettingsError(f"'{override}' must have the form key=value, such as finetune.epochs=20")
    *parents, last = key.split(".")
    section = content
    for name in parents:
        inner = section.get(name, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"'{key}': '{name}' is a value, not a section")
        section[name] = dict(inner)  # a copy: a YAML alias may show the same section in another place
        section = section[name]
    try:
        section[last] = _parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"'{override}' has a value that is not valid YAML: {error}") from None
