"""Summarize an inspection as one JSON document.

The command line prints its tables from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...ir.program import Miss
from .layers import OUTSIDE, fold, label
from .record import Inspection


def summarise(inspection: Inspection) -> dict[str, Any]:
    """Build the document, without the graph.

    It has the passes, misses, ops by stage, and groups of identical layers.
    """
    program, error = inspection.program, inspection.refusal
    return {
        "model": program.source,
        "stage": str(inspection.stage),
        "dtype": inspection.dtype,
        "max_seq_len": program.max_seq_len,
        "parameters": inspection.parameters,
        "passes": [
            {
                "name": step.record.name,
                "stage": str(step.record.stage),
                "matches": step.record.matches,
                "misses": group_misses(step.record.misses),
                "ms": round(step.record.seconds * 1e3, 1),
                "nodes": step.after.nodes,
            }
            for step in inspection.steps
        ],
        "stages": {
            name: {"nodes": moment.nodes, "weights": moment.weights, "ops": moment.ops}
            for name, moment in inspection.moments.items()
        },
        "layers": _layers(inspection),
        "error": {"code": error.code, "what": error.what, "hint": error.hint} if error else None,
    }


def group_misses(misses: Iterable[Miss], limit: int | None = None) -> list[dict[str, Any]]:
    """Group misses by reason, with counts and nodes, the most frequent first.

    Args:
        misses: the misses of a pass.
        limit: number of nodes to list for each reason; None lists all.
    """
    by_reason: dict[str, list[Miss]] = {}
    for miss in misses:
        by_reason.setdefault(miss.reason, []).append(miss)
    groups = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    return [
        {
            "reason": reason,
            "count": len(group),
            "at": [f"{m.node} in {m.where}" if m.where else m.node for m in group[:limit]],
        }
        for reason, group in groups
    ]


def _layers(inspection: Inspection) -> list[dict[str, Any]]:
    """Groups of layers that are identical in the final program, with their ops.

    The last group is `OUTSIDE`.
    """
    snapshot = inspection.steps[-1].after if inspection.steps else inspection.captured
    groups = [*fold(snapshot.kinds), [OUTSIDE]]
    return [
        {"name": label(group), "layers": [name for name in group if name != OUTSIDE], "ops": snapshot.ops_of[group[0]]}
        for group in groups
        if group[0] in snapshot.ops_of
    ]
