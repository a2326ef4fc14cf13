"""The same contract for this machine, a real sshd on the loopback and an adb that is a folder."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmark import transfer, transports
from benchmark.transports import Adb, Local, Ssh, Transport
from compress.errors import DeviceError, SettingsError

NASTY = "a b; touch $(x) 'q' \"d\" -n"


@pytest.fixture(params=["local", "ssh", "adb"])
def place(request: pytest.FixtureRequest) -> Transport:
    if request.param == "local":
        return Local()
    if request.param == "adb":
        request.getfixturevalue("adb")
        return Adb("phone-1", sys.executable)
    return Ssh(request.getfixturevalue("sshd").host, None, sys.executable)


@pytest.fixture
def folder(place: Transport) -> Any:
    made = transfer.make_folder(place)
    yield made
    transfer.remove_folder(place, made)


def test_words_reach_the_program_as_they_are(place: Transport, folder: str) -> None:
    command = [sys.executable, "-c", "import os, sys; print(sys.argv[1], os.environ['X'], sep='|')", NASTY]
    done = transports.run(place, command, folder=folder, environment={"X": NASTY})
    assert done.stdout == f"{NASTY}|{NASTY}\n"
    assert transports.run(place, ["ls", folder]).stdout == ""


def test_exit_codes_and_messages_come_back(place: Transport) -> None:
    command = [sys.executable, "-c", "import sys; sys.stderr.write('odd\\n'); sys.exit(3)"]
    assert transports.run(place, command).returncode == 3
    with pytest.raises(DeviceError, match=rf"^{place.name} could not be odd \(odd\): check it there$"):
        transports.run(place, command, purpose="be odd")


def test_files_go_there_and_come_back(place: Transport, folder: str, tmp_path: Path) -> None:
    source, back = tmp_path / "from", tmp_path / "back"
    (source / "inner").mkdir(parents=True)
    back.mkdir()
    (source / "inner" / "one.txt").write_bytes(b"1")
    (tmp_path / NASTY).write_bytes(b"2")
    transfer.push(place, [source, tmp_path / NASTY], folder)
    transfer.pull(place, f"{folder}/from/inner", ["one.txt", "none.txt"], back)
    assert [(path.name, path.read_bytes()) for path in back.iterdir()] == [("one.txt", b"1")]
    assert NASTY in transports.run(place, ["ls", folder]).stdout.splitlines()


def test_a_folder_is_private_and_goes_away(place: Transport) -> None:
    with transfer.job_folder(place) as made:
        mode = "import os, sys; print(oct(os.stat('.').st_mode & 0o777))"
        assert transports.run(place, [sys.executable, "-c", mode], folder=made).stdout == "0o700\n"
        assert (transfer.free_bytes(place, made) or 0) > 1 << 20
        with pytest.raises(DeviceError, match=rf"^{place.name} has \d+ MiB free in .*, 1099511627777 are needed: free"):
            transfer.require_room(place, made, 1 << 60)
    assert transports.run(place, ["ls", made]).returncode != 0


@pytest.mark.parametrize("place", ["ssh", "adb"], indirect=True)
def test_what_a_killed_run_left_is_removed_after_a_week(place: Transport, request: pytest.FixtureRequest) -> None:
    there = request.getfixturevalue("sshd").tmp if isinstance(place, Ssh) else None
    there = there or request.getfixturevalue("adb") / "data/local/tmp"
    ages_days = {"espalier.aaaaaaaa": 8, "espalier.bbbbbbbb": 2, "espalier.packages-of-mine": 99, "other.cccccccc": 99}
    for name, days in ages_days.items():
        (there / name / "inner").mkdir(parents=True)
        then = time.time() - 86400 * days
        os.utime(there / name, (then, then))
    with transfer.job_folder(place) as made:
        left = {path.name for path in there.iterdir()} - {Path(made).name}
    assert left == set(ages_days) - {"espalier.aaaaaaaa"}
    for name in left:
        shutil.rmtree(there / name)


def test_a_process_has_pipes_and_ends_with_its_input(place: Transport, folder: str, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        process = transports.start(place, ["cat"], {}, log, folder)
        assert process.communicate(b"\x00\xff raw\n", timeout=20) == (b"\x00\xff raw\n", None)
    assert process.returncode == 0


def test_whatever_shell_an_account_has_a_posix_one_reads_the_command() -> None:
    """fish refuses a line with $? in it, csh one with ${A:-b}: of its words alone all shells make the same."""
    command = transports.there(Ssh("jetson"), f"cd /tmp && {transports.script(['echo', NASTY])}")[-1]
    assert shlex.split(command) == ["sh", "-c", f"cd /tmp && {shlex.join(['echo', NASTY])}; exit $?"]


@pytest.mark.parametrize(
    "text",
    ["-oProxyCommand=touch x", "host;touch x", "$(touch x)", "host name", "a@-b", "host:0", "host:70000", "", "host\n"],
)
def test_what_could_be_an_option_or_a_command_is_no_host(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--host must be \[user@\]host\[:port\], got"):
        transports.parse_host(text)


@pytest.mark.parametrize("text", ["-s", "a b", "$(x)", "a;b", ""])
def test_what_could_be_an_option_is_no_serial(text: str) -> None:
    with pytest.raises(SettingsError, match="--host must be a serial"):
        transports.parse_serial(text)


def test_hosts_are_read() -> None:
    assert transports.parse_host("pi@10.0.0.7:2222") == ("pi@10.0.0.7", 2222)
    assert transports.parse_host("jetson") == ("jetson", None)
    assert transports.parse_serial("192.168.1.5:5555") == "192.168.1.5:5555"


def test_a_host_that_is_down_is_one_line(sshd: Any) -> None:
    with pytest.raises(DeviceError) as caught:
        transfer.make_folder(Ssh("127.0.0.1", 1))
    assert "127.0.0.1 cannot be reached over ssh" in str(caught.value)
    assert str(caught.value).endswith("check host, port and keys with: ssh -p 1 127.0.0.1 true")
    assert "\n" not in str(caught.value)


def test_a_machine_that_must_be_started_is_said_to_be(sshd: Any) -> None:
    with pytest.raises(DeviceError) as caught:
        transfer.make_folder(Ssh("127.0.0.1", 1, setup="bash emulated.sh up"))
    assert str(caught.value).endswith("Connection refused): start it with: bash emulated.sh up")


def test_a_key_that_is_refused_is_one_line(sshd: Any, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    config = tmp_path / "config"
    config.write_text(
        f"Host loopback\n HostName 127.0.0.1\n Port {sshd.port}\n IdentityFile {tmp_path}/other\n IdentitiesOnly yes\n"
        f" UserKnownHostsFile {tmp_path}/known\n StrictHostKeyChecking accept-new\n"
    )
    real = shutil.which("ssh", path=os.pathsep.join(os.environ["PATH"].split(os.pathsep)[1:]))
    (tmp_path / "ssh-bin" / "ssh").write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    with pytest.raises(DeviceError, match=r"^loopback cannot be reached over ssh \(.*Permission denied \(publickey"):
        transfer.make_folder(Ssh("loopback", config=config))


def test_a_phone_that_is_not_there_is_one_line(adb: Path) -> None:
    with pytest.raises(DeviceError, match=r"^phone-2 cannot be reached over adb \(adb: device 'phone-2' not found\)"):
        transfer.make_folder(Adb("phone-2"))
    assert transports.is_alive(Adb("phone-1"))
    Path(f"{adb}.gone").touch()
    assert not transports.is_alive(Adb("phone-1"))


def test_a_phone_that_has_left_its_network_is_waited_for_no_longer_than_it_takes_to_notice(
    adb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transports, "CHECK_S", 0.2)
    monkeypatch.setattr(transports, "CLEAN_UP_S", 0.5)
    phone = Adb("phone-1")
    assert transports.run(phone, ["sh", "-c", "sleep 0.7; echo slow"]).stdout == "slow\n"  # slow is not gone
    Path(f"{adb}.lost").touch()
    (tmp_path / "model").touch()
    said = (
        r"^phone-1 cannot be reached over adb \(it no longer answers\): check cable and permission with: adb devices$"
    )
    for work in (
        lambda: transfer.make_folder(phone),
        lambda: transfer.push(phone, [tmp_path / "model"], "/data/local/tmp"),
        lambda: transfer.free_bytes(phone, "/data/local/tmp"),
    ):
        with pytest.raises(DeviceError, match=said):
            work()


@pytest.mark.parametrize(
    ("place", "said", "code"),
    [
        (Ssh("jetson"), "scp: write remote: No space left on device\n", 1),
        (Adb("phone-1"), "adb: error: failed to copy 'm' to '/data/m': couldn't write: No space left on device\n", 1),
    ],
)
def test_a_device_that_is_full_is_not_one_that_is_gone(place: Ssh | Adb, said: str, code: int) -> None:
    found = transports.explain(place, said, code, "copy files")
    assert found == f"{place.name} has no space left: free some space there"


def test_programs_that_are_not_installed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match=r"^ssh cannot be started .*install OpenSSH's client .*openssh-client"):
        transfer.make_folder(Ssh("jetson"))
    with pytest.raises(DeviceError, match=r"^adb cannot be started .*install Android's adb"):
        transfer.make_folder(Adb("phone-1"))


def test_what_takes_too_long_is_named() -> None:
    with pytest.raises(DeviceError, match=r"^this machine did not answer in 0\.2 s"):
        transports.run(Local(), ["sleep", "5"], timeout_s=0.2)
