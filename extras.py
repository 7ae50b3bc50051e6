"""Optional modules, and the extra of llmc that installs each of them."""

from __future__ import annotations

import importlib.util

from .errors import LlmcError

# Module -> the extra that installs it; if several do, the one to recommend.
EXTRAS = {
    "torch": "compile",
    "transformers": "compile",
    "safetensors": "compile",
    "gguf": "compile",
    "onnx": "compile",
    "onnxruntime": "cpu",
    "tokenizers": "cpu",
    "jinja2": "cpu",
    "lm_eval": "eval",
    "tensorrt_rtx": "rtx",
}


def require(*modules: str) -> None:
    """Check that modules are installed, without importing them.

    Raises:
        LlmcError: EXTRA_MISSING, which names all absent modules and their extras.
    """
    absent = [module for module in modules if not _is_installed(module)]
    if absent:
        subject = f"The module {absent[0]} is" if len(absent) == 1 else f"The modules {', '.join(absent)} are"
        raise LlmcError("EXTRA_MISSING", f"{subject} not installed.", _install(*absent))


def import_failure(error: ImportError) -> LlmcError | None:
    """Return an EXTRA_MISSING error for the failed import of an optional module; None for any other module."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    if isinstance(error, ModuleNotFoundError):
        what = f"The module {module} is not installed."
    else:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        what = f"The module {module} can't be imported: {reason}."
    return LlmcError("EXTRA_MISSING", what, _install(module))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _install(*modules: str) -> str:
    extras = ",".join(sorted({EXTRAS[module] for module in modules}))
    return f"Install {'it' if len(modules) == 1 else 'them'}: pip install 'llmc[{extras}]'"
