"""What is to be done in one case: who is killed where, and how the protocol is used. Plain data for all processes."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from qblock.lab.witness.disk import GuestKind
from qblock.units import MILLISECOND_NS

DEVICE: Final = "virtio0"
WITNESS: Final = "witness"
"""The witness's file in the directory of a case, and its name in the machine."""
MANAGEMENT_JOURNAL: Final = "management.journal"
TICK_NS: Final = 20 * MILLISECOND_NS
"""The guest's shortest pause between two writes."""
LONGEST_TICK_NS: Final = 25 * MILLISECOND_NS
"""The guest's longest pause; in so much time it writes at least once."""
POLL_NS: Final = 100 * MILLISECOND_NS
"""Management's pause between two looks at the job."""
DELAYS: Final = (1, 2)
"""How long the guest with the door is let alone before the switch: in one of the two cases the number of its writes which the
mirror has not copied is odd, so that the door of the target is not as that of the source.
"""


class Part(enum.Enum):
    """How drive-reopen is used. The values are the names of directories."""

    WITNESS = "with-witness"
    REFUSED = "refused-witness"
    """With a witness to which the machine cannot write: its descriptor was opened for reading only."""
    WITHOUT = "without-witness"


class Victim(enum.Enum):
    """Who is killed."""

    MANAGEMENT = "management"
    MACHINE = "machine"
    BOTH = "both"
    HOST = "host"
    """Both, and with them all that no file was told to keep: a power cut."""


@attrs.frozen
class Plan:
    """One case. ``step`` and ``victim`` are None when nobody is killed.

    ``delay`` is how many of the guest's longest ticks management waits, being in sync, before it goes on.
    """

    step: str | None = None
    victim: Victim | None = None
    part: Part = Part.WITNESS
    guest: GuestKind = GuestKind.COUNTER
    seed: int = 1
    delay: int = 2

    @property
    def format(self) -> str:
        """The format of the target. Without the witness it is raw, so that the file always shows what was copied; the tables
        of a qcow2 target are not on disk before it is flushed, at the end of the mirror.
        """
        return "raw" if self.part is Part.WITHOUT else "qcow2"

    @property
    def target(self) -> str:
        """The file name of the target."""
        return f"target.{self.format}"

    @property
    def place(self) -> Path:
        """The directory of the case below that of the run."""
        part = Path(self.part.value)
        if self.step is None or self.victim is None:
            return part / "nobody"
        who = self.victim.value if self.guest is GuestKind.COUNTER else f"{self.victim.value}-door-{self.delay}"
        return part / self.step / who

    @classmethod
    def at(cls, place: Path, seed: int) -> Plan:
        """The plan that has this place in a run with this seed; raises `ValueError` if there is none."""
        for plan in _kinds(cls(seed=seed), place.parts):
            if plan.place == place:
                return plan
        raise ValueError(f"no case has the place '{place}'")

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return attrs.asdict(
            self, value_serializer=lambda _, __, value: value.value if isinstance(value, enum.Enum) else value
        )

    @classmethod
    def load(cls, members: dict[str, Any]) -> Plan:
        """From what `dump` gave."""
        victim = Victim(members["victim"]) if members["victim"] is not None else None
        kinds = {"part": Part(members["part"]), "victim": victim, "guest": GuestKind(members["guest"])}
        return cls(**members | kinds)


def _kinds(plan: Plan, parts: Sequence[str]) -> Iterator[Plan]:
    """All plans that differ from ``plan`` as the parts of a place can tell."""
    part = Part(parts[0] if parts else "")
    yield attrs.evolve(plan, part=part)
    for victim in Victim:
        told = attrs.evolve(plan, part=part, step="".join(parts[1:2]), victim=victim)
        yield told
        yield from (attrs.evolve(told, guest=GuestKind.DOOR, delay=delay) for delay in DELAYS)
