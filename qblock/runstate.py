"""Whether the guest runs, and if not, why: the run state of the machine around a block system.

Models QEMU's run states as far as block devices meet them (semantics.md section 18): a machine is stopped by a command or by an
I/O error of a device, goes on with ``cont``, by a snapshot of all of it,
and is ``prelaunch`` before its first start and after a reset while it was stopped.
Devices wait here when an error has stopped the machine, to try again afterwards.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import attrs

from qblock.errors import CommandError

if TYPE_CHECKING:
    from qblock.driver import Json


class RunState(enum.Enum):
    """The states of the guest as query-status tells them."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    IO_ERROR = "io-error"
    SHUTDOWN = "shutdown"
    SAVE_VM = "save-vm"
    RESTORE_VM = "restore-vm"


TRANSITIONS: Final[Mapping[RunState, frozenset[RunState]]] = {
    RunState.PRELAUNCH: frozenset({RunState.RUNNING}),
    RunState.RUNNING: frozenset(RunState) - {RunState.PRELAUNCH, RunState.RUNNING},
    RunState.PAUSED: frozenset({RunState.RUNNING, RunState.PRELAUNCH}),
    RunState.IO_ERROR: frozenset({RunState.RUNNING, RunState.PRELAUNCH}),
    RunState.SHUTDOWN: frozenset({RunState.PRELAUNCH}),
    RunState.SAVE_VM: frozenset({RunState.RUNNING, RunState.PRELAUNCH}),
    RunState.RESTORE_VM: frozenset({RunState.RUNNING, RunState.PRELAUNCH}),
}
"""Where each state leads: only a machine that runs can be stopped, only a reset leads back to ``prelaunch``."""


@attrs.define(eq=False)
class RunControl:
    """The run state of one machine. ``before_resume`` are called before the guest goes on (with ``cont``), ``on_change`` when it
    goes on (True) or has stopped (False), and ``on_reset`` when the machine is reset.
    """

    _emit: Callable[[str, Mapping[str, Json]], None]
    state: RunState = RunState.RUNNING
    before_resume: list[Callable[[], None]] = attrs.field(factory=list, init=False, repr=False)
    on_change: list[Callable[[bool], None]] = attrs.field(factory=list, init=False, repr=False)
    on_reset: list[Callable[[], None]] = attrs.field(factory=list, init=False, repr=False)
    _ended: bool = attrs.field(default=False, init=False)
    _waiting: list[asyncio.Future[bool]] = attrs.field(factory=list, init=False, repr=False)

    @property
    def running(self) -> bool:
        """Whether the guest runs."""
        return self.state is RunState.RUNNING

    def stop(self, state: RunState = RunState.PAUSED) -> None:
        """Stop the guest, with the event STOP; nothing happens when it does not run."""
        if not self.running:
            return
        self._enter(state)
        self._tell(False)
        self._emit("STOP", {})

    def resume(self) -> None:
        """Let the guest go on, with the event RESUME; nothing happens when it runs.

        Raises `CommandError` when the machine was shut down and must be reset first.
        """
        if self.state is RunState.SHUTDOWN:
            raise CommandError("The machine is shut down; reset it first (system_reset)")
        for listener in self.before_resume:
            listener()
        if self.running:
            return
        self._enter(RunState.RUNNING)
        self._tell(True)
        self._emit("RESUME", {})
        self._wake(goes_on=True)

    def reset(self) -> None:
        """The machine starts anew: it goes on if it ran, otherwise it is as before its first start."""
        for listener in self.on_reset:
            listener()
        self._wake(goes_on=False)
        if not self.running and self.state is not RunState.PRELAUNCH:
            self._enter(RunState.PRELAUNCH)

    def end(self) -> None:
        """The machine ends: nobody waits for it to go on any more."""
        self._ended = True
        self._wake(goes_on=False)

    async def until_running(self) -> bool:
        """Wait until the guest runs; False when the machine was reset or ended instead, which forgets what devices were at."""
        while not self.running:
            if self._ended:
                return False
            future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            if not await future:
                return False
        return True

    def _wake(self, *, goes_on: bool) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(goes_on)

    def _enter(self, state: RunState) -> None:
        assert state in TRANSITIONS[self.state], (self.state, state)
        self.state = state

    def _tell(self, running: bool) -> None:
        for listener in self.on_change:
            listener(running)
