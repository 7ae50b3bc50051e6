"""Write docs/errors.md from the table of error codes."""

from __future__ import annotations

from . import SECTIONS

_HEAD = """# Errors

Every expected error of llmc is an `LlmcError`. It has a stable code, a sentence about what happened, and a hint about
what to do. The command prints it as one paragraph on stderr. With `--json`, it also prints
`{"error": {"code": ..., "what": ..., "hint": ...}}` on stdout. Scripts may match the codes. Python code may catch the
classes of `llmc.errors`. The class determines the exit status of the command.

`python -m llmc.error_codes --write docs/errors.md` writes this page.

| exit status | class | meaning |
|---|---|---|
| 0 | | done |
| 1 | `CheckFailedError` | a check failed: the gate, `llmc verify` or `llmc doctor` |
| 2 | `UsageError` | an option or argument has an invalid name or value |
| 3 | `LlmcError` | the model, the text, the artifact or the machine can't be used |
| 4 | `CompilerError` | a defect of llmc; please report it |
| 130 | | interrupted by Ctrl-C |
| 141 | | the program that reads the output closed the pipe, as `head` does |

With `LLMC_TRACEBACK=1`, the command also prints the Python traceback of any error.
"""


def page() -> str:
    """Return the whole page, as Markdown."""
    parts = [_HEAD]
    for title, error_class, texts in SECTIONS:
        parts.append(f"\n## {title}\n\nExit status {error_class.exit_status}, `{error_class.__name__}`.\n")
        parts.append("\n| code | when it occurs | what to do |\n|---|---|---|\n")
        parts += [f"| `{code}` | {when} | {remedy} |\n" for code, (when, remedy) in sorted(texts.items())]
    return "".join(parts)
