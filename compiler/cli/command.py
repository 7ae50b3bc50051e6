"""Parts that all verbs share: options, quiet libraries, and errors as one paragraph."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import textwrap
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import click

from ...errors import LlmcError
from .failures import TRACEBACK, as_llmc_error, with_flags
from .streams import OutputError

CHECK_FAILED = 1
_WIDEST = 100

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
model_argument = click.argument("model")
artifact_argument = click.argument("artifact", metavar="DIR", type=click.Path(path_type=Path))
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads to compute with.  [default: the runtime's choice]",
)


class Verb(click.Command):
    """A command that reports any error as one paragraph on stderr, with the exit status of the error's class.

    With `--json`, it also prints the error as a document on stdout.
    """

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by section, those without a section first."""
        sections: dict[str, list[tuple[str, str]]] = {"": []}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                declared = getattr(parameter, "declared", None)
                sections.setdefault(declared.option.section if declared else "", []).append(record)
        for section, records in sections.items():
            with formatter.section(section or "Options"):
                formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with quiet_libraries():
                return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, OutputError):
            raise
        except Exception as error:
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            shown = with_flags(as_llmc_error(error), self.get_params(ctx))
            if ctx.params.get("as_json") or ctx.params.get("output_format") == "json":
                print_json({"error": as_json(shown)})
            exit_with(ctx, shown)


def exit_with(ctx: click.Context, error: LlmcError) -> NoReturn:
    """Print an error as one paragraph on stderr, and exit with the status of its class."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    click.echo(textwrap.fill(str(error), width, break_long_words=False, break_on_hyphens=False), err=True)
    ctx.exit(error.exit_status)


def as_json(error: LlmcError) -> dict[str, str]:
    return {"code": error.code, "what": error.what, "hint": error.hint}


def print_json(document: dict[str, Any]) -> None:
    click.echo(json.dumps(document, indent=2))


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppress warnings and logs of libraries, such as torch and transformers. Exceptions still propagate."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with mock.patch.dict(os.environ, {"TRANSFORMERS_VERBOSITY": "error"}), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
