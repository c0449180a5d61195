"""Who runs next: the schedules that a `SimLoop` may follow, and the tokens that name them.

A schedule is asked only when two or more tasks could take their next step; candidates come in the order in which they
became runnable, so that always answering 0 is what asyncio itself would do. QEMU has no counterpart: its coroutines
switch where the hardware answers. A token is a short text (``fifo``, ``seed:7``, ``path:0,2,1``) that makes the same
schedule again.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Protocol

import attrs


class Schedule(Protocol):
    """Chooses among runnable tasks. Belongs to one loop; it must not be shared between runs."""

    def choose(self, count: int) -> int:
        """Which of ``count`` (at least 2) candidates takes the next step, counted from 0."""

    def token(self) -> str:
        """What `from_token` makes an equal schedule of, as far as this one has got."""


@attrs.frozen
class Fifo:
    """First runnable, first served, as asyncio does it."""

    def choose(self, count: int) -> int:
        """See `Schedule`."""
        return 0

    def token(self) -> str:
        """See `Schedule`."""
        return "fifo"


@attrs.define
class Seeded:
    """Chooses at random from a seed: the same seed, the same run."""

    seed: int
    _random: random.Random = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def choose(self, count: int) -> int:
        """See `Schedule`."""
        return self._random.randrange(count)

    def token(self) -> str:
        """See `Schedule`."""
        return f"seed:{self.seed}"


def _as_tuple(choices: Iterable[int]) -> tuple[int, ...]:
    return tuple(choices)


@attrs.define
class Listed:
    """Follows a finished list of choices (each taken modulo the number of candidates), then goes on first-in-first-out.

    It remembers what was chosen among how many, from which `successor` finds the next run of a depth-first search.
    This is also how a Hypothesis test hands over its choices: as a list drawn before the loop starts.
    """

    choices: tuple[int, ...] = attrs.field(default=(), converter=_as_tuple)
    taken: list[tuple[int, int]] = attrs.field(init=False, factory=list, repr=False, eq=False)

    def choose(self, count: int) -> int:
        """See `Schedule`."""
        step = len(self.taken)
        pick = self.choices[step] % count if step < len(self.choices) else 0
        self.taken.append((pick, count))
        return pick

    def token(self) -> str:
        """See `Schedule`."""
        picks = [pick for pick, _ in self.taken]
        while picks and picks[-1] == 0:
            picks.pop()
        return "path:" + ",".join(map(str, picks))

    def successor(self) -> Listed | None:
        """The next path of a depth-first search over all choices, or None after the last one."""
        path = list(self.taken)
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return None
        return Listed([*(pick for pick, _ in path[:-1]), path[-1][0] + 1])


def from_token(token: str) -> Schedule:
    """The schedule that ``token`` names; `ValueError` when it is none that `Schedule.token` makes."""
    kind, _, rest = token.partition(":")
    if token == "fifo":
        return Fifo()
    if kind == "seed":
        return Seeded(int(rest))
    if kind == "path":
        return Listed(tuple(int(pick) for pick in rest.split(",") if pick))
    raise ValueError(f"'{token}' is not a schedule token: use fifo, seed:NUMBER or path:N,N,…")
