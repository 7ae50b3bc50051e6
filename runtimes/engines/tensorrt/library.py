"""The TensorRT library: two modules with the same interface, behind one handle."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, get_args

from ....errors import LlmcError
from ...artifact.versions import fits
from .section import Library

LIBRARIES: tuple[Library, ...] = get_args(Library)
"""All libraries, the preferred one first."""

# The first versions that were tested and have KV cache updates, rotary embeddings and outputs that alias inputs.
VERSIONS: dict[Library, str] = {"tensorrt_rtx": ">=1.7", "tensorrt": ">=10.15"}
_PACKAGES: dict[Library, str] = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}


@dataclass(frozen=True)
class TensorRt:
    """An installed library.

    Attributes:
        module: the imported module.
    """

    name: Library
    version: str
    module: Any


def installed_libraries() -> list[Library]:
    """Return the libraries that are installed, the preferred one first, without importing them."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is not None]


def find_library(name: Library | None = None) -> TensorRt:
    """Import a library.

    Args:
        name: None: whichever is installed.

    Raises:
        LlmcError: TENSORRT_MISSING or TENSORRT_VERSION.
    """
    installed = installed_libraries()
    if name is None and installed:
        name = installed[0]
    if name is None or name not in installed:
        wanted = " or ".join(_PACKAGES[one] for one in (LIBRARIES if name is None else (name,)))
        raise LlmcError(
            "TENSORRT_MISSING",
            f"{wanted} is not installed.",
            f"Install it: pip install '{_PACKAGES[name or LIBRARIES[0]]}{VERSIONS[name or LIBRARIES[0]]}'",
        )
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LlmcError(
            "TENSORRT_MISSING", f"{_PACKAGES[name]} can't be imported: {reason}.", "Check its installation."
        ) from None
    version = str(module.__version__)
    if not fits(version, VERSIONS[name]):
        raise LlmcError(
            "TENSORRT_VERSION",
            f"{_PACKAGES[name]} {version} is too old; llmc needs {VERSIONS[name]}.",
            f"Update it: pip install --upgrade '{_PACKAGES[name]}{VERSIONS[name]}'",
        )
    return TensorRt(name, version, module)
