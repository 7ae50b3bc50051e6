"""An environment for each peer: their requirements contradict each other, and none may change llmc's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

_INSTALLED = """
import sys
from importlib.metadata import PackageNotFoundError, version
for pin in sys.argv[1:]:
    name, wanted = pin.split("==")
    try:
        found = version(name).split("+")[0]
    except PackageNotFoundError:
        found = "none"
    if found != wanted:
        sys.exit(f"{name} {found} instead of {wanted}")
"""


def python_of(engine: str, cache: Path) -> Path:
    """The interpreter that runs an engine: llmc's is this one, a peer's has its pins installed when this returns."""
    if engine == "llmc":
        return Path(sys.executable)
    folder = cache / "envs" / engine
    python = folder / "bin" / "python"
    files = requirements(engine)
    if _mismatch(python, files):
        print(f"installing {engine} into {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for path in files:
            alone = ["--no-deps"] if path.name.endswith(".nodeps.txt") else []
            subprocess.run([python, "-m", "pip", "install", "--quiet", *alone, "-r", path], check=True)
        if wrong := _mismatch(python, files):
            raise SystemExit(f"{folder} holds {wrong}; delete the folder and start again.")
    return python


def requirements(engine: str) -> list[Path]:
    """A peer's requirement files, in the order of installation; those of the last are installed without theirs."""
    return [path for path in (HERE / f"{engine}.txt", HERE / f"{engine}.nodeps.txt") if path.exists()]


def pins(path: Path) -> list[str]:
    """The `name==version` lines of a requirements file; anything else in it is an error."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    wanted = [line for line in lines if line and not line.startswith("#")]
    for line in wanted:
        if not re.fullmatch(r"[\w.-]+==[\w.]+", line):
            raise SystemExit(f"{path}: {line!r} is not of the form name==version.")
    return wanted


def _mismatch(python: Path, files: list[Path]) -> str:
    if not python.exists():
        return "no interpreter"
    wanted = [pin for path in files for pin in pins(path)]
    done = subprocess.run([python, "-c", _INSTALLED, *wanted], capture_output=True, text=True)
    return done.stderr.strip()
