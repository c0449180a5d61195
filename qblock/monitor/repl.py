"""The `qblock` prompt: HMP's commands and those for learning, with history, completion, help as you type, and a live toolbar.

The machine runs on a loop of its own (`LoopThread`) and lives on while you type; each line is executed there. When standard
input is no terminal, lines are read from it without a prompt, so that scripts can be piped in. Models QEMU's ``-monitor stdio``;
differs in that lines starting with ``#`` are comments, and in the exit code: 1 when a line of a piped script failed.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import attrs

from qblock.monitor.console import Answer, Console, Suggestion
from qblock.monitor.drawing import UNICODE, progress_bar
from qblock.monitor.eventlog import MachineEvent
from qblock.monitor.loopthread import LoopThread
from qblock.monitor.reports import Report
from qblock.units import format_duration

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History

PROMPT: Final = "(qblock) "
_ANSWER_TIMEOUT: Final = 0.2
"""Real seconds that drawing the toolbar or completing a word waits for a busy machine."""
_REFRESH_SECONDS: Final = 0.5


@attrs.define(eq=False)
class Repl:
    """One person (or script) at one machine. ``out`` takes text that ends in a newline."""

    thread: LoopThread
    console: Console
    out: Callable[[str], object] = sys.stdout.write
    _toolbar: str = attrs.field(init=False, default="")

    def execute(self, line: str) -> Answer:
        """Execute one line on the machine's loop and print what it says."""
        answer = self.thread.call(self.console.execute(line))
        if answer.text:
            self.out(answer.text.rstrip("\n") + "\n")
        return answer

    # -------------------------------------------------------------------------------------------------------- line mode

    def run_lines(self, lines: IO[str]) -> int:
        """Execute all lines, up to ``quit`` or the end; returns the exit code: 1 when one of them failed."""
        events: list[MachineEvent] = []
        self.console.machine.events.listener = events.append
        reports = self.console.machine.reports
        reports.listener = None  # they come with the answers, so that the order of the lines is always the same
        failed = False
        for line in lines:
            answer = self.execute(line)
            failed |= answer.failed
            self._print_events(events)
            if answer.quit:
                break
        for report in reports.take():
            self.out(report.text)
        return int(failed)

    def _print_events(self, events: list[MachineEvent]) -> None:
        shown, events[:] = list(events), []
        if self.console.machine.watching:
            for event in shown:
                self.out(f"[event] {event.describe()}\n")

    # ---------------------------------------------------------------------------------------------------------- prompt

    def run_prompt(self, session: PromptSession[str]) -> int:
        """Prompt until ``quit``, Ctrl-D, or until the machine is told to quit by somebody else."""
        from prompt_toolkit.patch_stdout import patch_stdout  # noqa: PLC0415 - heavy, and for terminals only

        with patch_stdout(raw=True):
            self.console.machine.events.listener = self._announce
            self.console.machine.reports.listener = self._pass_on
            self.thread.when_done(self.console.machine.hub.wait_quit(), lambda: _leave_prompt(session))
            while not self.console.machine.hub.quitting:
                try:
                    line = session.prompt(PROMPT)
                except KeyboardInterrupt:
                    continue
                except EOFError:
                    break
                try:
                    if self.execute(line).quit:
                        break
                except KeyboardInterrupt:
                    self.out("interrupted; what was started goes on\n")
        return 0

    def _pass_on(self, report: Report) -> None:
        self.out(report.text)

    def _announce(self, event: MachineEvent) -> None:
        if self.console.machine.watching:
            self.out(f"[event] {event.describe()}\n")

    def toolbar(self, typed: str) -> str:
        """What stands below the prompt: help on the command being typed, then the clock and the jobs."""
        shown = self.thread.ask(lambda: toolbar_text(self.console), timeout=_ANSWER_TIMEOUT)
        self._toolbar = shown if shown is not None else self._toolbar
        usage = textwrap.wrap(self.console.usage(typed), shutil.get_terminal_size().columns)
        return "\n".join([*usage, self._toolbar])

    def suggestions(self, typed: str) -> list[Suggestion]:
        """What could be typed next; nothing while the machine is too busy to say."""
        return self.thread.ask(lambda: self.console.suggestions(typed), timeout=_ANSWER_TIMEOUT) or []

    def make_session(self, history: History | None = None) -> PromptSession[str]:
        """A prompt with everything that belongs to it; ``history`` defaults to a file that is kept between sessions."""
        from prompt_toolkit import PromptSession  # noqa: PLC0415 - heavy, and for terminals only
        from prompt_toolkit.auto_suggest import AutoSuggestFromHistory  # noqa: PLC0415
        from prompt_toolkit.completion import ThreadedCompleter  # noqa: PLC0415

        from qblock.monitor.completion import ReplCompleter  # noqa: PLC0415 - imports prompt_toolkit

        session: PromptSession[str] = PromptSession(
            history=history if history is not None else _kept_history(),
            auto_suggest=AutoSuggestFromHistory(),
            completer=ThreadedCompleter(ReplCompleter(self.suggestions)),
            complete_while_typing=True,
            refresh_interval=_REFRESH_SECONDS,
            bottom_toolbar=lambda: self.toolbar(session.default_buffer.document.text_before_cursor),
        )
        return session


def _leave_prompt(session: PromptSession[str]) -> None:
    """Called on the machine's thread when somebody else has told it to quit."""
    loop = session.app.loop
    if loop is not None and session.app.is_running:
        loop.call_soon_threadsafe(lambda: session.app.is_running and session.app.exit(exception=EOFError))


def toolbar_text(console: Console) -> str:
    """The clock and the running jobs on one line."""
    machine = console.machine
    passed = format_duration((machine.clock.now_ns() - machine.started_ns) // 1_000_000 * 1_000_000)
    parts = [f"{machine.clock.kind} time {passed}"]
    for job in machine.system.jobs.query_jobs():
        bar = progress_bar(job["current-progress"], job["total-progress"], width=10, strokes=UNICODE)
        parts.append(f"{job['type']} {job['id']} {job['status']} {bar}")
    if len(parts) == 1:
        parts.append("no jobs")
    return "  |  ".join(parts)


def _kept_history() -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory  # noqa: PLC0415 - heavy, and for terminals only

    directory = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "qblock"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (directory / "history").open("a"):
            pass
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(directory / "history"))
