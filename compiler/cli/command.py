"""What all verbs have in common: `--json`, silence of the libraries, and one paragraph for a refusal."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import click

from ...errors import LlmcError

CHECK_FAILED = 1
REFUSED = 3
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
    """A command that reports a refusal as one paragraph on stderr, with `--json` also as the document, and exits 3."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with quiet_libraries():
                return super().invoke(ctx)
        except LlmcError as error:
            if ctx.params.get("as_json") or ctx.params.get("output_format") == "json":
                print_json({"error": as_json(error)})
            refuse(ctx, error)


def refuse(ctx: click.Context, error: LlmcError) -> None:
    """Say what was refused and why, and exit; a gate that failed is a failed check."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    click.echo(textwrap.fill(str(error), width, break_long_words=False, break_on_hyphens=False), err=True)
    ctx.exit(CHECK_FAILED if error.code == "GATE_FAILED" else REFUSED)


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
