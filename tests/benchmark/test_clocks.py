"""What devices say of clocks, throttling and power, as their tools print it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from benchmark import clocks
from benchmark.transports import Local
from compress.devices import known_devices
from compress.errors import DeviceError

ORIN = (
    "11-25-2026 12:00:00 RAM 2048/7620MB (lfb 4x4MB) SWAP 0/3810MB (cached 0MB) CPU [2%@1510,0%@1510,off] EMC_FREQ "
    "0%@2133 GR3D_FREQ 0%@[{mhz}] cpu@50.2C gpu@49C VDD_IN {now}mW/4800mW VDD_CPU_GPU_CV 500mW/500mW"
)
NANO = "RAM 1000/3964MB IRAM 0/252kB CPU [1%@102] GR3D_FREQ 0%@{mhz} POM_5V_IN {now}/2050 POM_5V_GPU 0/0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("throttled=0x0", []),
        ("throttled=0x5", ["the Raspberry Pi tells of under-voltage and throttling now (get_throttled 0x5)"]),
        (
            "throttled=0x50008",
            [
                "the Raspberry Pi tells of the soft temperature limit now, under-voltage and throttling since it was "
                "started, which a restart clears (get_throttled 0x50008)"
            ],
        ),
        ("0x0000000000000001", []),  # idle
        ("NVIDIA L4, 300 MHz, 0x0000000000000024", ["the GPU's clocks are held down by its power cap and heat"]),
        ("vcgencmd cannot be started", []),
    ],
)
def test_the_device_itself_tells_of_throttling(text: str, expected: list[str]) -> None:
    assert clocks.throttling({"read": ""}, {"read": text}, fixed=False) == expected


@pytest.mark.parametrize("line", [ORIN, NANO])
def test_a_locked_clock_must_not_fall(line: str) -> None:
    fast, slow = ({"tegrastats": line.format(mhz=mhz, now=5000)} for mhz in (918, 306))
    assert clocks.throttling(fast, slow, fixed=True) == ["the GPU's locked clock fell from 918 to 306 MHz"]
    assert clocks.throttling(fast, slow, fixed=False) == []  # the GPU rests between measurements
    assert clocks.throttling(fast, fast, fixed=True) == []


@pytest.mark.parametrize("line", [ORIN, NANO])
def test_power_is_the_mean_of_the_lines(line: str) -> None:
    text = "\n".join(line.format(mhz=306, now=now) for now in (4000, 5001))
    assert clocks.power_mw({"nvpmodel": "NV Power Mode: 15W", "tegrastats": text}) == 4500.5
    assert clocks.power_mw({"nvpmodel": "NV Power Mode: 15W"}) is None


# NVIDIA's script asks before it stores into a file that is there, and takes no answer for a no.
JETSON_CLOCKS = """\
#!/bin/sh
case $1 in
  --store) if [ -e "$2" ]; then echo "Error: file $2 already exists!"; exit 1; fi; cat "$STATE" > "$2" ;;
  --restore) [ -e "$2" ] || exit 1; cat "$2" > "$STATE" ;;
  "") echo locked > "$STATE" ;;
esac
"""


# It finds /run in a folder of the test.
SUDO = """\
#!/bin/sh
shift
for word; do shift; set -- "$@" "$(echo "$word" | sed 's#^/run#{root}/run#')"; done
exec "$@"
"""


@pytest.mark.parametrize("name", [name for name in known_devices() if name.startswith("jetson-")])
def test_the_clocks_of_a_jetson_are_fixed_as_often_as_wanted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    state = tmp_path / "state"
    state.write_text("free\n")
    monkeypatch.setenv("STATE", str(state))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for program, text in (("jetson_clocks", JETSON_CLOCKS), ("sudo", SUDO.format(root=tmp_path))):
        (tmp_path / program).write_text(text)
        (tmp_path / program).chmod(stat.S_IRWXU)
    device = known_devices()[name]
    for _ in range(2):
        with clocks.locked(device, Local()):
            assert state.read_text() == "locked\n"
        assert state.read_text() == "free\n"
    with pytest.raises(KeyboardInterrupt), clocks.locked(device, Local()):
        raise KeyboardInterrupt
    assert state.read_text() == "free\n"
    (tmp_path / "run" / "espalier-clocks.conf").write_text("free\n")  # what kill -9 leaves
    with pytest.raises(DeviceError, match=r"could not run sudo .*--store .* \(Error: file .* already exists!\)"):
        clocks.locked(device, Local()).__enter__()
    assert (tmp_path / "run" / "espalier-clocks.conf").read_text() == "free\n"
