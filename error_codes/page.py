"""docs/errors.md as text, from the table of error codes."""

from __future__ import annotations

from . import SECTIONS

_HEAD = """# Errors

Every error that llmc raises on purpose is an `LlmcError` with a stable code, a sentence about what happened, and a hint
what to do. The command prints it as one paragraph on stderr; with `--json` it also prints
`{"error": {"code": ..., "what": ..., "hint": ...}}` on stdout. Scripts may match the codes. Python code may catch the
classes of `llmc.errors`; the exit status of the command follows from the class.

`python -m llmc.error_codes --write docs/errors.md` writes this page.

| exit status | class | meaning |
|---|---|---|
| 0 | | done |
| 1 | `CheckFailedError` | a check failed: the gate, `llmc verify` or `llmc doctor` |
| 2 | `UsageError` | an option or argument has a wrong name or value |
| 3 | `LlmcError` | the model, the text, the artifact or the machine can't be used |
| 4 | `CompilerError` | a defect of llmc: please report it |
| 130 | | interrupted by Ctrl-C |
| 141 | | the reader of the output closed the pipe, as `head` does |

`LLMC_TRACEBACK=1` makes the command print the Python traceback of any error, too.
"""


def page() -> str:
    """The whole page, as Markdown."""
    parts = [_HEAD]
    for title, error_class, texts in SECTIONS:
        parts.append(f"\n## {title}\n\nExit status {error_class.exit_status}, `{error_class.__name__}`.\n")
        parts.append("\n| code | when it occurs | what to do |\n|---|---|---|\n")
        parts += [f"| `{code}` | {when} | {remedy} |\n" for code, (when, remedy) in sorted(texts.items())]
    return "".join(parts)
