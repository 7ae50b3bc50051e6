"""Write an inspection as one self-contained HTML page.

Style, scripts and data are inline, and the page loads nothing.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import LlmcError
from ...version import __version__
from .layers import OUTSIDE, label
from .record import Inspection, Snapshot, View
from .summary import group_misses

_HERE = Path(__file__).parent
_SCRIPTS = ("layout.js", "diff.js", "page.js")
_NODES_PER_REASON = 12  # nodes listed for each reason of a miss; the others are only counted


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the page. If writing fails, a file that existed at `path` is unchanged.

    Raises:
        LlmcError: ``OUTPUT_UNWRITABLE``.
    """
    # Escape "<": the first "</script" ends a script element, even inside a JSON string.
    data = json.dumps(page_data(inspection), separators=(",", ":")).replace("<", "\\u003c")
    page = (_HERE / "page.html").read_text()
    parts = {"style": _read("page.css"), "script": "\n".join(map(_read, _SCRIPTS)), "data": data}
    for name, text in parts.items():
        page = page.replace(f"/*{{{name}}}*/", text, 1)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise LlmcError(
            "OUTPUT_UNWRITABLE", f"{path} can't be written: {error.strerror}.", "Pass a writable path to --html."
        ) from error


def page_data(inspection: Inspection) -> dict[str, Any]:
    """Build the page's JSON data.

    Steps refer to views by index, so that each distinct view is stored once.
    """
    groups = [[OUTSIDE], *inspection.layers]
    views: list[dict[str, Any]] = []
    index: dict[View, int] = {}

    def index_of(snapshot: Snapshot, layer: str) -> int | None:
        view = snapshot.views.get(layer)
        if view is not None and view not in index:
            index[view] = len(views)
            views.append({"text": view.text, "boxes": [asdict(box) for box in view.drawing]})
        return None if view is None else index[view]

    def step(name: str, stage: str, snapshot: Snapshot, **more: Any) -> dict[str, Any]:
        shown = [index_of(snapshot, group[0]) for group in groups]
        return {"name": name, "stage": stage, "nodes": snapshot.nodes, "ops": snapshot.ops, "views": shown, **more}

    first = step("captured", "captured", inspection.captured, about="", matches=0, misses=[], ms=0)
    passes = [
        step(
            s.record.name,
            str(s.record.stage),
            s.after,
            about=s.about,
            matches=s.record.matches,
            misses=group_misses(s.record.misses, _NODES_PER_REASON),
            ms=s.record.seconds * 1e3,
        )
        for s in inspection.steps
    ]
    error = inspection.refusal
    return {
        "model": inspection.program.source,
        "llmc": __version__,
        "dtype": inspection.dtype,
        "max_seq_len": inspection.program.max_seq_len,
        "parameters": inspection.parameters,
        "layers": sum(map(len, inspection.layers)),
        "refusal": {"code": error.code, "what": error.what, "hint": error.hint} if error else None,
        "sections": [{"name": label(group), "layers": group} for group in groups],
        "steps": [first, *passes],
        "views": views,
    }


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
