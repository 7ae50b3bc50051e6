"""A headless Chromium, where there is one: what a page looks like to it and what it complains about."""

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
    reason=f"none of {', '.join(_NAMES)} is installed: the page's scripts are not run, only its text is checked",
)


def visit(page: Path, profile: Path, fragment: str = "") -> str:
    """The document after its scripts have run; anything on the console is an error."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri() + fragment], capture_output=True, text=True, timeout=120)
    said = re.findall(r".*CONSOLE.*", done.stderr)
    assert not said, said
    assert done.returncode == 0, done.stderr
    return done.stdout
