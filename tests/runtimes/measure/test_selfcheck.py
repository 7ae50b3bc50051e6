"""The check as a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from compiled import artifact


def selfcheck(folder: Path) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-m", "llmc.runtimes.measure.selfcheck", folder], capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


def test_as_a_process(tmp_path: Path) -> None:
    found = selfcheck(artifact("speaking"))
    assert found["passed"] and len(found["checks"]) == 4 and found["peak_rss_bytes"] > 1 << 20
    folder = shutil.copytree(artifact("speaking"), tmp_path / "out")
    (folder / "reference.npz").unlink()
    assert selfcheck(folder)["error"]["code"] == "ARTIFACT_DAMAGED"
