"""Sizes and durations: constants, alignment, and the texts that people type and read.

Models the size syntax of QEMU's command lines (``64k``, ``1.5G``, ``0x200``) and the layout in which qemu-img 7.2
prints sizes. Sizes are bytes, durations integer nanoseconds. Differs from QEMU in that durations have units of their
own (``100ms``, ``1m30s``), where QEMU wants bare numbers whose unit depends on the option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30
TiB: Final = 1 << 40
PiB: Final = 1 << 50
EiB: Final = 1 << 60

_SIZE_UNITS: Final[Mapping[str, int]] = {
    "B": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB, "P": PiB, "E": EiB,
}  # fmt: skip
_SIZE_NAMES: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SIZE: Final = re.compile(r"\s*\+?(?:(?P<hex>0[xX][0-9a-fA-F]+)|(?P<number>\d+(?:\.\d*)?))(?P<unit>[bBkKmMgGtTpPeE]?)")
_OFFSET_LIMIT: Final = 1 << 63
_SIZE_LIMIT: Final = 1 << 64

_DURATION_UNITS: Final[Mapping[str, int]] = {
    "ns": 1, "us": 1_000, "µs": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "m": 60_000_000_000, "h": 3_600_000_000_000,
}  # fmt: skip
_DURATION_PART: Final = re.compile(r"\s*(\d+(?:\.\d*)?)\s*(ns|us|µs|ms|s|m|h)")
_BARE_NUMBER: Final = re.compile(r"\s*(\d+(?:\.\d*)?)\s*")
SECOND_NS: Final = 1_000_000_000
MILLISECOND_NS: Final = 1_000_000


def align_down(n: int, a: int) -> int:
    """The largest multiple of ``a`` (positive, any number) that is not above ``n``."""
    return n - n % a


def align_up(n: int, a: int) -> int:
    """The smallest multiple of ``a`` (positive, any number) that is not below ``n``."""
    return n + -n % a


def is_power_of_two(n: int) -> bool:
    """True for 1, 2, 4, ...; False for zero and below."""
    return n > 0 and not n & (n - 1)


def parse_size(text: str, *, default_unit: str = "") -> int:
    """Bytes from text such as ``512``, ``64k``, ``1.5G`` or ``0x200``.

    ``default_unit`` (one of B K M G T P E) applies when the text has no suffix. Fractions of a byte are cut off, but a
    fraction with the unit byte is refused, as are negative numbers and 2**64 or more. Raises `ValueError` that says
    what was expected.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is not a size: give a number, with one of the suffixes B K M G T P E if you like")
    scale = _SIZE_UNITS[(match["unit"] or default_unit or "B").upper()]
    size = int(match["hex"], 16) * scale if match["hex"] else _scaled(match["number"], scale)
    if scale == 1 and match["number"] and match["number"].partition(".")[2].strip("0"):
        raise ValueError(f"'{text}' is not a size: there is no fraction of a byte")
    if size >= _SIZE_LIMIT:
        raise ValueError(f"'{text}' is too large: sizes must be below 16 EiB")
    return size


def parse_offset(text: str) -> int:
    """As `parse_size`, but below 2**63 bytes, which is where offsets end."""
    offset = parse_size(text)
    if offset >= _OFFSET_LIMIT:
        raise ValueError(f"'{text}' is too large: it must be below 8 EiB")
    return offset


def format_size(n: int) -> str:
    """``n`` bytes for people, with up to three significant digits and a binary unit: ``196 KiB``, ``2.25 MiB``, ``0
    B``.

    The unit is the first one in which the number is below 1000, so that 1000 bytes are ``0.977 KiB``.
    """
    exponent = 0
    while exponent < len(_SIZE_NAMES) - 1 and n >= 1000 << (10 * exponent):
        exponent += 1
    return f"{n / (1 << (10 * exponent)):.3g} {_SIZE_NAMES[exponent]}"


def parse_duration(text: str) -> int:
    """Nanoseconds from ``100ms``, ``2s``, ``10us``, ``1m30s``, ``1.5h``; a bare number counts seconds.

    Raises `ValueError` for anything else, negative durations included.
    """
    if bare := _BARE_NUMBER.fullmatch(text):
        return _scaled(bare[1], SECOND_NS)
    total = 0
    position = 0
    while part := _DURATION_PART.match(text, position):
        total += _scaled(part[1], _DURATION_UNITS[part[2]])
        position = part.end()
    if position == 0 or text[position:].strip():
        raise ValueError(f"'{text}' is not a duration: write for example 100ms, 2s or 1m30s")
    return total


def format_duration(ns: int) -> str:
    """Nanoseconds as `parse_duration` reads them back, to three decimals: ``250ms``, ``1.5s``, ``1m30s``, ``0s``."""
    if ns < 0:
        return "-" + format_duration(-ns)
    for unit, scale in (("ns", 1), ("us", 1_000), ("ms", 1_000_000)):
        if 0 < ns < scale * 1000:
            return f"{_decimals(ns, scale)}{unit}"
    minutes, rest = divmod(ns, 60 * SECOND_NS)
    hours, minutes = divmod(minutes, 60)
    text = (f"{hours}h" if hours else "") + (f"{minutes}m" if minutes else "")
    seconds = _decimals(rest, SECOND_NS)
    return text if text and seconds == "0" else f"{text}{seconds}s"


def _scaled(number: str, scale: int) -> int:
    """A decimal ``number`` times ``scale``, rounded down, in exact integers."""
    whole, _, decimals = number.partition(".")
    divisor: int = 10 ** len(decimals)
    return int(whole + decimals) * scale // divisor


def _decimals(n: int, scale: int) -> str:
    whole, thousandths = divmod(n * 1000 // scale, 1000)
    return f"{whole}.{thousandths:03}".rstrip("0").rstrip(".")
