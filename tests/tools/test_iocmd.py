"""The qemu-io command language on a disk in memory, on virtual time. (tests/compat holds it against the real one.)"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from qblock.backend import BlockBackend
from qblock.iocmd.commands import COMMANDS
from qblock.iocmd.shell import IoShell
from qblock.iocmd.words import format_bytes
from qblock.permissions import Perm
from qblock.system import BlockSystem
from qblock.testing.simloop import run


def on_a_disk(body: Callable[[BlockSystem, BlockBackend], Awaitable[None]], **options: object) -> None:
    """Run ``body`` with a 1 MiB disk in memory and no permission but to read."""

    async def main() -> None:
        async with BlockSystem.create() as system:
            node = await system.opener.open_blockdev(
                {"driver": "memory", "node-name": "disk", "size": 1 << 20, **options}
            )
            backend = BlockBackend(system.graph, perm=Perm.CONSISTENT_READ, shared=Perm.ALL)
            backend.insert(node)
            await body(system, backend)
            backend.close()

    run(main)


async def execute(system: BlockSystem, backend: BlockBackend, line: str, out: Callable[[str], None]) -> int:
    """Run one line in a shell of its own."""

    def start(request: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return system.later(request, "a request")

    shell = IoShell(backend, system.clock, out, out, start, COMMANDS, opener=system.opener)
    result = await shell.execute(line)
    await shell.finish()
    return result


def test_a_command_takes_the_permissions_it_needs() -> None:
    """Reading needs none but to read; the first write takes the right to write."""

    async def body(system: BlockSystem, backend: BlockBackend) -> None:
        lines: list[str] = []
        assert await execute(system, backend, "read 0 512", lines.append) == 0
        assert backend.perm == Perm.CONSISTENT_READ
        assert await execute(system, backend, "write -P 3 0 512", lines.append) == 0
        assert backend.perm & Perm.WRITE
        assert await backend.read(0, 3) == b"\3\3\3"

    on_a_disk(body)


def test_a_read_only_disk_refuses_writes_with_a_reason() -> None:
    """Status 1 and a sentence, no exception."""

    async def body(system: BlockSystem, backend: BlockBackend) -> None:
        lines: list[str] = []
        assert await execute(system, backend, "write 0 512", lines.append) == 1
        assert "read-only" in lines[0]

    on_a_disk(body, **{"read-only": True})


def test_aio_requests_report_when_they_are_done() -> None:
    """After the command that started them."""

    async def body(system: BlockSystem, backend: BlockBackend) -> None:
        lines: list[str] = []
        assert await execute(system, backend, "aio_write -P 9 4k 4k", lines.append) == 0
        assert lines[0] == "wrote 4096/4096 bytes at offset 4096"
        assert await backend.read(4096, 2) == b"\t\t"

    on_a_disk(body)


def test_sleep_passes_virtual_time() -> None:
    """An hour of sleeping takes no time."""

    async def body(system: BlockSystem, backend: BlockBackend) -> None:
        assert await execute(system, backend, "sleep 3600000", print) == 0

    on_a_disk(body)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name: str) -> None:
    """By its name and by its aliases."""

    async def body(system: BlockSystem, backend: BlockBackend) -> None:
        lines: list[str] = []
        assert await execute(system, backend, f"help {name}", lines.append) == 0
        assert lines[0].startswith(name)
        assert " -- " in lines[0]

    on_a_disk(body)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"), (100, "100 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (1536, "1.500 KiB"),
        (8257536, "7.875 MiB"), (3 << 40, "3 TiB"), (2.5617, "2.561700 bytes"),
    ],
)  # fmt: skip
def test_sizes_are_shown_as_qemu_io_shows_them(size: float, text: str) -> None:
    """Three decimals, none when they are zero."""
    assert format_bytes(size) == text
