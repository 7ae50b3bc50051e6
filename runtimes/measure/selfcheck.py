"""Check one artifact in a process of its own, and print the report as JSON."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from ...errors import LlmcError
from ..engines.base import Engine
from ..engines.selfcheck import GateReference, check
from ..memory import peak_rss

DEFAULT_OPENER = "llmc.runtimes.engines.load:load"


def find(opener: str) -> Callable[..., Engine]:
    """Return the function of a text such as `llmc.runtimes.engines.load:load`."""
    module, _, function = opener.partition(":")
    found: Callable[..., Engine] = getattr(importlib.import_module(module), function)
    return found


def main() -> None:
    """Check an artifact: `python -m llmc.runtimes.measure.selfcheck DIR [MODULE:FUNCTION]`.

    The function opens the artifact; by default, its engine does.
    """
    folder, opener = Path(sys.argv[1]), (*sys.argv[2:], DEFAULT_OPENER)[0]
    try:
        report = check(find(opener)(folder, check_files=False), GateReference.read(folder))
        document = report.as_dict() | {"peak_rss_bytes": peak_rss()}
    except LlmcError as error:
        document = {"error": {"code": error.code, "what": error.what, "hint": error.hint}}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
