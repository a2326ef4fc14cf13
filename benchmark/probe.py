"""What a device is and has, as one JSON line: `python3 -m benchmark.probe RUNTIME...`; it runs on devices.

It needs no package, and says so too where Python is too old for the rest.
"""

import json
import platform
import sys

OLDEST = (3, 8)


def main():
    """Say it. No annotations here: an old Python must be able to read this."""
    found = {"python": list(sys.version_info[:3]), "machine": platform.machine()}
    if sys.version_info >= OLDEST:
        from benchmark import system

        found.update(device=system.device(), state=system.state(), busy_s=system.busy_s())
        found.update(libc=platform.libc_ver(), packages={name: _version(name) for name in sys.argv[1:]})
    print(json.dumps(found))


def _version(name):
    """Return the version of a package that can be imported, null for one that is not there, or why it cannot be."""
    import importlib

    try:
        return {"version": str(getattr(importlib.import_module(name), "__version__", ""))}
    except ModuleNotFoundError as error:
        return None if error.name == name else {"error": str(error)}
    except Exception as error:  # a library of another architecture fails in its own ways
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
