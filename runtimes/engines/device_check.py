"""Run the rest of the gate on the device that serves an artifact, once, before the first answer.

Some artifacts are compiled on machines that can't run their engine. The gate compares there what it can, and the
manifest's `verified` says that the engine itself remains to be checked. The result is kept outside of the artifact, for
this artifact on this platform: device, driver and library.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ...errors import CheckFailedError
from ..artifact.hashing import sha256
from ..artifact.manifest import MANIFEST, Manifest
from ..cache_folder import cache_dir
from .base import Engine
from .selfcheck import GateReference, GateReport, check


def check_on_device(engine: Engine, folder: Path, manifest: Manifest) -> None:
    """Check an engine whose artifact was not checked with it, unless it has passed before. Its slots hold other content
    afterwards.

    Raises:
        CheckFailedError: DEVICE_CHECK_FAILED.
        LlmcError: REFERENCE_MISSING.
    """
    if manifest.verified.on_device == "nothing":
        return
    path = result_path(sha256(folder / MANIFEST), engine.spec.platform)
    if _has_passed(path):
        return
    slots = engine.slots
    report = check(engine, GateReference.read(folder))
    engine.open_slots(slots)
    _store(path, {"artifact": str(folder.resolve()), "platform": list(engine.spec.platform), **report.as_dict()})
    if not report.passed:
        raise _failed(report, folder, engine)


def result_path(manifest_hash: str, platform: Sequence[str]) -> Path:
    """Return the file with the result for an artifact on a platform."""
    key = "\n".join((manifest_hash, *platform))
    return cache_dir() / "verified" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _has_passed(path: Path) -> bool:
    """Return True for a stored result that passed. After a failure, the check runs again."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("passed") is True


def _store(path: Path, document: dict[str, object]) -> None:
    """Write a result. If it can't be written, the check runs again next time."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "w") as file:
            json.dump(document, file, indent=2)
        os.replace(name, path)


def _failed(report: GateReport, folder: Path, engine: Engine) -> CheckFailedError:
    measured = "; ".join(f"{c.name}: {c.measured:g}, the limit is {c.limit:g}" for c in report.checks if not c.ok)
    return CheckFailedError(
        "DEVICE_CHECK_FAILED",
        f"On {', '.join(engine.spec.platform)}, the artifact differs from its model by more than {report.precision} "
        f"explains: {measured}. It is not served.",
        f"Update the driver and the library, or compile again. All checks: llmc verify {folder}",
    )
