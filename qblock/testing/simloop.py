"""`SimLoop`: an asyncio loop on virtual time, whose task steps run in the order that a schedule chooses.

The same product code runs on it unchanged; waiting costs no wall time, and a run can be repeated exactly. Built on
documented asyncio names: a ``SelectorEventLoop`` over a selector that turns every wait into a jump of an
integer-nanosecond clock, a task factory that numbers tasks, and a ``call_soon`` that parks task steps. Only steps
that belong to a task are permuted, everything else stays first-in-first-out. ``TaskGroup`` keeps its children in a
set, whose order differs from run to run; therefore steps that become runnable at the same moment are ordered by task
number before anybody chooses. Executors run inline. Sockets work where both ends are on this machine (socketpair,
AF_UNIX).

Two ways to let time pass:

- *automatic* (the default): when nothing can run, time jumps to the next timer; when there is none, `Deadlock` is
  raised.
- *manual* (``SimLoop(manual=True)``): time passes only as `SimLoop.advance` and `SimLoop.advance_until` allow. In
  between, the loop waits on its descriptors in real time, so that people and other processes can talk to what runs on
  it.
"""

from __future__ import annotations

import asyncio
import contextvars
import selectors
import weakref
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from typing import Any, Final, TypeVar, TypeVarTuple, Unpack

import attrs

from qblock.clock import LoopClock
from qblock.testing.schedules import Fifo, Listed, Schedule
from qblock.units import SECOND_NS, format_duration

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Deadlock(RuntimeError):
    """Nothing can ever run again: every task waits, no timer is armed. The text says who waits where."""


class VirtualSelector(selectors.BaseSelector):
    """Polls real descriptors, and turns every wait into a jump of the clock, up to the horizon if there is one.

    ``now_ns`` is the time; ``horizon_ns`` is None in automatic mode; ``due_ns`` is when the next timer falls due, as seen when
    the loop was idle last. ``on_idle`` is asked before time passes or the loop blocks, and returns True when it has given the
    loop something to do; ``on_deadlock`` makes the exception.
    """

    def __init__(self, *, manual: bool, on_idle: Callable[[], bool], on_deadlock: Callable[[], Deadlock]) -> None:
        self.now_ns = 0
        self.horizon_ns = 0 if manual else None
        self.due_ns: int | None = None
        self._on_idle = on_idle
        self._on_deadlock = on_deadlock
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready; otherwise time passes. Blocks in real time only at the horizon."""
        ready = self._real.select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        self.due_ns = None if timeout is None else self.now_ns + max(1, round(timeout * SECOND_NS))
        if self._on_idle():
            return []
        if self.due_ns is not None and (self.horizon_ns is None or self.due_ns <= self.horizon_ns):
            self.now_ns = self.due_ns
            return []
        if self.horizon_ns is None:
            raise self._on_deadlock()
        self.now_ns = max(self.now_ns, self.horizon_ns)
        return self._real.select(None)

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """As the base class says."""
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """As the base class says."""
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """As the base class says."""
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """As the base class says."""
        return self._real.get_map()

    def close(self) -> None:
        """As the base class says."""
        self._real.close()


@attrs.frozen(eq=False)
class _Step:
    """One step of a task that could run now; ``moment`` counts the steps run before it became runnable."""

    moment: int
    task_number: int
    callback: Callable[..., object]
    args: tuple[Any, ...]
    context: contextvars.Context

    @property
    def order(self) -> tuple[int, int]:
        return self.moment, self.task_number


class SimLoop(asyncio.SelectorEventLoop):
    """See the module. ``trace`` lists the numbers of the tasks in the order in which they took their steps."""

    def __init__(self, schedule: Schedule | None = None, *, manual: bool = False) -> None:
        self.schedule: Final[Schedule] = schedule if schedule is not None else Fifo()
        self.trace: list[int] = []
        self._time = VirtualSelector(manual=manual, on_idle=self._wake_settlers, on_deadlock=self._deadlock)
        self._settlers: list[asyncio.Future[None]] = []
        self._steps: list[_Step] = []
        self._numbers: weakref.WeakKeyDictionary[asyncio.Task[Any], int] = weakref.WeakKeyDictionary()
        self._tasks_made = 0
        super().__init__(self._time)
        self.set_task_factory(self._make_task)

    # ---------------------------------------------------------------------------------------------------------- time

    @property
    def now_ns(self) -> int:
        """Virtual nanoseconds since the loop was made."""
        return self._time.now_ns

    def time(self) -> float:
        """The same in seconds, as asyncio wants it."""
        return self._time.now_ns / SECOND_NS

    @property
    def manual(self) -> bool:
        """True when time passes only as `advance` allows."""
        return self._time.horizon_ns is not None

    async def settle(self) -> None:
        """Return when everything that can run without time passing has run, and no descriptor is ready."""
        settler = self.create_future()
        self._settlers.append(settler)
        await settler

    def _wake_settlers(self) -> bool:
        settlers, self._settlers = self._settlers, []
        for settler in settlers:
            if not settler.done():
                settler.set_result(None)
        return bool(settlers)

    async def next_timer_ns(self) -> int | None:
        """When the next timer falls due, once everything has run that needs no time to pass; None when none is armed."""
        await self.settle()
        return self._time.due_ns

    async def advance(self, ns: int) -> None:
        """Let ``ns`` nanoseconds pass and return when everything that fell due in them has run."""
        if self._time.horizon_ns is not None:
            self._time.horizon_ns = max(self._time.horizon_ns, self.now_ns + ns)
        await LoopClock().sleep_ns(ns)
        await self.settle()

    async def advance_until(self, done: asyncio.Future[Any], *, limit_ns: int) -> bool:
        """Let time pass until ``done`` is done, at most ``limit_ns``; returns whether it is. ``done`` is not
        cancelled.
        """
        horizon = self._time.horizon_ns
        if horizon is not None:
            self._time.horizon_ns = max(horizon, self.now_ns + limit_ns)
        try:
            async with asyncio.timeout_at((self.now_ns + limit_ns) / SECOND_NS):
                await asyncio.wait([done])
        except TimeoutError:
            pass
        finally:
            if horizon is not None:
                self._time.horizon_ns = max(horizon, self.now_ns)
        return done.done()

    # ------------------------------------------------------------------------------------------------------ scheduling

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **options)
        self._number_of(task)
        return task

    def _number_of(self, task: asyncio.Task[Any]) -> int:
        # The constructor of a task asks for its first step already, so whoever comes first gives the number.
        number = self._numbers.get(task)
        if number is None:
            number = self._numbers[task] = self._tasks_made
            self._tasks_made += 1
        return number

    def create_task(self, coro: Any, *, name: object = None, **options: Any) -> asyncio.Task[Any]:
        """As asyncio's; a task without a name is called after its number on this loop, the same in every run."""
        return super().create_task(coro, name=str(name or f"Task-{self._tasks_made}"), **options)

    def call_soon(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """As asyncio's, except that a step of a task is parked until the schedule chooses it."""
        task = getattr(callback, "__self__", None)
        if not isinstance(task, asyncio.Task):
            return super().call_soon(callback, *args, context=context)
        number = self._number_of(task)
        if context is None:  # one that is empty counts as false
            context = contextvars.copy_context()
        self._steps.append(_Step(len(self.trace), number, callback, args, context))
        return super().call_soon(self._run_chosen_step)

    def _run_chosen_step(self) -> None:
        steps = self._steps
        count = len(steps)
        index = 0
        if count > 1:
            steps.sort(key=lambda step: step.order)
            index = self.schedule.choose(count)
        step = steps.pop(index)
        self.trace.append(step.task_number)
        step.context.run(step.callback, *step.args)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Calls ``func`` at once, on this thread, and returns a future that is done."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    # -------------------------------------------------------------------------------------------------------- deadlock

    def _deadlock(self) -> Deadlock:
        waiting = sorted(asyncio.all_tasks(self), key=self._number_of)
        now = format_duration(self.now_ns)
        lines = [f"nothing can run at {now}: no timer is armed, and these tasks wait for one another"]
        for task in waiting:
            name, place = task.get_name(), describe_wait(task.get_coro())
            lines.append(f"  task {self._number_of(task)} '{name}' waits in {place}")
        return Deadlock("\n".join(lines))


def describe_wait(coro: Any) -> str:
    """Where a suspended coroutine waits: the innermost frame outside asyncio, and what it waits on there."""
    place, primitive = "an unknown place", ""
    while coro is not None:
        frame = getattr(coro, "cr_frame", None) or getattr(coro, "gi_frame", None) or getattr(coro, "ag_frame", None)
        if frame is not None:
            module = frame.f_globals.get("__name__", "?")
            if module.partition(".")[0] == "asyncio":
                if not primitive or not coro.__qualname__.startswith("_"):
                    primitive = f" for {coro.__qualname__}"
            else:
                owner = frame.f_locals.get("self")
                of = f" of {owner!r}" if owner is not None else ""
                place, primitive = f"{module}.{coro.__qualname__} (line {frame.f_lineno}){of}", ""
        coro = getattr(coro, "cr_await", None) or getattr(coro, "gi_yieldfrom", None) or getattr(coro, "ag_await", None)
    return place + primitive


def run(main: Callable[[], Coroutine[Any, Any, T]], schedule: Schedule | None = None) -> T:
    """Run ``main()`` to its end on a fresh `SimLoop` and return its result.

    An exception that comes out carries a note with the token by which `qblock.testing.schedules.from_token` repeats
    the run.
    """
    loop = SimLoop(schedule)
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(main())
    except BaseException as error:
        error.add_note(f"schedule: {loop.schedule.token()} (virtual time {format_duration(loop.now_ns)})")
        raise


def every_schedule(main: Callable[[], Coroutine[Any, Any, T]], *, limit: int = 100_000) -> list[T]:
    """Run ``main()`` once for every order in which its tasks can take their steps, depth-first; returns all results.

    Raises `AssertionError` when there are more than ``limit`` orders: make the scenario smaller then.
    """
    results: list[T] = []
    schedule: Listed | None = Listed()
    while schedule is not None:
        assert len(results) < limit, f"more than {limit} schedules"
        results.append(run(main, schedule))
        schedule = schedule.successor()
    return results
