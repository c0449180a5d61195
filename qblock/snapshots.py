"""Internal snapshots as programs see them: what is known of one, how one is found by id or name, and how a list looks.

Layout, members and rules of finding are those of QEMU 7.2 (semantics.md section 10.6): an id is looked for before a name.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

import attrs

from qblock.errors import CommandError
from qblock.options import parse_keyval
from qblock.units import format_size

HEADING: Final = f"{'ID':<9} {'TAG':<16} {'VM SIZE':>8}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}"
_SECOND: Final = 1_000_000_000


@attrs.frozen
class SnapshotInfo:
    """One internal snapshot: sizes in bytes, its date in seconds since 1970 and nanoseconds, the guest's clock in nanoseconds.

    ``disk_size`` and ``icount`` (instructions that the guest had executed) are None where the image does not say.
    """

    id: str
    name: str
    vm_state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_ns: int
    icount: int | None = None
    disk_size: int | None = None

    def as_json(self) -> dict[str, int | str]:
        """QMP's ``SnapshotInfo``."""
        result: dict[str, int | str] = {
            "vm-clock-nsec": self.vm_clock_ns % _SECOND,
            "name": self.name,
            "date-sec": self.date_sec,
            "date-nsec": self.date_nsec,
            "vm-clock-sec": self.vm_clock_ns // _SECOND,
            "id": self.id,
            "vm-state-size": self.vm_state_size,
        }
        return result if self.icount is None else {"icount": self.icount, **result}

    @classmethod
    def of_json(cls, members: dict[str, int | str]) -> SnapshotInfo:
        """The inverse of `as_json`."""
        return cls(
            id=str(members["id"]),
            name=str(members["name"]),
            vm_state_size=int(members["vm-state-size"]),
            date_sec=int(members["date-sec"]),
            date_nsec=int(members["date-nsec"]),
            vm_clock_ns=int(members["vm-clock-sec"]) * _SECOND + int(members["vm-clock-nsec"]),
            icount=int(members["icount"]) if "icount" in members else None,
        )

    def line(self) -> str:
        """Its line in a list for a person; the date is local time."""
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.date_sec))
        seconds, fraction = divmod(self.vm_clock_ns, _SECOND)
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{fraction // 1_000_000:03}"
        icount = "" if self.icount is None else str(self.icount)
        return f"{self.id:<9} {self.name:<16} {format_size(self.vm_state_size):>8}{date:>20}{clock:>13}{icount:>11}"


def find_snapshot(
    snapshots: Iterable[SnapshotInfo], *, id: str | None = None, name: str | None = None
) -> SnapshotInfo | None:
    """The first snapshot with this id, this name, or both."""
    for snapshot in snapshots:
        if id in (None, snapshot.id) and name in (None, snapshot.name):
            return snapshot
    return None


def find_by_id_or_name(snapshots: Iterable[SnapshotInfo], text: str) -> SnapshotInfo | None:
    """The snapshot whose id is ``text``, or else the first one with that name."""
    known = tuple(snapshots)
    return find_snapshot(known, id=text) or find_snapshot(known, name=text)


def find_described(snapshots: Iterable[SnapshotInfo], text: str) -> SnapshotInfo:
    """The snapshot that an option names: ``snapshot.id=ID``, ``snapshot.name=NAME``, both, or an id or name alone.

    Raises `CommandError` when there is none.
    """
    if text.startswith("snapshot."):
        wanted = parse_keyval(text).get("snapshot")
        if not isinstance(wanted, dict) or not set(wanted) <= {"id", "name"}:
            raise CommandError(f"'{text}' does not name a snapshot: give snapshot.id=ID, snapshot.name=NAME, or both")
        found = find_snapshot(snapshots, id=wanted.get("id"), name=wanted.get("name"))
    else:
        found = find_by_id_or_name(snapshots, text)
    if found is None:
        raise CommandError(f"There is no snapshot '{text}'")
    return found


def list_lines(snapshots: Iterable[SnapshotInfo]) -> list[str]:
    """The list for a person, with its heading; nothing when there are no snapshots."""
    lines = [snapshot.line() for snapshot in snapshots]
    return ["Snapshot list:", HEADING, *lines] if lines else []
