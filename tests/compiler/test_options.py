"""Options declared once: what a declaration checks, and that everything else follows from it."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

import llmc
from llmc.compiler.config import CompileConfig
from llmc.compiler.options import check_options, option, options_of
from llmc.compiler.targets.ort.options import OrtOptions
from llmc.compiler.targets.registry import all_options
from llmc.errors import UsageError


@dataclass(frozen=True)
class Toy:
    size: int | str | None = option(None, "A size.", words=("all",), at_least=2)
    share: float = option(0.5, "A share.", at_least=0, at_most=1)
    limit: float | None = option(None, "A limit.", above=0)
    kind: str = option("a", "A kind.", choices=("a", "b"))
    loud: bool = option(False, "Say it loudly.")

    def __post_init__(self) -> None:
        check_options(self)


@pytest.mark.parametrize(
    "values",
    [{}, {"size": 2}, {"size": "all"}, {"size": None}, {"share": 1}, {"share": 0.0}, {"limit": 0.1}, {"kind": "b"}],
)
def test_accepted(values: dict[str, Any]) -> None:
    Toy(**values)


@pytest.mark.parametrize(
    ("values", "what", "hint"),
    [
        ({"size": 1}, "size is 1.", "Give 2 or more."),
        ({"size": "some"}, "size is 'some'.", "Give a whole number or 'all'."),
        ({"size": True}, "size is True.", "Give a whole number or 'all'."),
        ({"share": 1.5}, "share is 1.5.", "Give 0 to 1."),
        ({"share": None}, "share is None.", "Leave it out for the default."),
        ({"limit": 0.0}, "limit is 0.", "Give a number above 0."),
        ({"kind": "c"}, "kind is 'c'.", "Choose one of a, b."),
        ({"loud": 1}, "loud is 1.", "Give true or false."),
    ],
)
def test_refused(values: dict[str, Any], what: str, hint: str) -> None:
    with pytest.raises(UsageError, match="CONFIG_INVALID") as caught:
        Toy(**values)
    assert (caught.value.what, caught.value.hint) == (what, hint)


def test_every_field_is_declared() -> None:
    for kind, more in ((CompileConfig, {"overrides", "target_options"}), (OrtOptions, set())):
        assert {field.name for field in dataclasses.fields(kind)} - more == set(options_of(kind))


def test_defaults_are_within_their_choices() -> None:
    for declared in all_options().values():
        declared.check(declared.default)
        assert declared.option.help.endswith(".")


def test_python_shows_every_option() -> None:
    shown = inspect.signature(llmc.compile).parameters
    assert list(shown)[:3] == ["model", "output", "config"]
    assert {name: declared.default for name, declared in all_options().items()}.items() <= {
        name: parameter.default for name, parameter in shown.items()
    }.items()


def test_options_load_without_torch() -> None:
    code = (
        "import sys; from llmc.compiler.targets import registry; registry.all_options(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
