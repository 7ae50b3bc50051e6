"""Attention over a cache in plain ONNX is the op's own meaning, call after call, past and present in one memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attending import SCALE, VALUE_DIM, Attend, Attending, cached, join, qkv
from stepping import check_steps, engine_of
from torch import Tensor

from llmc.kernels.ops import attention

WINDOW = 6


def attending(**options: Any) -> Attend:
    """Attention with these options in the first layer and without a window in the second."""

    def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        given = {n: getattr(m, v) if isinstance(v, str) else v for n, v in options.items()}
        if place:
            given = {n: v for n, v in given.items() if n not in ("window", "chunk")}
        return join(attention(*qkv(m, place, x), SCALE, **given))

    return attend


FORMS: dict[str, dict[str, Any]] = {
    "all positions": {},
    "a window": {"window": WINDOW},
    "a chunk": {"chunk": WINDOW},
    "a cap": {"softcap": 0.5},
    "sinks": {"sinks": "sinks"},
    "slopes": {"slopes": "slopes"},
    "a window, a cap, sinks and slopes": {"window": WINDOW, "softcap": 0.5, "sinks": "sinks", "slopes": "slopes"},
}


# Only what looks back so far and no farther can keep a ring.
RINGS = [name for name, form in FORMS.items() if {"window", "chunk"} & form.keys()]


@pytest.mark.parametrize(("name", "ring"), [*((name, False) for name in FORMS), *((name, True) for name in RINGS)])
def test_attention_as_the_op_means_it(tmp_path: Path, name: str, ring: bool) -> None:
    program = cached(attending(**FORMS[name]), ring, VALUE_DIM)
    assert [cache.ring for cache in program.caches] == [ring, False]
    assert [cache.key_dim == cache.value_dim for cache in program.caches] == [False, False]
    check_steps(program, tmp_path, ops="standard")


def test_what_a_slot_held_before_is_not_seen(tmp_path: Path) -> None:
    """A new sequence in a used slot gives what it gives in a fresh one, in a ring as well."""
    engine = engine_of(cached(attending(window=WINDOW)), tmp_path, ops="standard")
    tokens = np.arange(1, 18)[None] % engine.vocab_size
    start = np.zeros(1, np.int64)
    fresh = engine.forward(tokens[:, :3], start).copy()
    engine.forward(tokens, start)
    assert np.array_equal(engine.forward(tokens[:, :3], start), fresh)


def test_masks_are_made_once_for_all_layers(tmp_path: Path) -> None:
    def windowed(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        return join(attention(*qkv(m, place, x), SCALE, window=WINDOW))

    program = cached(windowed)
    assert len(program.caches) == 2
    engine = engine_of(program, tmp_path, ops="standard")
    assert engine.manifest.caches[0].length == WINDOW
    made = [n.op_type for n in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node]
    assert (made.count("Attention"), made.count("LessOrEqual"), made.count("Range")) == (2, 1, 1)


def test_logits_stay_finite_in_a_cache_that_nobody_filled(tmp_path: Path) -> None:
    engine = engine_of(cached(attending(sinks="sinks", slopes="slopes")), tmp_path, ops="standard")
    assert np.isfinite(engine.forward(np.array([[1]]), np.array([0]))).all()
