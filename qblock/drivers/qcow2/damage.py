"""The kinds of damage that a check of a qcow2 image tells apart, and the report in which they are collected.

Models the categories of image-formats.md section 1.13. What each kind means and what repair does about it is a table here, so
that the explanations of ``qblock-img check --explain`` are the same wherever a kind is found. A report lists a bounded number
of findings and counts the others: a hostile image can hold millions.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, NamedTuple

import attrs

from qblock.findings import Finding, Severity
from qblock.ranges import ByteRange

MAX_FINDINGS: Final = 1000
"""Findings that a report lists; more are counted only."""


class Damage(enum.Enum):
    """Kinds of damage; the values are the names that programs see."""

    LEAK = "leak"
    TOO_LOW = "refcount-too-low"
    COPIED = "copied-flag"
    BEYOND_END = "beyond-end-of-file"
    L1_ENTRY = "l1-entry"
    L2_ENTRY = "l2-entry"
    ZERO_ENTRY = "l2-entry-of-zeroes"
    SUBCLUSTERS = "subclusters"
    SHARED_TABLE = "shared-l2-table"
    TABLE_ENTRY = "refcount-table-entry"
    BLOCK = "refcount-block"
    SNAPSHOT_ENTRY = "snapshot-table-entry"
    SNAPSHOT_L1 = "snapshot-l1-table"
    BITMAPS = "bitmap-directory"


class Explanation(NamedTuple):
    """What a kind of damage means, and what repair does about it."""

    meaning: str
    repair: str


_NOTHING: Final = "Nothing repairs it: what the entry was is not known. Copy what can be read to a new image."
_REBUILT: Final = "'-r all' counts all references anew and writes a new refcount structure; the old one is given up."
EXPLANATIONS: Final[Mapping[Damage, Explanation]] = {
    Damage.LEAK: Explanation(
        "More references are counted to this cluster than there are: it takes space, and no data is in danger.",
        "'-r leaks' (and '-r all') lowers the count to the references that there are; the space can be used again.",
    ),
    Damage.TOO_LOW: Explanation(
        "More tables refer to this cluster than are counted: it can be given to somebody else while it is in use, "
        "and writes can then change what others see.",
        "'-r all' raises the count to the references that there are; no data is changed.",
    ),
    Damage.COPIED: Explanation(
        "The mark that allows writing in place must be there exactly where one reference is counted. Where it is missing, "
        "writes copy without need; where it is wrong, they change what somebody else refers to as well.",
        "'-r leaks' and '-r all' set or clear the mark by the refcount; of clusters that are not counted at all only '-r all'.",
    ),
    Damage.BEYOND_END: Explanation(
        "Something refers to a place behind the end of the file: the file was cut off, or the reference is damaged. "
        "What was there is lost, and reads as zeroes or fails.",
        "Nothing repairs it: what lay there is not in the file any more.",
    ),
    Damage.L1_ENTRY: Explanation(
        "An entry of an L1 table cannot be one: it is not aligned, or has bits set that the format reserves. Requests to this "
        "part of the disk fail.",
        _NOTHING,
    ),
    Damage.L2_ENTRY: Explanation(
        "An entry of an L2 table cannot be one: it is not aligned, or has bits set that must not be. Requests to this part of "
        "the disk fail.",
        _NOTHING,
    ),
    Damage.ZERO_ENTRY: Explanation(
        "A cluster that reads as zeroes keeps space at a place that is not aligned. Requests to it fail.",
        "'-r all' takes the place away: the cluster reads as zeroes, as it did.",
    ),
    Damage.SUBCLUSTERS: Explanation(
        "The states of the subclusters contradict each other, or the entry that they belong to. Requests to them fail.",
        _NOTHING,
    ),
    Damage.SHARED_TABLE: Explanation(
        "Several parts of the disk have the same L2 table, although each lies at a place of its own in the data file.",
        _NOTHING,
    ),
    Damage.TABLE_ENTRY: Explanation(
        "An entry of the refcount table cannot be one: it is not aligned, has reserved bits set, or leads out of the file. What "
        "the block would count is not known.",
        _REBUILT,
    ),
    Damage.BLOCK: Explanation(
        "A refcount block is used for something else as well: counting would change data, and writing data the counts.",
        _REBUILT,
    ),
    Damage.SNAPSHOT_ENTRY: Explanation(
        "The snapshot table has an entry that the format does not allow: it lacks what it must say, or says too much.",
        "'-r all' writes the table anew, with the entries as they were understood.",
    ),
    Damage.SNAPSHOT_L1: Explanation(
        "The L1 table of a snapshot cannot be where its entry says. The snapshot cannot be used; the disk is not concerned.",
        "Nothing repairs it: delete the snapshot.",
    ),
    Damage.BITMAPS: Explanation(
        "The persistent bitmaps cannot be found as their directory says. They cannot be used; the disk is not concerned.",
        "Nothing repairs it: remove the bitmaps.",
    ),
}  # fmt: skip


@attrs.define(eq=False)
class Report:
    """The findings of one check, and their numbers."""

    corruptions: int = 0
    corruptions_fixed: int = 0
    leaks: int = 0
    leaks_fixed: int = 0
    check_errors: int = 0
    """Questions that could not be answered."""
    findings: list[Finding] = attrs.field(factory=list)

    def add(
        self,
        damage: Damage,
        text: str,
        *,
        place: ByteRange | None = None,
        guest: ByteRange | None = None,
        fixed: bool = False,
        times: int = 1,
    ) -> None:
        """One more finding (or ``times`` of the same kind). ``text`` is the line without ERROR, Leaked or Repairing."""
        leak = damage is Damage.LEAK
        if leak:
            self.leaks += times
            self.leaks_fixed += times * fixed
        else:
            self.corruptions += times
            self.corruptions_fixed += times * fixed
        if len(self.findings) >= MAX_FINDINGS:
            return
        prefix = "Repairing" if fixed else "Leaked" if leak else "ERROR"
        meaning, repair = EXPLANATIONS[damage]
        self.findings.append(
            Finding(
                kind=damage.value,
                severity=Severity.LEAK if leak else Severity.CORRUPTION,
                text=f"{prefix} {text}",
                meaning=meaning,
                repair=repair,
                place=place,
                guest=(guest,) if guest is not None else (),
                fixed=fixed,
            )
        )

    @property
    def unlisted(self) -> int:
        """Findings that are counted, but not listed."""
        return self.corruptions + self.leaks - len(self.findings)

    @property
    def clean(self) -> bool:
        """Nothing is wrong, or left to be repaired."""
        return self.corruptions == self.corruptions_fixed and not self.check_errors

    def lines(self) -> tuple[str, ...]:
        """The classic report."""
        lines = tuple(finding.text for finding in self.findings)
        return (
            (*lines, f"({self.unlisted} further findings are counted, but not listed)") if self.unlisted > 0 else lines
        )
