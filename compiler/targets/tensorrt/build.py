"""Build a TensorRT plan from the neutral graph, in a process of its own.

A native library can crash, and its peak memory can be measured only in a process that does nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from ....error_codes import make_error
from ....errors import LlmcError
from ....runtimes.artifact.decode import decode, encode
from ....runtimes.artifact.manifest import CacheSpec
from ....runtimes.engines.tensorrt.library import TensorRt
from ....runtimes.engines.tensorrt.record import BuildRecord, write_record
from ....runtimes.engines.tensorrt.section import PROFILES, Plan, TensorRtSection
from .check_record import check_record
from .preflight import check_before_build
from .worker import BuildRequest

PLAN_FILE, RECORD_FILE = "engine.plan", "engine.json"
_WORKER = f"{__package__}.worker"
_PACKAGE_ROOT = Path(__file__).parents[4]


def build(
    library: TensorRt,
    onnx_path: Path,
    section: TensorRtSection,
    caches: Sequence[CacheSpec],
    sms: list[str],
    folder: Path,
    watch: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Plan:
    """Build a plan, and write it and the record of its build into a folder.

    Args:
        section: its dtype and profiles.
        sms: the compute capabilities to build for, such as ["8.9"].
        watch: called with a phase, and how many of its steps are done of how many.

    Raises:
        LlmcError: TRT_UNSUPPORTED, TRT_SM_UNSUPPORTED, TRT_MEMORY, TRT_PARSE_REFUSED or TRT_BUILD_FAILED.
    """
    forecast = check_before_build(library, onnx_path, caches, sms, folder)
    watch(f"engine: {forecast}", 0, 0)
    partial = folder / f"{PLAN_FILE}.partial"
    profiles = {name: section.profiles[name] for name in PROFILES}
    request = BuildRequest(library.name, str(onnx_path), profiles, list(sms), str(partial), forecast.data_bytes)
    try:
        record = _run(request, watch)
        record = replace(record, problems=check_record(record, sum(len(cache.parts) for cache in caches)))
        partial.replace(folder / PLAN_FILE)
    finally:
        partial.unlink(missing_ok=True)
    write_record(record, folder / RECORD_FILE)
    return Plan(PLAN_FILE, library.name, library.version, list(sms), RECORD_FILE)


def _run(request: BuildRequest, watch: Callable[[str, int, int], None]) -> BuildRecord:
    paths = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The working directory may have modules with the names of others.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryFile() as errors:
        worker = subprocess.Popen(
            [sys.executable, "-m", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
            encoding="utf-8",
        )
        assert worker.stdin is not None and worker.stdout is not None
        try:
            with suppress(BrokenPipeError):
                worker.stdin.write(json.dumps(encode(request)) + "\n")
                worker.stdin.flush()
            outcome = _follow(worker.stdout, watch)
            worker.wait()
        finally:
            # Also on KeyboardInterrupt: nobody waits for the plan any more.
            if worker.poll() is None:
                worker.kill()
                worker.wait()
            worker.stdout.close()
            with suppress(BrokenPipeError):
                worker.stdin.close()
        if outcome is None:
            raise _crash(worker.returncode, errors)
    if "error" in outcome:
        raise make_error(*outcome["error"])
    if "os_error" in outcome:
        raise OSError(*outcome["os_error"])
    return decode(BuildRecord, outcome["record"], "record")


def _follow(events: IO[str], watch: Callable[[str, int, int], None]) -> dict[str, Any] | None:
    """Pass progress on; return the last event, or None if the process ended without one."""
    for line in events:
        event: dict[str, Any] = json.loads(line)
        if "phase" not in event:
            return event
        watch(event["phase"], event["done"], event["total"])
    return None


def _crash(status: int, errors: IO[bytes]) -> LlmcError:
    if status == -signal.SIGKILL:
        return LlmcError(
            "TRT_BUILD_FAILED",
            "The process that builds the TensorRT engine was killed, probably because memory ran out.",
            "Close other programs, or build on a machine with more memory.",
        )
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    ended = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    said = f" Its last line is: {lines[-1][:300]}" if lines else ""
    return LlmcError(
        "TRT_BUILD_FAILED",
        f"The process that builds the TensorRT engine ended {ended}.{said}",
        "Report this as a defect, with the model and the command.",
    )
