"""Create one environment per peer.

Their requirements conflict, and none may change llmc's environment.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Environment variables for the peers that are compiled while they are installed. A wheel from pip's cache would be one
# for another machine, or without them.
_COMPILED = {"llama": {"CXXFLAGS": f"-include {HERE / 'amx_config.h'}"}}

_CHECK_PINS = """
import sys
from importlib.metadata import PackageNotFoundError, version
for pin in sys.argv[1:]:
    name, wanted = pin.split("==")
    try:
        installed = version(name).split("+")[0]
    except PackageNotFoundError:
        installed = "none"
    if installed != wanted:
        sys.exit(f"{name} {installed} instead of {wanted}")
"""


def python_of(engine: str, cache: Path) -> Path:
    """Return the interpreter that runs an engine.

    For llmc it is this one, for a peer one with its pins installed.
    """
    if engine == "llmc":
        return Path(sys.executable)
    folder = cache / "envs" / engine
    python = folder / "bin" / "python"
    files = requirements(engine)
    if mismatch(python, files):
        print(f"installing {engine} into {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        options = ["--no-cache-dir"] if engine in _COMPILED else []
        environment = {**os.environ, **_COMPILED.get(engine, {})}
        for path in files:
            no_deps = ["--no-deps"] if path.name.endswith(".nodeps.txt") else []
            command = [python, "-m", "pip", "install", "--quiet", *options, *no_deps, "-r", path]
            subprocess.run(command, check=True, env=environment)
        if wrong := mismatch(python, files):
            raise SystemExit(f"{folder} has {wrong}; delete the folder and start again.")
    return python


def requirements(engine: str) -> list[Path]:
    """List a peer's requirement files in installation order.

    `*.nodeps.txt` is installed without dependencies.
    """
    return [path for path in (HERE / f"{engine}.txt", HERE / f"{engine}.nodeps.txt") if path.exists()]


def pins(path: Path) -> list[str]:
    """Return the `name==version` lines of a requirements file.

    Any other requirement is an error.
    """
    lines = [line.strip() for line in path.read_text().splitlines()]
    required = [line for line in lines if line and not line.startswith("#")]
    for line in required:
        if not re.fullmatch(r"[\w.-]+==[\w.]+", line):
            raise SystemExit(f"{path}: {line!r} is not an exact pin; write name==version.")
    return required


def mismatch(python: Path, files: list[Path]) -> str:
    """Return the first package of an environment that is not the pinned version, or an empty string."""
    if not python.exists():
        return "no interpreter"
    wanted = [pin for path in files for pin in pins(path)]
    process = subprocess.run([python, "-c", _CHECK_PINS, *wanted], capture_output=True, text=True)
    return process.stderr.strip()
