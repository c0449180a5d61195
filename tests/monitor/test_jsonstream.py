"""The JSON stream under a QMP session: any cut of the bytes gives the same values, and nothing makes it fail or swell."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qblock.monitor.jsonstream import JsonError, JsonStream

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=12,
)
FRAGMENTS = st.sampled_from(
    [b"{", b"}", b"[", b"]", b",", b":", b'"', b"'", b"\\", b"\xff", b"\x00", b" ", b"\n", b"1", b"-", b"true", b"null", b"e",
     b'"a"', b"'b'", b"{}", b"[1,2]", b'{"execute":"x"}', b"\xc3\xa9", b"\xe2", b"\\ud800", b"@"]
)  # fmt: skip


def feed(stream: JsonStream, data: bytes, cuts: list[int] | None = None) -> list[Any]:
    """All that comes of ``data``, fed in pieces that end at ``cuts``; mistakes are shown by their texts."""
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts or ())})
    found = [item for a, b in itertools.pairwise(edges) for item in stream.feed(data[a:b])]
    return [("mistake", str(item)) if isinstance(item, JsonError) else item for item in found]


@given(st.lists(FRAGMENTS | st.binary(max_size=8), max_size=30), st.lists(st.integers(0, 400), max_size=8))
def test_any_cut_of_any_bytes_gives_the_same_items(parts: list[bytes], cuts: list[int]) -> None:
    """How the network cuts the stream must not matter, for garbage neither."""
    data = b"".join(parts)
    assert feed(JsonStream(), data, cuts) == feed(JsonStream(), data)


@given(st.lists(VALUES, max_size=5), st.lists(st.integers(0, 400), max_size=8), st.sampled_from(["", " ", "\r\n"]))
def test_values_come_out_as_they_went_in(values: list[Any], cuts: list[int], between: str) -> None:
    """Several values in one read, one value in several reads, with or without line ends."""
    boxed = [{"value": value} for value in values]
    data = between.join(json.dumps(value) for value in boxed).encode()
    assert feed(JsonStream(), data, cuts) == boxed


@given(st.lists(FRAGMENTS, max_size=30))
def test_a_reset_byte_and_a_line_end_bring_the_stream_back(parts: list[bytes]) -> None:
    """Whatever came before, 0xFF makes the next request understood."""
    stream = JsonStream()
    stream.feed(b"".join(parts))
    assert feed(stream, b'\xff\n{"execute":"x"}')[-1] == {"execute": "x"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"{'a':'it\\'s \"so\"'}", {"a": 'it\'s "so"'}),
        (b'{"a":"it\\\'s"}', {"a": "it's"}),
        (b'{"a":18446744073709551615}', {"a": 18446744073709551615}),
        (b'{"a":18446744073709551616}', {"a": 18446744073709551616.0}),
        (b'{"a":-9223372036854775809}', {"a": -9223372036854775809.0}),
        (b'{"a":"\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        (b'{"a":"\\u0000x"}', {"a": "\0x"}),
        (b'{"a":-0.0}', {"a": 0.0}),
        (b"5 ", 5),
        (b"true ", True),
    ],
)
def test_what_qemu_accepts_is_accepted(text: bytes, value: Any) -> None:
    """Single quotes, 64-bit integers, escapes: tried on qemu-storage-daemon 7.2."""
    assert feed(JsonStream(), text) == [value]


@pytest.mark.parametrize(
    ("text", "mistakes"),
    [
        (b'{"execute":"x",}', 1), (b'{"execute" "x"}', 1), (b"}", 1), (b"]", 1), (b"{]", 1), (b'{"a":0123}', 2),
        (b'{"a":+1}', 2), (b'{"a":.5}', 2), (b'{"a":"\\ud800"}', 1), (b'{"a":"\xff"}', 2), (b'{"a":"x\ny"}', 2),
        (b'{"a":"\\x"}', 1), (b'{"a":truefalse}', 1), (b'{"a":TRUE}', 2), (b'{"a":1,"a":2}', 1), (b"hello ", 1),
        (b"@ ", 1), (b"\x00", 1), (b"\xef\xbb\xbf", 0), (b'{"a":NaN}', 2), (b'{"a":"\xc3("}', 1),
    ],
)  # fmt: skip
def test_mistakes_are_counted_as_qemu_counts_them(text: bytes, mistakes: int) -> None:
    """One error reply for each mistake that qemu-storage-daemon 7.2 reports, and the next request is understood."""
    stream = JsonStream()
    assert sum(isinstance(item, JsonError) for item in stream.feed(text)) == mistakes
    assert feed(stream, b' {"execute":"x"}')[-1] == {"execute": "x"}


def test_numbers_that_are_no_json_in_the_reply_are_refused() -> None:
    """QEMU echoes 1e400 as ``inf``, which no client can read."""
    assert isinstance(JsonStream().feed(b'{"id":1e400}')[0], JsonError)
    assert isinstance(JsonStream().feed(b'{"id":' + b"9" * 5000 + b"}")[0], JsonError)


@pytest.mark.parametrize(
    "piece",
    [b"a", b"a ", b'","', b"[", b"1,", b"1", b"\\n"],
    ids=["x", "words", "strings", "nesting", "numbers", "digits", "escapes"],
)
@pytest.mark.parametrize("start", [b'{"execute":"', b'{"id":['])
def test_a_message_beyond_the_limits_is_reported_once_and_not_kept(start: bytes, piece: bytes) -> None:
    """A message of any size and kind costs its sender a few errors, and us no memory."""
    stream = JsonStream(max_message=1 << 16, max_tokens=1000, max_nesting=100)
    stream.feed(start)
    data = piece * (4096 // len(piece))
    mistakes = 0
    for _ in range(100):
        mistakes += len(stream.feed(data))
        assert stream.pending <= 2 << 16
    assert mistakes <= 3


def test_a_message_just_within_the_limits_passes() -> None:
    """The limits are limits, not traps for long messages."""
    message = b'{"id":"' + b"a" * ((16 << 20) - 10) + b'"}'
    stream = JsonStream()
    items = [
        item for start in range(0, len(message), 1 << 16) for item in stream.feed(message[start : start + (1 << 16)])
    ]
    assert len(items) == 1
    assert not isinstance(items[0], JsonError)


def test_after_an_oversized_message_the_next_one_is_understood() -> None:
    """The connection survives: the structure of the big one is followed to its end."""
    stream = JsonStream(max_message=1000)
    items = [item for _ in range(30) for item in stream.feed(b'{"id":"' + b"x" * 500 if _ == 0 else b"]}'x" * 100)]
    items += stream.feed(b'"}{"execute":"x"}')
    assert [type(item) for item in items] == [JsonError, dict]
