"""The user's folder for what llmc keeps from run to run."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder for downloads and results: ``LLMC_CACHE``, or ``llmc`` in the user's cache folder."""
    if chosen := os.environ.get("LLMC_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llmc"
