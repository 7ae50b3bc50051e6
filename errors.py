"""The exceptions that llmc raises on purpose: each has a stable code, says what happened and what to do."""

from __future__ import annotations

from typing import ClassVar


class LlmcError(Exception):
    """A model, an artifact, a text or a machine that llmc can't work with.

    The subclasses say whose turn it is: the caller's (`UsageError`), the checked artifact's (`CheckFailedError`), or
    llmc's own (`CompilerError`).

    Args:
        code: stable, upper-case name that scripts may match, such as ``MODEL_NOT_FOUND``; docs/errors.md lists all.
        what: what happened, in one sentence, naming the file, node or value at fault.
        hint: what to do about it.
    """

    exit_status: ClassVar[int] = 3

    def __init__(self, code: str, what: str, hint: str = "") -> None:
        self.code = code
        self.what = what
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        return f"{self.code}: {self.what}" + (f" {self.hint}" if self.hint else "")

    def __reduce__(self) -> tuple[type[LlmcError], tuple[str, str, str]]:
        return type(self), (self.code, self.what, self.hint)


class UsageError(LlmcError):
    """An option or argument with a value that it can't have.

    `what` and `hint` name options as Python does (`max_tokens`); the command line shows them as flags.
    """

    exit_status: ClassVar[int] = 2


class CheckFailedError(LlmcError):
    """A check that ran to its end and found a difference, such as the gate."""

    exit_status: ClassVar[int] = 1


class CompilerError(LlmcError):
    """A defect of llmc itself: an invariant that no input may break is broken."""

    exit_status: ClassVar[int] = 4
