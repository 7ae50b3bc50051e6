"""Where results and downloads are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.runtimes.cache_folder import cache_dir


def test_environment_variables_choose_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("LLMC_CACHE")
    assert cache_dir() == Path("/b/llmc")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "llmc"
