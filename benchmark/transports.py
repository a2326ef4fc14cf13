"""How a device is reached: this machine itself, ssh, or adb; the system's own ssh, scp and adb do the work.

So keys, jump hosts and what else ssh_config says hold as usual. What runs there is a list of words; the shell that ssh
and adb put in between reads them quoted, and nothing that a user typed is part of it but checked names.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmark import programs
from compress.errors import DeviceError, SettingsError

# A host that is down or a connection that breaks is noticed in seconds, and no password is asked for in a pipe.
CONNECT_S, ALIVE_S, ALIVE_COUNT = 15, 5, 3
CLEAN_UP_S = 5.0
CHECK_S = 10.0  # how often a device of adb, whose connection does not notice by itself, is asked whether it is there
_HOST = re.compile(
    r"(?:(?P<user>[A-Za-z_][\w.-]*)@)?(?P<host>[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:]+\])(?::(?P<port>\d{1,5}))?"
)
_SERIAL = re.compile(r"[A-Za-z0-9][\w.:-]*")
_PYTHON = re.compile(r"[A-Za-z0-9/][\w./+-]*")
_LOST = re.compile(r"connection (closed|refused|reset|timed out)", re.IGNORECASE)
_UNREACHABLE = 255
_PACKAGES = {"ssh": "openssh-client", "scp": "openssh-client", "adb": "adb"}


@dataclass(frozen=True)
class Local:
    """This machine.

    Attributes:
        python: the interpreter that sees the runtime.
    """

    python: str = sys.executable

    @property
    def name(self) -> str:
        """What messages call it."""
        return "this machine"


@dataclass(frozen=True)
class Ssh:
    """Another machine; what ssh_config says of the host (user, keys, jumps) holds.

    Attributes:
        destination: HOST or USER@HOST.
        port: null for ssh's own.
        python: the interpreter there that sees the runtime.
        config: a file to read instead of the user's own ssh_config.
        setup: the command that starts it, where it is one that must be started; for messages.
    """

    destination: str
    port: int | None = None
    python: str = "python3"
    config: Path | None = None
    setup: str | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.destination


@dataclass(frozen=True)
class Adb:
    """A device of Android's debug bridge.

    Attributes:
        serial: as `adb devices` lists it; null for the only one.
        python: the interpreter there that sees the runtime.
    """

    serial: str | None = None
    python: str = "python3"

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.serial or "the adb device"


Transport = Local | Ssh | Adb


def parse_host(text: str, option: str = "--host") -> tuple[str, int | None]:
    """Return destination and port of `[user@]host[:port]`, where host is a name, an address or an alias of ssh_config.

    Raises:
        SettingsError: the text has another form.
    """
    match = _HOST.fullmatch(text)
    port = int(match["port"]) if match and match["port"] else None
    if match is None or (port is not None and not 0 < port < 65536):
        raise SettingsError(f"{option} must be [user@]host[:port], got {text!r}")
    host = match["host"].strip("[]")
    return (f"{match['user']}@{host}" if match["user"] else host), port


def parse_serial(text: str) -> str:
    """Return a serial as adb lists it.

    Raises:
        SettingsError: the text cannot be one.
    """
    if not _SERIAL.fullmatch(text):
        raise SettingsError(f"--host must be a serial as 'adb devices' lists it, got {text!r}")
    return text


def check_python(text: str) -> str:
    """Return the name or path of an interpreter.

    Raises:
        SettingsError: it is not a plain one.
    """
    if not _PYTHON.fullmatch(text):
        raise SettingsError(f"--python must be a name or path of an interpreter without spaces, got {text!r}")
    return text


def run(
    place: Transport,
    arguments: list[str],
    *,
    folder: str | None = None,
    environment: Mapping[str, str] | None = None,
    purpose: str | None = None,
    timeout_s: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command there and return what it said.

    Args:
        place: where.
        arguments: program and arguments.
        folder: where it starts.
        environment: variables beside those that it has there.
        purpose: what failed, for the message; null where the caller looks at the exit code.
        timeout_s: how long it may take.

    Raises:
        DeviceError: the device cannot be reached, or the command takes too long, or fails and `purpose` is given.
    """
    if isinstance(place, Local):
        done = call(arguments, timeout_s, place, folder, environment)
    else:
        done = call(there(place, script(arguments, folder, environment)), timeout_s, place)
    if _is_lost(place, done) or (purpose and done.returncode != 0):
        raise DeviceError(explain(place, done.stderr.strip() or done.stdout, done.returncode, purpose))
    return done


def start(
    place: Transport, arguments: list[str], environment: Mapping[str, str], log: IO[bytes], folder: str | None = None
) -> subprocess.Popen[bytes]:
    """Start a command there with pipes to its input and from its output; what it says beside that goes to `log`.

    Ending the returned process ends the connection, and with it the input of what runs there.

    Raises:
        DeviceError: the program, ssh or adb is not installed here.
    """
    here = isinstance(place, Local)
    command = arguments if here else there(place, script(arguments, folder, environment))
    try:
        return subprocess.Popen(  # noqa: S603  (words, checked or ours)
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=folder if here else None,
            env={**os.environ, **environment} if here else None,
        )
    except OSError as error:
        raise DeviceError(_not_started(command[0], error, place)) from None


def is_alive(place: Transport) -> bool:
    """Tell whether the device answers, where its connection does not notice by itself as ssh does."""
    if not isinstance(place, Adb):
        return True
    try:  # not `get-state`, which adb's server answers: of a device that has left its network it knows for long nothing
        return call(there(place, "true"), CLEAN_UP_S, place).returncode == 0
    except DeviceError:
        return False


def explain(place: Transport, said: str, code: int, purpose: str | None) -> str:
    """Say in a line why a command failed, and what to do.

    Args:
        place: where it ran.
        said: its standard error, or where that is empty its output.
        code: its exit code.
        purpose: what it was for.
    """
    last = last_line(said)
    if "No space left" in said:  # before adb's own errors, of which a copy that fails is one
        return f"{place.name} has no space left: free some space there"
    if isinstance(place, Ssh) and (code == _UNREACHABLE or _LOST.search(last)):
        remedy = (
            f"start it with: {place.setup}"
            if place.setup
            else f"check host, port and keys with: {check_command(place)}"
        )
        return f"{place.name} cannot be reached over ssh ({last}): {remedy}"
    if isinstance(place, Adb) and _is_adb_error(said):
        return _gone(place, last)
    return f"{place.name} could not {purpose} ({last}): check it there"


def check_command(place: Ssh) -> str:
    """Return the command with which a person checks the connection."""
    return shlex.join(["ssh", *_config(place), *_port(place, "-p"), place.destination, "true"])


def last_line(text: str) -> str:
    """Return the last line of a text that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def script(arguments: list[str], folder: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Return a command as the shell in between reads it: every word quoted."""
    words = ["env", *(f"{key}={value}" for key, value in environment.items())] if environment else []
    # `exit` keeps the shell in between: a signal that ends ssh's own child looks like a connection that was lost.
    command = f"{shlex.join([*words, *arguments])}; exit $?"
    return command if folder is None else f"cd {shlex.quote(folder)} && {command}"


def there(place: Ssh | Adb, command: str) -> list[str]:
    """Return the words that run a shell's command there; it is made of constants, checked names and quoted words."""
    if isinstance(place, Adb):
        return [*adb_words(place), "shell", "-T", command]
    # Whatever the account's own shell is: csh knows no ${TMPDIR:-/tmp}, fish no $?.
    return ["ssh", *ssh_words(place, "-p"), "--", place.destination, shlex.join(["sh", "-c", command])]


def adb_words(place: Adb) -> list[str]:
    """Return the words that every call of adb begins with."""
    return ["adb", *([] if place.serial is None else ["-s", place.serial])]


def ssh_words(place: Ssh, port_option: str) -> list[str]:
    """Return the options that every call of ssh or scp begins with, whose words for a port differ."""
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": CONNECT_S,
        "ServerAliveInterval": ALIVE_S,
        "ServerAliveCountMax": ALIVE_COUNT,
    }
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    return [*_config(place), *words, *_port(place, port_option)]


def _config(place: Ssh) -> list[str]:
    return [] if place.config is None else ["-F", str(place.config)]


def _port(place: Ssh, option: str) -> list[str]:
    return [] if place.port is None else [option, str(place.port)]


def _is_lost(place: Transport, done: subprocess.CompletedProcess[str]) -> bool:
    if isinstance(place, Ssh):
        return done.returncode == _UNREACHABLE
    return isinstance(place, Adb) and done.returncode != 0 and _is_adb_error(done.stderr)


def _is_adb_error(said: str) -> bool:
    return last_line(said).startswith(("adb: ", "error: "))


def call(
    command: list[str],
    timeout_s: float | None,
    place: Transport,
    folder: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command here, for a place.

    Raises:
        DeviceError: the program is not installed here, or takes longer than `timeout_s`; or the device of adb that it
            is for no longer answers.
    """
    try:
        if timeout_s is None and isinstance(place, Adb):
            return _while_alive(command, place)
        return programs.run(command, timeout_s, folder, environment)
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{place.name} did not answer in {timeout_s:g} s: check it there") from None
    except OSError as error:
        raise DeviceError(_not_started(command[0], error, place)) from None


def _while_alive(command: list[str], place: Adb) -> subprocess.CompletedProcess[str]:
    """Run a command of adb for as long as it takes and its device answers."""
    with subprocess.Popen(  # noqa: S603  (words, checked or ours)
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            while True:
                try:
                    said, complained = process.communicate(timeout=CHECK_S)
                    return subprocess.CompletedProcess(command, process.returncode, said, complained)
                except subprocess.TimeoutExpired:
                    if not is_alive(place):
                        raise DeviceError(_gone(place, "it no longer answers")) from None
        finally:
            process.kill()


def _gone(place: Adb, reason: str) -> str:
    return f"{place.name} cannot be reached over adb ({reason}): check cable and permission with: adb devices"


def _not_started(program: str, error: OSError, place: Transport) -> str:
    if isinstance(place, Local):
        return f"{program} cannot be started ({error.strerror}): check --python"
    client = "OpenSSH's client" if isinstance(place, Ssh) else "Android's adb"
    return f"{program} cannot be started ({error.strerror}): install {client} (Debian, Ubuntu: {_PACKAGES[program]})"
