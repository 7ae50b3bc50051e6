"""Open pages in a headless Chromium, if one is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, _NAMES)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None,
    reason=f"none of {', '.join(_NAMES)} is installed, so the page's scripts can't run",
)


def visit(page: Path, profile: Path, fragment: str = "") -> str:
    """Return the document after its scripts have run.

    Any console message fails the test.
    """
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"]
    process = subprocess.run([*command, page.as_uri() + fragment], capture_output=True, text=True, timeout=120)
    messages = re.findall(r".*CONSOLE.*", process.stderr)
    assert not messages, messages
    assert process.returncode == 0, process.stderr
    return process.stdout
