"""`llmc run`: continue a prompt or chat with an artifact."""

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
    from ...runtimes.generate.llm import LLM
    from ...runtimes.generate.sampling import SamplingParams
    from ...runtimes.generate.tokenizer import Message, Tokenizer

    Prompt = str | Sequence[Message]


@click.command(cls=Verb, short_help="Continue a prompt, or chat, with an artifact.")
@artifact_argument
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=int, default=256, show_default=True, metavar="N", help="Generate at most N tokens.")
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0 always picks the most probable token."
)
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Sample from the most probable tokens of this total probability.",
)
@click.option(
    "--top-k", type=int, default=0, show_default=True, help="Sample from this many most probable tokens; 0: all."
)
@click.option(
    "--min-p",
    type=float,
    default=0.0,
    show_default=True,
    help="Drop tokens less probable than this fraction of the best.",
)
@click.option(
    "--repetition-penalty", type=float, default=1.0, show_default=True, help="Values above 1 reduce repetition."
)
@click.option("--seed", type=int, help="Make the output repeatable.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop at this text. Repeatable.")
@click.option(
    "--chat/--raw",
    default=None,
    help="Format the prompt with the chat template or not.  [default: --chat if there is a template]",
)
@threads_option
@click.option("-v", "--verbose", is_flag=True, help="Print statistics on stderr. A terminal always shows them.")
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
    """Continue PROMPT with the artifact in DIR and print the text as it is generated.

    Without PROMPT, the prompt is read from stdin. If stdin is a terminal, a chat begins.
    """
    is_chat = prompt is None and sys.stdin.isatty()
    if is_chat and as_json:
        raise click.UsageError("--json prints a single answer: give a PROMPT.")
    if prompt is None and not is_chat:
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
    llm = LLM(engine, tokenizer, batch_size=1)
    chat = _has_template(tokenizer) if chat is None else chat
    if as_json:
        assert prompt is not None
        print_json(asdict(llm.generate(prompt, params, chat=chat)[0]))
        return
    session = ChatSession(llm, params, stats=verbose or sys.stderr.isatty())
    if prompt is None:
        _chat(session, chat)
    else:
        session.answer([{"role": "user", "content": prompt}] if chat else prompt)


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from None


def _not_utf8(error: UnicodeDecodeError) -> UsageError:
    what = f"The prompt on stdin is not {error.encoding}: {error.reason} at byte {error.start}."
    return UsageError("PROMPT_NOT_UTF8", what, "Convert it to UTF-8: iconv -t UTF-8")


def _has_template(tokenizer: Tokenizer) -> bool:
    try:
        tokenizer.chat([{"role": "user", "content": "."}])
    except LlmcError as error:
        # Any other error is raised again, with the prompt.
        return error.code != "CHAT_TEMPLATE_MISSING"
    return True


@dataclass
class ChatSession:
    """Prints the answers of a model, to one prompt or in a chat.

    Attributes:
        stats: print statistics after each answer.
        said: the text of the last answer; incomplete if it was interrupted.
    """

    llm: LLM
    params: SamplingParams
    stats: bool
    said: str = field(default="", init=False)

    def answer(self, prompt: Prompt) -> None:
        """Print an answer as it is generated, and a line break at its end, also after an error."""
        self.said = ""
        times = [time.perf_counter()]
        try:
            for token in self.llm.stream(prompt, self.params):
                times.append(time.perf_counter())
                self.said += token.text
                click.echo(token.text, nl=False)
        finally:
            if len(times) > 1:
                click.echo()
        if self.stats:
            _show_stats(len(self.llm.encode(prompt)), times, str(token.finish_reason))


def _show_stats(prompt_tokens: int, times: Sequence[float], finish_reason: str) -> None:
    new_tokens, decode_s = len(times) - 1, times[-1] - times[1]
    speed = f", {(new_tokens - 1) / decode_s:,.1f} tokens/s" if new_tokens > 1 else ""
    first = f"first after {(times[1] - times[0]) * 1000:,.0f} ms"
    click.secho(
        f"[{prompt_tokens} + {new_tokens} tokens, {first}{speed}, ended by {finish_reason}]", err=True, dim=True
    )


def _chat(session: ChatSession, with_history: bool) -> None:
    """Answer the lines that the user types.

    Args:
        with_history: answer a chat with all earlier messages; otherwise each line is a plain prompt.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # adds a history and line editing to input()

    click.echo("/reset starts a new chat, /exit or Ctrl-D quits, Ctrl-C stops an answer.", err=True)
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
                session.answer(history if with_history else line)
            except KeyboardInterrupt:
                pass
            except LlmcError as error:  # for example a prompt that is too long
                click.echo(str(error), err=True)
                history.pop()
                continue
            history.append({"role": "assistant", "content": session.said})
