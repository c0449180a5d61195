"""Options: declared as classes, read strictly from JSON and leniently from text, and written back."""

from __future__ import annotations

import enum
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qblock.errors import CommandError, InvalidParameter
from qblock.options import (
    ABSENT,
    ChildRef,
    DriverOptions,
    child,
    dump,
    fields,
    option,
    parse_json_filename,
    parse_keyval,
    parse_options,
    required,
    unflatten_dotted,
    visit,
)
from qblock.permissions import ChildRole
from qblock.registry import GROUP, OWN_DRIVERS


class Colour(enum.Enum):
    """An enumeration with wire values."""

    RED = "deep-red"
    BLUE = "blue"


@attrs.frozen
class Inner:
    """A nested object."""

    direct: bool = option(False, doc="a flag")


@attrs.frozen
class Sample(DriverOptions):
    """One member of each kind."""

    file: ChildRef = child(ChildRole.STORAGE, doc="a child")
    backing: ChildRef = child(ChildRole.BACKING, optional=True, nullable=True, doc="a child that may be null")
    size: int = option(0, doc="an integer", since="1.0")
    ratio: float = option(1.0, doc="a number")
    lazy_flag: bool | None = option(None, doc="a flag with three states")
    mode: Literal["off", "on"] = option("off", doc="a choice")
    colour: Colour = option(Colour.RED, doc="an enumeration")
    cache: Inner | None = option(None, doc="an object")
    names: tuple[str, ...] = option((), doc="a list")
    parts: tuple[Inner, ...] = option((), doc="a list of objects")
    either: Inner | str | None = option(None, doc="an alternate")
    extra: Mapping[str, Any] = option(attrs.Factory(dict), doc="anything")
    new_state: int | None = option(None, doc="a wire name of its own", name="new_state")


@attrs.frozen
class Needy:
    """An object with a mandatory member."""

    name: str = required(doc="must be given")


def test_a_full_object_is_read_by_wire_names() -> None:
    """``-`` on the wire, ``_`` in Python, unless a member has a name of its own."""
    sample = visit(
        Sample,
        {
            "file": "disk",
            "backing": None,
            "size": 5,
            "ratio": 2,
            "lazy-flag": True,
            "mode": "on",
            "colour": "blue",
            "cache": {"direct": True},
            "names": ["a", "b"],
            "parts": [{"direct": True}, {}],
            "either": {"direct": True},
            "new_state": 3,
        },
    )
    assert (sample.file, sample.backing, sample.size, sample.ratio) == ("disk", None, 5, 2.0)
    assert (sample.lazy_flag, sample.mode, sample.colour, sample.cache) == (True, "on", Colour.BLUE, Inner(direct=True))
    assert (sample.names, sample.parts) == (("a", "b"), (Inner(direct=True), Inner()))
    assert (sample.either, sample.new_state) == (Inner(direct=True), 3)
    assert visit(Sample, {"file": "x", "either": "text"}).either == "text"


def test_absent_and_null_are_different_for_a_child_that_may_be_null() -> None:
    """``backing`` absent: what the header says; null: none at all."""
    assert visit(Sample, {"file": "x"}).backing is ABSENT
    assert visit(Sample, {"file": "x", "backing": None}).backing is None
    assert not ABSENT


@pytest.mark.parametrize(
    ("wrong", "path", "detail"),
    [
        ({}, "options.file", "is missing"),
        ({"file": None}, "options.file", "null"),
        ({"file": 5}, "options.file", "must be"),
        ({"file": "x", "sise": 1}, "options.sise", "is unexpected"),
        ({"file": "x", "lazy_flag": True}, "options.lazy_flag", "is unexpected"),
        ({"file": "x", "size": "1"}, "options.size", "an integer"),
        ({"file": "x", "size": True}, "options.size", "an integer"),
        ({"file": "x", "size": 1.0}, "options.size", "an integer"),
        ({"file": "x", "size": 1 << 64}, "options.size", "64 bits"),
        ({"file": "x", "size": None}, "options.size", "null"),
        ({"file": "x", "lazy-flag": 1}, "options.lazy-flag", "a boolean"),
        ({"file": "x", "lazy-flag": "on"}, "options.lazy-flag", "a boolean"),
        ({"file": "x", "mode": "maybe"}, "options.mode", "'maybe'"),
        ({"file": "x", "mode": True}, "options.mode", "a string"),
        ({"file": "x", "colour": "RED"}, "options.colour", "'RED'"),
        ({"file": "x", "cache": True}, "options.cache", "an object"),
        ({"file": "x", "cache": {"direct": "yes"}}, "options.cache.direct", "a boolean"),
        ({"file": "x", "names": "a"}, "options.names", "an array"),
        ({"file": "x", "names": ["a", 1]}, "options.names[1]", "a string"),
        ({"file": "x", "parts": [{}, {"no": 1}]}, "options.parts[1].no", "is unexpected"),
        ({"file": "x", "either": 1}, "options.either", "an object or a string"),
        ({"file": "x", "extra": 1}, "options.extra", "an object"),
    ],
)
def test_wrong_json_is_refused_with_the_path_of_the_member(wrong: dict[str, Any], path: str, detail: str) -> None:
    """Strict: a bool is no int, a string no number, and nothing is ignored."""
    with pytest.raises(InvalidParameter) as refused:
        visit(Sample, wrong, path="options")
    assert refused.value.name == path
    assert detail in str(refused.value)


def test_what_is_not_an_object_is_refused() -> None:
    """Arguments are an object, whatever a client sends."""
    with pytest.raises(InvalidParameter):
        visit(Needy, ["name"])


@pytest.mark.parametrize(
    ("text", "value"), [("on", True), ("yes", True), ("true", True), ("off", False), ("no", False), ("n", False)]
)
def test_text_booleans_are_those_of_the_command_line(text: str, value: bool) -> None:
    """``read-only=on`` as on QEMU's command lines."""
    assert visit(Inner, {"direct": text}, strings=True).direct is value


def test_text_leaves_become_what_the_option_is() -> None:
    """Sizes take suffixes; values that have the right type already are taken as they are."""
    text = {"file": "x", "size": "64k", "ratio": "0.5", "lazy-flag": "on", "cache": {"direct": "off"}, "new_state": 7}
    sample = visit(Sample, text, strings=True)
    assert (sample.size, sample.ratio, sample.lazy_flag, sample.new_state) == (65536, 0.5, True, 7)
    for wrong in ({"size": "many"}, {"ratio": "x"}, {"lazy-flag": "perhaps"}):
        with pytest.raises(InvalidParameter):
            visit(Sample, {"file": "x", **wrong}, strings=True)


def test_what_is_read_can_be_written_and_read_again() -> None:
    """Members that were not given are left out of what is written."""
    given_json = {"file": {"driver": "file"}, "size": 1, "colour": "blue", "parts": [{"direct": True}]}
    sample = visit(Sample, given_json)
    written = dump(sample)
    assert visit(Sample, written) == sample
    assert "backing" not in written and "lazy-flag" not in written
    assert written["colour"] == "blue"


def test_the_declaration_can_be_read_off_the_class() -> None:
    """Schema and help come from the same place as the checking."""
    about = {field.wire: field for field in fields(Sample)}
    assert about["size"].since == "1.0" and about["size"].doc == "an integer" and not about["size"].required
    assert about["file"].required and about["file"].role is ChildRole.STORAGE
    assert about["backing"].nullable and not about["backing"].required
    assert "lazy-flag" in about and "new_state" in about


# ----------------------------------------------------------------------------------------------------------- spellings


@attrs.frozen
class Numbers:
    """One of each kind."""

    count: int = option(0, doc="a count")
    rate: float = option(0.0, doc="a rate")


@pytest.mark.parametrize(
    ("text", "nested"),
    [
        ("", {}),
        ("a=1", {"a": "1"}),
        ("driver=raw,file.driver=file,file.filename=x", {"driver": "raw", "file": {"driver": "file", "filename": "x"}}),
        ("file=a,,b,c=", {"file": "a,b", "c": ""}),
        ("file=a,,,c=1", {"file": "a,", "c": "1"}),
        ("a=b=c", {"a": "b=c"}),
        ("l.0=x,l.1.k=y", {"l": ["x", {"k": "y"}]}),
        ("a=1,a=2", {"a": "2"}),
        ("a=1,", {"a": "1"}),
        ("a=x\0y", {"a": "x\0y"}),
        ("l.00=x", {"l": {"00": "x"}}),
        ("l." + "9" * 5000 + "=x", {"l": {"9" * 5000: "x"}}),
    ],
)
def test_keys_and_values_become_nested_options(text: str, nested: dict[str, Any]) -> None:
    """Dots nest, numbers make lists, a doubled comma stands for one, the last value wins."""
    assert parse_keyval(text) == nested


def test_the_first_item_may_stand_for_an_implied_key() -> None:
    """``-drive disk.img,if=virtio`` and ``--object secret,id=s``."""
    assert parse_keyval("disk.img,if=virtio", implied_key="file") == {"file": "disk.img", "if": "virtio"}


@pytest.mark.parametrize("text", ["a", "a=1,b", "=1", "a=1,a.b=2", "a.b=2,a=1", "l.0=x,l.2=y", ",a=1", "a..b=1"])
def test_text_that_contradicts_itself_is_refused(text: str) -> None:
    """Better an error than a guess at what was meant."""
    with pytest.raises(CommandError):
        parse_keyval(text)


@given(
    st.dictionaries(st.from_regex(r"[a-z][a-z-]{0,8}", fullmatch=True), st.text(st.characters(exclude_characters="\0")))
)
def test_any_value_survives_the_doubling_of_commas(options: dict[str, str]) -> None:
    """File names may hold commas, equal signs and dots."""
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())
    assert parse_keyval(text) == options


def test_json_names_are_told_from_paths() -> None:
    """Dotted keys are allowed inside; a broken one is an error and not a strange path."""
    assert parse_json_filename("plain.img") is None
    name = 'json:{"driver": "raw", "file.driver": "file", "file": {"filename": "x"}}'
    assert parse_json_filename(name) == {"driver": "raw", "file": {"driver": "file", "filename": "x"}}


def test_strings_in_json_names_may_be_in_single_quotes() -> None:
    """As QEMU takes them: such names need no escapes in a shell."""
    name = r"""json:{'driver':'raw','file':{"filename":"it's","driver":'fi\'l"e'}}"""
    assert parse_json_filename(name) == {"driver": "raw", "file": {"driver": "fi'l\"e", "filename": "it's"}}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        '{"a": 1, "a": 2}',
        '{"a": {"b": 1}, "a.b": 2}',
        '{"a": NaN}',
        "[" * 100_000,
        '{"a":' * 400 + "1" + "}" * 400,
        '{"a": ' + "9" * 5000 + "}",
    ],
)
def test_a_broken_json_name_is_refused_in_few_words(text: str) -> None:
    """Its options may come from an image's header: an error, not an endless message and no other exception."""
    with pytest.raises(CommandError) as refused:
        parse_json_filename(f"json:{text}")
    assert len(str(refused.value)) < 600


def test_keys_cannot_be_nested_without_end() -> None:
    """A line of text must not exhaust the stack."""
    with pytest.raises(CommandError, match="nested"):
        parse_keyval("a." * 100_000 + "b=1")


def test_what_is_given_stays_as_it_is() -> None:
    """The caller's nested options are merged into a copy."""
    given = {"file": {"driver": "file"}, "file.filename": "x"}
    unflatten_dotted(given)
    assert given == {"file": {"driver": "file"}, "file.filename": "x"}


@pytest.mark.parametrize("number", [1 << 63, -(1 << 63) - 1, str(1 << 63), "-9223372036854775809", "-1_0", "1 "])
def test_integers_are_those_of_64_bits_with_sign(number: object) -> None:
    """As in QAPI's ``int``; text is read strictly too."""
    with pytest.raises(InvalidParameter):
        visit(Numbers, {"count": number}, strings=isinstance(number, str))


@pytest.mark.parametrize("number", ["nan", "inf", float("nan"), float("-inf"), 10**400])
def test_numbers_are_finite(number: object) -> None:
    """A rate of NaN compares with nothing."""
    with pytest.raises(InvalidParameter):
        visit(Numbers, {"rate": number}, strings=isinstance(number, str))


def test_an_option_of_a_command_line_is_json_or_text() -> None:
    """Whoever reads it has to know whether numbers are written as text."""
    assert parse_options("null-co,size=5", implied_key="driver") == ({"driver": "null-co", "size": "5"}, True)
    assert parse_options('{"driver": "null-co", "size": 5}', implied_key="driver") == (
        {"driver": "null-co", "size": 5},
        False,
    )


@pytest.mark.parametrize(
    "text",
    ["{", '{"a": 1, "a": 2}', '{"a": NaN}', "{} {}", '{"a":' * 100_000],
    ids=["cut", "twice", "NaN", "two", "deep"],
)
def test_json_of_a_command_line_that_is_none_is_refused_shortly(text: str) -> None:
    """A program is no parser's victim: neither depth nor length shows in its error."""
    with pytest.raises(CommandError) as error:
        parse_options(text)
    assert len(str(error.value)) < 400


def test_nested_and_dotted_keys_of_one_object_are_merged() -> None:
    """Defaults are given nested, what a person adds is dotted."""
    assert unflatten_dotted({"file": {"driver": "file"}, "file.filename": "x"}) == {
        "file": {"driver": "file", "filename": "x"}
    }


def test_the_entry_points_are_the_registrys_own_drivers() -> None:
    """The registry knows our drivers without asking the package metadata, so the two lists must not drift apart."""

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][GROUP] == OWN_DRIVERS
