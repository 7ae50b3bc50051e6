"""The JSON document of an inspection."""

from __future__ import annotations

import json

from stack import Stack

from llmc.compiler.inspect.record import inspect_model
from llmc.compiler.inspect.summary import group_misses, summarise
from llmc.ir.program import Miss
from llmc.ir.stages import Stage

USUAL = (1e-5, "silu")


def test_misses_are_grouped_by_reason_in_order_of_frequency() -> None:
    misses = [Miss("rare", "a"), Miss("often", "b", "layers.0"), Miss("often", "c"), Miss("often", "d")]
    assert group_misses(misses, 2) == [
        {"reason": "often", "count": 3, "at": ["b in layers.0", "c"]},
        {"reason": "rare", "count": 1, "at": ["a"]},
    ]
    assert group_misses(misses)[0]["at"] == ["b in layers.0", "c", "d"]


def test_the_document_describes_passes_stages_and_layers() -> None:
    inspection = inspect_model(Stack(USUAL, (1e-6, "gelu"), USUAL), until=Stage.CANONICAL)
    document = summarise(inspection)
    assert json.loads(json.dumps(document)) == document
    passes = {p["name"]: p for p in document["passes"]}
    assert passes["MatchRmsNorm"]["matches"] == 3
    assert passes["Reach(canonical)"]["stage"] == document["stage"] == "canonical"
    assert document["stages"]["captured"]["ops"]["aten.rsqrt"] == 3
    assert document["stages"]["canonical"]["ops"]["llmc.rms_norm"] == 3
    assert [(group["name"], group["layers"]) for group in document["layers"]] == [
        ("layers.0, 2", ["layers.0", "layers.2"]),
        ("layers.1", ["layers.1"]),
        ("outside of the layers", []),
    ]
    assert document["layers"][1]["ops"]["aten.gelu"] == 1
    assert document["error"] is None
