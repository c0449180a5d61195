"""What the files of a case say: which image was chosen and why, what it holds, and what the other one holds.

Nothing but the files in the directory of a case is looked at, so that a verdict can be found again at any later time.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from qblock.lab.digests import Digests, changed, digests
from qblock.lab.witness.disk import BASE, GUEST_JOURNAL, SOURCE, Findings, History, examine
from qblock.lab.witness.management import RESTARTED, Decision, Ground, Image, Journal, conclusion, decide, read_witness
from qblock.lab.witness.plan import MANAGEMENT_JOURNAL, WITNESS, Plan

VERDICT: Final = "verdict.json"
_ONLY_LEAKS: Final = 3
"""The exit code of a check that finds nothing worse than leaked clusters, which a kill may leave."""


@attrs.frozen
class Verdict:
    """The outcome of a case. ``flushed`` is how many writes the guest was promised; ``byte`` whether the witness has its byte
    (None: there is no witness); ``journal`` what management had noted before it was started again; ``view`` stands for all
    that a management without memory can see: its journal, the witness, and every byte of the images. ``said`` is the last line
    of management's journal, which must tell the decision that follows from the rest; ``files`` is what the verdict rests on.
    """

    plan: Plan
    decision: Decision
    flushed: int
    byte: bool | None
    journal: Sequence[str]
    view: str
    source: Findings
    target: Findings
    said: str
    files: Digests

    @property
    def agreed(self) -> bool:
        """Whether management has decided as it must."""
        return self.said == conclusion(self.decision)

    @property
    def chosen(self) -> Findings | None:
        """What the image holds with which the guest goes on; None when none could be chosen."""
        return None if self.decision.image is None else self.found(self.decision.image)

    @property
    def chosen_lost(self) -> Sequence[int]:
        """The flushed writes that are lost with the choice."""
        return () if self.chosen is None else self.chosen.lost

    def found(self, image: Image) -> Findings:
        """What was found in one of the two images."""
        return self.source if image is Image.SOURCE else self.target

    @property
    def right(self) -> frozenset[Image]:
        """The images in which nothing is missing."""
        return frozenset(image for image in Image if self.found(image).sound)

    @property
    def sound(self) -> bool:
        """Whether an image was chosen in which nothing is missing, by management too."""
        return self.agreed and self.chosen is not None and self.chosen.sound

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        image = self.decision.image
        decision = {"image": None if image is None else image.value, "ground": self.decision.ground.value}
        members: dict[str, Any] = {"plan": self.plan.dump(), "decision": decision, "sound": self.sound}
        members |= {"right": sorted(image.value for image in self.right), "flushed": self.flushed, "byte": self.byte}
        members |= {"journal": list(self.journal), "said": self.said, "view": self.view, "files": dict(self.files)}
        return members | {image.value: _findings(self.found(image)) for image in Image}

    @classmethod
    def load(cls, members: Mapping[str, Any]) -> Verdict:
        """From what `dump` gave."""
        image, ground = members["decision"]["image"], Ground(members["decision"]["ground"])
        return cls(
            Plan.load(members["plan"]),
            Decision(None if image is None else Image(image), ground),
            members["flushed"],
            members["byte"],
            tuple(members["journal"]),
            members["view"],
            Findings(**members["source"]),
            Findings(**members["target"]),
            members["said"],
            members["files"],
        )


def _findings(found: Findings) -> dict[str, Any]:
    return attrs.asdict(found) | {"lost": list(found.lost), "damaged": list(found.damaged)}


def judge(plan: Plan, directory: Path) -> Verdict:
    """Find the verdict on the files in ``directory``, in which ``plan`` was performed."""
    lines, witness = Journal(directory / MANAGEMENT_JOURNAL).lines(), read_witness(directory)
    history = History.read(directory / GUEST_JOURNAL)
    images = (BASE, SOURCE, plan.target)
    files = digests(directory, (*images, WITNESS, GUEST_JOURNAL, MANAGEMENT_JOURNAL))
    before = tuple(lines[: lines.index(RESTARTED)] if RESTARTED in lines else lines)
    return Verdict(
        plan,
        decide(lines, witness),
        history.flushed,
        None if witness is None else bool(witness),
        before,
        _view(before, witness, [files[name] for name in images]),
        examine(directory / SOURCE, history),
        examine(directory / plan.target, history),
        lines[-1] if lines else "",
        files,
    )


def _view(journal: Sequence[str], witness: bytes | None, images: Sequence[str]) -> str:
    seen = [journal, None if witness is None else witness.hex(), images]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def checked_by(program: str, verdict: Verdict, directory: Path) -> Verdict:
    """The verdict after ``program``, a real qemu-img, has checked the chosen image, if its format can be checked."""
    name = {Image.SOURCE: SOURCE, Image.TARGET: verdict.plan.target, None: ""}[verdict.decision.image]
    if verdict.chosen is None or not name.endswith(".qcow2"):
        return verdict
    command = [program, "check", "-f", "qcow2", name]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode in (0, _ONLY_LEAKS):
        return verdict
    found = attrs.evolve(
        verdict.chosen, objection=(done.stderr + done.stdout).strip() or f"exit code {done.returncode}"
    )
    return attrs.evolve(verdict, source=found) if name == SOURCE else attrs.evolve(verdict, target=found)


def keep(verdict: Verdict, directory: Path) -> None:
    """Put the verdict beside the files."""
    (directory / VERDICT).write_text(json.dumps(verdict.dump(), indent=2) + "\n")


def disagreement(verdict: Verdict, directory: Path) -> str:
    """In what the verdict on the files in ``directory`` differs from the one that was kept there; empty if in nothing.

    Raises `OSError`, `KeyError`, `TypeError` and `ValueError` when none was kept.
    """
    kept: dict[str, Any] = json.loads((directory / VERDICT).read_text())
    if kept == verdict.dump():
        return ""
    names = changed(kept["files"], verdict.files)
    which = f" ({', '.join(names)} changed)" if names else ""
    return f"the files say something else than the verdict that was kept with them{which}"
