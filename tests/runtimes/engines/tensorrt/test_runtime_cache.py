"""Compiled kernels are kept for this plan on this device, and a file that is of no use does no harm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fake_tensorrt import FakeTensorRt
from fake_tensorrt import RuntimeCache as LibraryCache
from mock_cuda import MockDriver

from llmc.runtimes.engines.tensorrt.runtime_cache import RuntimeCache, cache_path


def library_cache() -> LibraryCache:
    return LibraryCache(FakeTensorRt(MockDriver(), "tensorrt_rtx"))


def test_kernels_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kernels"
    first = RuntimeCache(library_cache(), path)
    first.store()
    assert not path.exists()  # nothing to keep
    first.cache.content = b"kernel"
    first.store()
    second = RuntimeCache(library_cache(), path)
    assert second.cache.content == b"kernel" and [file.name for file in path.parent.iterdir()] == ["kernels"]


def test_a_file_is_written_only_if_the_cache_has_grown(tmp_path: Path) -> None:
    path = tmp_path / "kernels"
    path.write_bytes(b"kernel")
    cache = RuntimeCache(library_cache(), path)
    path.unlink()
    cache.store()
    assert not path.exists()
    cache.cache.content += b" and more"
    cache.store()
    assert path.read_bytes() == b"kernel and more"


def test_kernels_that_the_library_refuses_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "kernels"
    path.write_bytes(b"other version")
    cache = RuntimeCache(library_cache(), path)
    cache.cache.content = b"kernel"
    cache.store()
    assert path.read_bytes() == b"kernel"


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = RuntimeCache(library_cache(), tmp_path / "file" / "kernels")
    cache.cache.content = b"kernel"
    cache.store()
    assert (tmp_path / "file").read_bytes() == b""


def test_each_plan_version_and_device_has_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))
    device = MockDriver().device
    others = [replace(device, name="x"), replace(device, sm="9.0"), replace(device, driver="14.0")]
    paths = {cache_path("a", "1", one) for one in (device, *others)} | {cache_path("b", "1", device)}
    paths |= {cache_path("a", "2", device), cache_path("a", "1", device)}
    assert len(paths) == 6 and all(path.parent == tmp_path / "tensorrt" for path in paths)
