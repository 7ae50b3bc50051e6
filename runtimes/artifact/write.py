"""How an artifact comes to stand where it belongs: whole, or not at all.

It grows in a folder beside its final place and is swapped in when it is complete. Whatever stops the process,
the final place holds either what was there or the new artifact. What a killed writer leaves is removed by the
next writer for the same place.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from io import FileIO
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

from ...errors import LlmcError
from .hashing import sha256_all
from .manifest import MANIFEST, FileSpec, Manifest

try:
    import fcntl
except ImportError:  # Windows, which can run an artifact all the same
    fcntl = None  # type: ignore[assignment]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
_AT_FDCWD = -100


def check_output(final: Path) -> None:
    """Refuse a place where no artifact may be written, before any work is done for it.

    Raises:
        LlmcError: OUTPUT_EXISTS if something else than an artifact or an empty folder is there, OUTPUT_INVALID
            if nothing can be written there.
    """
    final = _real(final)
    parent = final.parent
    if not parent.is_dir():
        raise LlmcError("OUTPUT_INVALID", f"There is no folder {str(parent)!r}.", f"Create it: mkdir -p {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise LlmcError("OUTPUT_INVALID", f"{str(parent)!r} is not writable.", "Choose another output folder.")
    # The artifact is renamed into place, and what is mounted or worked in can't be replaced.
    if os.path.ismount(final) or Path.cwd().is_relative_to(final):
        where = "a mount point" if os.path.ismount(final) else "where this command runs"
        raise LlmcError("OUTPUT_INVALID", f"{str(final)!r} is {where}.", f"Choose a folder in it: -o {final / 'out'}")
    if os.path.lexists(final) and not _is_artifact(final) and not (final.is_dir() and not os.listdir(final)):
        raise LlmcError(
            "OUTPUT_EXISTS",
            f"{str(final)!r} exists and is not an artifact of llmc.",
            "Choose another output folder, or remove it first.",
        )


class ArtifactWriter:
    """Writes an artifact; used as a context manager.

    with ArtifactWriter(Path("out")) as writer:
        (writer.folder / "model.onnx").write_bytes(...)
        writer.commit(manifest)

    Leaving it without a commit removes what was written, on SIGTERM too. What stopped for lack of space within
    leaves it as the LlmcError DISK_FULL.
    """

    def __init__(self, final: Path) -> None:
        self.final = _real(final)
        self.folder = self.final.parent / f"{_prefix(self.final)}{secrets.token_hex(4)}"
        self._hashed: dict[str, tuple[tuple[int, int, int], FileSpec]] = {}

    def __enter__(self) -> ArtifactWriter:
        check_output(self.final)
        with ExitStack() as undo:
            try:
                undo.enter_context(_ending_on_sigterm())
                undo.enter_context(_owned(self.folder))
                _sweep(self.final, keep=self.folder)
                self.folder.mkdir()
            except OSError as error:
                what = f"Nothing can be written in {str(self.final.parent)!r}: {error.strerror}."
                raise LlmcError("OUTPUT_INVALID", what, "Choose another output folder.") from error
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._undo:
            if error is not None and (full := _disk_full(error)):
                raise self._without_space(full) from error

    def seal(self, manifest: Manifest) -> Manifest:
        """Write `manifest.json` with the files that are in the folder now: it can be opened and tried where it is."""
        sealed = replace(manifest, files=self._files())
        with (self.folder / MANIFEST).open("wb") as file:
            file.write(sealed.to_json())
        return sealed

    def commit(self, manifest: Manifest) -> Manifest:
        """Put the artifact in its place; `manifest.files` is filled in.

        Raises:
            LlmcError: OUTPUT_EXISTS if somebody else put something there meanwhile.
        """
        sealed = self.seal(manifest)
        _sync(self.folder)
        check_output(self.final)
        _put(self.folder, self.final)
        return sealed

    def _files(self) -> dict[str, FileSpec]:
        """Names and hashes of what was written. What didn't change since the last time isn't read again."""
        paths = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        paths.pop(MANIFEST, None)
        states = {name: _state(path) for name, path in paths.items()}
        changed = [name for name in paths if self._hashed.get(name, (None,))[0] != states[name]]
        for name, digest in zip(changed, sha256_all(paths[name] for name in changed), strict=True):
            self._hashed[name] = states[name], FileSpec(digest, states[name][0])
        return {name: self._hashed[name][1] for name in sorted(paths)}

    def _without_space(self, error: OSError) -> LlmcError:
        written = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.final.parent).free
        why = "A file grew beyond what may be written" if error.errno == errno.EFBIG else "The disk is full"
        return LlmcError(
            "DISK_FULL",
            f"{why}: {written / 1e6:,.1f} MB of the artifact were written below {str(self.final.parent)!r}, "
            f"{free / 1e6:,.1f} MB are free.",
            "Make room, or choose an output folder on another disk.",
        )


def _real(final: Path) -> Path:
    # Of a link it is the target that is replaced, on the target's own disk.
    return Path(os.path.realpath(final))


def _prefix(final: Path) -> str:
    return f".{final.name}.llmc-"


def _is_artifact(folder: Path) -> bool:
    # A manifest.json alone says little: a web page's or a browser extension's is called the same.
    try:
        document = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and {"format", "target", "graphs", "files"} <= document.keys()


def _state(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _disk_full(error: BaseException | None) -> OSError | None:
    """The error by which the disk refused more, here or in what it was raised from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


# Owners ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Own `folder` through a file beside it, whose lock the system opens when the process dies; then remove both."""
    lock = folder.with_name(f"{folder.name}.lock")
    with _locked(lock) as file:
        file.write(f"{os.getpid()}\n".encode())  # for people
        try:
            yield
        finally:
            _remove(folder)
            lock.unlink(missing_ok=True)


def _locked(lock: Path) -> FileIO:
    while True:
        file = lock.open("xb", buffering=0)
        _claim(file, wait=True)
        # Another writer's sweep may have come between the two, and taken it for a dead one's.
        if lock.exists():
            return file
        file.close()


def _claim(file: IO[bytes], wait: bool = False) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # its owner lives, or the filesystem has no locks: then nobody is known to be dead
        return False
    return True


def _sweep(final: Path, keep: Path) -> None:
    """Remove what dead writers for `final` left; give back an artifact that one of them had set aside."""
    for lock in final.parent.glob(f"{glob.escape(_prefix(final))}*.lock"):
        folder = lock.with_suffix("")
        with suppress(FileNotFoundError), lock.open("rb") as file:
            if folder == keep or not _claim(file):
                continue
            aside = _aside(folder)
            if aside.exists() and not final.exists():
                aside.rename(final)
            _remove(aside)
            _remove(folder)
            lock.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Within, SIGTERM ends the process as an exception does: through every `finally`."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not ours:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# Into place -----------------------------------------------------------------------------------------------------------


def _sync(folder: Path) -> None:
    """Bring everything below `folder` to the disk, so that no name gets there before its content."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # has no handle to sync
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(folder: Path, final: Path) -> None:
    if _is_artifact(final):
        if not _exchange(folder, final):
            _replace(folder, final)
    else:
        with suppress(FileNotFoundError):
            final.rmdir()
        folder.rename(final)
    _sync_one(final.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the filesystem can't."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _replace(folder: Path, final: Path) -> None:
    """Swap in two steps. Killed between them, the old artifact is aside, where the next writer takes it from."""
    aside = _aside(folder)
    final.rename(aside)
    try:
        folder.rename(final)
    except BaseException:
        if not final.exists():
            aside.rename(final)
        raise
    _remove(aside)


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-old")
