"""All or nothing: steps that are done at once, and finished or undone together.

Models the transactions of QEMU's block layer (a list of actions that are prepared, then committed or aborted). Differs from
QEMU in that each step is done when it is made, and registers how to undo it; a step made later may rely on the ones before.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from types import TracebackType

Callback = Callable[[], object]
"""A step of finishing or undoing: takes nothing, must not fail, its result is ignored."""


class TransactionState(enum.Enum):
    """How far a transaction has come."""

    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"


class Transaction:
    """Steps that are finished together or undone together.

    Use it as a context manager: an exception that leaves the block (a cancelled task included) aborts, the normal end
    commits. A block that has called `commit` or `abort` itself is left as it is. ::

        with Transaction() as change:
            graph.set_backing(node, other, change)
    """

    __slots__ = ("_aborts", "_cleans", "_commits", "state")

    def __init__(self) -> None:
        self._commits: list[Callback] = []
        self._aborts: list[Callback] = []
        self._cleans: list[Callback] = []
        self.state = TransactionState.OPEN

    def add(self, commit: Callback | None = None, abort: Callback | None = None, clean: Callback | None = None) -> None:
        """Register what completes, undoes and tidies up a step that has just been done; none of them may fail."""
        assert self.state is TransactionState.OPEN, f"the transaction is {self.state.value} already"
        if commit is not None:
            self._commits.append(commit)
        if abort is not None:
            self._aborts.append(abort)
        if clean is not None:
            self._cleans.append(clean)

    def commit(self) -> None:
        """Make all steps final: commits in the order of the steps, then cleans in the same order."""
        self._finish(TransactionState.COMMITTED, self._commits)

    def abort(self) -> None:
        """Undo all steps: aborts in the reverse order of the steps, then cleans in the order of the steps."""
        self._finish(TransactionState.ABORTED, self._aborts[::-1])

    def _finish(self, state: TransactionState, callbacks: list[Callback]) -> None:
        assert self.state is TransactionState.OPEN, f"the transaction is {self.state.value} already"
        self.state = state
        for callback in callbacks:
            callback()
        for callback in self._cleans:
            callback()
        self._commits, self._aborts, self._cleans = [], [], []

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.state is not TransactionState.OPEN:
            return
        if kind is None:
            self.commit()
        else:
            self.abort()

    def __repr__(self) -> str:
        return f"<Transaction {self.state.value}, {len(self._aborts)} to undo>"
