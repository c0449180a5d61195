"""All cases of the experiment, and what they show together.

The steps are not listed anywhere: a run in which nobody is killed finds them. With the witness, every step is tried with every
victim. Without it both are killed at every step, by a guest with numbered writes, which shows how much each choice would lose,
and by a guest that writes the same contents again and again, among whose cases `twins` looks for pairs in which every byte that
management can see is the same, while different images are right.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Final

import attrs

from qblock.lab.ending import ending_at_once, scratch_directory
from qblock.lab.witness.case import StepNotTaken, run_case
from qblock.lab.witness.disk import GuestKind, make_disk
from qblock.lab.witness.machine import ROLLBACK
from qblock.lab.witness.management import Decision, Ground, Image
from qblock.lab.witness.plan import DELAYS, Part, Plan, Victim
from qblock.lab.witness.processes import Child, Ended, LabError, Wire
from qblock.lab.witness.verdict import VERDICT, Verdict, checked_by, disagreement, judge, keep
from qblock.monitor.commands import table
from qblock.monitor.dialects import Dialect

MAX_WORKERS: Final = 8
"""Cases that are performed at the same time; each has some 6 MiB of files."""
RUN: Final = "run.json"
WITH: Final = (Part.WITNESS, Part.REFUSED)
"""The parts in which the protocol is followed."""

Progress = Callable[[int, int], None]
"""Told how many cases are done, of how many."""


@attrs.frozen
class Scope:
    """What to try. ``steps``: only these (all, if empty); ``victims`` only these."""

    seed: int = 1
    steps: Sequence[str] = ()
    victims: Sequence[Victim] = tuple(Victim)
    parts: Sequence[Part] = tuple(Part)


@attrs.frozen
class Outcome:
    """What was found, in the order of the steps."""

    scope: Scope
    verdicts: Sequence[Verdict]

    def of(self, *parts: Part, guest: GuestKind = GuestKind.COUNTER) -> list[Verdict]:
        """The verdicts of some parts, in the order of the steps."""
        return [found for found in self.verdicts if found.plan.part in parts and found.plan.guest is guest]

    @property
    def unsound(self) -> list[Verdict]:
        """Cases with the witness in which a flushed write was lost, or the image cannot be used."""
        return [found for found in self.of(*WITH) if not found.sound]

    @property
    def held(self) -> bool:
        """Whether the protocol held in all cases with the witness."""
        return not self.unsound

    @property
    def twins(self) -> list[tuple[Verdict, Verdict]]:
        """See `twins`."""
        return twins(self.of(Part.WITHOUT, guest=GuestKind.DOOR))

    @property
    def shown(self) -> bool:
        """Whether everything that was asked for is as it should be. Who chooses steps need not choose those of a pair."""
        return self.held and (Part.WITHOUT not in self.scope.parts or bool(self.scope.steps) or bool(self.twins))


def twins(verdicts: Sequence[Verdict]) -> list[tuple[Verdict, Verdict]]:
    """Pairs that nobody without a memory can tell apart, in which only the source is right, and only the target.

    Each step comes in one pair only.
    """
    pairs: list[tuple[Verdict, Verdict]] = []
    seen: set[str] = set()
    for one, other in combinations(verdicts, 2):
        steps = {f"{one.plan.step}", f"{other.plan.step}"}
        if one.view == other.view and one.right and other.right and not one.right & other.right and not steps & seen:
            pairs.append((one, other) if Image.SOURCE in one.right else (other, one))
            seen |= steps
    return pairs


def _resolved(path: Path) -> Path:
    return path.resolve()


@attrs.define(eq=False)
class Experiment:
    """Performs a scope below ``directory``, which must be empty or new. What it leaves there with ``keep``: the files of each
    case with its verdict, and `RUN`, which `recompute` reads; without, nothing. ``checker``: a qemu-img that checks each image
    that is chosen.
    """

    scope: Scope
    directory: Path = attrs.field(converter=_resolved)
    keep: bool = False
    progress: Progress = lambda done, total: None
    checker: str | None = None
    workers: int = attrs.field(factory=lambda: min(MAX_WORKERS, len(os.sched_getaffinity(0))))
    _own: Path = attrs.field(init=False)
    _disk: Path = attrs.field(init=False)

    def run(self) -> Outcome:
        """All of it; raises `LabError`, of which `UnknownStep` is one."""
        with self._prepared():
            found = {part: self._find_steps(part) for part in self.scope.parts}
            self._check_steps(list(dict.fromkeys(step for steps in found.values() for step in steps)))
            verdicts = self._perform_all([plan for part in found for plan in self._plans(part, found[part])])
            verdicts += self._perform_all(list(self._plans_for_twins(verdicts)))
        outcome = Outcome(self.scope, verdicts)
        if self.keep:
            write_run(outcome, self.directory)
        return outcome

    def steps(self) -> list[str]:
        """Find the steps, and kill nobody."""
        with self._prepared():
            return list(dict.fromkeys(self._find_steps(Part.WITNESS) + self._find_steps(Part.REFUSED)))

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        self._disk = self.directory / "disk"
        self._disk.mkdir(parents=True)
        with ending_at_once(), scratch_directory() as self._own:  # elsewhere: the name of a socket must be short
            make_disk(self._disk)
            table(Dialect.RFC_2012)  # loaded once, for all children
            yield

    def _find_steps(self, part: Part) -> list[str]:
        """The steps that are taken when nobody is killed; raises `LabError` when that leads to a wrong end."""
        steps, verdict = self._perform(Plan(part=part, seed=self.scope.seed), "s")
        expected = Image.SOURCE if part is Part.REFUSED else Image.TARGET
        if not verdict.sound or verdict.decision != Decision(expected, Ground.MACHINE):
            raise LabError(f"nobody was killed, and yet this came out: {verdict.dump()}")
        return steps

    def _check_steps(self, known: Sequence[str]) -> None:
        for step in self.scope.steps:
            if step not in known:
                raise UnknownStep(step, known)

    def _plans(self, part: Part, steps: Sequence[str]) -> Iterator[Plan]:
        """Without the witness both are killed. A witness that is refused makes no difference before the machine goes back."""
        victims = (Victim.BOTH,) if part is Part.WITHOUT else self.scope.victims
        first = steps.index(ROLLBACK) if part is Part.REFUSED else 0
        for step in steps[first:]:
            if not self.scope.steps or step in self.scope.steps:
                for victim in victims:
                    yield Plan(step, victim, part, seed=self.scope.seed)

    def _plans_for_twins(self, verdicts: Sequence[Verdict]) -> Iterator[Plan]:
        """The steps at which it could not be known which image to choose, again with the other guest."""
        for found in verdicts:
            if found.decision.ground is Ground.NOTHING:
                for delay in DELAYS:
                    yield attrs.evolve(found.plan, guest=GuestKind.DOOR, delay=delay)

    # --------------------------------------------------------------------------------------------------------- performing

    def _perform(self, plan: Plan, socket: str) -> tuple[list[str], Verdict]:
        directory = self.directory / plan.place
        directory.mkdir(parents=True)
        try:
            steps = run_case(plan, directory, disk=self._disk, socket=self._own / socket)
            verdict = judge(plan, directory)
            if self.checker is not None:
                verdict = checked_by(self.checker, verdict, directory)
            keep(verdict, directory)
        finally:
            if not self.keep:
                shutil.rmtree(directory)
        return steps, verdict

    def _perform_all(self, plans: Sequence[Plan]) -> list[Verdict]:
        """One process for each processor, each with a share of the plans. Steps that do not come in a case are left out."""
        found: dict[int, Verdict | None] = {}
        workers: list[Child] = []
        try:
            for number in range(max(1, min(self.workers, len(plans)))):
                workers.append(self._start_worker(number, plans, [worker.wire for worker in workers]))
            self.progress(0, len(plans))
            while len(found) < len(plans):
                for worker in _speaking(workers):
                    message = worker.wire.receive()
                    found[message["index"]] = Verdict.load(message["verdict"]) if "verdict" in message else None
                    self.progress(len(found), len(plans))
        except Ended:
            raise LabError("a worker of the experiment has ended before its time") from None
        finally:
            for worker in workers:
                worker.end()
        return [verdict for _, verdict in sorted(found.items()) if verdict is not None]

    def _start_worker(self, number: int, plans: Sequence[Plan], strangers: Sequence[Wire]) -> Child:
        share = range(number, len(plans), max(1, min(self.workers, len(plans))))

        def work(wire: Wire) -> None:
            with ending_at_once():
                for index in share:
                    try:
                        _, verdict = self._perform(plans[index], f"s{number}")
                    except StepNotTaken:
                        if plans[index].guest is not GuestKind.DOOR:
                            raise
                        wire.send(index=index)  # the guest writes at other times: the mirror may have less left to do
                    else:
                        wire.send(index=index, verdict=verdict.dump())
                wire.receive()  # until we are no longer needed

        return Child.fork(work, log=self._own / f"worker{number}.log", strangers=strangers)


def _speaking(workers: Sequence[Child]) -> list[Child]:
    ready, _, _ = select.select([worker.wire.sock for worker in workers], [], [])
    return [worker for worker in workers if worker.wire.sock in ready]


class UnknownStep(LabError):
    """There is no step of that name; ``known`` are those that there are."""

    def __init__(self, step: str, known: Sequence[str]) -> None:
        super().__init__(f"there is no step '{step}'; there are {', '.join(known)}")
        self.known = known


def write_run(outcome: Outcome, directory: Path) -> None:
    """Note in ``directory`` what was tried, in which order."""
    scope = outcome.scope
    members = {"seed": scope.seed, "steps": list(scope.steps), "victims": [victim.value for victim in scope.victims]}
    members |= {"parts": [part.value for part in scope.parts]}
    cases = [str(found.plan.place) for found in outcome.verdicts]
    text = json.dumps(members | {"cases": cases}, indent=2)
    (directory / RUN).write_text(f"{text}\n")


def recompute(
    directory: Path, progress: Progress = lambda done, total: None, checker: str | None = None
) -> tuple[Outcome, list[str]]:
    """Find all verdicts of a kept run again, from the files of its cases; also gives a text for each disagreement of the files
    with what was kept with them, or among themselves. Raises `LabError` when ``directory`` does not hold a run.
    """
    try:
        run = json.loads((directory / RUN).read_text())
        scope = Scope(
            run["seed"], run["steps"], [Victim(name) for name in run["victims"]], [Part(name) for name in run["parts"]]
        )
        plans = [Plan.at(Path(case), scope.seed) for case in run["cases"]]
        controls = [Plan(part=part, seed=scope.seed) for part in scope.parts]
        if strange := _strange_cases(directory, scope, plans):
            raise LabError("\n".join(strange))
        told: list[str] = []
        verdicts = []
        for number, plan in enumerate((*controls, *plans)):
            progress(number, len(controls) + len(plans))
            verdict = judge(plan, directory / plan.place)
            verdicts.append(verdict if checker is None else checked_by(checker, verdict, directory / plan.place))
            if text := disagreement(verdicts[-1], directory / plan.place):
                told.append(f"{plan.place}: {text}")
    except (OSError, KeyError, ValueError, TypeError) as error:
        text = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise LabError(f"{directory} does not hold a run of this experiment, or not all of it ({text})") from None
    progress(len(verdicts), len(verdicts))
    return Outcome(scope, verdicts[len(controls) :]), told


def _strange_cases(directory: Path, scope: Scope, plans: Sequence[Plan]) -> list[str]:
    """Where the list of a run's cases contradicts what is there, or what was asked for."""
    there = {path.parent.relative_to(directory) for path in directory.rglob(VERDICT)}
    listed = {plan.place for plan in plans} | {Plan(part=part).place for part in scope.parts}
    told = [f"{place}: {RUN} does not list this case" for place in sorted(there - listed)]
    for plan in plans:
        wanted = not scope.steps or plan.step in scope.steps
        victims = (Victim.BOTH,) if plan.part is Part.WITHOUT else scope.victims
        if not wanted or plan.victim not in victims or plan.part not in scope.parts or plans.count(plan) > 1:
            told.append(f"{plan.place}: {RUN} lists this case and does not ask for it")
    for plan in (plan for plan in plans if plan.part in WITH):
        beside = [attrs.evolve(plan, victim=victim).place for victim in scope.victims]
        told += [f"{place}: {RUN} asks for this case and does not list it" for place in beside if place not in listed]
    return list(dict.fromkeys(told))
