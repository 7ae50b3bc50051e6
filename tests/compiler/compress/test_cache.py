"""Results on disk: whole or not there, and found again only by what they depend on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmc.compiler.compress.cache import Shelf


def never() -> dict[str, torch.Tensor]:
    raise AssertionError("it is there already")


def test_made_once(tmp_path: Path) -> None:
    made = {"a": torch.randn(3, 4), "b": torch.tensor(5, dtype=torch.int8)}
    Shelf(tmp_path / "shelf").keep("one", lambda: made)
    found = Shelf(tmp_path / "shelf").keep("one", never)
    assert set(found) == {"a", "b"}
    for name, tensor in made.items():
        assert torch.equal(found[name].evaluate(), tensor)
        assert (found[name].shape, found[name].dtype) == (tuple(tensor.shape), tensor.dtype)


def test_names_are_apart(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.keep("one", lambda: {"a": torch.zeros(1)})
    assert shelf.keep("two", lambda: {"a": torch.ones(1)})["a"].evaluate() == 1


def test_an_interrupted_one_is_not_there(tmp_path: Path) -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise KeyboardInterrupt

    shelf = Shelf(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        shelf.keep("one", fail)
    assert shelf.keep("one", lambda: {"a": torch.ones(1)})["a"].evaluate() == 1


def test_a_damaged_one_is_made_again(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.keep("one", lambda: {"a": torch.zeros(100)})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    assert shelf.keep("one", lambda: {"a": torch.ones(100)})["a"].evaluate().sum() == 100


def test_what_it_depends_on(tmp_path: Path) -> None:
    def place(*parts: object) -> Path:
        return Shelf.of(tmp_path, *parts).folder

    assert place("model", 1) == place("model", 1) and place("model", 1).is_relative_to(tmp_path)
    assert len({place("model", 1), place("model", 2), place("other", 1)}) == 3
    tensors = [torch.tensor([1, 2]), torch.tensor([1, 3])]
    assert place(tensors[0]) != place(tensors[1]) and place(tensors[0]) == place(tensors[0].clone())


def test_clear(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    shelf.clear()  # nothing there is fine
    shelf.keep("one", lambda: {"a": torch.zeros(1)})
    shelf.clear()
    assert not list(tmp_path.iterdir())
