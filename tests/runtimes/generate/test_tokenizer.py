"""Encoding, decoding and chat templates agree with transformers."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fake_engines import BOS, EOS, byte_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmc.compiler.frontend.sources import find_source
from llmc.errors import LlmcError
from llmc.runtimes.generate.tokenizer import Tokenizer, read_eos_ids

TEXTS = [
    "",
    " ",
    "The capital of France is Paris.",
    "  two spaces,\ttab\n\nlines  ",
    "naïve café — “quotes”",
    "日本語のテキスト、中文字符。",
    "👩‍👩‍👧 🎉🇩🇪 e\u0301",
    "def f(x):\n    return x ** 2  # 12345",
    "<|im_start|>user\nhi<|im_end|> not special <|im",
]
CHAT = [{"role": "user", "content": "Hi & <b>bye</b> 🎉"}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Sure?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    find_source("demo").tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_encode_and_decode_match_transformers(
    ours: Tokenizer, theirs: PreTrainedTokenizerBase, text: str, special: bool
) -> None:
    ids = ours.encode(text, add_special_tokens=special)
    assert ids == theirs.encode(text, add_special_tokens=special)
    assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(ids, skip_special_tokens=special)
    assert ours.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_are_added_on_request(tmp_path: Path) -> None:
    ours = byte_tokenizer(tmp_path)
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")).save_pretrained(tmp_path / "theirs")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    for special, want in ((True, [BOS, *b"a"]), (False, [*b"a"])):
        assert ours.encode("a", add_special_tokens=special) == want == theirs.encode("a", add_special_tokens=special)


@pytest.mark.parametrize("messages", [CHAT, TURNS])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_chat_template_of_the_demo_matches_transformers(
    ours: Tokenizer, theirs: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool
) -> None:
    text = ours.chat(messages, add_generation_prompt=prompt)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    assert ours.encode(text, add_special_tokens=False) == ids


TEMPLATES = {
    "tokens": "{{ bos_token }}|{{ eos_token }}|{{ sep_token }}|{{ nonesuch }}|{{ sep_token is defined }}",
    "blocks": "  {% for m in messages %}\n    {{ m.content }}\n  {% endfor %}\nend",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true) }}",
    "absent": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ add_generation_prompt }}",
    "generation": "{% for m in messages %}a{% generation %}{{ m.content }}{% endgeneration %}b\n{% endfor %}",
    "generation keeps its names": "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}",
    "namespace": "{% set n = namespace(a=1) %}{% for m in messages %}{% set n.a = n.a + 1 %}{% endfor %}{{ n.a }}",
    "namespace of a dict": "{% set n = namespace({'a': 1}, b=2, self=3) %}{{ n.a }}{{ n.b }}{{ n.self }}",
    "dict": "{{ dict(a=1)['a'] }}{{ dict({'b': 2}).b }}",
    "strip": "{{ messages[0]['content'].strip() }}{{ messages[0].get('name') }}{{ messages[-1]['role'] | upper }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_features_match_transformers(
    folder: Path, theirs: PreTrainedTokenizerBase, tmp_path: Path, name: str
) -> None:
    copy(folder, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])
    want = theirs.apply_chat_template(TURNS, chat_template=TEMPLATES[name], tokenize=False)
    assert Tokenizer(tmp_path).chat(TURNS, add_generation_prompt=False) == want


def test_a_template_can_read_the_date(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
    assert abs(int(Tokenizer(tmp_path).chat(CHAT)) - datetime.now().year) <= 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ namespace(_a=1) }}",
        "{{ dict.fromkeys([1]) }}",
        "{{ dict.update(messages[0], role='x') }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ messages[0].content + 1 }}",
        "{{ nonesuch.a }}",
    ],
)
def test_unsafe_and_failing_templates_are_refused(tmp_path: Path, template: str) -> None:
    byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(LlmcError, match="refuses these messages") as caught:
        Tokenizer(tmp_path).chat(CHAT)
    assert caught.value.code == "CHAT_INVALID"


def test_the_error_contains_the_message_of_the_template(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(LlmcError, match="refuses these messages: roles must alternate"):
        Tokenizer(tmp_path).chat(CHAT)


def test_a_template_gets_messages_as_plain_data(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content.secret() }}")

    class Rich(str):
        def secret(self) -> str:
            return "called"

    with pytest.raises(LlmcError, match="CHAT_INVALID"):
        Tokenizer(tmp_path).chat([{"role": "user", "content": Rich("a")}])
    with pytest.raises(LlmcError, match="CHAT_INVALID"):
        Tokenizer(tmp_path).chat([{"role": "user", "content": object()}])


# Files ----------------------------------------------------------------------------------------------------------------


def copy(folder: Path, to: Path, **config: Any) -> None:
    """Copy the demo's tokenizer without its chat template; change its config."""
    (to / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    old = json.loads((folder / "tokenizer_config.json").read_text())
    (to / "tokenizer_config.json").write_text(json.dumps({**old, **config}))


@pytest.mark.parametrize(
    "written",
    ["{{ eos_token }}x", [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ eos_token }}x"}]],
)
def test_a_template_in_the_tokenizer_config(folder: Path, tmp_path: Path, written: object) -> None:
    copy(folder, tmp_path, chat_template=written)
    assert Tokenizer(tmp_path).chat(CHAT) == "<|im_end|>x"


def test_special_tokens_come_from_both_files(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    map_ = {
        "bos_token": {"content": "<begin>", "lstrip": False},
        "eos_token": "old",
        "additional_special_tokens": ["<a>"],
    }
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(map_))
    config = {"eos_token": "<end>", "unk_token": None, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}")
    assert Tokenizer(tmp_path).chat(CHAT) == "<begin><end>False"


@pytest.mark.parametrize(
    ("generation", "config", "want"),
    [
        ({"eos_token_id": 3}, {"eos_token_id": 4}, (3,)),
        ({"eos_token_id": [3, 5]}, {"eos_token_id": 4}, (3, 5)),
        ({"eos_token_id": 0}, None, (0,)),
        ({"eos_token_id": None}, {"eos_token_id": [4]}, (4,)),
        (None, {"eos_token_id": 4}, (4,)),
        ({}, {}, ()),
        (None, None, ()),
    ],
)
def test_end_tokens_of_the_model(tmp_path: Path, generation: Any, config: Any, want: tuple[int, ...]) -> None:
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert read_eos_ids(tmp_path) == want


def test_end_token_of_the_tokenizer_is_the_default(folder: Path, tmp_path: Path) -> None:
    assert Tokenizer(folder).eos_ids == (2,)
    assert byte_tokenizer(tmp_path).eos_ids == (EOS,)
    (tmp_path / "generation_config.json").unlink()
    assert Tokenizer(tmp_path).eos_ids == ()


def test_truncation_and_padding_in_the_file_are_ignored(folder: Path, tmp_path: Path) -> None:
    copy(folder, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "<|im_end|>",
    }
    content["padding"]["pad_to_multiple_of"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer(tmp_path).encode(TEXTS[2]) == Tokenizer(folder).encode(TEXTS[2])


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("tokenizer.json", None, "TOKENIZER_MISSING"),
        ("tokenizer.json", "{", "TOKENIZER_INVALID"),
        ("tokenizer_config.json", "{", "TOKENIZER_INVALID"),
        ("tokenizer_config.json", "[]", "TOKENIZER_INVALID"),
        ("chat_template.jinja", None, "CHAT_TEMPLATE_MISSING"),
        ("chat_template.jinja", "{% for %}", "CHAT_TEMPLATE_INVALID"),
    ],
)
def test_missing_and_broken_files(tmp_path: Path, name: str, content: str | None, code: str) -> None:
    byte_tokenizer(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(LlmcError) as caught:
        Tokenizer(tmp_path).chat(CHAT)
    assert caught.value.code == code
    assert str(tmp_path) in caught.value.what
