"""The messages of TensorRT, of which errors name the last."""

from __future__ import annotations

import re
from typing import Any

_LONGEST = 300
_PLACE = re.compile(r"^\[[^\]]*\]\s*")


def error_log(module: Any) -> Any:
    """Return a logger for a library that keeps its last error and prints nothing.

    The logger has an attribute `error`: the last error, or None. Its class is made here, since its base class is the
    library's.
    """

    class ErrorLog(module.ILogger):
        """Keeps the last error."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.error: str | None = None

        def log(self, severity: Any, msg: str) -> None:
            # An exception must not leave a callback of the library.
            if severity in (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR):
                self.error = _first_line(str(msg))

    return ErrorLog()


def _first_line(message: str) -> str:
    """Return the first line of a message, without the place in the library's source before it."""
    lines = _PLACE.sub("", message.strip()).splitlines() or ["an error without a message"]
    return lines[0][:_LONGEST].rstrip(".")
