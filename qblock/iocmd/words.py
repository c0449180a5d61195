"""Numbers in command lines, and numbers for people, as qemu-io reads and writes them. Sizes are bytes."""

from __future__ import annotations

from typing import Final

from qblock.iocmd.shell import CommandFailed
from qblock.units import SECOND_NS, KiB, parse_offset

MAX_REQUEST: Final = (1 << 31) - 512
SECTOR: Final = 512


def number(text: str) -> int:
    """A size or an offset in bytes, with QEMU's suffixes."""
    try:
        return parse_offset(text)
    except ValueError as error:
        raise CommandFailed(f"Parsing error: {error}") from None


def pattern_byte(text: str) -> int:
    """The byte that -P names; raises `CommandFailed`."""
    try:
        value = int(text, 8 if text.startswith("0") and text.isdigit() else 0)
    except ValueError:
        value = -1
    if not 0 <= value <= 0xFF:
        raise CommandFailed(f"{text} is not a valid pattern byte")
    return value


def total_length(texts: list[str], *, limit: bool = True, note: str = "") -> int:
    """Sum of the lengths of a vector, checked like one request; ``note`` says in the error when there is no limit."""
    total = 0
    for text in texts:
        total += number(text)
        if limit and total > MAX_REQUEST:
            raise CommandFailed(f"length cannot exceed {MAX_REQUEST}{note}, given {text}")
    return total


def format_bytes(n: float) -> str:
    """``n`` bytes in qemu-io's layout: ``64 KiB``, ``7.875 MiB``, ``100 bytes``."""
    units = ("EiB", "PiB", "TiB", "GiB", "MiB", "KiB")
    for power, unit in zip(range(6, 0, -1), units, strict=True):
        if n >= KiB**power:
            return f"{n / KiB**power:.3f}".removesuffix(".000") + f" {unit}"
    return f"{n:.6f}".removesuffix(".000000") + " bytes"


def clock_text(ns: int, *, fixed: bool) -> str:
    """A duration; ``fixed``: with hours and minutes even if there are none."""
    centiseconds = ns * 100 // SECOND_NS
    minutes, rest = divmod(centiseconds, 6000)
    seconds = f"{rest // 100:02}.{rest % 100:02}"
    if minutes or fixed:
        return f"{minutes // 60}:{minutes % 60:02}:{seconds}"
    return f"{seconds} sec"


def check_sectors(offset: int, length: int) -> None:
    """Raise `CommandFailed` unless both are multiples of 512."""
    for what, value in (("offset", offset), ("length", length)):
        if value % SECTOR:
            raise CommandFailed(f"{value} is not a multiple of {SECTOR}, which the {what} must be with -b")
