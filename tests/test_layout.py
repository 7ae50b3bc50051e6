"""The house's plan as tests: rooms and who may enter them, what is public, what must be listed."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmc
from llmc.compiler.config import CompileConfig
from llmc.kernels.ops import all_ops
from llmc.passes.base import Pass
from llmc.passes.pipeline import Reach, few_rows_passes, many_rows_passes, optimizing_passes
from llmc.passes.quantize.move_scales import MoveScales
from llmc.passes.quantize.prune import Prune
from llmc.passes.quantize.quantize import Quantize
from llmc.passes.quantize.rounding_plan import RoundingPlan

ROOT = Path(llmc.__file__).parent
TESTS = Path(__file__).parent
NO_PART = {"tests", "docs", "examples", "build", "dist"}


def modules() -> dict[str, Path]:
    """The package's files by dotted name without `llmc.`; the root's own is the empty one."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if not any(part.startswith(".") for part in parts) and parts[0] not in NO_PART:
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[tuple[str, bool, bool]]:
    """What a module imports: the full name, whether it is relative, whether for type checkers only."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    tree = ast.parse(path.read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, False, node in for_types
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module), False, node in for_types
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + ([node.module] if node.module else [])
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield whole if whole in MODULES else ".".join(base), True, node in for_types


def test_modules_are_found() -> None:
    assert {"", "errors", "passes.pipeline", "kernels.ops.op", "ir.weights"} <= set(MODULES)


# Packages -----------------------------------------------------------------------------------------------------------


def test_every_package_is_listed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = ast.literal_eval(text.split("\npackages = ", 1)[1].split("]", 1)[0] + "]")
    there = {".".join(filter(None, ["llmc", name])) for name, path in MODULES.items() if path.name == "__init__.py"}
    assert listed == sorted(there)


def test_every_folder_of_modules_is_a_package() -> None:
    assert not [path for path in MODULES.values() if not (path.parent / "__init__.py").exists()]


def test_the_package_is_loaded_once() -> None:
    """Started at its root, pytest could import the checkout a second time, under the folder's name."""
    for name in MODULES:
        importlib.import_module(f"llmc.{name}".rstrip("."))
    ours = {str(path) for path in MODULES.values()}
    loaded = [name for name, module in sys.modules.items() if getattr(module, "__file__", None) in ours]
    assert sorted(loaded) == sorted(f"llmc.{name}".rstrip(".") for name in MODULES)


# Imports ------------------------------------------------------------------------------------------------------------

# Whose modules (by the longest prefix that fits) may import which others.
ROOMS: dict[str, tuple[str, ...]] = {
    "": ("compiler", "ir", "runtimes", "extras", "errors"),  # for type checkers; at run time only what is asked for
    "errors": (),
    "error_codes": ("error_codes", "errors"),
    "extras": ("errors",),
    "kernels": ("kernels", "errors"),
    "ir": ("ir", "kernels.ops", "errors"),
    "passes": ("passes", "ir", "kernels", "errors"),
    "runtimes": ("runtimes", "kernels", "extras", "errors"),
    "compiler": (
        "compiler",
        "ir",
        "passes",
        "runtimes",
        "kernels",
        "error_codes",
        "extras",
        "errors",
        "",
    ),  # the root for its version
}


def room(name: str) -> str:
    return max((r for r in ROOMS if r == "" or name == r or name.startswith(f"{r}.")), key=len)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name: str) -> None:
    allowed = ROOMS[room(name)]
    assert name == "" or room(name), f"{name} stands in no room"
    for imported, relative, _ in imports(name):
        if relative:
            assert any(imported == a or imported.startswith(f"{a}.") for a in allowed), imported


@pytest.mark.parametrize("name", MODULES)
def test_imports_inside_are_relative(name: str) -> None:
    assert not [i for i, relative, _ in imports(name) if not relative and i.split(".")[0] == "llmc"]


def test_ops_stand_at_the_bottom() -> None:
    for name in MODULES:
        if name.startswith("kernels.ops"):
            inside = {i for i, relative, _ in imports(name) if relative}
            assert all(i.startswith("kernels.ops") or i == "errors" for i in inside), name


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys; before = set(sys.modules); import llmc; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "llmc" in loaded
    assert loaded - set(sys.stdlib_module_names) == {"llmc"}
    assert [name for name in done.stdout.split() if name.startswith("llmc")] == ["llmc"]


# What is public -------------------------------------------------------------------------------------------------------


def test_the_public_api() -> None:
    assert llmc.__all__ == [
        "LLM",
        "Artifact",
        "Completion",
        "LlmcError",
        "Program",
        "SamplingParams",
        "Stage",
        "capture",
        "compile",
        "load",
    ]
    assert dir(llmc) == sorted([*llmc.__all__, "__version__"])
    for name in llmc.__all__:
        assert getattr(llmc, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        llmc.nonesuch  # noqa: B018


def test_public_functions_say_what_they_do() -> None:
    for name in MODULES:
        tree = ast.parse(MODULES[name].read_text())
        assert ast.get_docstring(tree), name
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                is_short = isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 4
                assert is_short or ast.get_docstring(node), f"{name}.{node.name}"


# What must be listed --------------------------------------------------------------------------------------------------


def pass_classes() -> dict[str, type[Pass]]:
    """Every pass that can be made, by its name."""
    found = {}
    for module in pkgutil.iter_modules([str(ROOT / "passes")]):
        loaded = importlib.import_module(f"llmc.passes.{module.name}")
        for value in vars(loaded).values():
            if not inspect.isclass(value) or not issubclass(value, Pass) or inspect.isabstract(value):
                continue
            if not value.__name__.startswith("_"):  # a part of a pass that runs it itself
                found[value.__name__] = value
    return found


PASSES = pass_classes()


def test_every_pass_stands_in_a_list() -> None:
    rounding = [MoveScales({}), Quantize(RoundingPlan("none", {}))]
    engine = CompileConfig(quantize="int8").engine_passes(rounding)
    listed = [*optimizing_passes(["a"]), Prune({}), *engine, *few_rows_passes(), *many_rows_passes()]
    assert {type(subject) for subject in listed} == set(PASSES.values())
    kinds = [type(subject) for subject in listed if not isinstance(subject, Reach)]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_has_a_test_file_and_a_diagram(name: str) -> None:
    subject = PASSES[name]
    assert (TESTS / "passes" / f"test_{subject.__module__.rpartition('.')[2]}.py").exists()
    if subject is not Reach:
        text = inspect.getdoc(subject) or ""
        assert "Example:" in text and "Becomes:" in text and ("Left alone: 1." in text or "Refused: 1." in text)


@pytest.mark.parametrize("name", all_ops())
def test_every_op_has_a_test(name: str) -> None:
    """A test calls `check`, which compares an op with exact values, for the op; it may call a helper that does."""
    module = all_ops()[name].meaning.__module__.rpartition(".")[2]
    tree = ast.parse((TESTS / "kernels" / "ops" / f"test_{module}.py").read_text())
    checking, callees = set(), {}
    for function in tree.body:
        if isinstance(function, ast.FunctionDef):
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            callees[function.name] = {ast.unparse(call.func) for call in calls}
            if any(ast.unparse(call.func) == "check" and ast.unparse(call.args[0]) == name for call in calls):
                checking.add(function.name)
    tests = [test for test in callees if test.startswith("test_")]
    assert [test for test in tests if test in checking or callees[test] & checking], f"no test checks llmc.{name}"
