"""What every section is: strict, complete, and with all its mistakes reported at once."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from compress.errors import SettingsError

Section = TypeVar("Section", bound="Strict")


class Strict(BaseModel):
    """A settings section: an unknown key is an error, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def changed(self, *names: str) -> str | None:
        """Return the first of these settings that is not as it is by default."""
        fields = type(self).model_fields
        return next((name for name in names if getattr(self, name) != fields[name].default), None)


def parse(kind: type[Section], content: dict[str, Any], source: str) -> Section:
    """Check a mapping against a settings section and return the section; report every mistake in one error."""
    import json

    try:
        # Through JSON, so that strict typing still takes a YAML list where a tuple is meant.
        text = json.dumps(content, default=str)
    except (TypeError, ValueError) as error:  # a date as a key, or a mapping that holds itself
        raise SettingsError(f"{source} holds what a configuration cannot: {error}") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        # Of a number that may be a word too, pydantic says twice what is wrong: as a number, and as a word.
        items = [item for item in error.errors() if not str(["", *item["loc"]][-1]).startswith("literal[")]
        mistakes = [_describe(item, kind) for item in items]
        raise SettingsError(f"{source}: {'; '.join(mistakes)}") from None


def _describe(item: Any, kind: type[Strict]) -> str:
    """Say in a few words what pydantic found wrong, and what may have been meant."""
    where = ".".join(str(part) for part in item["loc"]).removesuffix(".constrained-float") or "settings"
    if item["type"] == "extra_forbidden":
        *parents, last = item["loc"]
        close = difflib.get_close_matches(str(last), _keys(kind, parents), n=1)
        return f"unknown key '{where}'" + (f", did you mean '{close[0]}'?" if close else "")
    if item["type"] == "missing":
        return f"'{where}' is missing"
    got = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
    text = f"{where}: {item['msg'].removeprefix('Value error, ')}{got}"
    limit = item.get("ctx", {}).get({"less_than": "lt", "less_than_equal": "le"}.get(item["type"], ""))
    if limit == 1 and 1 < item["input"] <= 100:
        text += f": a share is meant, such as {item['input'] / 100:g}"
    return text


def _keys(kind: Any, parents: list[str | int]) -> list[str]:
    """Return the keys of the section that lies at a place inside a section."""
    for name in parents:
        if isinstance(name, str):  # a number is a place in a list of sections
            annotation = kind.model_fields[name].annotation
            inner = (annotation, *get_args(annotation))
            kind = next(part for part in inner if isinstance(part, type) and issubclass(part, Strict))
    return list(kind.model_fields)
