"""A model's tokenizer and chat template, from the files that Hugging Face tools save, without those tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from ...errors import LlmcError

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]
"""One turn of a conversation: `{"role": "user", "content": "..."}`, and what else the template knows."""


class Tokenizer:
    """The tokenizer of a folder: `tokenizer.json` and what stands beside it.

    Args:
        folder: where the files are.

    Raises:
        LlmcError: `TOKENIZER_MISSING` or `TOKENIZER_INVALID`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise LlmcError("TOKENIZER_MISSING", f"{self.folder} holds no tokenizer.json.", "Put the model's there.")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more exact
            raise _unreadable(path, error) from error
        # A file may ask for a fixed length, which is for training.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = _read(self.folder / "tokenizer_config.json")
        self._special = _special_tokens(_read(self.folder / "special_tokens_map.json"), self._config)

    @property
    def vocab_size(self) -> int:
        """How many tokens it knows; a model's logits may be wider."""
        return self._tokenizer.get_vocab_size()

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end an output: the model's, else the tokenizer's own."""
        if ids := read_eos_ids(self.folder):
            return ids
        own = self._tokenizer.token_to_id(self._special.get("eos_token", ""))
        return () if own is None else (own,)

    @cached_property
    def bos_id(self) -> int | None:
        """The token that begins a text, whether or not `encode` puts it there."""
        return self._tokenizer.token_to_id(self._special.get("bos_token", ""))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; those that open a sequence come with it if asked for."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """A conversation as the model was taught to read it.

        The text holds its own special tokens: encode it with `add_special_tokens=False`.

        Args:
            add_generation_prompt: end where the model's answer begins.

        Raises:
            LlmcError: `CHAT_TEMPLATE_MISSING`, `CHAT_TEMPLATE_INVALID`, or `CHAT_INVALID` where the template can't
                render these messages.
        """
        template = self._template
        try:
            # Plain data only: a template is foreign code, and methods of other objects would be its to call.
            plain = json.loads(json.dumps(list(messages)))
            return template.render(
                messages=plain, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self._special
            )
        except Exception as error:  # whatever an expression in a template can raise
            raise LlmcError(
                "CHAT_INVALID",
                f"The chat template of {self.folder} refuses these messages: {error}.",
                'Give a list of {"role": ..., "content": ...} with roles that the model knows.',
            ) from error

    @cached_property
    def _template(self) -> Template:
        import jinja2

        text = self._template_text()
        try:
            return _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise LlmcError(
                "CHAT_TEMPLATE_INVALID",
                f"The chat template of {self.folder} is wrong at line {error.lineno}: {error.message}.",
                "Mend chat_template.jinja, or give the prompt as plain text.",
            ) from error

    def _template_text(self) -> str:
        path = self.folder / "chat_template.jinja"
        found = path.read_text(encoding="utf-8") if path.is_file() else self._config.get("chat_template")
        if isinstance(found, list):  # several under names, as older tools saved them
            found = {one["name"]: one["template"] for one in found}.get("default")
        if not isinstance(found, str):
            raise LlmcError(
                "CHAT_TEMPLATE_MISSING",
                f"{self.folder} holds no chat template.",
                "The model may know no chat: give the prompt as plain text, or put its chat_template.jinja there.",
            )
        return found


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """The end tokens that a model's `generation_config.json` names, else its `config.json`."""
    for name in ("generation_config.json", "config.json"):
        ids = _read(folder / name).get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, for templates; a later source wins. Those that a model lacks stay undefined."""
    found = {}
    for name, value in (item for source in sources for item in source.items()):
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _environment() -> Any:
    """Jinja as chat templates expect it: no way to Python's internals, and a few helpers that they all use."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what an assistant said, for training; here it is what it encloses."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class PublicNamespace(Namespace):
        """A namespace that can't be given `__class__` and pass for something else."""

        def __init__(*args: Any, **values: Any) -> None:
            for name in dict(*args[1:], **values):
                PublicNamespace._check(name)
            Namespace.__init__(*args, **values)

        def __setitem__(self, name: str, value: Any) -> None:
            PublicNamespace._check(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check(name: str) -> None:
            if name.startswith("_"):
                raise SecurityError(f"{name!r} is no name for a template's variable")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson  # jinja's own escapes for HTML
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda layout: datetime.now().strftime(layout),
        namespace=PublicNamespace,
        dict=lambda *args, **values: dict(*args, **values),  # a function: the class has methods that change others
    )
    return environment


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unreadable(path, error) from error
    if not isinstance(found, dict):
        raise _unreadable(path, "it holds no object")
    return found


def _unreadable(path: Path, why: object) -> LlmcError:
    return LlmcError("TOKENIZER_INVALID", f"{path} can't be read: {why}.", "Fetch the file again.")
