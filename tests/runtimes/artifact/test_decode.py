"""Documents become dataclasses only if every key and every type fits; a message names the place that doesn't."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from llmc.runtimes.artifact.decode import DecodeError, decode, encode, left_out


@dataclass(frozen=True)
class Leg:
    """A part of a document that is an object itself."""

    length: int
    shoe: str | None


@dataclass(frozen=True)
class Animal:
    """A document with a field of each kind."""

    name: str
    weight: float
    is_tame: bool
    kind: Literal["cat", "dog"]
    legs: list[Leg]
    friends: dict[str, Leg]
    owner: Leg | None
    notes: dict[str, Any]
    sizes: list[int]
    age: int | None = None
    tags: list[str] = field(default_factory=list)


def document(**changes: Any) -> dict[str, Any]:
    """Return a document that fits, with `changes`."""
    fits: dict[str, Any] = {
        "name": "Tom",
        "weight": 4.5,
        "is_tame": True,
        "kind": "cat",
        "legs": [{"length": 9, "shoe": None}, {"length": 8, "shoe": "boot"}],
        "friends": {"Jerry": {"length": 1, "shoe": None}},
        "owner": None,
        "notes": {"any": [1, {"thing": None}]},
        "sizes": [],
        "age": None,
        "tags": ["grey"],
    }
    return fits | changes


def test_a_document_that_fits() -> None:
    legs = [Leg(9, None), Leg(8, "boot")]
    friends, notes = {"Jerry": Leg(1, None)}, {"any": [1, {"thing": None}]}
    want = Animal("Tom", 4.5, True, "cat", legs, friends, None, notes, [], None, ["grey"])
    assert decode(Animal, document(), "it") == want
    owned = decode(Animal, document(owner={"length": 3, "shoe": "clog"}, age=7, sizes=[1, -2]), "it")
    assert (owned.owner, owned.age, owned.sizes) == (Leg(3, "clog"), 7, [1, -2])


def test_a_whole_number_may_stand_for_a_number() -> None:
    """JSON writers differ in whether they write 4 or 4.0."""
    decoded = decode(Animal, document(weight=4), "it").weight
    assert decoded == 4.0 and type(decoded) is float


def refused(value: Any, kind: type = Animal) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(kind, value, "it")
    assert not str(caught.value).endswith(".")
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": 3}, "it.name is 3, not text"),
        ({"name": None}, "it.name is None, not text"),
        ({"weight": "4.5"}, "it.weight is '4.5', not a number"),
        ({"weight": True}, "it.weight is True, not a number"),
        ({"is_tame": 1}, "it.is_tame is 1, not "),
        ({"kind": "cow"}, "it.kind is 'cow', not 'cat' or 'dog'"),
        ({"kind": ["cat"]}, "it.kind is ['cat'], not 'cat' or 'dog'"),
        ({"legs": {}}, "it.legs is {}, not list"),
        ({"legs": [{"length": 1, "shoe": None}, 2]}, "it.legs[1] is 2, not an object"),
        ({"legs": [{"length": 1.0, "shoe": None}]}, "it.legs[0].length is 1.0, not a whole number"),
        ({"legs": [{"length": True, "shoe": None}]}, "it.legs[0].length is True, not a whole number"),
        ({"legs": [{"shoe": None}]}, "it.legs[0] lacks length"),
        ({"friends": []}, "it.friends is [], not dict"),
        ({"friends": {"Jerry": []}}, "it.friends['Jerry'] is [], not an object"),
        ({"owner": {"length": 3, "shoe": 4}}, "it.owner.shoe is 4, not text"),
        ({"owner": "me"}, "it.owner is 'me', not an object"),
        ({"notes": "none"}, "it.notes is 'none', not dict"),
        ({"sizes": [1, None]}, "it.sizes[1] is None, not a whole number"),
        ({"sizes": (1, 2)}, "it.sizes is (1, 2), not list"),
        ({"age": "7"}, "it.age is '7', not a whole number"),
    ],
)
def test_a_value_of_another_type_is_named(changes: dict[str, Any], said: str) -> None:
    assert said in refused(document(**changes))


def test_missing_and_unknown_keys_are_listed() -> None:
    lacking = document()
    del lacking["name"], lacking["legs"]
    assert refused(lacking) == "it lacks legs, name"
    assert refused(document(wings=2, fins=0)) == "it has unknown keys: fins, wings"


def test_a_key_with_a_default_must_be_there_too() -> None:
    """A document is written whole, so a key that is missing means another format."""
    for name in ("age", "tags"):
        lacking = document()
        del lacking[name]
        assert refused(lacking) == f"it lacks {name}"


@dataclass(frozen=True)
class Dog:
    """A document that may lack a key."""

    name: str
    tricks: int = left_out(0)


def test_a_field_is_left_out_where_it_has_its_default() -> None:
    for dog, given in [(Dog("Rex"), {"name": "Rex"}), (Dog("Rex", 3), {"name": "Rex", "tricks": 3})]:
        assert encode(dog) == given and decode(Dog, given, "it") == dog
    assert decode(Dog, {"name": "Rex", "tricks": 0}, "it") == Dog("Rex")
    assert refused({"tricks": 1}, Dog) == "it lacks name"
    assert refused({"name": "Rex", "tricks": None}, Dog) == "it.tricks is None, not a whole number"
    assert refused({"name": "Rex", "trick": 1}, Dog) == "it has unknown keys: trick"


def test_a_document_there_and_back() -> None:
    for given in (document(), document(owner={"length": 3, "shoe": None}, age=7)):
        assert encode(decode(Animal, given, "it")) == given


@pytest.mark.parametrize("value", [None, 3, "text", [], [["length", 3], ["shoe", None]]])
def test_what_is_no_object_is_no_dataclass(value: Any) -> None:
    assert refused(value, Leg) == f"it is {value!r}, not an object"


def test_a_long_value_is_cut() -> None:
    said = refused(document(name=["x" * 1000]))
    assert said.startswith("it.name is ['xxx") and len(said) < 120
