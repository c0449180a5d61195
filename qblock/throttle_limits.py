"""The limits that throttling imposes, as values: how many bytes and requests a second, with bursts.

Models ``ThrottleLimits`` of 7.2 (semantics.md section 13). There are six limits: bytes (``bps``) and requests (``iops``), each
for all requests, for reads, and for writes. Each has an average, a higher rate that is allowed for a while (``-max``, 0 for
none), and how many seconds that may last (``-max-length``). Differs from QEMU in that an ``iops-size`` below 0 is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import attrs

from qblock.errors import CommandError, InvalidParameter
from qblock.options import dump, fields, option, visit

MAX_RATE: Final = 10**15
"""The highest rate, in bytes or requests a second; also of a burst rate times the seconds that it may last."""
MAX_LENGTH: Final = (1 << 32) - 1
"""The longest burst in seconds."""


class Rate(NamedTuple):
    """One of the six limits: ``average`` and ``burst`` per second (0: none), and for how many seconds ``burst`` may last."""

    average: int
    burst: int
    seconds: int


@attrs.frozen
class ThrottleLimits:
    """``ThrottleLimits``, complete: 0 means no limit."""

    iops_total: int = option(0, doc="requests per second")
    iops_total_max: int = option(0, doc="requests per second in bursts")
    iops_total_max_length: int = option(1, doc="longest burst in seconds")
    iops_read: int = option(0, doc="reads per second")
    iops_read_max: int = option(0, doc="reads per second in bursts")
    iops_read_max_length: int = option(1, doc="longest burst of reads in seconds")
    iops_write: int = option(0, doc="writes per second")
    iops_write_max: int = option(0, doc="writes per second in bursts")
    iops_write_max_length: int = option(1, doc="longest burst of writes in seconds")
    bps_total: int = option(0, doc="bytes per second")
    bps_total_max: int = option(0, doc="bytes per second in bursts")
    bps_total_max_length: int = option(1, doc="longest burst of bytes in seconds")
    bps_read: int = option(0, doc="bytes read per second")
    bps_read_max: int = option(0, doc="bytes read per second in bursts")
    bps_read_max_length: int = option(1, doc="longest burst of bytes read in seconds")
    bps_write: int = option(0, doc="bytes written per second")
    bps_write_max: int = option(0, doc="bytes written per second in bursts")
    bps_write_max_length: int = option(1, doc="longest burst of bytes written in seconds")
    iops_size: int = option(0, doc="a request of more bytes counts as several; 0: it never does")

    @property
    def are_set(self) -> bool:
        """Whether anything is limited."""
        return any(self.rate(name).average for name in RATES)

    def rate(self, name: str) -> Rate:
        """The limit ``name``, one of `RATES`."""
        return Rate(*(getattr(self, f"{name}{part}") for part in ("", "_max", "_max_length")))


RATES: Final = ("bps_total", "bps_read", "bps_write", "iops_total", "iops_read", "iops_write")
"""The names of the six limits."""

DRIVE_NAMES: Final[Mapping[str, str]] = {
    field.attribute: field.attribute.replace("_total", "").replace("_read", "_rd").replace("_write", "_wr")
    for field in fields(ThrottleLimits)
}
"""How the members of `ThrottleLimits` are called where drives are concerned: ``iops_max`` for ``iops_total_max``."""

NO_LIMITS: Final = ThrottleLimits()


def changed_limits(limits: ThrottleLimits, given: Any, *, path: str = "limits", strings: bool = False) -> ThrottleLimits:
    """``limits`` with the members that ``given`` (JSON; with ``strings`` text) names replaced, checked.

    Raises `InvalidParameter` and `CommandError`.
    """
    members = {**dump(limits), **given} if isinstance(given, Mapping) else given
    changed = visit(ThrottleLimits, members, path=path, strings=strings)
    check_limits(changed)
    return changed


def check_limits(limits: ThrottleLimits) -> None:
    """Raise `CommandError` for limits that contradict each other or are out of range."""
    for unit in ("bps", "iops"):
        total, read, write = (limits.rate(f"{unit}_{kind}") for kind in ("total", "read", "write"))
        for overall, parts in ((total.average, read.average + write.average), (total.burst, read.burst + write.burst)):
            if overall and parts:
                raise CommandError(f"A limit of {unit} for everything cannot stand beside one for reads or writes alone")
    for name in RATES:
        _check_rate(name.replace("_", "-"), limits.rate(name))
    if limits.iops_size < 0:
        raise InvalidParameter("iops-size", f"cannot be negative ({limits.iops_size})")
    if limits.iops_size and not any(limits.rate(name).average for name in RATES if name.startswith("iops")):
        raise InvalidParameter("iops-size", "says how requests are counted, so it needs a limit of iops")


def _check_rate(name: str, rate: Rate) -> None:
    for member, value in ((name, rate.average), (f"{name}-max", rate.burst)):
        if not 0 <= value <= MAX_RATE:
            raise InvalidParameter(member, f"cannot be {value}: it must be from 0 to {MAX_RATE}")
    if not 1 <= rate.seconds <= MAX_LENGTH:
        raise InvalidParameter(f"{name}-max-length", f"cannot be {rate.seconds}: it must be from 1 to {MAX_LENGTH} seconds")
    if rate.seconds > 1 and not rate.burst:
        raise InvalidParameter(f"{name}-max-length", f"says how long a burst lasts, so it needs '{name}-max'")
    if rate.burst and not rate.average:
        raise InvalidParameter(f"{name}-max", f"is the rate of bursts above the average, so it needs '{name}'")
    if rate.burst and rate.burst < rate.average:
        raise InvalidParameter(f"{name}-max", f"cannot be {rate.burst}, which is less than the average of {rate.average}")
    if rate.burst * rate.seconds > MAX_RATE:
        raise InvalidParameter(f"{name}-max-length", f"is too long for {rate.burst} a second: no burst may exceed {MAX_RATE}")
