"""Each test worker has a cache of its own, which is not the user's."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from llmc.runtimes.cache_folder import cache_dir

# Each worker waits for the other, so that both run.
_PROBE = """
import os, time
from pathlib import Path
import pytest

@pytest.mark.parametrize("part", range(2))
def test_probe(part):
    (Path(os.environ["LLMC_CACHE"]) / "result").touch()
    Path(__file__).with_suffix("." + os.environ["PYTEST_XDIST_WORKER"]).write_text(os.environ["LLMC_CACHE"])
    end = time.monotonic() + 30
    while len(list(Path(__file__).parent.glob("*.gw*"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
"""


def test_each_worker_has_a_cache_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "test_probe.py").write_text(_PROBE)
    users = tmp_path / "users"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "conftest", "-p", "no:cacheprovider"]
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [*command, "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path / "test_probe.py")],
        env=os.environ | {"LLMC_CACHE": str(users), "PYTHONPATH": os.pathsep.join([tests, *filter(None, sys.path)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    caches = [Path(path.read_text()) for path in tmp_path.glob("test_probe.gw*")]
    assert len(set(caches)) == 2 and users not in caches
    assert [path.name for path in users.rglob("*")] == ["demo"], "only downloads may be shared"
    assert not any(cache.exists() for cache in caches), "they are removed at the end"


def test_this_process_does_not_use_the_users_cache() -> None:
    own = cache_dir().resolve()
    assert own.is_relative_to(Path(tempfile.gettempdir()).resolve())
    assert not own.is_relative_to((Path.home() / ".cache").resolve())
