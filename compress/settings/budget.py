"""The widths that a device likes, and how a budget is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from compress.settings.reading import load_yaml
from compress.settings.strict import Strict, parse


class LayerRule(Strict):
    """What the layers whose names match a glob may keep; a value that is not given is inherited."""

    layers: str = Field(description="glob over layer names, such as 'model.0.*' or 'model.22.cv2.*'")
    multiple_of: int | None = Field(default=None, ge=1)
    power_of_two: bool | None = None
    min_width: int | None = Field(default=None, ge=1)
    max_removed: float | None = Field(default=None, ge=0.0, le=1.0)
    freeze: bool | None = None


class Budget(Strict):
    """The widths that a device likes. See configs/budgets/ for measured ones."""

    multiple_of: int = Field(default=8, ge=1, description="channel counts are multiples of this")
    power_of_two: bool = Field(default=False, description="channel counts are powers of two")
    min_width: int = Field(default=8, ge=1, description="no layer becomes narrower than this")
    max_removed: float = Field(
        default=0.75, ge=0.0, le=1.0, description="largest share of channels that one group may lose"
    )
    rules: tuple[LayerRule, ...] = Field(default=(), description="per-layer overrides, the last match wins")
    source: str = Field(default="", description="where the rule comes from")


def load_budget(path: Path) -> Budget:
    """Read a file of configs/budgets/, or the budget of a device: `rpi5`, `rpi5:onnxruntime`, a file of its own.

    Raises:
        SettingsError: there is no such file or device, or it does not hold a budget.
    """
    return parse(Budget, budget_content(path), str(path))


def budget_content(path: Path) -> dict[str, Any]:
    """Return what `load_budget` checks."""
    if path.suffix in (".yaml", ".yml") or path.is_file():
        content = load_yaml(path)
        if "budgets" not in content:
            return content
    from compress.devices import device_budget

    return device_budget(str(path)).model_dump(mode="json")
