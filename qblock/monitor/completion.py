"""The console's suggestions in the shape in which prompt_toolkit wants completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from qblock.monitor.console import Suggestion


class ReplCompleter(Completer):
    """``ask`` gives the suggestions for the text before the cursor."""

    def __init__(self, ask: Callable[[str], Iterable[Suggestion]]) -> None:
        self._ask = ask

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """See prompt_toolkit."""
        typed = document.text_before_cursor
        beginning = "" if not typed or typed[-1].isspace() else typed.split()[-1]
        for item in self._ask(typed):
            yield Completion(item.word, start_position=-len(beginning), display_meta=item.remark)
