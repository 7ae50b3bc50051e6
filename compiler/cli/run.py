"""`llmc run`: an artifact answers."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...errors import LlmcError, UsageError
from .command import Verb, artifact_argument, json_option, print_json, threads_option

if TYPE_CHECKING:
    from ...runtimes.engines.base import Engine
    from ...runtimes.generate.sampling import SamplingParams
    from ...runtimes.generate.tokenizer import Message, Tokenizer

    Prompt = str | Sequence[Message]


@click.command(cls=Verb, short_help="Continue a prompt, or chat, with an artifact.")
@artifact_argument
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=int, default=256, show_default=True, metavar="N", help="Most tokens to make.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Keep the likeliest tokens of this mass.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Keep that many tokens; 0 keeps all.")
@click.option("--min-p", type=float, default=0.0, show_default=True, help="Keep tokens this likely against the best.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1 avoids repetition.")
@click.option("--seed", type=int, help="Makes the answer repeatable.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Text that ends the answer; may be given several times.")
@click.option(
    "--chat/--raw", default=None, help="By the chat template, or as plain text.  [default: --chat if it has one]"
)
@threads_option
@click.option("-v", "--verbose", is_flag=True, help="Say on stderr how fast it was; a terminal is told anyway.")
@json_option
def run(
    artifact: Path,
    prompt: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: Sequence[str],
    chat: bool | None,
    threads: int | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Continue PROMPT with the artifact in DIR and print the text as it is made.

    Without PROMPT it is read from stdin; on a terminal a conversation begins.
    """
    converse = prompt is None and sys.stdin.isatty()
    if converse and as_json:
        raise click.UsageError("--json is about one answer: give a PROMPT.")
    if prompt is None and not converse:
        prompt = _read_stdin().removesuffix("\n")

    from ...runtimes.engines.load import load
    from ...runtimes.generate.llm import LLM
    from ...runtimes.generate.sampling import SamplingParams
    from ...runtimes.generate.tokenizer import Tokenizer

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    engine = load(artifact, threads=threads)
    tokenizer = Tokenizer(artifact)
    chat = _knows_chat(tokenizer) if chat is None else chat
    if as_json:
        assert prompt is not None
        print_json(asdict(LLM(engine, tokenizer).generate(prompt, params, chat=chat)[0]))
        return
    talk = _Talk(engine, tokenizer, params, stats=verbose or sys.stderr.isatty())
    if prompt is None:
        _converse(talk, chat)
    else:
        talk.answer([{"role": "user", "content": prompt}] if chat else prompt)


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from None


def _not_utf8(error: UnicodeDecodeError) -> UsageError:
    what = f"The prompt on stdin is not {error.encoding}: {error.reason} at byte {error.start}."
    return UsageError("PROMPT_NOT_UTF8", what, "Convert it to UTF-8: iconv -t UTF-8")


def _knows_chat(tokenizer: Tokenizer) -> bool:
    try:
        tokenizer.chat([{"role": "user", "content": "."}])
    except LlmcError as error:
        # Another error is one that the user should see, when the prompt meets it.
        return error.code != "CHAT_TEMPLATE_MISSING"
    return True


@dataclass
class _Talk:
    """Who answers, and how; `said` is the last answer, as far as it came."""

    engine: Engine
    tokenizer: Tokenizer
    params: SamplingParams
    stats: bool
    said: str = field(default="", init=False)

    def answer(self, prompt: Prompt) -> None:
        """Print an answer as it is made, and end its line however it ends."""
        from ...runtimes.generate.loop import generate

        self.said = ""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            ids = self.tokenizer.encode(self.tokenizer.chat(prompt), add_special_tokens=False)
        times = [time.perf_counter()]
        steps = generate(self.engine, [ids], self.params, self.tokenizer.eos_ids, self.tokenizer)
        try:
            for step in steps:
                times.append(time.perf_counter())
                self.said += step.text
                click.echo(step.text, nl=False)
        finally:
            if len(times) > 1:
                click.echo()
        if self.stats:
            _show_stats(len(ids), times, str(step.finish_reason))


def _show_stats(prompt_tokens: int, times: Sequence[float], ended: str) -> None:
    made, decode_s = len(times) - 1, times[-1] - times[1]
    speed = f", {(made - 1) / decode_s:,.1f} tokens/s" if made > 1 else ""
    first = f"first after {(times[1] - times[0]) * 1000:,.0f} ms"
    click.secho(f"[{prompt_tokens} + {made} tokens, {first}{speed}, ended by {ended}]", err=True, dim=True)


def _converse(talk: _Talk, chat: bool) -> None:
    """Answer line by line; what was said before counts if the model knows conversations."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() a history and keys to edit with

    click.echo("/reset forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer.", err=True)
    history: list[Message] = []
    while True:
        try:
            line = input("> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            continue
        except UnicodeDecodeError as error:
            click.echo(str(_not_utf8(error)), err=True)
            continue
        if line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            history.clear()
        elif line.strip():
            history.append({"role": "user", "content": line})
            try:
                talk.answer(history if chat else line)
            except KeyboardInterrupt:
                pass
            except LlmcError as error:  # the prompt is too long, say: another one may do
                click.echo(str(error), err=True)
                history.pop()
                continue
            history.append({"role": "assistant", "content": talk.said})
