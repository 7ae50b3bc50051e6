"""Calibration results on disk: complete or absent, found by what they depend on, and shared by identical runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cache_users
import pytest
import torch
from compiled import speaking_model

from llmc.compiler.compress.cache import CalibrationCache


def never() -> dict[str, torch.Tensor]:
    raise AssertionError("the result is stored already")


def test_a_result_is_computed_once(tmp_path: Path) -> None:
    made = {"a": torch.randn(3, 4), "b": torch.tensor(5, dtype=torch.int8)}
    first = CalibrationCache(tmp_path / "cache").keep("one", lambda: made)
    for found in (first, CalibrationCache(tmp_path / "cache").keep("one", never)):
        assert set(found) == {"a", "b"}
        for name, tensor in made.items():
            assert torch.equal(found[name].evaluate(), tensor)
            assert (found[name].shape, found[name].dtype) == (tuple(tensor.shape), tensor.dtype)


def test_names_do_not_collide(tmp_path: Path) -> None:
    cache = CalibrationCache(tmp_path / "cache")
    cache.keep("one", lambda: {"a": torch.zeros(1)})
    assert cache.keep("two", lambda: {"a": torch.ones(1)})["a"].evaluate() == 1


def test_an_interrupted_computation_stores_nothing(tmp_path: Path) -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise KeyboardInterrupt

    cache = CalibrationCache(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        cache.keep("one", fail)
    assert cache.keep("one", lambda: {"a": torch.ones(1)})["a"].evaluate() == 1


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    cache = CalibrationCache(tmp_path / "cache")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("safetensors.torch.save_file", full)
        cache.keep("one", lambda: {"a": torch.ones(1)})
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock"]
    assert cache.keep("one", lambda: {"a": torch.ones(1)})["a"].evaluate() == 1


def test_a_damaged_result_is_computed_again(tmp_path: Path) -> None:
    cache = CalibrationCache(tmp_path / "cache")
    cache.keep("one", lambda: {"a": torch.zeros(100)})
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:40])
    assert cache.keep("one", lambda: {"a": torch.ones(100)})["a"].evaluate().sum() == 100


def test_the_folder_follows_from_all_dependencies(tmp_path: Path) -> None:
    def place(*parts: object) -> Path:
        return CalibrationCache.of(tmp_path, *parts).folder

    assert place("model", 1) == place("model", 1) and place("model", 1).is_relative_to(tmp_path)
    assert len({place("model", 1), place("model", 2), place("other", 1)}) == 3
    tensors = [torch.tensor([1, 2]), torch.tensor([1, 3])]
    assert place(tensors[0]) != place(tensors[1]) and place(tensors[0]) == place(tensors[0].clone())


def test_clear(tmp_path: Path) -> None:
    cache = CalibrationCache(tmp_path / "cache")
    cache.clear()  # there is nothing to remove
    cache.keep("one", lambda: {"a": torch.zeros(1)})
    cache.clear()
    assert not list(tmp_path.iterdir())
    assert cache.keep("one", lambda: {"a": torch.ones(1)})["a"].evaluate() == 1


def test_close_leaves_the_results(tmp_path: Path) -> None:
    with CalibrationCache(tmp_path / "cache") as cache:
        cache.keep("one", lambda: {"a": torch.ones(1)})
    later = CalibrationCache(tmp_path / "cache")
    assert later.keep("one", never)["a"].evaluate() == 1
    later.clear()
    assert not list(tmp_path.iterdir()), "one that was closed must not prevent it"


def test_the_last_user_clears(tmp_path: Path) -> None:
    one, other = CalibrationCache(tmp_path / "cache"), CalibrationCache(tmp_path / "cache")
    one.keep("one", lambda: {"a": torch.ones(1)})
    kept = other.keep("one", never)
    one.clear()
    assert kept["a"].evaluate() == 1
    other.clear()
    assert not list(tmp_path.iterdir())


# Processes ------------------------------------------------------------------------------------------------------------


def use(kind: str, home: Path, *arguments: str | Path) -> dict[str, Any]:
    """Run `cache_users.py`; return how its processes ended and how often each result was computed."""
    command = [sys.executable, cache_users.__file__, kind, *map(str, [home, *arguments])]
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result | {"stderr": done.stderr}


def test_processes_compute_each_result_once(tmp_path: Path) -> None:
    result = use("together", tmp_path)
    assert result["ended"] == [0] * cache_users.USERS, result["stderr"]
    assert result["computed"] == dict.fromkeys(["first", *cache_users.NAMES], 1)
    assert [path.name for path in tmp_path.iterdir()] == ["log"], "the last one removes the cache"


def test_processes_do_not_clear_results_in_use(tmp_path: Path) -> None:
    result = use("rounds", tmp_path)
    assert result["ended"] == [0] * cache_users.USERS, result["stderr"]
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_killed_process_blocks_no_other(tmp_path: Path) -> None:
    result = use("killed", tmp_path)
    assert result["ended"] == [-signal.SIGKILL, 0, 0], result["stderr"]
    assert result["computed"] == {"one": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["computing", "log"]


def test_identical_compilations_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    result = use("compile", tmp_path, speaking_model())
    assert result["ended"] == [0, 0, 0], result["stderr"]
    data = {(tmp_path / f"out-{number}" / "model.onnx.data").read_bytes() for number in range(3)}
    assert len(data) == 1
    assert not list((tmp_path / "cache" / "calibration").iterdir())
