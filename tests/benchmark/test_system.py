"""What a machine says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark import system


@pytest.mark.parametrize(
    ("text", "cpu", "virtual"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu sse2 avx avx2 hypervisor\n", "AMD EPYC (AVX2)", True),
        (
            "model name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f avx512_vnni avx_vnni\n",
            "AMD EPYC (AVX2, AVX-512, VNNI)",
            False,
        ),
        ("model name\t: Pentium\nflags\t\t: fpu sse2\n", "Pentium", False),
        ("model name\t: Cortex-A76\nFeatures\t: fp asimd asimdhp asimddp\n", "Cortex-A76 (fp16, dot products)", None),
    ],
)
def test_processors_of_one_name_are_told_apart(
    tmp_path: Path, monkeypatch, text: str, cpu: str, virtual: bool | None
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(system, "_CPUINFO", tmp_path / "cpuinfo")
    found = system.device()
    assert (found["cpu"], found["virtual_machine"]) == (cpu, virtual)
