"""All verbs without the modules of an extra. `make extras` does the same in fresh environments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from compiled import artifact, speaking_model

from llmc.extras import EXTRAS

WITHOUT = """
import sys
absent, *arguments = sys.argv[1:]
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent.split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from llmc.compiler.cli.main import main
main(arguments, prog_name="llmc")
"""
EVAL = ("eval", "ARTIFACT", "--max-tokens", "40")


def said(done: subprocess.CompletedProcess[str]) -> str:
    """Return a command's stderr as one line, without the lines of phases."""
    return " ".join(" ".join(line for line in done.stderr.splitlines() if not line.startswith("llmc: ")).split())


def without(extras: set[str], arguments: tuple[str, ...], output: Path) -> subprocess.CompletedProcess[str]:
    """Run `llmc` in a process that can't import the modules of some extras."""
    absent = ",".join(module for module, extra in EXTRAS.items() if extra in extras)
    paths = {"MODEL": str(speaking_model()), "ARTIFACT": str(artifact("speaking")), "OUTPUT": str(output)}
    command = [sys.executable, "-c", WITHOUT, absent, *(paths.get(argument, argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("extras", "arguments", "install"),
    [
        ({"compile", "cpu"}, ("compile", "MODEL", "-o", "OUTPUT"), "compile,cpu"),
        ({"compile", "cpu"}, ("plan", "MODEL"), "compile"),
        ({"compile", "cpu"}, ("inspect", "MODEL"), "compile"),
        ({"compile", "cpu"}, ("run", "ARTIFACT", "a"), "cpu"),
        ({"compile", "cpu"}, ("bench", "ARTIFACT"), "cpu"),
        ({"compile", "cpu"}, ("verify", "ARTIFACT"), "cpu"),
        ({"compile", "cpu"}, ("verify", "ARTIFACT", "MODEL"), "c"),
        ({"compile", "cpu"}, EVAL, "cpu"),
        ({"compile"}, ("compile", "MODEL", "-o", "OUTPUT"), "compile"),
        ({"compile"}, ("plan", "MODEL"), "compile"),
        ({"compile"}, ("inspect", "MODEL"), "compile"),
        ({"compile"}, ("verify", "ARTIFACT", "MODEL"), "compile"),
        ({"compile"}, (*EVAL, "--reference", "MODEL"), "compile"),
        ({"cpu"}, ("compile", "MODEL", "-o", "OUTPUT"), "cpu"),
    ],
)
def test_the_extra_to_install_is_named(
    tmp_path: Path, extras: set[str], arguments: tuple[str, ...], install: str
) -> None:
    done = without(extras, arguments, tmp_path / "out")
    assert (done.returncode, done.stdout) == (3, "")
    assert said(done).startswith("EXTRA_MISSING: The module") and f"pip install 'llmc[{install}" in said(done)
    assert "Traceback" not in said(done)


@pytest.mark.parametrize("arguments", [("verify", "ARTIFACT"), EVAL, ("inspect", "ARTIFACT")])
def test_an_artifact_needs_no_compiler(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = without({"compile"}, arguments, tmp_path / "out")
    assert (done.returncode, said(done)) == (0, "")


@pytest.mark.parametrize("arguments", [("doctor",), ("doctor", "--json"), ("--help",), ("inspect", "ARTIFACT")])
def test_some_verbs_need_no_extra(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = without({"compile", "cpu"}, arguments, tmp_path / "out")
    assert (done.returncode, said(done)) == (0, "")
