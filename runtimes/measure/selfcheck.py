"""Check one artifact in a process of its own, and print the report as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ...errors import LlmcError
from ..engines.load import load
from ..engines.selfcheck import GateReference, check
from ..memory import peak_rss


def main() -> None:
    """Check an artifact: `python -m llmc.runtimes.measure.selfcheck DIR`."""
    folder = Path(sys.argv[1])
    try:
        report = check(load(folder, check_files=False), GateReference.read(folder))
        document = report.as_dict() | {"peak_rss_bytes": peak_rss()}
    except LlmcError as error:
        document = {"error": {"code": error.code, "what": error.what, "hint": error.hint}}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
