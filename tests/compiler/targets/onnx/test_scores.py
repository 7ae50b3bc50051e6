"""Attention over a cache in plain ONNX equals the op's meaning in several calls.

Past and present caches share their memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attending import MAX_SEQ_LEN, SCALE, VALUE_DIM, Attend, Attending, cached, join, qkv
from batches import forward
from stepping import GOING_BACK, check_steps, engine_of
from torch import Tensor

from llmc.kernels.ops import attention

WINDOW = 6


def attending(**options: Any) -> Attend:
    """Return two layers: one with these options, one without window and chunk."""

    def attend(m: Attending, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        arguments = {n: getattr(m, v) if isinstance(v, str) else v for n, v in options.items()}
        if layer:
            arguments = {n: v for n, v in arguments.items() if n not in ("window", "chunk")}
        return join(attention(*qkv(m, layer, x), SCALE, **arguments))

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


# Ring caches require a window or a chunk.
RINGS = [name for name, form in FORMS.items() if {"window", "chunk"} & form.keys()]


@pytest.mark.parametrize(("name", "ring"), [*((name, False) for name in FORMS), *((name, True) for name in RINGS)])
def test_attention_equals_the_meaning_of_the_op(tmp_path: Path, name: str, ring: bool) -> None:
    program = cached(attending(**FORMS[name]), ring, VALUE_DIM)
    assert [cache.ring for cache in program.caches] == [ring, False]
    assert [cache.key_dim == cache.value_dim for cache in program.caches] == [False, False]
    check_steps(program, tmp_path, ops="standard")


@pytest.mark.parametrize("name", RINGS)
def test_rings_longer_than_their_window(tmp_path: Path, name: str) -> None:
    program = cached(attending(**FORMS[name]), True, VALUE_DIM, slack=3)
    assert [cache.length for cache in program.caches] == [WINDOW + 3, MAX_SEQ_LEN]
    engine = check_steps(program, tmp_path, ops="standard", calls=GOING_BACK)
    assert engine.spec.rollback == 4


def test_earlier_contents_of_a_slot_are_not_seen(tmp_path: Path) -> None:
    """A sequence has the same logits in a used slot as in a new one, rings included."""
    engine = engine_of(cached(attending(window=WINDOW)), tmp_path, ops="standard")
    tokens = np.arange(1, 18)[None] % engine.spec.vocab_size
    start = np.zeros(1, np.int64)
    fresh = forward(engine, tokens[:, :3], start)
    forward(engine, tokens, start)
    assert np.array_equal(forward(engine, tokens[:, :3], start), fresh)


def test_masks_are_computed_once_for_all_layers(tmp_path: Path) -> None:
    def windowed(m: Attending, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        return join(attention(*qkv(m, layer, x), SCALE, window=WINDOW))

    program = cached(windowed)
    assert len(program.caches) == 2
    engine = engine_of(program, tmp_path, ops="standard")
    assert engine.manifest.caches[0].length == WINDOW
    kinds = [n.op_type for n in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node]
    assert (kinds.count("Attention"), kinds.count("LessOrEqual"), kinds.count("Range")) == (2, 1, 1)


def test_logits_are_finite_with_an_empty_cache(tmp_path: Path) -> None:
    engine = engine_of(cached(attending(sinks="sinks", slopes="slopes")), tmp_path, ops="standard")
    assert np.isfinite(forward(engine, np.array([[1]]), np.array([0]))).all()
