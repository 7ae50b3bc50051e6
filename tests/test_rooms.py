"""Imports follow the table of rooms; targets and engines are named only in their own folders."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rooms import PAGE, ROOMS, arrows, cycles, imports, modules, room_of, violations, with_table

MODULES = modules()
# Folders in which a target or an engine may be named.
_OWN = ("compiler.targets", "runtimes.engines")
_TARGETS = ("ort", "trt", "tensorrt", "triton")


def test_modules_are_found() -> None:
    assert {"", "errors", "passes.pipeline", "kernels.ops.op", "ir.weights"} <= set(MODULES)


def test_modules_import_only_what_the_table_allows() -> None:
    assert violations(MODULES) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("ir.planted", "from ..passes.base import Pass"),
        ("passes.match.planted", "from ...compiler.config import CompileConfig"),
        ("runtimes.engines.planted", "def f():\n    from ..generate import llm"),
        ("compiler.targets.onnx.planted", "from ..ort import facts"),
        ("planted", "from .ir import program"),
    ],
)
def test_a_planted_import_is_found(name: str, line: str, tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(line)
    (found,) = violations({**MODULES, name: planted})
    assert found.startswith(f"{name} imports ")


def test_rooms_have_no_cycle() -> None:
    assert cycles(arrows()) == []
    assert {other for others in arrows().values() for other in others} <= set(ROOMS)


@pytest.mark.parametrize(("room", "other"), [("errors", "ir"), ("compiler.config", "compiler.api")])
def test_a_planted_cycle_is_found(room: str, other: str) -> None:
    planted = arrows()
    planted[room] = planted[room] | {other}
    assert any(room in cycle and other in cycle for cycle in cycles(planted))


def test_the_table_allows_only_imports_that_are_used() -> None:
    used: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        home = room_of(name)
        targets = {room_of(imported) for imported, relative in imports(name, path, MODULES) if relative}
        used.setdefault(str(home), set()).update(str(target) for target in targets if target != home)
    for room, others in arrows().items():
        assert others == used.get(room, set()), room


def test_the_page_prints_the_table() -> None:
    page = PAGE.read_text()
    assert page == with_table(page), "run: python tests/rooms.py"


@pytest.mark.parametrize("name", MODULES)
def test_imports_inside_are_relative(name: str) -> None:
    found = imports(name, MODULES[name], MODULES)
    assert not [i for i, relative in found if not relative and i.split(".")[0] == "llmc"]


# Names of targets and engines -----------------------------------------------------------------------------------------


def named(tree: ast.Module) -> Iterator[str]:
    """Yield each place that depends on a target or an engine: a string, an import, or a branch on its options."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            if re.search(rf"(?<![\w-])({'|'.join(_TARGETS)})(?![\w-])", node.value):
                yield f"line {node.lineno}: {node.value!r}"
        elif isinstance(node, ast.ImportFrom):
            parts = f"{node.module or ''}.{'.'.join(alias.name for alias in node.names)}".split(".")
            if set(parts) & set(_TARGETS):
                yield f"line {node.lineno}: import of {node.module}"
        elif isinstance(node, ast.Compare):
            left = node.left.attr if isinstance(node.left, ast.Attribute) else getattr(node.left, "id", "")
            if left == "ops":
                yield f"line {node.lineno}: a branch on ops"


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith(_OWN)])
def test_nothing_else_names_a_target(name: str) -> None:
    assert list(named(ast.parse(MODULES[name].read_text()))) == []


@pytest.mark.parametrize(
    "line",
    ['if target == "ort": pass', "from .targets.ort import facts", "x = config.ops == 'contrib'", 'say("for trt")'],
)
def test_a_planted_name_is_found(line: str) -> None:
    assert list(named(ast.parse(line)))


# Metadata of nodes ----------------------------------------------------------------------------------------------------


def test_only_one_module_reads_the_metadata_of_nodes() -> None:
    known = {"ir.nodes", "compiler.frontend.capture"}  # capture reads what torch.export left
    for name, path in MODULES.items():
        reads = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute) and n.attr == "meta"]
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        methods = {ast.unparse(call) for call in calls}  # `Weight.meta()` is another thing
        assert name in known or not [n for n in reads if ast.unparse(n) not in methods], name
