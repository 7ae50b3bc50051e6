"""Tokenizer and chat template from Hugging Face files, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from ...errors import LlmcError, UsageError

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]
"""One message of a conversation: `{"role": "user", "content": "..."}`, and other keys that the template knows."""


class Tokenizer:
    """The tokenizer of a model folder.

    Args:
        folder: contains `tokenizer.json`, and optionally `tokenizer_config.json`, `special_tokens_map.json`,
            `chat_template.jinja`, `generation_config.json` and `config.json`.

    Raises:
        LlmcError: `TOKENIZER_MISSING` or `TOKENIZER_INVALID`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise LlmcError(
                "TOKENIZER_MISSING",
                f"There is no tokenizer.json in {self.folder}.",
                "Copy the model's tokenizer.json there.",
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise _unreadable(path, error) from error
        # The file may set truncation and padding to a fixed length, which is meant for training.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = _read(self.folder / "tokenizer_config.json")
        self._special = _special_tokens(_read(self.folder / "special_tokens_map.json"), self._config)

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the tokenizer; a model may have more logits."""
        return self._tokenizer.get_vocab_size()

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end an output: the model's, or else the tokenizer's own."""
        if ids := read_eos_ids(self.folder):
            return ids
        own = self._tokenizer.token_to_id(self._special.get("eos_token", ""))
        return () if own is None else (own,)

    @cached_property
    def bos_id(self) -> int | None:
        """The token that begins a text, or None; `encode` may not add it."""
        return self._tokenizer.token_to_id(self._special.get("bos_token", ""))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text, with the model's special tokens around it.

        Raises:
            UsageError: PROMPT_NOT_UTF8 if the text contains surrogates, as command-line arguments of other bytes do.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            what = f"The prompt holds {text[error.start]!r} at character {error.start}, which UTF-8 can't encode."
            raise UsageError("PROMPT_NOT_UTF8", what, "Convert it to UTF-8: iconv -t UTF-8") from None
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Render a conversation with the model's chat template.

        The text contains its special tokens: encode it with `add_special_tokens=False`.

        Args:
            add_generation_prompt: end with the tokens that start the model's answer.

        Raises:
            LlmcError: `CHAT_TEMPLATE_MISSING`, `CHAT_TEMPLATE_INVALID`, or `CHAT_INVALID` if the template can't render
                these messages.
        """
        template = self._template
        try:
            # Pass plain data only: a template is untrusted code and could call the methods of other objects.
            plain = json.loads(json.dumps(list(messages)))
            return template.render(
                messages=plain, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self._special
            )
        except Exception as error:  # an expression in a template can raise anything
            raise LlmcError(
                "CHAT_INVALID",
                f"The chat template of {self.folder} refuses these messages: {error}.",
                'Give a list of {"role": ..., "content": ...} with roles that the template supports.',
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
                f"The chat template of {self.folder} has a syntax error in line {error.lineno}: {error.message}.",
                "Fix chat_template.jinja, or give the prompt as plain text.",
            ) from error

    def _template_text(self) -> str:
        path = self.folder / "chat_template.jinja"
        text = path.read_text(encoding="utf-8") if path.is_file() else self._config.get("chat_template")
        if isinstance(text, list):  # older tools saved several named templates
            text = {one["name"]: one["template"] for one in text}.get("default")
        if not isinstance(text, str):
            raise LlmcError(
                "CHAT_TEMPLATE_MISSING",
                f"There is no chat template in {self.folder}.",
                "Give the prompt as plain text, or copy the model's chat_template.jinja there.",
            )
        return text


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """Read end tokens from `generation_config.json`, or else from `config.json`."""
    for name in ("generation_config.json", "config.json"):
        ids = _read(folder / name).get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Collect `bos_token`, `eos_token` and so on; later sources override earlier."""
    special = {}
    for name, value in (item for source in sources for item in source.items()):
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            special[name] = text
    return special


def _environment() -> Any:
    """Build a sandboxed Jinja environment with the helpers of chat templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}`, a training mark; here it only renders its content."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class PublicNamespace(Namespace):
        """Jinja namespace without private names: templates can't set `__class__`."""

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
                raise SecurityError(f"a template can't use {name!r} as a variable name")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson  # the built-in filter escapes for HTML
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda layout: datetime.now().strftime(layout),
        namespace=PublicNamespace,
        dict=lambda *args, **values: dict(*args, **values),  # not the class: dict.update would modify its arguments
    )
    return environment


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unreadable(path, error) from error
    if not isinstance(document, dict):
        raise _unreadable(path, "it is not a JSON object")
    return document


def _unreadable(path: Path, why: object) -> LlmcError:
    return LlmcError("TOKENIZER_INVALID", f"{path} can't be read: {why}.", "Download the file again.")
