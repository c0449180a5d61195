"""The loop on virtual time: order, time, deadlocks, sockets, on plain asyncio programs."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, ContextVar
from pathlib import Path

import pytest

from qblock.testing.schedules import Fifo, Listed, Schedule, Seeded, from_token
from qblock.testing.simloop import Deadlock, SimLoop, every_schedule, run

SECOND = 1_000_000_000


async def lost_update(tasks: int = 3) -> int:
    """The textbook race: each task reads, yields, and writes back what it read plus one."""
    value = 0

    async def increment() -> None:
        nonlocal value
        seen = value
        await asyncio.sleep(0)
        value = seen + 1

    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(increment())
    return value


async def order_of_steps() -> list[str]:
    """Three tasks of three steps each; returns who ran when."""
    order: list[str] = []

    async def worker(name: str) -> None:
        for _ in range(3):
            order.append(name)
            await asyncio.sleep(0)

    await asyncio.gather(*(worker(name) for name in "abc"))
    return order


# ------------------------------------------------------------------------------------------------------------ schedules


def test_fifo_is_what_asyncio_does() -> None:
    """A program behaves under the default schedule as it does on a plain loop."""
    assert run(order_of_steps) == asyncio.run(order_of_steps()) == list("abcabcabc")


def test_a_seed_repeats_a_run_and_another_seed_differs() -> None:
    """A failure found by one seed is found again by it."""
    orders = [run(order_of_steps, Seeded(seed)) for seed in range(6)]
    assert orders == [run(order_of_steps, Seeded(seed)) for seed in range(6)]
    assert len({tuple(order) for order in orders}) > 1


def test_every_schedule_finds_every_outcome_of_a_race() -> None:
    """Two tasks can lose an update in some orders and not in others: all orders are tried."""
    assert set(every_schedule(lost_update)) == {1, 2, 3}
    assert sorted(every_schedule(lambda: lost_update(2))) == [1, 1, 1, 1, 2, 2]


def test_every_schedule_stops_at_its_limit() -> None:
    """A scenario that is too large says so instead of running for days."""
    with pytest.raises(AssertionError, match="more than 10 schedules"):
        every_schedule(lost_update, limit=10)


def test_listed_choices_wrap_and_then_go_on_first_in_first_out() -> None:
    """Any list of integers is a schedule, which is what Hypothesis needs."""
    assert run(order_of_steps, Listed([2, 1])) != list("abcabcabc")
    assert run(order_of_steps, Listed([3, 3, 3, 3])) == list("abcabcabc")


def test_a_failure_carries_the_token_that_repeats_it() -> None:
    """Copy the token out of the report, and the same interleaving fails again."""

    async def fails_when_updates_are_lost() -> None:
        assert await lost_update() == 3

    failing = Listed([2, 1, 1, 0, 2])
    with pytest.raises(AssertionError) as caught:
        run(fails_when_updates_are_lost, failing)
    (note,) = [note for note in caught.value.__notes__ if note.startswith("schedule: ")]
    token = note.split()[1]
    assert token == failing.token()
    again = from_token(token)
    with pytest.raises(AssertionError):
        run(fails_when_updates_are_lost, again)
    assert again.token() == token


@pytest.mark.parametrize("schedule", [Fifo(), Seeded(7), Listed()])
def test_tokens_make_equal_schedules(schedule: Schedule) -> None:
    """fifo, seed:7 and path: are what a person types."""
    assert from_token(schedule.token()) == schedule


@pytest.mark.parametrize("token", ["", "lifo", "seed:x", "path:a"])
def test_what_is_no_token_is_refused(token: str) -> None:
    """A mistyped token must not silently run the default."""
    with pytest.raises(ValueError, match=r"not a schedule token|invalid literal"):
        from_token(token)


def test_task_groups_cancel_their_children_in_the_same_order_every_time() -> None:
    """TaskGroup keeps its children in a set, whose order depends on addresses; steps are therefore sorted by task number."""

    async def main() -> list[int]:
        ended: list[int] = []

        async def child(number: int) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(number)

        async def fail() -> None:
            raise ValueError

        async def family() -> None:
            async with asyncio.TaskGroup() as group:
                for number in range(40):
                    group.create_task(child(number))
                group.create_task(fail())

        with pytest.raises(ExceptionGroup):
            await family()
        return ended

    assert run(main) == list(range(40))


def test_the_trace_tells_who_ran() -> None:
    """Task numbers count from 0, the main task, in order of creation."""

    async def main() -> list[int]:
        await asyncio.gather(asyncio.sleep(0), asyncio.sleep(0))
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        return list(loop.trace)

    assert run(main) == [0, 1, 2, 1, 2, 0]


def test_tasks_without_a_name_are_numbered_by_the_loop() -> None:
    """asyncio's own numbering goes on from run to run, which would show in messages."""

    async def main() -> list[str]:
        task = asyncio.ensure_future(asyncio.sleep(0))
        named = asyncio.get_running_loop().create_task(asyncio.sleep(0), name="mine")
        await asyncio.gather(task, named)
        return [task.get_name(), named.get_name()]

    assert run(main) == run(main) == ["Task-1", "mine"]


# ------------------------------------------------------------------------------------------------------------- deadlock


def test_a_task_keeps_its_context_variables() -> None:
    """Also those of a task that began without any: what it sets in one step is there in the next."""
    variable: ContextVar[int] = ContextVar("variable")

    async def main() -> None:
        token = variable.set(1)
        await asyncio.sleep(1)
        assert variable.get() == 1
        variable.reset(token)

    Context().run(run, main)


def test_a_deadlock_names_who_waits_for_what() -> None:
    """Two tasks that each hold what the other wants end the run with a report instead of hanging the test."""

    async def main() -> None:
        first, second = asyncio.Lock(), asyncio.Lock()

        async def grab(one: asyncio.Lock, other: asyncio.Lock) -> None:
            async with one:
                await asyncio.sleep(1)
                async with other:
                    pass

        async with asyncio.TaskGroup() as group:
            group.create_task(grab(first, second), name="left")
            group.create_task(grab(second, first), name="right")

    with pytest.raises(Deadlock) as caught:
        run(main)
    text = str(caught.value)
    assert "nothing can run at 1s" in text
    assert "'left' waits in" in text
    assert "'right' waits in" in text
    assert text.count("for Lock.acquire") == 2
    assert "TaskGroup.__aexit__" in text


def test_a_deadlock_shows_the_object_that_waits() -> None:
    """A report about nodes and jobs should name the node or job."""

    class Worker:
        def __repr__(self) -> str:
            return "<Worker 'w'>"

        async def wait(self) -> None:
            await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock, match=r"Worker\.wait \(line \d+\) of <Worker 'w'>"):
        run(lambda: Worker().wait())


def test_tasks_are_unwound_after_a_deadlock() -> None:
    """`finally` blocks still run, so that temporary files go away."""
    unwound = []

    async def main() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            unwound.append(True)

    with pytest.raises(Deadlock):
        run(main)
    assert unwound == [True]


# ---------------------------------------------------------------------------------------------- threads and descriptors


def test_executors_run_inline_and_pass_exceptions_on() -> None:
    """Blocking calls take no virtual time, and their errors arrive where they are awaited."""

    async def main() -> tuple[bool, int]:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as pool:
            thread = await loop.run_in_executor(pool, threading.get_ident)
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)
        return thread == threading.get_ident(), round(loop.time())

    assert run(main) == (True, 0)


def test_unix_sockets_work_with_both_ends_on_the_loop(tmp_path: Path) -> None:
    """The QMP server and its client live on one loop in most tests."""
    path = str(tmp_path / "socket")

    async def main() -> tuple[bytes, float]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            line = await reader.readline()
            await asyncio.sleep(5)
            writer.write(line.upper())
            await writer.drain()
            writer.close()
            await writer.wait_closed()

        async with await asyncio.start_unix_server(serve, path) as server:
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"hello\n")
            answer = await reader.read()
            writer.close()
            await writer.wait_closed()
            server.close()
        return answer, asyncio.get_running_loop().time()

    assert run(main) == (b"HELLO\n", 5.0)


def test_large_transfers_over_a_socketpair_suspend_and_go_on() -> None:
    """Buffers fill up and both sides wait for the other: descriptors must win over the clock."""

    async def main() -> tuple[int, float]:
        left, right = socket.socketpair()
        reader, closer = await asyncio.open_connection(sock=left)
        _, writer = await asyncio.open_connection(sock=right)
        size = 4 << 20

        async def send() -> None:
            writer.write(bytes(size))
            await writer.drain()
            writer.close()

        task = asyncio.ensure_future(send())
        received = len(await reader.read(-1))
        await task
        closer.close()
        return received, asyncio.get_running_loop().time()

    assert run(main) == (4 << 20, 0.0)


# -------------------------------------------------------------------------------------------------------- manual mode


def run_manual(main: object) -> object:
    """Run ``main(loop)`` on a manual loop."""
    loop = SimLoop(manual=True)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main(loop))  # type: ignore[operator]


def test_manual_time_moves_only_by_advance() -> None:
    """A sleeper that is due in 10 s sleeps through 9.999 s, and is awake after 10."""

    async def main(loop: SimLoop) -> list[object]:
        sleeper = asyncio.ensure_future(asyncio.sleep(10))
        seen: list[object] = [loop.manual, loop.now_ns]
        await loop.advance(9_999_999_999)
        seen += [loop.now_ns, sleeper.done()]
        await loop.advance(1)
        seen += [loop.now_ns, sleeper.done()]
        return seen

    assert run_manual(main) == [True, 0, 10 * SECOND - 1, False, 10 * SECOND, True]


def test_everything_due_happens_in_order_while_time_is_advanced() -> None:
    """One `step 10s` lets a chain of short sleeps run in full."""

    async def main(loop: SimLoop) -> list[int]:
        ticks: list[int] = []

        async def tick() -> None:
            while True:
                await asyncio.sleep(3)
                ticks.append(loop.now_ns // SECOND)

        task = asyncio.ensure_future(tick())
        await loop.advance(10 * SECOND)
        task.cancel()
        return ticks

    assert run_manual(main) == [3, 6, 9]


def test_settle_returns_when_only_time_could_change_anything() -> None:
    """After a command everything that follows at once has happened, and nothing that takes time."""

    async def main() -> list[int]:
        done: list[int] = []

        async def work(number: int) -> None:
            for _ in range(number):
                await asyncio.sleep(0)
            done.append(number)
            await asyncio.sleep(1)
            done.append(-number)

        tasks = [asyncio.ensure_future(work(number)) for number in (3, 50)]
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        await loop.settle()
        seen = list(done)
        await asyncio.wait(tasks)
        return seen

    assert run(main) == [3, 50]


def test_advance_until_stops_when_the_wish_comes_true_or_at_the_limit() -> None:
    """`run until READY` on virtual time."""

    async def main(loop: SimLoop) -> list[object]:
        wish: asyncio.Future[object] = asyncio.ensure_future(asyncio.sleep(30))
        early = await loop.advance_until(wish, limit_ns=10 * SECOND)
        at = loop.now_ns
        late = await loop.advance_until(wish, limit_ns=3600 * SECOND)
        after = asyncio.ensure_future(asyncio.sleep(1))
        await asyncio.sleep(0)
        result: list[object] = [early, at, late, loop.now_ns, after.done()]
        after.cancel()
        return result

    assert run_manual(main) == [False, 10 * SECOND, True, 30 * SECOND, False]


def test_a_manual_loop_waits_for_other_threads_in_real_time() -> None:
    """A synchronous client in another thread talks to the loop, and virtual time stands still meanwhile."""

    async def main(loop: SimLoop) -> tuple[bytes, int]:
        left, right = socket.socketpair()
        thread = threading.Thread(target=lambda: right.sendall(b"from outside"))
        reader, writer = await asyncio.open_connection(sock=left)
        asyncio.get_running_loop().call_soon(thread.start)
        ticking = asyncio.ensure_future(asyncio.sleep(1))
        data = await reader.read(100)
        thread.join()
        right.close()
        writer.close()
        ticking.cancel()
        return data, loop.now_ns

    assert run_manual(main) == (b"from outside", 0)
