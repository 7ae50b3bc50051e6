"""A run of several sequences and a piece of one more equals a run for each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check_pass import capture
from fused_layers import FORMS, VOCAB, Layer, fused
from stepping import engine_of

from llmc.compiler.targets.ort.mixing import can_mix
from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.passes.cache.fuse_attention import FuseAttention
from llmc.passes.cache.insert_kv_cache import InsertKvCache
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.runtimes.engines.batch import Batch, NewTokens
from llmc.runtimes.engines.ort.engine import OrtEngine

RANDOM = np.random.default_rng(0)
PIECES = [([5, 2, 8], 9), ([1, 12, 3], 3), ([4, 4, 4], 30)]  # positions that the others hold, tokens of the piece


def held(engine: OrtEngine, lengths: list[int], tokens: np.ndarray) -> None:
    for slot, length in enumerate(lengths):
        engine.forward(Batch.of(NewTokens(tokens[slot, :length], 0, slot, "none")))


def logits(engine: OrtEngine, *parts: NewTokens) -> np.ndarray:
    return engine.forward(Batch.of(*parts)).numpy().copy()


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_a_piece_runs_with_other_sequences(tmp_path: Path, name: str, by_channel: bool) -> None:
    program = fused(**FORMS[name], by_channel=by_channel)
    tolerance = 5e-3 if by_channel else 1e-5  # sums in another order may change the nearest code
    for number, (lengths, size) in enumerate(PIECES):
        tokens = RANDOM.integers(0, VOCAB, (4, 32))
        folders = [tmp_path / f"{kind}{number}" for kind in ("mixing", "plain")]
        mixing, plain = (engine_of_one(program, folder) for folder in folders)
        for engine in (mixing, plain):
            held(engine, [*lengths, 1], tokens)
        before = mixing.runs
        parts = [NewTokens(tokens[i, n : n + 1], n, i) for i, n in enumerate(lengths)]
        piece = NewTokens(tokens[3, 1 : size + 1], 1, 3, "all")
        got = logits(mixing, piece, *parts)
        assert mixing.runs - before == 1
        want = np.concatenate([logits(plain, part) for part in (piece, *parts)])
        assert np.abs(got - want).max() <= tolerance
        # What they wrote into the caches: every sequence continues alone.
        for i, length in enumerate([*(n + 1 for n in lengths), size + 1]):
            part = NewTokens(tokens[i, length : length + 1] if length < 32 else [3], length, i)
            assert np.abs(logits(mixing, part) - logits(plain, part)).max() <= tolerance


def engine_of_one(program: Program, folder: Path) -> OrtEngine:
    folder.mkdir()
    return engine_of(program, folder, ops="contrib", prefill=[] if folder.name.startswith("mixing") else None, slots=4)


@pytest.mark.parametrize(
    ("options", "ring"), [({"dim": 16, "rotary": 8}, False), ({"dim": 16, "rotary": 16, "window": 6}, True)]
)
def test_positions_outside_of_the_fused_attention_prevent_it(
    tmp_path: Path, options: dict[str, Any], ring: bool
) -> None:
    """A rotation that is not fused, and a ring cache."""
    program = capture(Layer(**options), first=[RemoveNoOps()], stage=Stage.OPTIMIZED)
    InsertKvCache(ring=ring)(program)
    FuseAttention(8)(program)
    assert not can_mix(program) and can_mix(fused(**FORMS["rotated"]))
    tokens = RANDOM.integers(0, VOCAB, (2, 8))
    engine = engine_of_one(program, tmp_path / "mixing")
    before = engine.runs
    together = logits(engine, NewTokens(tokens[0], 0, 0, "all"), NewTokens(tokens[1, :1], 0, 1))
    assert engine.runs - before == 2
    assert np.abs(together[:8] - logits(engine, NewTokens(tokens[0], 0, 0, "all"))).max() <= 1e-5
