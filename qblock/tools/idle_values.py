"""Values of options that have no effect, and are an error all the same when they are wrong.

Models what qemu-system-x86_64 7.2 says of ``-boot``, ``-m``, ``-rtc`` and ``-watchdog-action``. Differs from QEMU in that the
values of networks, displays, processors and tables for firmware are taken as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

from qblock.errors import InvalidParameter
from qblock.monitor.commandline import check_members
from qblock.options import split_opts
from qblock.tools.system_options import Given
from qblock.units import parse_size

_WATCHDOG: Final = ("reset", "shutdown", "poweroff", "pause", "debug", "none", "inject-nmi")
_RTC: Final[Mapping[str, tuple[str, ...]]] = {"clock": ("host", "rt", "vm"), "driftfix": ("slew", "none")}
_DATE: Final = re.compile(r"\d+-\d+-\d+")
_SWITCHES: Final = {"yes": "on", "y": "on", "true": "on", "no": "off", "n": "off", "false": "off"}
"""Other words for a switch that ``-boot`` knows."""
_BOOT_TIMES: Final = {"splash-time": 0, "reboot-timeout": -1}
"""The least that each can be."""
_MAX_BOOT_TIME: Final = 0xFFFF
_MAX_SLOTS: Final = 256


def check_idle(option: Given) -> None:
    """Raise `InvalidParameter` for a wrong value of an option that has no effect."""
    check = _CHECKS.get(option.name)
    if check is not None:
        check(option.value)


def _watchdog(value: str) -> None:
    if value not in _WATCHDOG:
        raise InvalidParameter("watchdog-action", f"takes {', '.join(_WATCHDOG)}, not '{value:.100}'")


def _rtc(value: str) -> None:
    for key, text in split_opts(value).items():
        words = _RTC.get(key)
        if words is not None and text not in words:
            raise InvalidParameter(key, f"takes {', '.join(words)}, not '{text:.100}'")
        if key == "base" and text not in ("utc", "localtime") and not _DATE.match(text):
            raise InvalidParameter(key, f"takes utc, localtime or a time (2006-06-17T16:01:21), not '{text:.100}'")


def _boot(value: str) -> None:
    members = split_opts(value, implied_key="order")
    check_members("boot-opts", {key: _SWITCHES.get(text, text) for key, text in members.items()})
    for key in members.keys() & {"order", "once"}:
        letters = members[key]
        if not set(letters) <= set("abcdefghijklmnop") or len(set(letters)) < len(letters):
            raise InvalidParameter(key, f"takes letters from a to p, each once, not '{letters:.100}'")
    for key in members.keys() & _BOOT_TIMES.keys():
        if not _BOOT_TIMES[key] <= int(members[key], 0) <= _MAX_BOOT_TIME:
            raise InvalidParameter(key, f"must be from {_BOOT_TIMES[key]} to {_MAX_BOOT_TIME}, not {members[key]}")


def _memory(value: str) -> None:
    members = split_opts(value, implied_key="size")
    slots = int(members.get("slots", "0"), 0)
    if slots and "maxmem" not in members:
        raise InvalidParameter("slots", "needs a 'maxmem' up to which they can be filled")
    if not 0 <= slots <= _MAX_SLOTS:
        raise InvalidParameter("slots", f"must be from 0 to {_MAX_SLOTS}, not {slots}")
    size = parse_size(members.get("size", "128"), default_unit="M")
    if "maxmem" in members and parse_size(members["maxmem"]) < size + bool(slots):
        raise InvalidParameter("maxmem", "must be the memory that there is from the beginning, and more if there are slots")


_CHECKS: Final[Mapping[str, Callable[[str], None]]] = {
    "boot": _boot, "m": _memory, "rtc": _rtc, "watchdog-action": _watchdog,
}  # fmt: skip
