"""Standard streams that are closed or full, and Ctrl-C: a command ends without a traceback."""

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
    """Standard output or standard error takes no more, unlike a file that a command writes."""

    def __init__(self, code: int, reason: str, descriptor: int) -> None:
        super().__init__(code, reason)
        self.descriptor = descriptor


class _Output(io.TextIOWrapper):
    """Standard output or standard error; errors are translated above the buffers, where Ctrl-C can't repeat a write."""

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
    """The stream as an `_Output`; one that a test or a caller put there stays as it is."""
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream, _Output):
        return stream
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return stream
    if descriptor not in _OUTPUTS:
        return stream
    stream.flush()
    # click takes ASCII for a mistake of the environment and writes UTF-8, in a stream of its own.
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
    """Within, Ctrl-C and an output that takes no more end the process with a status of their own.

    Raises:
        SystemExit: with `INTERRUPTED`, `PIPE_CLOSED`, or the status of STDOUT_FAILED.
    """
    try:
        yield
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except KeyboardInterrupt:
        _say("Interrupted.")
        sys.exit(INTERRUPTED)
    except OutputError as error:
        _discard(error.descriptor)
        if error.errno == errno.EPIPE:
            sys.exit(PIPE_CLOSED)
        failed = LlmcError(
            "STDOUT_FAILED", f"The output can't be written: {error.strerror}.", "Redirect it to another place."
        )
        _say(str(failed))
        sys.exit(failed.exit_status)


def _discard(descriptor: int) -> None:
    """Send what is still buffered to nowhere; else Python tries again at its end and prints a traceback."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
