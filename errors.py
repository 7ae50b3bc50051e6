"""The one exception type that llmc raises on purpose."""

from __future__ import annotations


class LlmcError(Exception):
    """A refusal or failure that the user can act on.

    Args:
        code: stable, upper-case name that scripts may match, such as ``MODEL_NOT_FOUND``.
        what: what happened, in one sentence, naming the file, node or value at fault.
        hint: what to do about it.
    """

    def __init__(self, code: str, what: str, hint: str = "") -> None:
        self.code = code
        self.what = what
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        return f"{self.code}: {self.what}" + (f" {self.hint}" if self.hint else "")

    def __reduce__(self) -> tuple[type[LlmcError], tuple[str, str, str]]:
        return type(self), (self.code, self.what, self.hint)
