"""Write the names that versions of TensorRT have into tests/export/tensorrt_names.json.

usage: python scripts/tensorrt_names.py FOLDER_OR_WHEEL …

Each is a wheel of TensorRT's Python bindings, or the folder of an installed one, such as
`pip download --no-deps tensorrt_bindings==8.6.1`. The bindings link against libraries that only NVIDIA's index has. To
read their names none of these is called, so empty ones stand in for them: whatever the loader misses is compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

OUTPUT = Path(__file__).parents[1] / "tests" / "export" / "tensorrt_names.json"
# What export/trt_builder.py and benchmark/runners/tensorrt_runner.py touch.
CLASSES = (
    "Builder",
    "BuilderFlag",
    "DataType",
    "DeviceType",
    "EngineInspector",
    "HardwareCompatibilityLevel",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IRuntimeCache",
    "IRuntimeConfig",
    "ITensor",
    "ITimingCache",
    "LayerInformationFormat",
    "Logger",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "ProfilingVerbosity",
    "Runtime",
    "TensorIOMode",
)
READ = f"""
import importlib, json, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
trt = importlib.import_module(sys.argv[1])
names = {{c: sorted(n for n in dir(getattr(trt, c)) if not n.startswith("_")) for c in {CLASSES} if hasattr(trt, c)}}
severities = sorted(trt.ILogger.Severity.__members__)
print(json.dumps({{"version": trt.__version__, "names": {{**names, "ILogger.Severity": severities}}}}))
"""


def read_names(package: Path) -> tuple[str, dict[str, list[str]]]:
    """Return version and public names by class of the bindings in a folder, with empty libraries for missing ones.

    Args:
        package: the folder of the package, such as site-packages/tensorrt_bindings.

    Raises:
        RuntimeError: it cannot be imported even so.
    """
    symbols: set[str] = set()
    libraries: set[str] = set()
    message = ""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": str(package.parent)}
        for _ in range(40):
            done = subprocess.run(  # noqa: S603  (our own text in our own interpreter)
                [sys.executable, "-c", READ, package.name],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0:
                found = json.loads(done.stdout)
                return found["version"], found["names"]
            message = done.stderr
            library = re.search(r"ImportError: (lib[\w.+-]+\.so[.\d]*): cannot open", message)
            symbol = re.search(r"undefined symbol: (\w+)", message)
            if library:
                libraries.add(library[1])
            elif symbol and symbol[1] not in symbols:
                symbols.add(symbol[1])
            else:
                break
            for name in libraries:
                _compile(Path(folder) / name, symbols)
    raise RuntimeError(f"{package} cannot be imported: {message.strip().splitlines()[-1]}")


def _compile(library: Path, symbols: set[str]) -> None:
    source = "".join(f"void {name}(void) {{}}\n" for name in sorted(symbols))
    subprocess.run(  # noqa: S603
        ["cc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{library.name}", "-o", str(library)],  # noqa: S607
        input=source,
        text=True,
        check=True,
        capture_output=True,
    )


def main() -> None:
    """Read every package that is named, and add it to the file."""
    known = json.loads(OUTPUT.read_text()) if OUTPUT.is_file() else {}
    for argument in map(Path, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            place = argument
            if argument.suffix == ".whl":
                zipfile.ZipFile(argument).extractall(folder)
                (place,) = (path for path in Path(folder).iterdir() if path.name.endswith("_bindings"))
            version, names = read_names(place)
        flavour = "tensorrt_rtx" if place.name.startswith("tensorrt_rtx") else "tensorrt"
        # One line for each class.
        known[f"{flavour} {version}"] = {name: " ".join(values) for name, values in names.items()}
        print(f"{flavour} {version}: {sum(map(len, names.values()))} names of {len(names)} classes")
    OUTPUT.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
