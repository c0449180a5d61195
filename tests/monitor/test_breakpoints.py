"""Requests of a running machine that are held at breakpoints: by qemu-io at the monitor, until somebody lets them go on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from qblock.monitor.client import QmpClient
from qblock.monitor.hub import MonitorHub
from qblock.policy import OpenPolicy
from qblock.system import BlockSystem
from qblock.testing.images import make_image
from qblock.testing.simloop import run

SIZE = 1 << 20
HELD, GOES_ON = "blkdebug: Suspended request 'A'", "blkdebug: Resuming request 'A'"


class Person:
    """Types at the monitor of a machine with the drive ``d``, whose image ``top`` lies on blkdebug."""

    def __init__(self, hub: MonitorHub, client: QmpClient, printed: list[str]) -> None:
        self.hub = hub
        self.client = client
        self._printed = printed

    async def io(self, *lines: str, on: str = "d") -> None:
        """Commands of qemu-io, each of which must be answered."""
        for line in lines:
            await asyncio.wait_for(self.client.hmp(f'qemu-io {on} "{line}"'), 60)

    def seen(self) -> list[str]:
        """What was printed since the last call, without the lines on times."""
        printed, self._printed[:] = [line for line in self._printed if " ops; " not in line], []
        return printed


def with_person(tmp_path: Path, body: Callable[[Person], Awaitable[None]]) -> None:
    """Run ``body`` on virtual time."""
    image = make_image(tmp_path / "disk", SIZE, {0: b"x" * SIZE})
    printed: list[str] = []

    async def main() -> None:
        async with BlockSystem.create(policy=OpenPolicy.follow()) as system:
            hub = MonitorHub(system, output=printed.append)
            hub.open()
            async with await QmpClient.in_process(hub) as client:
                await client.hmp(f"drive_add 0 if=none,id=d,file=blkdebug::{image},format=qcow2,node-name=top")
                person = Person(hub, client, printed)
                await body(person)
            await hub.close()
            assert not any(node.in_flight for node in system.graph.nodes.values())

    run(main)


def test_a_request_stays_held_between_commands(tmp_path: Path) -> None:
    """An order of requests that chance would not give, in a machine; what the command has taken stays taken, as in QEMU."""

    async def body(person: Person) -> None:
        await person.io("break write_aio A", "aio_write -P 3 0 4k", "wait_break A")
        assert person.seen() == [HELD]
        taken = await person.client.execute("x-debug-query-block-graph")
        await person.io("read -P 0x78 0 4k", "aio_flush")
        assert person.seen() == [
            "read 4096/4096 bytes at offset 0",
            "requests are held at breakpoints (A): resume them first",
        ]
        await person.io("resume A", "aio_flush", "read -P 3 0 4k")
        assert person.seen() == [GOES_ON, "wrote 4096/4096 bytes at offset 0", "read 4096/4096 bytes at offset 0"]
        assert await person.client.execute("x-debug-query-block-graph") == taken

    with_person(tmp_path, body)


@pytest.mark.parametrize("node", ["d", "top"])
def test_a_job_is_held_cancelled_and_let_go(node: str, tmp_path: Path) -> None:
    """How scripts make a job stand still at a known place, whether they name the drive or its node."""

    async def body(person: Person) -> None:
        await person.io("break read_aio A", on=node)
        target = str(tmp_path / "copy")
        await person.client.execute("drive-mirror", job_id="j", device="d", target=target, sync="full", format="qcow2")
        await person.io("wait_break A")
        assert person.seen()[-1] == HELD
        await person.client.execute("block-job-cancel", device="j")
        assert [job["status"] for job in await person.client.execute("query-jobs")] == ["running"]
        await person.io("remove_break A", on=node)
        await person.client.wait_event("BLOCK_JOB_CANCELLED", device="j")
        assert GOES_ON in person.seen()

    with_person(tmp_path, body)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("stop", {}),
        ("block_resize", {"device": "d", "size": 2 * SIZE}),
        ("blockdev-snapshot-sync", {"device": "d", "snapshot-file": "overlay"}),
        ("human-monitor-command", {"command-line": "drive_del d"}),
        ("human-monitor-command", {"command-line": "eject -f d"}),
        ("human-monitor-command", {"command-line": 'qemu-io top "length"'}),
        ("human-monitor-command", {"command-line": 'qemu-io d "reopen -o lazy-refcounts=on"'}),
        ("quit", {}),
    ],
)
def test_whoever_waits_for_held_requests_lets_them_go_on(
    command: str, arguments: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7.2 hangs for ever in each of these, with all its monitors."""
    monkeypatch.chdir(tmp_path)

    async def body(person: Person) -> None:
        await person.io("break read_aio A", "break read_aio A", "aio_read 0 4k")
        assert person.seen() == [HELD, HELD]
        await asyncio.wait_for(person.client.execute(command, arguments), 60)
        assert [line for line in person.seen() if line == GOES_ON] == [GOES_ON] * 2

    with_person(tmp_path, body)


def test_a_command_is_not_held_itself(tmp_path: Path) -> None:
    """Nobody could type `resume` then: it goes on, and says so."""

    async def body(person: Person) -> None:
        await person.io("break write_aio A", "write -P 3 0 4k")
        held, told, *rest = person.seen()
        assert held == HELD and "use aio_ commands" in told
        assert rest == [GOES_ON, "wrote 4096/4096 bytes at offset 0"]

    with_person(tmp_path, body)


def test_a_node_has_no_request_left_when_its_command_is_done(tmp_path: Path) -> None:
    """Its backend is there for the one command; jobs pause at the end of it, as in 7.2."""

    async def body(person: Person) -> None:
        await person.io("break read_aio A", "aio_read 0 4k", on="top")
        assert person.seen() == [HELD, GOES_ON, "read 4096/4096 bytes at offset 0"]

    with_person(tmp_path, body)


def test_waiting_ends_when_nothing_can_come_or_another_monitor_says_so(tmp_path: Path) -> None:
    """7.2 waits for ever, and nobody can tell it to stop."""

    async def body(person: Person) -> None:
        await person.io("wait_break A", "break write_aio A", "wait_break A")
        assert person.seen() == ["no request is under way that could be held as 'A'"] * 2
        target = str(tmp_path / "copy")
        await person.client.execute("drive-mirror", job_id="j", device="d", target=target, sync="none", format="qcow2")
        async with await QmpClient.in_process(person.hub) as other:
            waiting = asyncio.ensure_future(person.io("wait_break A"))
            await asyncio.sleep(1)
            assert not waiting.done()
            await other.hmp('qemu-io d "remove_break A"')
            await waiting
        assert person.seen()[-1] == "no request is under way that could be held as 'A'"

    with_person(tmp_path, body)
