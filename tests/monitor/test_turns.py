"""Commands run side by side; one that must be alone is alone, and nobody waits for ever."""

from __future__ import annotations

import asyncio

import pytest

from qblock.monitor.turns import Turns
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run


@pytest.mark.parametrize("seed", range(20))
def test_nobody_is_inside_with_one_who_is_alone(seed: int) -> None:
    """What a transaction has half done, no other command sees."""
    inside: set[int] = set()
    most = 0

    async def command(turns: Turns, number: int) -> None:
        nonlocal most
        alone = number % 3 == 0
        async with turns.taken(alone=alone):
            inside.add(number)
            for _ in range(4):
                assert not alone or inside == {number}
                most = max(most, len(inside))
                await asyncio.sleep(0)
            inside.remove(number)

    async def main() -> None:
        turns = Turns()
        async with asyncio.TaskGroup() as group:
            for number in range(9):
                group.create_task(command(turns, number))

    run(main, Seeded(seed))
    assert most > 1, "the others do run side by side"


def test_a_command_executes_others_inside_itself() -> None:
    """human-monitor-command executes QMP commands, the prompt even transactions: they do not wait for themselves."""

    async def main() -> list[str]:
        turns, story = Turns(), []

        async def outer() -> None:
            async with turns.taken():
                async with turns.taken(alone=True), turns.taken():
                    await asyncio.sleep(0)
                    story.append("inner")
                await asyncio.sleep(0)
                story.append("outer")

        async def other() -> None:
            await asyncio.sleep(0)
            async with turns.taken():
                story.append("other")

        await asyncio.gather(outer(), other())
        return story

    assert run(main) == ["inner", "other", "outer"]


def test_one_who_waits_to_be_alone_keeps_nobody_out() -> None:
    """A command may wait for what another one will do; it must get in."""

    async def main() -> list[str]:
        turns, story = Turns(), []
        released = asyncio.Event()

        async def waits_for_another() -> None:
            async with turns.taken():
                await released.wait()
                story.append("waited")

        async def alone() -> None:
            async with turns.taken(alone=True):
                story.append("alone")

        async def releases() -> None:
            async with turns.taken():
                released.set()
                story.append("released")

        async with asyncio.TaskGroup() as group:
            group.create_task(waits_for_another())
            await asyncio.sleep(0)
            group.create_task(alone())
            await asyncio.sleep(0)
            group.create_task(releases())
        return story

    assert run(main) == ["released", "waited", "alone"]


def test_a_turn_ends_when_its_command_fails_or_is_cancelled() -> None:
    """A monitor whose client goes away must not stop the others."""

    async def main() -> None:
        turns = Turns()

        async def stuck() -> None:
            async with turns.taken(alone=True):
                await asyncio.get_running_loop().create_future()

        task = asyncio.create_task(stuck())
        await asyncio.sleep(0)
        waiting = asyncio.create_task(stuck())
        await asyncio.sleep(0)
        waiting.cancel()
        task.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)
        with pytest.raises(ZeroDivisionError):
            async with turns.taken(alone=True):
                raise ZeroDivisionError
        async with turns.taken(alone=True):
            pass

    run(main)
