"""`check_driver`: the contract that every driver keeps, ours and those of others.

A node of the driver is worked on at random through the border, beside a ``bytearray`` that says what it should hold: reads,
writes, zeroes, discards, flushes, block status, resizing, several requests at once. What is checked:

- A read gives what was written last, whatever the alignment, and a range that was zeroed reads as zeroes.
- What was discarded reads as before or as zeroes; its neighbours are untouched.
- Block status covers the disk in runs of at least one byte, and what it calls zero is zero.
- A resize cuts or adds zeroes, or is refused with ``ENOTSUP`` and changes nothing.
- The caller's buffers are the caller's again when a request returns.
- What the class says of itself is so: its name, its options, which requests it knows, its children.
- After closing and opening again everything is there, if the driver says that it `Keeps` it.

QEMU has no such test; its drivers are tried one by one with qemu-io scripts. All sizes are bytes. ::

    def test_the_contract() -> None:
        check_driver(lambda opener: opener.open_blockdev({"driver": "mine", "node-name": "disk"}), drivers=[MyDriver])
"""

from __future__ import annotations

import asyncio
import enum
import errno
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from itertools import pairwise
from random import Random
from typing import Final

from qblock import requests
from qblock.backend import BlockBackend
from qblock.driver import Driver
from qblock.errors import BlockIOError
from qblock.extents import Unallocated, Zero
from qblock.node import BlockDriverState
from qblock.opening import Opener
from qblock.options import DriverOptions
from qblock.policy import OpenPolicy
from qblock.registry import DriverRegistry
from qblock.testing.nodes import NodeBench
from qblock.testing.simloop import run
from qblock.units import KiB, align_down

OpenNode = Callable[[Opener], Awaitable[BlockDriverState]]
"""Opens a writable node of the driver to be tried, `SMALLEST` bytes or longer (a MiB is plenty).

With ``"discard": "unmap"`` on the node its `discard` is tried too; without, the border does not pass discards on.
"""

SMALLEST: Final = 32 * KiB
_LONGEST_REQUEST: Final = 80 * KiB
_SHOWN_STEPS: Final = 8
_OPENERS_COMPLAINT: Final = re.compile("Node '.*' could not be (flushed|closed)")
"""How the opener tells that closing a node went wrong; a driver may have other things to warn of."""


class Keeps(enum.Enum):
    """For how long a driver holds what is written to it."""

    NOTHING = "nothing"
    UNTIL_CLOSED = "until closed"
    FOREVER = "forever"


class ContractViolation(AssertionError):
    """The driver has not kept the contract; the text says what it did, and after which steps."""


def check_driver(
    open_node: OpenNode,
    *,
    drivers: Iterable[type[Driver]] = (),
    keeps: Keeps = Keeps.UNTIL_CLOSED,
    steps: int = 200,
    seed: int = 0,
    real_time: bool = False,
) -> None:
    """Try a driver; raises `ContractViolation`. Takes a fraction of a second and no virtual time of its own.

    ``drivers`` are made known beside qblock's own. With `Keeps.FOREVER` ``open_node`` is called a second time, when the
    first node is closed, and must find the same image. ``steps`` requests are drawn from ``seed``.
    ``real_time``: on an ordinary loop, for what virtual time cannot wait for.
    """

    def check() -> Coroutine[None, None, None]:
        return _check(open_node, tuple(drivers), keeps, steps=steps, seed=seed)

    asyncio.run(check()) if real_time else run(check)


async def _check(
    open_node: OpenNode, drivers: tuple[type[Driver], ...], keeps: Keeps, *, steps: int, seed: int
) -> None:
    bench = NodeBench()
    opener = Opener(bench.graph, DriverRegistry(), bench.env, OpenPolicy.follow())
    for driver in drivers:
        opener.registry.register(driver)
    trial = _Trial(bench, await open_node(opener), Random(seed), keeps)
    await trial.perform(steps)
    await opener.close_orphans()
    if keeps is Keeps.FOREVER:
        again = _Trial(bench, await open_node(opener), Random(seed), keeps)
        again.history += [*trial.history, "close and open again"]
        await again.compare(trial.model)
        await opener.close_orphans()
    complaints = [text for text in bench.warnings if _OPENERS_COMPLAINT.match(text)]
    if complaints:
        raise ContractViolation("; ".join(complaints))


class _Trial:
    """One node under trial. ``model`` is what it should hold, ``history`` what was done."""

    def __init__(self, bench: NodeBench, node: BlockDriverState, random: Random, keeps: Keeps) -> None:
        self.node = node
        self.random = random
        self.keeps = keeps
        self.model = bytearray()
        self.history: list[str] = []
        self.backend: BlockBackend = bench.backend(node)

    async def perform(self, steps: int) -> None:
        self._check_class()
        self._require(self.backend.length >= SMALLEST, f"give it at least {SMALLEST} bytes, not {self.backend.length}")
        self.model = bytearray(await self.backend.read(0, self.backend.length))
        actions = (
            (self._write, 30), (self._read, 25), (self._zero, 12), (self._discard, 10), (self._flush, 6),
            (self._several_at_once, 6), (self._resize, 6), (self._look, 5),
        )  # fmt: skip
        kinds, weights = zip(*actions, strict=True)
        try:
            for _ in range(steps):
                await self.random.choices(kinds, weights)[0]()
                self._check_length()
            await self._look()
            await self._flush()
        except ContractViolation:
            raise
        except Exception as error:
            raise self._violation(f"{type(error).__name__}: {error}") from error
        await self.compare(self.model)

    async def compare(self, expected: bytearray) -> None:
        """Read everything, and close."""
        self._require(self.backend.length == len(expected), f"its length is {self.backend.length}, not {len(expected)}")
        self.model = expected
        await self._expect(0, len(expected))
        self.backend.close()

    # ---------------------------------------------------------------------------------------------- what a class says

    def _check_class(self) -> None:
        driver, kind = self.node.driver, type(self.node.driver)
        self._require(bool(kind.name), "it has no name")
        options = kind.options_class
        self._require(issubclass(options, DriverOptions), f"{options.__name__} is no DriverOptions")
        self._require(isinstance(driver.options, options), f"its options are no {options.__name__}")
        for feature in ("write_zeroes", "discard", "copy_range"):
            flag = f"supports_{feature}"
            written = _origin(kind, feature) is not Driver
            undecided = _origin(kind, flag) is Driver
            self._require(written or not getattr(kind, flag), f"it declares {flag}, and has no {feature}()")
            self._require(not (written and undecided), f"its {feature}() is never called: declare {flag}")
        if kind.is_filter:
            child = self.node.filtered
            self._require(child is not None, "it is a filter, and has no child of the filtered role")
        if kind.is_protocol:
            self._require(self.node.storage is None, "it is a protocol driver, and has a storage child")

    # ------------------------------------------------------------------------------------------------------- requests

    async def _read(self) -> None:
        offset, length = self._range()
        self._note(f"read {length} at {offset}")
        await self._expect(offset, length)

    async def _write(self) -> None:
        offset, length = self._range()
        fua = self.random.random() < 0.2
        self._note(f"write {length} at {offset}{', fua' if fua else ''}")
        await self._write_pattern(offset, length, fua=fua)

    async def _write_pattern(self, offset: int, length: int, *, fua: bool = False) -> None:
        data = bytearray(self.random.randbytes(length))
        expected = bytes(data)
        await self.backend.write_from(offset, memoryview(data), fua=fua)
        self._require(data == expected, "it changed the buffer that it should write")
        data[:] = bytes(length)  # the buffer is ours again: what was written must not follow it
        self.model[offset : offset + length] = expected

    async def _zero(self) -> None:
        offset, length = self._range()
        may_unmap = self.random.random() < 0.5
        self._note(f"zero {length} at {offset}{', may unmap' if may_unmap else ''}")
        await self.backend.write_zeroes(offset, length, may_unmap=may_unmap)
        self.model[offset : offset + length] = bytes(length)

    async def _discard(self) -> None:
        offset, length = self._range()
        self._note(f"discard {length} at {offset}")
        await self.backend.discard(offset, length)
        if self.keeps is Keeps.NOTHING:
            return
        for index, byte in enumerate(await self.backend.read(offset, length), offset):
            self._require(byte in (0, self.model[index]), f"the discarded byte at {index} reads {byte:#04x}, which is new")
            self.model[index] = byte

    async def _flush(self) -> None:
        self._note("flush")
        await self.backend.flush()

    async def _several_at_once(self) -> None:
        """Requests that do not overlap, but share sectors and clusters at their borders."""
        cuts = sorted(self.random.sample(range(min(len(self.model), 2 * _LONGEST_REQUEST)), 7))
        self._note(f"at once, between {cuts}: write and read in turn")
        try:
            async with asyncio.TaskGroup() as group:
                for index, (start, end) in enumerate(pairwise(cuts)):
                    work = self._write_pattern(start, end - start) if index % 2 else self._expect(start, end - start)
                    group.create_task(work)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        await self._expect(cuts[0], cuts[-1] - cuts[0])

    async def _resize(self) -> None:
        """Once, or twice in a row: what a cut has taken away must not come back."""
        for _ in range(self.random.choice((1, 2))):
            before = len(self.model)
            unit = max(512, self.node.driver.limits.request_alignment)
            length = max(SMALLEST, align_down(self.random.randrange(before // 2, before + before // 2), unit))
            if not await self._resized(length):
                return

    async def _resized(self, length: int) -> bool:
        self._note(f"resize to {length}")
        try:
            await self.backend.truncate(length)
        except BlockIOError as error:
            self._require(error.errno == errno.ENOTSUP, f"it refuses to be resized with {error!r}, not ENOTSUP")
            return False
        self._require(self.backend.length == length, f"it was resized to {length}, and is {self.backend.length} long")
        del self.model[length:]
        self.model.extend(bytes(length - len(self.model)))
        return True

    async def _look(self) -> None:
        """Block status from a random place to the end."""
        offset = self.random.choice((0, self.random.randrange(len(self.model))))
        self._note(f"look at everything from {offset}")
        while offset < len(self.model):
            rest = len(self.model) - offset
            extent = await requests.block_status(self.node, offset, rest)
            self._require(0 < extent.length <= rest, f"asked about {rest} bytes at {offset}, it answers {extent!r}")
            is_zero = isinstance(extent, Zero) or (isinstance(extent, Unallocated) and self.node.backing is None)
            if is_zero and self.keeps is not Keeps.NOTHING:
                zero = not any(self.model[offset : offset + extent.length])
                self._require(zero, f"it says {extent!r} at {offset}, and there are data")
            offset += extent.length

    # --------------------------------------------------------------------------------------------------------- checks

    async def _expect(self, offset: int, length: int) -> None:
        """Read and compare; a driver that keeps nothing need only answer."""
        got = await self.backend.read(offset, length)
        expected = bytes(self.model[offset : offset + length])
        if self.keeps is Keeps.NOTHING or got == expected:
            return
        at = next(index for index in range(length) if got[index] != expected[index])
        raise self._violation(f"the byte at {offset + at} reads {got[at]:#04x} and should be {expected[at]:#04x}")

    def _check_length(self) -> None:
        length = self.node.driver.length()
        self._require(
            len(self.model) - 512 < length <= len(self.model), f"it says that it is {length} long, not {len(self.model)}"
        )
        child = self.node.filtered
        if child is not None:
            below = child.node.driver.length()
            hidden = getattr(self.node.driver, "hides_surplus", False) and length < below
            self._require(length == below or hidden, "the filter is not as long as its child")

    def _require(self, kept: bool, otherwise: str) -> None:
        if not kept:
            raise self._violation(otherwise)

    def _violation(self, what: str) -> ContractViolation:
        last = "\n".join(f"  {step}" for step in self.history[-_SHOWN_STEPS:])
        after = f"\nafter {len(self.history)} steps, the last of them:\n{last}" if self.history else ""
        return ContractViolation(f"driver '{type(self.node.driver).name}': {what}{after}")

    # ------------------------------------------------------------------------------------------------------- drawing

    def _note(self, step: str) -> None:
        self.history.append(step)

    def _range(self) -> tuple[int, int]:
        """Offset and length of a request: any bytes, whole sectors, or whole 4 KiB blocks; now and then up to the end."""
        unit = self.random.choice((1, 512, 4 * KiB))
        limit = len(self.model)
        offset = align_down(self.random.randrange(limit), unit)
        length = max(1, align_down(self.random.randrange(1, _LONGEST_REQUEST), unit))
        if self.random.random() < 0.1:
            offset = max(0, limit - length)
        return offset, min(length, limit - offset)


def _origin(kind: type[Driver], attribute: str) -> type:
    """The class from which ``kind`` has an attribute."""
    return next(base for base in kind.__mro__ if attribute in vars(base))

