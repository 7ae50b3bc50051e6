"""Write an artifact atomically.

The files are written to a staging folder next to the output folder, which is renamed into place when it is complete.
Whatever stops the process, the output folder has either its old content or the new artifact. The staging folder of a
killed writer is removed by the next writer for the same output.
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

from ...errors import LlmcError, UsageError
from .hashing import sha256_all
from .manifest import MANIFEST, FileSpec, Manifest

try:
    import fcntl
except ImportError:  # Windows has no fcntl; artifacts are written there without locks
    fcntl = None  # type: ignore[assignment]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
_AT_FDCWD = -100


def check_output(final: Path) -> None:
    """Check that an artifact may be written to `final`; call it before any work.

    Raises:
        LlmcError: OUTPUT_EXISTS if it is neither an artifact nor an empty folder; OUTPUT_INVALID if it can't be
            written.
    """
    final = _resolve(final)
    parent = final.parent
    if not parent.is_dir():
        raise UsageError("OUTPUT_INVALID", f"There is no folder {str(parent)!r}.", f"Create it: mkdir -p {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError("OUTPUT_INVALID", f"{str(parent)!r} is not writable.", "Choose another output folder.")
    # The artifact is renamed into place: mount points and working directories can't be replaced.
    if os.path.ismount(final) or Path.cwd().is_relative_to(final):
        why = "is a mount point" if os.path.ismount(final) else "contains the working directory"
        raise UsageError("OUTPUT_INVALID", f"{str(final)!r} {why}.", f"Choose a folder in it: -o {final / 'out'}")
    if os.path.lexists(final) and not _is_artifact(final) and not (final.is_dir() and not os.listdir(final)):
        raise UsageError(
            "OUTPUT_EXISTS",
            f"{str(final)!r} exists and is not an llmc artifact.",
            "Choose another output folder, or remove this one first.",
        )


class ArtifactWriter:
    """Writes an artifact; use it as a context manager.

    with ArtifactWriter(Path("out")) as writer:
        (writer.folder / "model.onnx").write_bytes(...)
        writer.commit(manifest)

    Leaving the context without a commit removes what was written, also on SIGTERM. An exception caused by a full disk
    is raised as the LlmcError DISK_FULL.
    """

    def __init__(self, final: Path) -> None:
        self.final = _resolve(final)
        self.folder = self.final.parent / f"{_prefix(self.final)}{secrets.token_hex(4)}"
        self._hashed: dict[str, tuple[tuple[int, int, int], FileSpec]] = {}

    def __enter__(self) -> ArtifactWriter:
        check_output(self.final)
        with ExitStack() as undo:
            try:
                undo.enter_context(_exit_on_sigterm())
                undo.enter_context(_own(self.folder))
                _remove_stale(self.final, keep=self.folder)
                self.folder.mkdir()
            except OSError as error:
                what = f"{str(self.final.parent)!r} can't be written: {error.strerror}."
                raise UsageError("OUTPUT_INVALID", what, "Choose another output folder.") from error
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._undo:
            if error is not None and (full := _find_disk_full(error)):
                raise self._disk_full(full) from error

    def seal(self, manifest: Manifest) -> Manifest:
        """Write `manifest.json` for the current files; makes `folder` an artifact.

        Returns:
            The manifest with `files` filled in.
        """
        sealed = replace(manifest, files=self._files())
        with (self.folder / MANIFEST).open("wb") as file:
            file.write(sealed.to_json())
        return sealed

    def commit(self, manifest: Manifest) -> Manifest:
        """Write the manifest and move the artifact to its output folder.

        Returns:
            The manifest with `files` filled in.

        Raises:
            LlmcError: OUTPUT_EXISTS if another process has created something else there in the meantime.
        """
        sealed = self.seal(manifest)
        _sync(self.folder)
        check_output(self.final)
        move_into_place(self.folder, self.final)
        return sealed

    def _files(self) -> dict[str, FileSpec]:
        """Hash the written files; files unchanged since the last call are not read again."""
        paths = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        paths.pop(MANIFEST, None)
        states = {name: _state(path) for name, path in paths.items()}
        changed = [name for name in paths if self._hashed.get(name, (None,))[0] != states[name]]
        for name, digest in zip(changed, sha256_all(paths[name] for name in changed), strict=True):
            self._hashed[name] = states[name], FileSpec(digest, states[name][0])
        return {name: self._hashed[name][1] for name in sorted(paths)}

    def _disk_full(self, error: OSError) -> LlmcError:
        written = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.final.parent).free
        too_big = error.errno == errno.EFBIG
        return LlmcError(
            "DISK_FULL",
            f"{'A file reached the size limit' if too_big else 'The disk is full'}: {written / 1e6:,.1f} MB of the "
            f"artifact were written to {str(self.final.parent)!r}, {free / 1e6:,.1f} MB are free.",
            f"{'Raise it (ulimit -f)' if too_big else 'Free some space'}, or choose an output folder on another disk.",
        )


def _resolve(final: Path) -> Path:
    # The target of a link is replaced, not the link, and the staging folder must be on the target's disk.
    return Path(os.path.realpath(final))


def _prefix(final: Path) -> str:
    return f".{final.name}.llmc-"


def _is_artifact(folder: Path) -> bool:
    # Check the keys, too: web pages and browser extensions have a manifest.json as well. Older formats have these keys.
    try:
        document = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and {"format", "target", "model", "files"} <= document.keys()


def _state(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _find_disk_full(error: BaseException | None) -> OSError | None:
    """Find the OSError of a full disk among an exception and its causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


# Locks ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _own(folder: Path) -> Iterator[None]:
    """Hold a lock file for `folder` in the context; remove both at its end.

    If the process dies, the system releases the lock, and other writers see that the folder has no owner.
    """
    lock = folder.with_name(f"{folder.name}.lock")
    with _create_lock(lock) as file:
        file.write(f"{os.getpid()}\n".encode())  # for people
        try:
            yield
        finally:
            remove_folder(folder)
            lock.unlink(missing_ok=True)


def _create_lock(lock: Path) -> FileIO:
    while True:
        file = lock.open("xb", buffering=0)
        _try_lock(file, wait=True)
        # Between creating and locking, another writer may have taken the file for a stale one and removed it.
        if lock.exists():
            return file
        file.close()


def _try_lock(file: IO[bytes], wait: bool = False) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # the owner is alive, or the filesystem has no locks: then no writer counts as dead
        return False
    return True


def _remove_stale(final: Path, keep: Path) -> None:
    """Remove files of dead writers for `final`; restore an artifact left aside."""
    for lock in final.parent.glob(f"{glob.escape(_prefix(final))}*.lock"):
        folder = lock.with_suffix("")
        with suppress(FileNotFoundError), lock.open("rb") as file:
            if folder == keep or not _try_lock(file):
                continue
            aside = _aside(folder)
            if aside.exists() and not final.exists():
                aside.rename(final)
            remove_folder(aside)
            remove_folder(folder)
            lock.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder with its content, if it exists."""
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit in the context, so that every `finally` runs.

    Has no effect outside the main thread or if SIGTERM has another handler.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not (in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL):
        yield
        return

    def raise_exit(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, raise_exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# Moving into place ----------------------------------------------------------------------------------------------------


def _sync(folder: Path) -> None:
    """Flush everything in `folder` to disk: content must be there before the name."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows can't open folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into_place(folder: Path, final: Path) -> None:
    """Rename `folder` to `final`, and make that last through a power failure.

    An artifact at `final` is swapped with `folder`, whose owner removes it; an empty folder there is removed.
    """
    if _is_artifact(final):
        if not _exchange(folder, final):
            _replace(folder, final)
    else:
        with suppress(FileNotFoundError):
            final.rmdir()
        folder.rename(final)
    _sync_one(final.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically; False if system or filesystem can't do that."""
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
    """Swap two folders in two steps.

    If the process is killed between them, the old artifact stays aside, and the next writer restores it.
    """
    aside = _aside(folder)
    final.rename(aside)
    try:
        folder.rename(final)
    except BaseException:
        if not final.exists():
            aside.rename(final)
        raise
    remove_folder(aside)


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-old")
