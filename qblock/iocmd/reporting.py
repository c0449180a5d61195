"""What the commands print about their requests: statistics, failures, dumps."""

from __future__ import annotations

import errno
import os
from collections.abc import Coroutine, Mapping
from typing import Any, Final

from qblock.accounting import Operation
from qblock.errors import BlockIOError
from qblock.iocmd.shell import CommandFailed, IoShell
from qblock.iocmd.words import clock_text, format_bytes
from qblock.units import SECOND_NS

_COMPARE_STEP: Final = 1 << 20


def report(
    shell: IoShell, verb: str, options: Mapping[str, str], *, offset: int, length: int, started_ns: int
) -> None:
    """The two lines after a request, one machine-readable line with -C, none with -q."""
    if "q" in options:
        return
    elapsed = shell.clock.now_ns() - started_ns
    seconds = max(elapsed, 1) / SECOND_NS
    if "C" in options:
        shell.out(f"{length},1,{clock_text(elapsed, fixed=True)},{length / seconds:.3f},{1 / seconds:.3f}")
        return
    shell.out(f"{verb} {length}/{length} bytes at offset {offset}")
    rate = f"{format_bytes(length / seconds)}/sec and {1 / seconds:.4f} ops/sec"
    shell.out(f"{format_bytes(length)}, 1 ops; {clock_text(elapsed, fixed=False)} ({rate})")


def failed(shell: IoShell, verb: str, error: BlockIOError) -> CommandFailed:
    """The line that scripts look for has the errno's text only; what qblock knows beyond it goes to the error stream."""
    reason = os.strerror(error.errno or errno.EIO)
    if str(error) != reason:
        shell.err(f"{shell.program}: {error}")
    return CommandFailed(f"{verb} failed: {reason}")


def dump(shell: IoShell, offset: int, data: memoryview) -> None:
    """Print bytes in rows of 16, in hexadecimal and as text."""
    for at in range(0, len(data), 16):
        row = bytes(data[at : at + 16])
        text = "".join(chr(byte) if byte < 0x80 and chr(byte).isalnum() else "." for byte in row)
        shell.out(f"{offset + at:08x}:  {' '.join(f'{byte:02x}' for byte in row)}  {text}")


def all_bytes(data: memoryview, value: int) -> bool:
    """Whether every byte is ``value``."""
    expected = bytes([value]) * min(len(data), _COMPARE_STEP)
    return all(
        data[at : at + _COMPARE_STEP] == expected[: min(_COMPARE_STEP, len(data) - at)]
        for at in range(0, len(data), _COMPARE_STEP)
    )


def refuse_request(shell: IoShell, operation: Operation) -> None:
    """What -i does: nothing is requested, and the statistics of the image have one more invalid ``operation``."""
    shell.out(f"injecting invalid {operation} request")
    if (accounting := shell.image.accounting) is not None:
        accounting.refused(operation)


async def counted(shell: IoShell, operation: Operation, length: int, request: Coroutine[Any, Any, None]) -> None:
    """Run a request that, as those of aio commands, is in the statistics of the image as a guest's is."""
    accounting = shell.image.accounting
    if accounting is None:
        await request
        return
    started = accounting.start()
    try:
        await request
    except CommandFailed:
        accounting.failed(operation, started)
        raise
    accounting.done(operation, length, started)
