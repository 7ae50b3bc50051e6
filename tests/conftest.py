"""Set up each process that runs tests: its signals, and a calibration cache of its own."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from llmc.runtimes.cache_folder import cache_dir

# A shell that starts the tests in the background may have them ignore SIGINT, and their child processes inherit that.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Neither the user's results nor those of another xdist worker may be found or removed by a test. Only the downloaded
# demo is shared: its file is compared with a checksum, and a download replaces it in one step. A worker inherits the
# variable from the controlling process, whose folder already has the link.
_CACHE = tempfile.TemporaryDirectory(prefix="llmc-test-cache-")
with suppress(OSError):
    _DOWNLOADS = (cache_dir() / "demo").resolve()
    _DOWNLOADS.mkdir(parents=True, exist_ok=True)
    Path(_CACHE.name, "demo").symlink_to(_DOWNLOADS, target_is_directory=True)
os.environ["LLMC_CACHE"] = _CACHE.name


def pytest_collection_finish() -> None:
    """Exclude the imported libraries from garbage collection: the compiler collects after each phase."""
    gc.collect()
    gc.freeze()
