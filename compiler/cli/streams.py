"""End a command without a traceback if a standard stream is closed or full, or on Ctrl-C."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from ...errors import LlmcError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE
_OUTPUTS = (1, 2)


class OutputError(OSError):
    """Writing to standard output or standard error failed. Errors of other files are plain `OSError`s."""

    def __init__(self, code: int, reason: str, descriptor: int) -> None:
        super().__init__(code, reason)
        self.descriptor = descriptor


class _Output(io.TextIOWrapper):
    """Standard output or standard error.

    Errors are translated above the buffers, where Ctrl-C can't repeat a write.
    """

    def write(self, text: str) -> int:
        with self._translated():
            return super().write(text)

    def flush(self) -> None:
        with self._translated():
            super().flush()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(error.errno or errno.EIO, error.strerror or str(error), self.fileno()) from error


def prepare_streams() -> None:
    """Make stdout and stderr raise `OutputError`, escape what they can't encode, and replace closed streams."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = _prepared(sys.stdout) or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = _prepared(sys.stderr) or open(os.devnull, "w")  # noqa: SIM115


def _prepared(stream: TextIO | None) -> TextIO | None:
    """Return the stream as an `_Output`. A stream that a test or a caller set is returned unchanged."""
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream, _Output):
        return stream
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return stream
    if descriptor not in _OUTPUTS:
        return stream
    stream.flush()
    # click considers ASCII a mistake of the environment; it would open a stream of its own with UTF-8.
    encoding = "utf-8" if codecs.lookup(stream.encoding).name == "ascii" else stream.encoding
    return _Output(
        io.BufferedWriter(io.FileIO(descriptor, "wb", closefd=False)),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """End the process with a special exit status on Ctrl-C, or if a standard stream fails.

    Raises:
        SystemExit: with `INTERRUPTED`, `PIPE_CLOSED`, or the status of STDOUT_FAILED.
    """
    try:
        yield
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except KeyboardInterrupt:
        _report("Interrupted.")
        sys.exit(INTERRUPTED)
    except OutputError as error:
        _discard(error.descriptor)
        if error.errno == errno.EPIPE:
            sys.exit(PIPE_CLOSED)
        failed = LlmcError(
            "STDOUT_FAILED", f"The output can't be written: {error.strerror}.", "Redirect it to another place."
        )
        _report(str(failed))
        sys.exit(failed.exit_status)


def _discard(descriptor: int) -> None:
    """Discard buffered output. Otherwise Python would try to write it at exit, and print a traceback."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _report(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
