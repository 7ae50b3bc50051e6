"""The command `llmc` and its verbs. A verb imports what it needs when it runs, so that `llmc --help` is fast."""

from __future__ import annotations

import difflib
from typing import Any

import click

from ...version import __version__
from .bench import bench
from .compile import compile_
from .doctor import doctor
from .evaluate import evaluate
from .finalize import finalize
from .inspect import inspect
from .plan import plan
from .run import run
from .streams import guarded_streams, prepare_streams
from .verify import verify


class Llmc(click.Group):
    """A group that suggests similar verbs, and ends without a traceback if a standard stream fails."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.commands, n=1)
            ctx.fail(f"No such command {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **extra: Any) -> Any:
        prepare_streams()
        with guarded_streams():
            return super().main(*args, **extra)

    # Guarded here too: if the pipe is closed, click itself would exit with another status.
    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with guarded_streams():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> object:
        with guarded_streams():
            return super().invoke(ctx)


@click.group(cls=Llmc, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="llmc")
def main() -> None:
    """Compile a Hugging Face causal language model into a verified, self-contained, fast engine.

    MODEL is a folder of safetensors, a GGUF file, a Hugging Face hub id, or "demo". DIR is an artifact: the folder that
    `llmc compile MODEL -o DIR` writes. Running an artifact needs no torch.

    Exit status: 0 done, 1 a check failed, 2 usage, 3 the model, artifact or machine can't be used, 4 a defect of llmc,
    130 interrupted.
    """


for verb in (compile_, run, bench, evaluate, verify, finalize, inspect, plan, doctor):
    main.add_command(verb)
