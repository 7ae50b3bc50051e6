"""Artifacts are written atomically, whatever stops the writer."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import killed_writers as killed_writers_script
import pytest
from artifacts import FILES, OldLibrary, fill, manifest, write
from killed_writers import identity

from llmc import LlmcError
from llmc.runtimes.artifact import hashing
from llmc.runtimes.artifact.manifest import MANIFEST
from llmc.runtimes.artifact.open import open_artifact
from llmc.runtimes.artifact.write import ArtifactWriter, check_output

linux = pytest.mark.skipif(sys.platform != "linux", reason="exchanges folders and locks files as Linux does")


@pytest.fixture(params=[pytest.param(True, id="exchange", marks=linux), pytest.param(False, id="two steps")])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Replace artifacts in one step, and in two as on systems without `renameat2`."""
    if not request.param:
        monkeypatch.setattr(ctypes, "CDLL", OldLibrary)
    return request.param


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    manifests = [write(tmp_path / name) for name in ("a", "b")]
    assert manifests[0] == manifests[1] == open_artifact(tmp_path / "a")
    for name in [*FILES, MANIFEST]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_an_older_artifact_is_replaced_with_all_its_files(tmp_path: Path, exchanges: bool) -> None:
    out = tmp_path / "out"
    write(out, "old")
    (out / "stale").write_text("of the old one")
    write(out, "new")
    assert identity(out) == "new"
    assert not (out / "stale").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_an_artifact_of_an_older_format_is_replaced(tmp_path: Path) -> None:
    """Its manifest says "graphs" where a newer one says "phases" and "section"."""
    out = tmp_path / "out"
    write(out, "old")
    document = json.loads((out / MANIFEST).read_text())
    del document["phases"], document["section"]
    (out / MANIFEST).write_text(json.dumps(document | {"format": 1, "graphs": {"step": {"file": "model.onnx"}}}))
    with pytest.raises(LlmcError, match="ARTIFACT_OLDER"):
        open_artifact(out)
    write(out, "new")
    assert identity(out) == "new"


def test_an_empty_folder_and_a_link_are_filled(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    for name in ("first", "second"):
        write(tmp_path / "out", name)
        assert (tmp_path / "out").is_symlink()
        assert identity(tmp_path / "real") == name


def test_a_sealed_artifact_can_be_opened_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    honest = hashing.sha256
    monkeypatch.setattr(hashing, "sha256", lambda path: read.append(path) or honest(path))
    with ArtifactWriter(tmp_path / "out") as writer:
        fill(writer.folder)
        sealed = writer.seal(manifest())
        assert open_artifact(writer.folder, check_files=False) == sealed
        assert not (tmp_path / "out").exists()
        (writer.folder / "verify.json").write_text("{}")
        (writer.folder / "empty").write_text("no more")
        read.clear()
        committed = writer.commit(manifest())
        assert sorted(path.name for path in read) == ["empty", "verify.json"]
    assert open_artifact(tmp_path / "out") == committed
    assert committed.files.keys() - sealed.files.keys() == {"verify.json"}


# Output folders -------------------------------------------------------------------------------------------------------


def refused(final: Path) -> LlmcError:
    with pytest.raises(LlmcError) as caught:
        check_output(final)
    with pytest.raises(LlmcError, match=caught.value.code), ArtifactWriter(final):
        pytest.fail("the writer was entered")
    return caught.value


def test_other_files_and_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / MANIFEST).write_text('{"name": "a web page", "icons": []}')
    for name in ("file", "folder"):
        assert refused(tmp_path / name).code == "OUTPUT_EXISTS"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_outputs_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(tmp_path / "absent" / "out")
    assert (error.code, error.hint) == ("OUTPUT_INVALID", f"Create it: mkdir -p {tmp_path / 'absent'}")
    assert "is a mount point" in refused(Path("/")).what
    monkeypatch.chdir(tmp_path)
    error = refused(Path("."))
    assert "contains the working directory" in error.what
    assert str(tmp_path / "out") in error.hint
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "is not writable" in refused(tmp_path / "out").what


def test_a_folder_created_by_another_process_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="OUTPUT_EXISTS"), ArtifactWriter(tmp_path / "out") as writer:
        fill(writer.folder)
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine").touch()
        writer.commit(manifest())
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["mine"]


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_keeps_the_old_artifact(tmp_path: Path, error: type[BaseException]) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(error), ArtifactWriter(tmp_path / "out") as writer:
        fill(writer.folder)
        raise error
    assert identity(tmp_path / "out") == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_swap_that_fails_half_way_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", OldLibrary)
    out, honest = tmp_path / "out", Path.rename
    write(out, "old")

    def rename(self: Path, target: Path) -> Path:
        if target == out and not self.name.endswith("-old"):
            raise OSError(errno.EIO, "broken")
        return honest(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="broken"):
        write(out, "new")
    assert identity(out) == "old"
    assert os.listdir(tmp_path) == ["out"]


def check_disk_full(final: Path, message: str) -> None:
    with pytest.raises(LlmcError) as caught, ArtifactWriter(final) as writer:
        fill(writer.folder)
        (writer.folder / "big").write_bytes(bytes(4 << 20))
    assert caught.value.code == "DISK_FULL"
    assert message in caught.value.what
    assert identity(final) == "old"
    assert os.listdir(final.parent) == [final.name]


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("a small disk can't be mounted here")
    try:
        write(disk / "out", "old")
        check_disk_full(disk / "out", "The disk is full: 1.0 MB of the artifact were written to")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_found_as_the_cause_of_another_error(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="DISK_FULL"), ArtifactWriter(tmp_path / "out"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("could not save the tensor") from error
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@linux
def test_a_limit_of_file_size(tmp_path: Path, small_files: None) -> None:
    write(tmp_path / "out", "old")
    check_disk_full(tmp_path / "out", "A file reached the size limit")


# Processes ------------------------------------------------------------------------------------------------------------

STOPPED = """
import sys, time
from pathlib import Path
from artifacts import fill
from llmc.runtimes.artifact.write import ArtifactWriter
with ArtifactWriter(Path(sys.argv[1])) as writer:
    fill(writer.folder)
    print("writing", flush=True)
    time.sleep(60)
"""


def writing(final: Path) -> subprocess.Popen[str]:
    """Start a process; return it when it is in the middle of writing an artifact."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, final],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@linux
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_a_writer_stopped_by_a_signal_leaves_no_files(tmp_path: Path, number: signal.Signals, status: int) -> None:
    process = writing(tmp_path / "out")
    assert len(os.listdir(tmp_path)) == 2
    process.send_signal(number)
    assert process.wait(timeout=30) == status
    assert os.listdir(tmp_path) == []


@linux
def test_only_files_of_dead_writers_are_removed(tmp_path: Path) -> None:
    alive, dead = writing(tmp_path / "out"), writing(tmp_path / "out")
    try:
        dead.kill()
        dead.wait(timeout=30)
        assert len(os.listdir(tmp_path)) == 4
        write(tmp_path / "out2")  # another output: its writer leaves the files of `out` alone
        assert len(os.listdir(tmp_path)) == 5
        write(tmp_path / "out")
        staged = sorted(set(os.listdir(tmp_path)) - {"out", "out2"})
        assert len(staged) == 2 and staged[1] == f"{staged[0]}.lock"
        assert (tmp_path / staged[0] / "model.onnx").exists()
        assert int((tmp_path / staged[1]).read_text()) == alive.pid
    finally:
        alive.kill()
        alive.wait()
    write(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "out2"]


def killed_writers(*arguments: str | Path) -> list[str]:
    """Return the identity of the artifact that is there after each killed writer."""
    command = [sys.executable, killed_writers_script.__file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@linux
@pytest.mark.parametrize("way", ["exchange", "two steps"])
def test_killed_at_every_moment(tmp_path: Path, way: str) -> None:
    left = killed_writers("every", tmp_path / "folder" / "out", *(["--steps"] if way == "two steps" else []))
    assert left == sorted(left, key=["old", "", "new"].index)
    assert left.count("old") > 20 and left.count("new") > 3
    # Between the two steps there is no artifact; the next writer restores it.
    assert ("" in left) == (way == "two steps")


@linux
def test_killed_at_random(tmp_path: Path) -> None:
    """Kill writers by the clock, as happens in reality."""
    assert set(killed_writers("random", tmp_path / "out")) <= {"old", "new"}
    assert identity(tmp_path / "out") == "last"
