"""The commands that ask: ``length``, ``alloc``, ``map``, ``info``, ``sleep``."""

from __future__ import annotations

from qblock.extents import Unallocated
from qblock.imageinfo import in_order, specific_lines
from qblock.iocmd.shell import CommandFailed, IoShell
from qblock.iocmd.words import format_bytes, number
from qblock.status import block_status
from qblock.units import MILLISECOND_NS


async def length(shell: IoShell, name: str, args: list[str]) -> None:
    """``length``: of the disk."""
    shell.out(format_bytes(shell.image.length))


async def _allocation(shell: IoShell, offset: int, end: int) -> tuple[bool, int]:
    """Whether the top node itself holds ``offset``, and for how many bytes (up to ``end``) the answer is the same."""
    node = shell.image.node
    at, allocated = offset, None
    while at < end:
        extent = await block_status(node, at, end - at, want_zero=False)
        here = not isinstance(extent, Unallocated)
        if allocated is None:
            allocated = here
        if here is not allocated:
            break
        at += extent.length
    return bool(allocated), at - offset


async def alloc(shell: IoShell, name: str, args: list[str]) -> None:
    """``alloc``: how many bytes of a range the image itself holds."""
    offset = number(args[0])
    count = number(args[1]) if len(args) > 1 else 512
    end = max(offset, min(offset + count, shell.image.length))
    total, at = 0, offset
    while at < end:
        allocated, length = await _allocation(shell, at, end)
        total += length if allocated else 0
        at += length
    shell.out(f"{total}/{end - offset} bytes allocated at offset {format_bytes(offset)}")


async def show_map(shell: IoShell, name: str, args: list[str]) -> None:
    """``map``: which areas the image itself holds."""
    at, end = 0, shell.image.length
    while at < end:
        allocated, length = await _allocation(shell, at, end)
        state = "    allocated" if allocated else "not allocated"
        shell.out(f"{format_bytes(length)} ({length:#x}) bytes {state} at offset {format_bytes(at)} ({at:#x})")
        at += length


async def info(shell: IoShell, name: str, args: list[str]) -> None:
    """``info``: what the driver tells of the image."""
    node = shell.image.node
    shell.out(f"format name: {node.driver.name}")
    info = node.driver.info()
    shell.out(f"cluster size: {format_bytes(info.cluster_size)}")
    shell.out(f"vm state offset: {format_bytes(info.vm_state_offset)}")
    specific = node.driver.specific_info()
    if specific is not None:
        shell.out("Format specific information:")
        for line in specific_lines(in_order(specific["data"])):
            shell.out(f"    {line}")


async def sleep(shell: IoShell, name: str, args: list[str]) -> None:
    """``sleep``: for some milliseconds."""
    if not args[0].isdigit():
        raise CommandFailed(f"{args[0]} is not a valid number")
    await shell.clock.sleep_ns(int(args[0]) * MILLISECOND_NS)
