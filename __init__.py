"""llmc compiles a Hugging Face causal language model into a verified, self-contained, fast engine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compiler.api import capture as capture
    from .compiler.ir.program import Program as Program
    from .compiler.ir.stages import Stage as Stage
    from .errors import LlmcError as LlmcError

__version__ = "0.1.0"

# Public name -> the module that defines it; imported when first asked for, so that `import llmc` stays fast.
_PUBLIC = {
    "capture": ".compiler.api",
    "Program": ".compiler.ir.program",
    "Stage": ".compiler.ir.stages",
    "LlmcError": ".errors",
}

__all__ = ["LlmcError", "Program", "Stage", "capture"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
