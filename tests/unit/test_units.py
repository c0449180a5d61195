"""Sizes and durations as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qblock.units import (
    EiB,
    GiB,
    KiB,
    MiB,
    align_down,
    align_up,
    format_duration,
    format_size,
    is_power_of_two,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("512", 512), ("+5", 5), (" 5", 5), ("64k", 64 * KiB), ("5K", 5 * KiB), ("5b", 5), ("1.5G", 3 * GiB // 2),
        ("1.k", KiB), ("1.00001k", KiB), ("0x10", 16), ("0X1f", 31), ("0x1k", KiB), ("2e", 2 * EiB), ("1.0", 1),
    ],
)  # fmt: skip
def test_sizes_read_as_qemu_reads_them(text: str, size: int) -> None:
    """A size copied from a qemu command line means the same number of bytes here."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "1.5", "1.5b", "1e3", "5 ", "-1", "5kb", "0x1.8", ".5k", "5bb", "0x", "16E"])
def test_what_is_no_size_is_refused_with_the_text_in_the_message(text: str) -> None:
    """A mistyped size must never become a small or a huge disk."""
    with pytest.raises(ValueError, match=r"is not a size|is too large") as caught:
        parse_size(text)
    assert f"'{text}'" in str(caught.value)


def test_default_unit_applies_only_without_a_suffix() -> None:
    """HMP sizes count MiB unless they say otherwise."""
    assert parse_size("10", default_unit="M") == 10 * MiB
    assert parse_size("0x10", default_unit="m") == 16 * MiB
    assert parse_size("10k", default_unit="M") == 10 * KiB


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1024, "1 KiB"), (200704, "196 KiB"), (2359296, "2.25 MiB"),
        (1023488, "1e+03 KiB"), (1047527424, "999 MiB"), (1 << 40, "1 TiB"), (3 << 60, "3 EiB"),
    ],
)  # fmt: skip
def test_sizes_print_as_qemu_img_prints_them(size: int, text: str) -> None:
    """``qblock-img info`` is compared with the real one line by line (the odd 1e+03 KiB included: observed on 7.2)."""
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("0", 0), ("2", 2_000_000_000), ("0.5", 500_000_000), ("100ms", 100_000_000), ("2s", 2_000_000_000), ("10us", 10_000),
        ("10µs", 10_000), ("7ns", 7), ("1m30s", 90_000_000_000), ("1h 2m", 3_720_000_000_000), ("1.5 s", 1_500_000_000),
    ],
)  # fmt: skip
def test_durations_have_units_and_bare_numbers_are_seconds(text: str, ns: int) -> None:
    """`step 100ms` and `{"advance": "10s"}` are typed by people."""
    assert parse_duration(text) == ns


@pytest.mark.parametrize("text", ["", "s", "-1s", "1x", "1s2", "ms1", "1e3"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    """Otherwise a typing error would let virtual time run off."""
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@given(st.integers(0, 10**15).map(lambda ms: ms * 1_000_000))
def test_printed_durations_read_back(ns: int) -> None:
    """What a transcript shows can be put into a replay script (whole milliseconds are exact)."""
    assert parse_duration(format_duration(ns)) == ns


def test_durations_print_short() -> None:
    """The toolbar has little room."""
    shown = [
        format_duration(n) for n in (0, 7, 1_500, 250_000_000, 1_500_000_000, 90_000_000_000, 3_600_000_000_000, -1)
    ]
    assert shown == ["0s", "7ns", "1.5us", "250ms", "1.5s", "1m30s", "1h", "-1ns"]


@given(st.integers(0, 1 << 64), st.integers(1, 1 << 40))
def test_alignment_brackets_the_number(n: int, a: int) -> None:
    """Every request is rounded with these two."""
    down, up = align_down(n, a), align_up(n, a)
    assert down <= n <= up
    assert down % a == up % a == 0
    assert up - down == (0 if n % a == 0 else a)


def test_powers_of_two_are_positive() -> None:
    """Cluster sizes of 0 come from damaged images."""
    assert [n for n in range(-2, 9) if is_power_of_two(n)] == [1, 2, 4, 8]
