"""The energy that Linux tells of, from files as Intel's RAPL has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark import system, worker


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(system, "_POWERCAP", tmp_path)
    domains = [
        ("intel-rapl:0", "package-0", 5_000_000),
        ("intel-rapl:0:0", "core", 4_000_000),
        ("intel-rapl:1", "package-1", 2_000_000),
        ("intel-rapl:2", "psys", 9_000_000),
    ]
    for folder, name, energy in domains:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "name").write_text(f"{name}\n")
        (tmp_path / folder / "energy_uj").write_text(f"{energy}\n")
    return tmp_path


def test_packages_are_added_and_neither_their_parts_nor_the_platform_are(powercap: Path) -> None:
    assert system.energy_uj() == 7_000_000


def test_what_only_root_may_read_is_unknown(powercap: Path) -> None:
    (powercap / "intel-rapl:1" / "energy_uj").unlink()
    assert system.energy_uj() is None


def test_a_machine_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_POWERCAP", tmp_path / "nothing")
    assert system.energy_uj() is None


@pytest.mark.parametrize(("after", "expected"), [(7_500_000, 2_500_000), (1_000, None)])  # the second ran over
def test_a_burst_took_the_difference(powercap: Path, after: int, expected: int | None) -> None:
    (powercap / "intel-rapl:1" / "energy_uj").write_text("0\n")

    def infer() -> list[object]:
        (powercap / "intel-rapl:0" / "energy_uj").write_text(str(after))
        return []

    found, _ = worker._measure(infer, 2)
    assert found["energy_uj"] == expected
    assert len(found["samples_ms"]) == 2
