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

from qblock.lab.witness.disk import BASE, GUEST_JOURNAL, SOURCE, Findings, History, examine
from qblock.lab.witness.management import RESTARTED, Decision, Ground, Image, Journal, decide, read_witness
from qblock.lab.witness.plan import MANAGEMENT_JOURNAL, Plan

VERDICT: Final = "verdict.json"
_ONLY_LEAKS: Final = 3
"""The exit code of a check that finds nothing worse than leaked clusters, which a kill may leave."""


@attrs.frozen
class Verdict:
    """The outcome of a case. ``flushed`` is how many writes the guest was promised; ``byte`` whether the witness has its byte
    (None: there is no witness); ``journal`` what management had noted before it was started again; ``view`` stands for all
    that a management without memory can see: its journal, the witness, and every byte of the images.
    """

    plan: Plan
    decision: Decision
    flushed: int
    byte: bool | None
    journal: Sequence[str]
    view: str
    source: Findings
    target: Findings

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
        """Whether an image was chosen in which nothing is missing."""
        return self.chosen is not None and self.chosen.sound

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        image = self.decision.image
        decision = {"image": None if image is None else image.value, "ground": self.decision.ground.value}
        members: dict[str, Any] = {"plan": self.plan.dump(), "decision": decision, "sound": self.sound}
        members |= {"right": sorted(image.value for image in self.right), "flushed": self.flushed, "byte": self.byte}
        members |= {"journal": list(self.journal), "view": self.view}
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
        )


def _findings(found: Findings) -> dict[str, Any]:
    return attrs.asdict(found) | {"lost": list(found.lost), "damaged": list(found.damaged)}


def judge(plan: Plan, directory: Path) -> Verdict:
    """Find the verdict on the files in ``directory``, in which ``plan`` was performed."""
    lines, witness = Journal(directory / MANAGEMENT_JOURNAL).lines(), read_witness(directory)
    history = History.read(directory / GUEST_JOURNAL)
    before = tuple(lines[: lines.index(RESTARTED)] if RESTARTED in lines else lines)
    return Verdict(
        plan,
        decide(lines, witness),
        history.flushed,
        None if witness is None else bool(witness),
        before,
        _view(before, directory, witness, (BASE, SOURCE, plan.target)),
        examine(directory / SOURCE, history),
        examine(directory / plan.target, history),
    )


def _view(journal: Sequence[str], directory: Path, witness: bytes | None, images: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([journal, None if witness is None else witness.hex()]).encode())
    for name in images:
        path = directory / name
        content = path.read_bytes() if path.exists() else b""
        digest.update(f"{name} {path.exists()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


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


def read_kept(directory: Path) -> Verdict:
    """The verdict that was kept in the directory of a case; raises `OSError`, `KeyError` and `ValueError`."""
    return Verdict.load(json.loads((directory / VERDICT).read_text()))
