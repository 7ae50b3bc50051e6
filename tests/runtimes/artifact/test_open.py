"""Opening an artifact reports its first problem in one line with a fix."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from artifacts import FILES, write

from llmc import LlmcError
from llmc.runtimes.artifact.manifest import FORMAT, MANIFEST
from llmc.runtimes.artifact.open import open_artifact


def refused(folder: Path, check_files: bool = True) -> LlmcError:
    with pytest.raises(LlmcError) as caught:
        open_artifact(folder, check_files)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "out")
    return tmp_path / "out"


def test_a_complete_artifact_opens_despite_extra_files(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    manifest = open_artifact(folder)
    assert list(manifest.files) == sorted(FILES)
    assert manifest.caches[0].value_dim == 32


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    error = refused(folder)
    assert error.code == "ARTIFACT_DAMAGED"
    assert f"the content of {name} has changed" in error.what
    open_artifact(folder, check_files=False)


@pytest.mark.parametrize("check_files", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_found_without_hashing(folder: Path, name: str, check_files: bool) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    error = refused(folder, check_files)
    assert error.code == "ARTIFACT_DAMAGED"
    assert f"{name} has {path.stat().st_size:,} bytes instead of {path.stat().st_size + 1:,}" in error.what
    path.unlink()
    assert f"{name} is missing" in refused(folder, check_files).what


def test_sizes_are_checked_before_hashes(folder: Path) -> None:
    (folder / "empty").write_bytes(b"new")
    (folder / "model.onnx.data").unlink()
    assert "model.onnx.data is missing" in refused(folder).what


@pytest.mark.parametrize(
    ("requires", "message"),
    [
        ({"numpy": ">=999,<1000"}, "numpy>=999,<1000"),
        ({"no_such_module": ">=1"}, "needs no_such_module>=1; no version is installed."),
        ({"numpy": "newest"}, "can't be compared with the required version"),
    ],
)
def test_wrong_runtime_version(tmp_path: Path, requires: dict[str, str], message: str) -> None:
    write(tmp_path / "out", requires=requires)
    (tmp_path / "out/model.onnx").unlink()  # reported only if the versions fit
    error = refused(tmp_path / "out")
    assert error.code == "RUNTIME_VERSION"
    assert message in error.what
    assert error.hint == f"Install it: pip install '{next(iter(requires))}{next(iter(requires.values()))}'"


@pytest.mark.parametrize(("format", "code"), [(FORMAT + 1, "ARTIFACT_NEWER"), (FORMAT - 1, "ARTIFACT_OLDER")])
def test_another_format_is_reported_before_missing_modules(tmp_path: Path, format: int, code: str) -> None:
    write(tmp_path / "out", requires={"no_such_module": ">=1"})
    path = tmp_path / "out" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": format}))
    assert refused(tmp_path / "out").code == code


def test_folders_and_files_that_are_not_artifacts(tmp_path: Path) -> None:
    error = refused(tmp_path / "absent")
    assert (error.code, error.hint) == (
        "ARTIFACT_NOT_FOUND",
        f"To create an artifact: llmc compile MODEL -o {tmp_path / 'absent'}",
    )
    assert "has no manifest.json" in refused(tmp_path).what
    (tmp_path / "config.json").write_text("{}")
    error = refused(tmp_path)
    assert "not compiled yet" in error.what
    assert error.hint == f"Compile it: llmc compile {tmp_path} -o DIR"
    error = refused(tmp_path / "config.json")
    assert (error.code, "is a file" in error.what) == ("ARTIFACT_NOT_FOUND", True)
    (tmp_path / MANIFEST).write_text("{")
    assert refused(tmp_path).code == "ARTIFACT_INVALID"


def test_opening_imports_only_the_standard_library(folder: Path) -> None:
    code = "import sys; from llmc.runtimes.artifact.open import open_artifact; open_artifact(sys.argv[1]);"
    code += "print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True, cwd="/")
    assert not {"numpy", "torch", "transformers", "onnx", "onnxruntime", "click", "rich"} & set(done.stdout.split())
