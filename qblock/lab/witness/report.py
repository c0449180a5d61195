"""The outcome of the experiment as a table for people, and as JSON for programs. See docs/labs.md for how to read it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from qblock.lab.witness.disk import Findings
from qblock.lab.witness.experiment import WITH, Outcome
from qblock.lab.witness.machine import GUEST_GOES_ON
from qblock.lab.witness.management import Ground, Image
from qblock.lab.witness.plan import Part, Victim
from qblock.lab.witness.verdict import Verdict
from qblock.tracing import DECLARED

if TYPE_CHECKING:
    from qblock.driver import Json

Paint = Callable[[str, str], str]
"""Gives a text in a colour, GOOD or BAD."""

GOOD, BAD, DIM = "32", "31", "2"
WIDTH: Final = 100

STEP_TEXTS: Final[Mapping[str, str]] = {
    "before-mirror": "management is connected and has not asked for anything",
    "mirror-started": "drive-mirror has been answered",
    "in-sync-noted": "management has seen that offset equals len, and noted it",
    "witness-sent": "the witness is there, empty, and the machine has a descriptor of it",
    "intent-noted": "management has noted that it is about to send drive-reopen",
    GUEST_GOES_ON: "the guest has been told, for the first time since the new image was opened, that its data is safe",
    "reply-received": "drive-reopen has been answered, and management has not noted it",
    "outcome-noted": "management has noted that the guest has switched, or that it has not",
    "later": "the guest has been going on for a while",
}
"""Those of management and of the guest; the others are trace events, which describe themselves."""

_GROUNDS: Final = {Ground.JOURNAL: "noted", Ground.MACHINE: "asked", Ground.NOTHING: "?"}


def plain(text: str, colour: str) -> str:
    """No colours."""
    del colour
    return text


def as_json(outcome: Outcome) -> Json:
    """Everything, for programs."""
    return {
        "seed": outcome.scope.seed,
        "held": outcome.held,
        "shown": outcome.shown,
        "cases": [found.dump() for found in outcome.verdicts],
        "twins": [[str(found.plan.place) for found in pair] for pair in outcome.twins],
    }


def step_lines(steps: Sequence[str]) -> list[str]:
    """The steps with what they mean, for ``--list``."""
    width = max(map(len, steps))
    return [f"{step:{width}}  {describe_step(step)}" for step in steps]


def describe_step(step: str) -> str:
    """What has happened at a step, in a sentence."""
    name = step.partition("#")[0]
    if name in STEP_TEXTS:
        return STEP_TEXTS[name]
    return DECLARED[name].doc


def as_text(outcome: Outcome, paint: Paint = plain) -> Iterator[str]:
    """The tables, the pairs, and a last line that says it all."""
    victims = outcome.scope.victims
    killed = [victim for victim in victims if victim is not Victim.HOST]
    power = [Victim.HOST] if Victim.HOST in victims else []
    yield from _section(
        f"With the witness. At each step a machine, its management, or both are killed (seed {outcome.scope.seed}); what is left "
        "decides which image the guest goes on with, by asking the machine, by what it had noted, or by the byte.",
        _with_witness(outcome.of(Part.WITNESS), killed, paint),
    )
    yield from _section(
        "The host loses its power: both die, and of each file only what had been made durable is left.",
        _with_witness(outcome.of(Part.WITNESS), power, paint),
    )
    yield from _section(
        "The machine cannot write to the witness, and goes back to the old image. (Up to there nothing is new.)",
        _with_witness(outcome.of(Part.REFUSED), victims, paint),
    )
    yield from _section(
        "Without a witness, both killed. What each image lacks of the flushed writes, and whether what was noted tells which one "
        "to take.",
        _without_witness(outcome.of(Part.WITHOUT), paint),
    )
    yield from _twins(outcome)
    yield from _summary(outcome, paint)


def _section(text: str, table: Iterator[str]) -> Iterator[str]:
    """A table with what there is to say about it; nothing, if it has no lines."""
    if lines := list(table):
        yield from (*_paragraph(text), "", *lines, "")


def _paragraph(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, WIDTH)


# ---------------------------------------------------------------------------------------------------------------- tables


def _with_witness(verdicts: Sequence[Verdict], victims: Sequence[Victim], paint: Paint) -> Iterator[str]:
    by_step: dict[str, dict[Victim | None, Verdict]] = {}
    for found in verdicts:
        by_step.setdefault(found.plan.step or "", {})[found.plan.victim] = found
    if not by_step or not victims:
        return
    width = max(map(len, by_step))
    titles = "".join(f"  {_title(victim):16}" for victim in victims)
    yield paint(f"{'step':{width}}  byte{titles}  {'flushed':>7}  {'lost':>4}  {'otherwise':>9}", DIM)
    for step, row in by_step.items():
        last = row[victims[-1]]
        byte = {None: "-", False: "no", True: "yes"}[last.byte]
        cells = "".join("  " + _decision(row[victim], paint) for victim in victims)
        lost = sum(len(row[victim].chosen_lost) for victim in victims)
        other = last.target if last.decision.image is Image.SOURCE else last.source
        shown = paint(f"{lost:4}", BAD if lost else GOOD)
        yield f"{step:{width}}  {byte:4}{cells}  {last.flushed:7}  {shown}  {_lacks(other):>9}".rstrip()


def _title(victim: Victim) -> str:
    return f"{victim.value} {'die' if victim is Victim.BOTH else 'dies'}"


def _decision(found: Verdict, paint: Paint) -> str:
    image = found.decision.image.value if found.decision.image is not None else "none"
    byte = "byte" if found.byte else "no byte"
    text = f"{image}, {_GROUNDS.get(found.decision.ground, byte)}"
    return f"{text:16}" if found.sound else paint(f"{text + ' BAD':16}", BAD)


def _without_witness(verdicts: Sequence[Verdict], paint: Paint) -> Iterator[str]:
    if not verdicts:
        return
    width = max(len(found.plan.step or "") for found in verdicts)
    yield paint(
        f"{'step':{width}}  {'last noted':16}  {'flushed':>7}  {'source lacks':>12}  {'target lacks':>12}  take", DIM
    )
    for found in verdicts:
        image = found.decision.image
        take = f"the {image.value}" if image is not None else paint("unknown", BAD)
        source, target = _lacks(found.source), _lacks(found.target)
        yield f"{found.plan.step:{width}}  {found.journal[-1]:16}  {found.flushed:7}  {source:>12}  {target:>12}  {take}"


def _lacks(found: Findings) -> str:
    """How much of a guest's writes is missing; "all" when the image cannot be used."""
    unusable = found.error or found.damaged or found.corruptions or found.objection
    return "all" if unusable else str(len(found.lost)) if found.lost else "nothing"


def _twins(outcome: Outcome) -> Iterator[str]:
    pairs = outcome.twins
    if not pairs:
        return
    yield from _paragraph(
        "Pairs of crashes without the witness that look the same: management's journal and every byte of the three images are "
        "equal. (This guest has a door, and each write says that it is open or shut.)"
    )
    yield ""
    for one, other in pairs:
        for found, role in ((one, "source"), (other, "target")):
            yield f"  {found.plan.step}: {found.flushed} writes flushed, the last is in the {role} only"
        yield ""


# --------------------------------------------------------------------------------------------------------------- summary


def _summary(outcome: Outcome, paint: Paint) -> Iterator[str]:
    for found in outcome.unsound:
        yield paint(f"{found.plan.place}: {_what_is_wrong(found)}", BAD)
    parts = [_of_protocol(outcome)] if outcome.of(*WITH) else []
    if without := outcome.of(Part.WITHOUT):
        parts.append(_of_ambiguity(without, len(outcome.twins)))
    for line in textwrap.wrap(" ".join(parts), WIDTH):
        yield paint(line, GOOD if outcome.shown else BAD)


def _of_ambiguity(without: Sequence[Verdict], pairs: int) -> str:
    unknown = [found for found in without if found.decision.ground is Ground.NOTHING]
    source, target = (sum(not found.found(image).sound for found in unknown) for image in Image)
    return (
        f"Without it: at {len(unknown)} of {len(without)} steps what was noted does not tell; the source would lose writes at "
        f"{source} of these, the target at {target}; {pairs or 'no'} pair{'' if pairs == 1 else 's'} of crashes look the same."
    )


def _of_protocol(outcome: Outcome) -> str:
    kills, bad = len(outcome.of(*WITH)), len(outcome.unsound)
    if not bad:
        return f"With the witness: {kills} kill{'' if kills == 1 else 's'}, and no flushed write was lost."
    return f"With the witness: {bad} of {kills} kill{'' if kills == 1 else 's'} went WRONG."


def _what_is_wrong(found: Verdict) -> str:
    if found.chosen is None:
        return "no image was chosen"
    assert found.decision.image is not None
    if found.chosen.sound:
        return f"the last word of management is '{found.said}', and the {found.decision.image.value} is to be chosen"
    name, held = found.decision.image.value, found.chosen
    if held.error:
        return f"the {name} was chosen, which cannot be opened: {held.error}"
    lost = f"writes {', '.join(map(str, held.lost))} are lost" if held.lost else ""
    damaged = f"{len(held.damaged)} blocks hold what nobody wrote" if held.damaged else ""
    corrupt = f"{held.corruptions} corruptions" if held.corruptions else ""
    objection = f"qemu-img says: {held.objection}" if held.objection else ""
    return f"the {name} was chosen: {', '.join(filter(None, (lost, damaged, corrupt, objection)))}"
