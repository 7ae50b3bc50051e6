"""llmc compiles a Hugging Face causal language model into a verified, self-contained, fast engine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compiler.api import Artifact as Artifact
    from .compiler.api import capture as capture
    from .compiler.api import compile as compile
    from .compiler.config import CompileConfig as CompileConfig
    from .errors import LlmcError as LlmcError
    from .ir.program import Program as Program
    from .ir.stages import Stage as Stage
    from .runtimes.engines.batch import Batch as Batch
    from .runtimes.engines.batch import NewTokens as NewTokens
    from .runtimes.engines.load import load as load
    from .runtimes.generate.llm import LLM as LLM
    from .runtimes.generate.llm import Completion as Completion
    from .runtimes.generate.sampling import SamplingParams as SamplingParams

from .version import __version__ as __version__

# Public name -> the module that defines it; imported when first asked for, so that `import llmc` stays fast.
_PUBLIC = {
    "Artifact": ".compiler.api",
    "capture": ".compiler.api",
    "compile": ".compiler.api",
    "CompileConfig": ".compiler.config",
    "Program": ".ir.program",
    "Stage": ".ir.stages",
    "LlmcError": ".errors",
    "LLM": ".runtimes.generate.llm",
    "Completion": ".runtimes.generate.llm",
    "SamplingParams": ".runtimes.generate.sampling",
    "load": ".runtimes.engines.load",
    "Batch": ".runtimes.engines.batch",
    "NewTokens": ".runtimes.engines.batch",
}

__all__ = [
    "LLM",
    "Artifact",
    "Batch",
    "CompileConfig",
    "Completion",
    "LlmcError",
    "NewTokens",
    "Program",
    "SamplingParams",
    "Stage",
    "capture",
    "compile",
    "load",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_PUBLIC[name], __name__), name)
    except ImportError as error:
        from .extras import import_failure

        raise import_failure(error) or error from error


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
