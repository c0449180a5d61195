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
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
_BETWEEN: Final = "  |  "
_TOOLBAR_LINES: Final = 5


@attrs.define(eq=False)
class Repl:
    """One person (or script) at one machine. ``out`` takes text that ends in a newline."""

    thread: LoopThread
    console: Console
    out: Callable[[str], object] = sys.stdout.write
    _toolbar: list[str] = attrs.field(init=False, factory=list)
    _held: list[str] | None = attrs.field(init=False, default=None)
    _printing: threading.Lock = attrs.field(init=False, factory=threading.Lock)

    def execute(self, line: str, *, columns: int | None = None) -> Answer:
        """Execute one line on the machine's loop and print what it says; help is wrapped to ``columns``."""
        answer = self.thread.call(self.console.execute(line))
        text = answer.text.rstrip("\n") + "\n" if answer.text else ""
        is_help = line.split()[:1] in (["help"], ["?"]) or line.split() == ["info"]
        self._print(_wrapped(text, columns) + "\n" if columns and is_help else text)
        return answer

    # -------------------------------------------------------------------------------------------------------- line mode

    def run_lines(self, lines: IO[str]) -> int:
        """Execute all lines, up to ``quit`` or the end; returns the exit code: 1 when one of them failed."""
        self._held = []  # what others say comes when the next line is answered, so that the order is always the same
        self._listen()
        failed = False
        for line in lines:
            answer = self.execute(line)
            failed |= answer.failed
            if answer.quit:
                break
        self._print("")
        return int(failed)

    # ---------------------------------------------------------------------------------------------------------- prompt

    def run_prompt(self, session: PromptSession[str]) -> int:
        """Prompt until ``quit``, Ctrl-D, or until the machine is told to quit by somebody else."""
        self._listen()
        self.thread.when_done(self.console.machine.hub.wait_quit(), lambda: _leave_prompt(session))
        while not self.console.machine.hub.quitting:
            try:
                with self._above_prompt():
                    line = session.prompt(PROMPT)
            except KeyboardInterrupt:
                continue
            except EOFError:
                break
            try:
                if self.execute(line, columns=shutil.get_terminal_size().columns).quit:
                    break
            except KeyboardInterrupt:
                self._print("interrupted; what was started goes on\n")
        return 0

    @contextmanager
    def _above_prompt(self) -> Iterator[None]:
        """While the prompt stands, what others print goes above it; between prompts it is printed at once, in its order."""
        from prompt_toolkit.patch_stdout import patch_stdout  # noqa: PLC0415 - heavy, and for terminals only

        patch = patch_stdout(raw=True)
        with self._printing:
            patch.__enter__()
        try:
            yield
        finally:
            with self._printing:
                patch.__exit__(None, None, None)

    # ------------------------------------------------------------------------------------------------ what others say

    def _listen(self) -> None:
        """Print what is said beside answers: what was kept, and from now on each report and each event that is watched."""
        machine = self.console.machine
        machine.events.listener = self._announce
        machine.reports.listener = self._pass_on
        for report in machine.reports.take():
            self._pass_on(report)

    def _pass_on(self, report: Report) -> None:
        self._say(report.text)

    def _announce(self, event: MachineEvent) -> None:
        if self.console.machine.watching:
            self._say(f"[event] {event.describe()}\n")

    def _say(self, text: str) -> None:
        with self._printing:
            if self._held is None:
                self.out(text)
            else:
                self._held.append(text)

    def _print(self, text: str) -> None:
        """Print an answer behind what was said before it."""
        with self._printing:
            held, self._held = self._held, None if self._held is None else []
            self.out("".join([*(held or ()), text]))

    # ----------------------------------------------------------------------------------------------------- while typing

    def toolbar(self, typed: str) -> str:
        """What stands below the prompt: help on the command being typed, then the clock and the jobs."""
        shown = self.thread.ask(lambda: toolbar_parts(self.console), timeout=_ANSWER_TIMEOUT)
        self._toolbar = shown if shown is not None else self._toolbar
        columns = shutil.get_terminal_size().columns
        usage = textwrap.wrap(self.console.usage(typed), columns)
        return "\n".join([*usage, *side_by_side(self._toolbar, columns)])

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


def _wrapped(text: str, columns: int) -> str:
    """Lines that are longer than ``columns`` broken between words, and continued with an indent."""
    lines = [textwrap.wrap(line, columns, subsequent_indent="    ") or [""] for line in text.splitlines()]
    return "\n".join(part for parts in lines for part in parts)


def toolbar_parts(console: Console) -> list[str]:
    """The clock, and each of the running jobs."""
    machine = console.machine
    passed = format_duration((machine.clock.now_ns() - machine.started_ns) // 1_000_000 * 1_000_000)
    parts = [f"{machine.clock.kind} time {passed}"]
    for job in machine.system.jobs.query_jobs():
        bar = progress_bar(job["current-progress"], job["total-progress"], width=10, strokes=UNICODE)
        parts.append(f"{job['type']} {job['id']} {job['status']} {bar}")
    return parts if len(parts) > 1 else [*parts, "no jobs"]


def side_by_side(parts: Sequence[str], columns: int) -> list[str]:
    """As many of ``parts`` on a line as fit into ``columns``; what `_TOOLBAR_LINES` do not hold is counted at the end."""
    lines: list[str] = []
    for index, part in enumerate(parts):
        if lines and len(lines[-1]) + len(_BETWEEN) + len(part) <= columns:
            lines[-1] += _BETWEEN + part
        elif len(lines) < _TOOLBAR_LINES:
            lines.append(part)
        else:
            return [*lines, f"and {len(parts) - index} more"]
    return lines


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
