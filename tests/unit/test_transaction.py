"""Transactions: steps that are finished or undone together."""

from __future__ import annotations

import asyncio

import pytest

from qblock.transaction import Transaction, TransactionState


def recorded(change: Transaction, log: list[str], *names: str) -> None:
    for name in names:
        change.add(
            commit=lambda name=name: log.append(f"commit {name}"),
            abort=lambda name=name: log.append(f"abort {name}"),
            clean=lambda name=name: log.append(f"clean {name}"),
        )


def failing(change: Transaction, log: list[str], error: BaseException, *, commit: bool = False) -> None:
    """A block of two steps that ends with ``error``, perhaps after an early commit."""
    with change:
        recorded(change, log, "a", "b")
        if commit:
            change.commit()
        raise error


def test_a_block_that_ends_well_commits_in_order_and_then_cleans() -> None:
    """Later steps rely on earlier ones, so they are finished in the order in which they were made."""
    log: list[str] = []
    with Transaction() as change:
        recorded(change, log, "a", "b")
        assert log == []
    assert log == ["commit a", "commit b", "clean a", "clean b"]
    assert change.state is TransactionState.COMMITTED


def test_an_exception_undoes_in_reverse_and_then_cleans() -> None:
    """Each undo finds the state that its step left."""
    log: list[str] = []
    change = Transaction()
    with pytest.raises(ValueError, match="no"):
        failing(change, log, ValueError("no"))
    assert log == ["abort b", "abort a", "clean a", "clean b"]
    assert change.state is TransactionState.ABORTED


def test_a_cancelled_task_undoes_its_change() -> None:
    """Cancellation is not an Exception, but leaves the block all the same."""
    log: list[str] = []
    with pytest.raises(asyncio.CancelledError):
        failing(Transaction(), log, asyncio.CancelledError())
    assert log == ["abort b", "abort a", "clean a", "clean b"]


@pytest.mark.parametrize("verb", ["commit", "abort"])
def test_a_block_may_finish_its_transaction_early(verb: str) -> None:
    """What was decided in the block is not done again at its end."""
    log: list[str] = []
    with Transaction() as change:
        recorded(change, log, "a")
        getattr(change, verb)()
    assert log == [f"{verb} a", "clean a"]


def test_an_early_commit_stands_when_the_block_fails_afterwards() -> None:
    """After the commit there is nothing to undo."""
    log: list[str] = []
    with pytest.raises(ValueError, match="late"):
        failing(Transaction(), log, ValueError("late"), commit=True)
    assert log == ["commit a", "commit b", "clean a", "clean b"]


def test_a_finished_transaction_takes_no_more_steps() -> None:
    """A step registered too late would never be undone: that is a bug, and is said."""
    change = Transaction()
    change.commit()
    with pytest.raises(AssertionError, match="committed already"):
        change.add(abort=lambda: None)
    with pytest.raises(AssertionError, match="committed already"):
        change.abort()
    assert "committed" in repr(change)


def test_each_callback_may_be_left_out() -> None:
    """Most steps only know how to be undone."""
    log: list[str] = []
    with Transaction() as change:
        change.add(abort=lambda: log.append("abort"))
        change.add(commit=lambda: log.append("commit"))
        change.add(clean=lambda: log.append("clean"))
    assert log == ["commit", "clean"]
