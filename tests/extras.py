"""Run all verbs in fresh environments, one per combination of extras. `make extras` runs it.

A verb whose extras are installed must work. Any other must end with exit status 3 and one paragraph that says which
extra to install. Arguments name the combinations to try, such as `bare cpu`; all by default.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "extras"
COMBINATIONS = {"bare": "", "cpu": "cpu", "compile": "compile", "compile,cpu": "compile,cpu"}
# The error codes of an absent module, and of an absent runtime that an artifact names.
CODES = ("EXTRA_MISSING", "RUNTIME_VERSION")


@dataclass(frozen=True)
class Case:
    """A command, the extras that it needs, and its exit status without them."""

    arguments: tuple[str, ...]
    needs: frozenset[str]
    without: int = 3


def cases(model: Path, artifact: Path, output: Path) -> list[Case]:
    """Return a case of every verb, on a model and on its artifact."""
    cpu, compiling, both = frozenset({"cpu"}), frozenset({"compile"}), frozenset({"cpu", "compile"})
    m, a, o = str(model), str(artifact), str(output)
    return [
        Case(("--help",), frozenset()),
        Case(("doctor",), compiling, without=1),
        Case(("inspect", a), cpu),
        Case(("run", a, "Hi", "--max-tokens", "2"), cpu),
        Case(("bench", a, "-p", "4", "-n", "2", "-r", "1"), cpu),
        Case(("verify", a), cpu),
        Case(("eval", a, "--max-tokens", "40"), cpu),
        Case(("inspect", m), compiling),
        Case(("plan", m), compiling),
        Case(("compile", m, "-o", o, "--no-verify"), compiling),
        Case(("compile", m, "-o", o), both),
        Case(("verify", a, m), both),
        Case(("eval", a, "--reference", m, "--max-tokens", "40"), both),
    ]


def said(done: subprocess.CompletedProcess[str]) -> str:
    """Return a command's stderr as one line, without the lines of phases."""
    return " ".join(" ".join(line for line in done.stderr.splitlines() if not line.startswith("llmc: ")).split())


def problem(case: Case, installed: set[str], done: subprocess.CompletedProcess[str]) -> str | None:
    """Return what is wrong with the result of a command; None if nothing is."""
    if "Traceback" in done.stderr:
        return f"a traceback: {done.stderr.strip().splitlines()[-1]}"
    if case.needs <= installed:
        return None if done.returncode == 0 else f"status {done.returncode}: {said(done)}"
    if done.returncode != case.without:
        return f"status {done.returncode} instead of {case.without}: {said(done)}"
    if case.without == 3 and not (said(done).startswith(CODES) and "pip install" in said(done)):
        return f"no extra is named: {said(done)}"
    return None


def build() -> tuple[Path, Path, Path]:
    """Build the wheel of this checkout, a tiny model, and an artifact of the model."""
    from compiled import artifact, speaking_model

    shutil.rmtree(CACHE, ignore_errors=True)
    model, compiled = CACHE / "model", CACHE / "artifact"
    shutil.copytree(speaking_model(), model)
    shutil.copytree(artifact("speaking"), compiled)
    wheels = CACHE / "wheel"
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", wheels, ROOT], check=True)
    return next(wheels.glob("llmc-*.whl")), model, compiled


def try_extras(name: str, wheel: Path, model: Path, compiled: Path) -> list[str]:
    """Install one combination and run every verb; returns what went wrong."""
    folder = CACHE / "env"
    venv.create(folder, clear=True, with_pip=True)
    commands = folder / ("Scripts" if sys.platform == "win32" else "bin")
    extras = COMBINATIONS[name]
    wanted = f"{wheel}[{extras}]" if extras else str(wheel)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([commands / "python", "-m", "pip", "install", "--quiet", wanted], check=True, env=environment)
    failed = []
    for case in cases(model, compiled, CACHE / "out"):
        done = subprocess.run(
            [commands / "llmc", *case.arguments],
            capture_output=True,
            text=True,
            cwd=CACHE,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        wrong = problem(case, set(extras.split(",")), done)
        shown = " ".join(Path(argument).name for argument in case.arguments)
        print(f"{name:11} {shown:45} {'WRONG' if wrong else 'ok':5} {done.returncode} {said(done)[:110]}", flush=True)
        if wrong:
            failed.append(f"llmc[{extras}]: llmc {shown}: {wrong}")
    shutil.rmtree(folder)
    return failed


def main() -> int:
    """Try the combinations that are named, or all."""
    built = build()
    failed = [line for name in sys.argv[1:] or COMBINATIONS for line in try_extras(name, *built)]
    print(*failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
