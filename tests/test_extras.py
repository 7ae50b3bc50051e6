"""Compare the table of optional modules with pyproject.toml, and check errors about absent modules."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmc
from llmc.extras import EXTRAS, import_failure, require

ROOT = Path(llmc.__file__).parent
# Modules under another name than their package's.
MODULES = {"lm-eval": "lm_eval", "onnxruntime-gpu": "onnxruntime", "tensorrt-rtx": "tensorrt_rtx"}


def declared() -> dict[str, set[str]]:
    """Return the modules of each extra for users in pyproject.toml."""
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]", 1)[1].split("\n[", 1)[0]
    lists = {name: ast.literal_eval(value) for name, value in re.findall(r"^(\w+) = (\[.*\])$", section, re.MULTILINE)}
    names = {extra: {re.split(r"[<>=;\[ ]", line)[0] for line in lines} for extra, lines in lists.items()}
    return {extra: {MODULES.get(n, n) for n in found} for extra, found in names.items() if extra != "dev"}


def test_every_optional_module_is_in_the_table() -> None:
    found = declared()
    assert {"compile", "cpu", "gpu", "rtx", "eval"} == set(found)
    assert set(EXTRAS) == set().union(*found.values())


def test_the_recommended_extra_installs_the_module() -> None:
    found = declared()
    assert not [module for module, extra in EXTRAS.items() if module not in found[extra]]


def test_installed_modules_are_found() -> None:
    require("torch", "onnxruntime")


def test_all_absent_modules_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.extras.importlib.util.find_spec", lambda name: None)
    with pytest.raises(llmc.LlmcError) as caught:
        require("torch", "onnx", "onnxruntime")
    assert str(caught.value) == (
        "EXTRA_MISSING: The modules torch, onnx, onnxruntime are not installed. "
        "Install them: pip install 'llmc[compile,cpu]'"
    )


def test_a_part_of_a_module_belongs_to_its_extra() -> None:
    error = import_failure(ModuleNotFoundError("No module named 'lm_eval.api'", name="lm_eval.api"))
    assert error is not None and error.code == "EXTRA_MISSING" and "llmc[eval]" in error.hint


def test_other_modules_have_no_extra() -> None:
    assert import_failure(ModuleNotFoundError(name="nonesuch")) is None
    assert import_failure(ImportError("no name")) is None


@pytest.mark.parametrize(("name", "blocked"), [("compile", "torch"), ("LLM", "tokenizers"), ("capture", "torch")])
def test_public_names_report_absent_modules(name: str, blocked: str) -> None:
    code = f"import sys; sys.modules[{blocked!r}] = None; import llmc\n"
    code += f"try: llmc.{name}\nexcept llmc.LlmcError as error: print(error.code, error.what)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"EXTRA_MISSING The module {blocked} is not installed.\n"
