"""Common parts of all verbs: shared options, quiet libraries, and one paragraph for any error."""

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
max_seq_len_option = click.option(
    "--max-seq-len",
    type=click.IntRange(min=2),
    metavar="N",
    help="Longest sequence to serve.  [default: the model's, 2048 at most]",
)
kv_cache_dtype_option = click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "int8", "fp8"]),
    help="What keys and values are kept as: 8 bits with a scale for each head of each token, or the dtype computed in."
    "  [default: auto]",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="What to compute in.",
)


class Verb(click.Command):
    """A command that ends every failure with one paragraph on stderr and the exit status of its class.

    With `--json` the error is also printed as a document on stdout.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with quiet_libraries():
                return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, OutputError):
            raise
        except Exception as error:
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            shown = with_flags(as_llmc_error(error), self.params)
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
    """Within, torch and transformers keep their warnings and logs to themselves; what matters they raise."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with mock.patch.dict(os.environ, {"TRANSFORMERS_VERBOSITY": "error"}), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
