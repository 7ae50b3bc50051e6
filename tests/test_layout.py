"""Packaging, imports, the public API, private names, and lists of passes and ops with their tests."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rooms import modules

import llmc
from llmc.compiler.config import CompileConfig
from llmc.compiler.targets.registry import find_target, target_names
from llmc.kernels.ops import all_ops
from llmc.passes.base import Pass, Reach
from llmc.passes.pipeline import caching_passes, optimizing_passes
from llmc.passes.quantize.move_scales import MoveScales
from llmc.passes.quantize.prune import Prune
from llmc.passes.quantize.quantization_plan import Choice, QuantizationPlan
from llmc.passes.quantize.quantize import Quantize
from llmc.passes.quantize.schemes import Grid

ROOT = Path(llmc.__file__).parent
TESTS = Path(__file__).parent


MODULES = modules()


# Packages -----------------------------------------------------------------------------------------------------------


def test_every_package_is_listed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = ast.literal_eval(text.split("\npackages = ", 1)[1].split("]", 1)[0] + "]")
    there = {".".join(filter(None, ["llmc", name])) for name, path in MODULES.items() if path.name == "__init__.py"}
    assert listed == sorted(there)


def test_every_folder_of_modules_is_a_package() -> None:
    assert not [path for path in MODULES.values() if not (path.parent / "__init__.py").exists()]


def test_the_package_is_loaded_once() -> None:
    """If pytest starts at its root, it could import the checkout a second time under the folder's name."""
    for name in MODULES:
        importlib.import_module(f"llmc.{name}".rstrip("."))
    ours = {str(path) for path in MODULES.values()}
    loaded = [name for name, module in sys.modules.items() if getattr(module, "__file__", None) in ours]
    assert sorted(loaded) == sorted(f"llmc.{name}".rstrip(".") for name in MODULES)


# Imports ------------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys; before = set(sys.modules); import llmc; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "llmc" in loaded
    assert loaded - set(sys.stdlib_module_names) == {"llmc"}
    assert [name for name in done.stdout.split() if name.startswith("llmc")] == ["llmc", "llmc.version"]


# What is public -------------------------------------------------------------------------------------------------------


def test_the_public_api() -> None:
    assert llmc.__all__ == [
        "LLM",
        "Artifact",
        "Batch",
        "CompileConfig",
        "Completion",
        "LlmcError",
        "NewTokens",
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


def test_public_functions_have_docstrings() -> None:
    for name in MODULES:
        tree = ast.parse(MODULES[name].read_text())
        assert ast.get_docstring(tree), name
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                is_short = isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 4
                assert is_short or ast.get_docstring(node), f"{name}.{node.name}"


# Private names --------------------------------------------------------------------------------------------------------


def private_names(tree: ast.Module) -> set[str]:
    """Return the private names that a module defines: functions, classes, constants and attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if re.fullmatch(r"_[A-Za-z]\w*", name)}


def uses_of_private_names(tree: ast.Module, names: set[str]) -> Iterator[str]:
    """Yield each place that imports, reads or replaces one of `names`, in code or in a string."""
    for node in ast.walk(tree):
        used: set[str] = set()
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llmc":
            used = {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and not re.match(r"(self|cls)$|torch\b", ast.unparse(node.value)):
            used = {node.attr}  # a test's own attribute, or one of torch, may have the same name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            used = {node.value, *re.findall(r"(?<!\bself)[.:](_\w+)", node.value)}
        for name in sorted(used & names):
            yield f"line {node.lineno}: {name}"


def test_tests_use_no_private_name() -> None:
    names = {name for path in MODULES.values() for name in private_names(ast.parse(path.read_text()))}
    for path in TESTS.rglob("*.py"):
        assert list(uses_of_private_names(ast.parse(path.read_text()), names)) == [], path


@pytest.mark.parametrize(
    "line",
    [
        "from llmc.ir.program import Program, _Hidden",
        "monkeypatch.setattr(program, '_Hidden', None)",
        "program._Hidden(x)",
        "patch('llmc.ir.program._Hidden')",
        "STOP_AT = 'llmc.ir.program:_Hidden'",
    ],
)
def test_a_planted_private_name_is_found(line: str) -> None:
    names = private_names(ast.parse("class _Hidden: ..."))
    assert list(uses_of_private_names(ast.parse(line), names)) == ["line 1: _Hidden"]


@pytest.mark.parametrize("line", ["self._Hidden = 1", "torch._Hidden", "from torch import _Hidden"])
def test_private_names_of_others_may_be_the_same(line: str) -> None:
    assert list(uses_of_private_names(ast.parse(line), {"_Hidden"})) == []


# What must be listed --------------------------------------------------------------------------------------------------


def pass_classes() -> dict[str, type[Pass]]:
    """Return all concrete passes by name."""
    found = {}
    for module in (name for name in MODULES if name.startswith("passes.")):
        loaded = importlib.import_module(f"llmc.{module}")
        for value in vars(loaded).values():
            if not inspect.isclass(value) or not issubclass(value, Pass) or inspect.isabstract(value):
                continue
            if not value.__name__.startswith("_"):  # a private part of another pass
                found[value.__name__] = value
    return found


PASSES = pass_classes()


def test_every_pass_is_in_a_list() -> None:
    plan = QuantizationPlan("none", {"w": Choice(Grid("int8", activation="int8"), "")})
    neutral = [*optimizing_passes(["a"]), Prune({}), MoveScales({}), Quantize(plan), *caching_passes()]
    kinds = [type(subject) for subject in neutral if not isinstance(subject, Reach)]
    assert len(kinds) == len(set(kinds))
    finishing = {
        type(subject)
        for name in target_names()
        for passes in find_target(name).finishing_passes(CompileConfig(quantize="int4"), plan, ()).values()
        for subject in passes
    }
    assert {*kinds, Reach} | finishing == set(PASSES.values())


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_has_a_test_file_and_a_diagram(name: str) -> None:
    subject = PASSES[name]
    *folder, module = subject.__module__.split(".")[1:]
    assert TESTS.joinpath(*folder, f"test_{module}.py").exists()
    if subject is not Reach:
        text = inspect.getdoc(subject) or ""
        assert "Example:" in text and "Becomes:" in text and ("Left alone: 1." in text or "Refused: 1." in text)


@pytest.mark.parametrize("name", all_ops())
def test_every_op_has_a_test_file(name: str) -> None:
    module = all_ops()[name].meaning.__module__.rpartition(".")[2]
    text = (TESTS / "kernels" / "ops" / f"test_{module}.py").read_text()
    assert name in text
