"""Every driver keeps the contract of drivers, and a driver that breaks it is caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest

import qblock
from qblock.driver import Driver, NodeInfo
from qblock.drivers.memory import MemoryDriver
from qblock.drivers.null import NullCoDriver
from qblock.extents import Extent, Zero
from qblock.filtering import FilterDriver
from qblock.node import BlockDriverState
from qblock.opening import Opener
from qblock.options import ChildRef, DriverOptions, child
from qblock.permissions import ChildRole
from qblock.registry import OWN_DRIVERS
from qblock.testing.contract import ContractViolation, Keeps, OpenNode, check_driver
from qblock.throttle_limits import ThrottleLimits
from qblock.units import KiB

SIZE = 512 * KiB
MEMORY = {"driver": "memory", "size": SIZE, "discard": "unmap"}


def described(**options: Any) -> OpenNode:
    """A node that is opened by its options."""

    async def open_node(opener: Opener) -> BlockDriverState:
        return await opener.open_blockdev({"node-name": "disk", "discard": "unmap", **options})

    return open_node


def image(path: Path, **creation: Any) -> OpenNode:
    """A qcow2 image that exists already, with its backing file."""
    qblock.create(path, SIZE, **creation)
    return described(driver="qcow2", file={"driver": "file", "filename": str(path), "discard": "unmap"})


def plain_file(directory: Path) -> dict[str, Any]:
    path = directory / "disk.raw"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return {"driver": "file", "filename": str(path), "discard": "unmap"}


def overlay(directory: Path) -> OpenNode:
    """An overlay that is longer than the cleared end of its backing file."""
    qblock.create(directory / "base.qcow2", SIZE // 2)
    with qblock.open(directory / "base.qcow2", writable=True) as base:
        base.write(1000, b"below" * 20_000)
    return image(directory / "top.qcow2", backing="base.qcow2", backing_fmt="qcow2")


def mirror_with_shared_backing(directory: Path) -> OpenNode:
    """A mirror to an image whose backing file is not open; the guest's sizes do not fit the clusters."""
    qblock.create(directory / "base.qcow2", SIZE)
    qblock.create(directory / "copy.qcow2", SIZE, backing="base.qcow2", backing_fmt="qcow2", cluster_size=4096)
    copy = {"driver": "qcow2", "file": {"driver": "file", "filename": str(directory / "copy.qcow2")}}
    return described(driver="blkmirror", file=MEMORY, target=copy)


def voting(count: int) -> dict[str, Any]:
    """A quorum whose children must all agree."""
    return {"driver": "quorum", "children": [MEMORY] * count, "vote-threshold": count}


def throttled(directory: Path) -> OpenNode:
    """A member of a group that is limited in everything; the contract runs on virtual time."""

    async def open_node(opener: Opener) -> BlockDriverState:
        group = opener.env.throttle_groups.create("limits")
        group.set_limits(ThrottleLimits(iops_total=500, iops_size=4096, bps_read=10**8, bps_write=10**7))
        return await described(**{"driver": "throttle", "throttle-group": "limits", "file": MEMORY})(opener)

    return open_node


class PackedMemory(MemoryDriver):
    """Stores compressed clusters, as often as it is asked to; qcow2 refuses those that are stored already."""

    name: ClassVar[str] = "packed"
    supports_compressed: ClassVar[bool] = True

    def info(self) -> NodeInfo:
        return NodeInfo(cluster_size=4096)

    async def write_compressed(self, offset: int, buffer: memoryview) -> None:
        assert offset % 4096 == 0
        await super().write_from(offset, buffer)

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        raise AssertionError("not compressed")


PACKED = {**MEMORY, "driver": "packed"}
SUBJECTS: dict[str, tuple[Callable[[Path], OpenNode], Keeps]] = {
    "file": (lambda tmp: described(**plain_file(tmp)), Keeps.FOREVER),
    "raw": (lambda tmp: described(driver="raw", file=plain_file(tmp)), Keeps.FOREVER),
    "raw window": (lambda tmp: described(driver="raw", offset=1536, size=64 * KiB, file=MEMORY), Keeps.UNTIL_CLOSED),
    "null-co": (lambda tmp: described(driver="null-co", size=SIZE), Keeps.NOTHING),
    "null-aio": (lambda tmp: described(**{"driver": "null-aio", "size": SIZE, "latency-ns": 1000}), Keeps.NOTHING),
    "memory": (lambda tmp: described(**MEMORY), Keeps.UNTIL_CLOSED),
    "blkdebug": (lambda tmp: described(driver="blkdebug", image=MEMORY), Keeps.UNTIL_CLOSED),
    "blkdebug align": (lambda tmp: described(driver="blkdebug", align=4096, image=MEMORY), Keeps.UNTIL_CLOSED),
    "copy-on-read": (lambda tmp: described(driver="copy-on-read", file=MEMORY), Keeps.UNTIL_CLOSED),
    "blkmirror": (lambda tmp: described(driver="blkmirror", file=MEMORY, target=MEMORY), Keeps.UNTIL_CLOSED),
    "blkmirror shared backing": (mirror_with_shared_backing, Keeps.UNTIL_CLOSED),
    "compress": (lambda tmp: described(driver="compress", file=PACKED), Keeps.UNTIL_CLOSED),
    "preallocate": (lambda tmp: described(driver="preallocate", file=MEMORY), Keeps.UNTIL_CLOSED),
    "quorum": (lambda tmp: described(**voting(3)), Keeps.UNTIL_CLOSED),
    "quorum fifo": (lambda tmp: described(**voting(2), **{"read-pattern": "fifo"}), Keeps.UNTIL_CLOSED),
    "blkverify": (lambda tmp: described(driver="blkverify", raw=MEMORY, test=MEMORY), Keeps.UNTIL_CLOSED),
    "blklogwrites": (lambda tmp: described(driver="blklogwrites", file=MEMORY, log={"driver": "memory"}), Keeps.UNTIL_CLOSED),
    "throttle": (throttled, Keeps.UNTIL_CLOSED),
    "copy-before-write": (lambda tmp: described(driver="copy-before-write", file=MEMORY, target=MEMORY), Keeps.UNTIL_CLOSED),
    "qcow2": (lambda tmp: image(tmp / "disk.qcow2"), Keeps.FOREVER),
    "qcow2 small clusters": (lambda tmp: image(tmp / "disk.qcow2", cluster_size=512), Keeps.FOREVER),
    "qcow2 version 2": (lambda tmp: image(tmp / "disk.qcow2", version="v2"), Keeps.FOREVER),
    "qcow2 over qcow2": (overlay, Keeps.FOREVER),
}  # fmt: skip


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("seed", [1, 2])
def test_our_drivers_keep_the_contract(name: str, seed: int, tmp_path: Path) -> None:
    """Whatever a driver is made of, a user sees a disk."""
    make, keeps = SUBJECTS[name]
    check_driver(make(tmp_path), drivers=[PackedMemory], keeps=keeps, seed=seed)


def test_no_driver_of_ours_is_left_out() -> None:
    """A new driver has to be added to the table above, unless nothing can be written to it."""
    assert {name.partition(" ")[0] for name in SUBJECTS} == set(OWN_DRIVERS) - {"snapshot-access"}


# ------------------------------------------------------------------------------------------------- drivers that break it


class Faulty(MemoryDriver):
    """A memory disk; each driver below has one fault."""

    name: ClassVar[str] = "faulty"


class ForgetsTheEnd(Faulty):
    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        await super().write_from(offset, buffer[: len(buffer) - len(buffer) % 4096 or None], fua=fua)


class KeepsBuffers(Faulty):
    async def open(self) -> None:
        await super().open()
        self._late: list[tuple[int, memoryview]] = []

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        self._late.append((offset, buffer))

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        for at, late in self._late:
            await super().write_from(at, late)
        self._late.clear()
        await super().read_into(offset, buffer)


class Scribbles(Faulty):
    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        await super().write_from(offset, buffer, fua=fua)
        buffer[:1] = b"!"


class ZeroesTooMuch(Faulty):
    async def write_zeroes(self, offset: int, length: int, **how: bool) -> None:
        await super().write_zeroes(offset, min(length + 1, self.length() - offset))


class DiscardsTooMuch(Faulty):
    async def discard(self, offset: int, length: int) -> None:
        await super().discard(max(0, offset - 1), length)


class CallsDataZero(Faulty):
    async def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        return Zero(length, offset)


class NeverAnswersFully(Faulty):
    async def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        return Zero(0)


class KeepsTheCutPart(Faulty):
    async def truncate(self, length: int, *, exact: bool = True, preallocation: str = "off") -> None:
        self._length = length


class CannotBeResized(Faulty):
    async def truncate(self, length: int, *, exact: bool = True, preallocation: str = "off") -> None:
        raise qblock.BlockIOError(22)


class ForgetsToDeclare(NullCoDriver):
    name: ClassVar[str] = "faulty"

    async def discard(self, offset: int, length: int) -> None:
        raise AssertionError


class PromisesACopy(Faulty):
    supports_copy_range: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("driver", "complaint"),
    [
        (ForgetsTheEnd, "should be"),
        (KeepsBuffers, "should be"),
        (Scribbles, "changed the buffer"),
        (ZeroesTooMuch, "should be"),
        (DiscardsTooMuch, "should be"),
        (CallsDataZero, "there are data"),
        (NeverAnswersFully, "empty block status"),
        (KeepsTheCutPart, "should be"),
        (CannotBeResized, "not ENOTSUP"),
        (ForgetsToDeclare, "never called"),
        (PromisesACopy, "has no copy_range"),
    ],
)
def test_a_driver_with_a_fault_is_caught(driver: type[Driver], complaint: str) -> None:
    """A contract that everything passes is worth nothing. The report says what happened before."""
    with pytest.raises(ContractViolation, match=complaint) as caught:
        check_driver(described(driver="faulty", size=SIZE), drivers=[driver])
    assert str(caught.value).startswith("driver 'faulty': ")


@attrs.frozen
class ShortOptions(DriverOptions):
    """One child."""

    file: ChildRef = child(ChildRole.FILTERED, doc="the child")


class ShortFilter(FilterDriver):
    """Hides the last sector of its child."""

    name: ClassVar[str] = "short"
    options_class: ClassVar[type[DriverOptions]] = ShortOptions

    def length(self) -> int:
        return super().length() - 512


def test_a_filter_of_another_length_is_caught() -> None:
    """Block status and jobs look through filters and count on equal offsets and ends."""
    with pytest.raises(ContractViolation, match="as long as its child"):
        check_driver(described(driver="short", file=MEMORY), drivers=[ShortFilter])


def test_an_image_that_loses_data_when_closed_is_caught(tmp_path: Path) -> None:
    """A disk in memory that claims to keep everything."""
    with pytest.raises(ContractViolation, match="close and open again"):
        check_driver(described(**MEMORY), keeps=Keeps.FOREVER)


def test_trouble_in_closing_is_caught() -> None:
    """A write-back cache that cannot be written back must not go unnoticed."""

    class Stuck(Faulty):
        async def close(self) -> None:
            raise qblock.BlockIOError(5)

    with pytest.raises(ContractViolation, match="could not be closed cleanly"):
        check_driver(described(driver="faulty", size=SIZE), drivers=[Stuck], steps=1)


def test_a_disk_that_is_too_small_to_be_tried_is_refused() -> None:
    """Nothing would be proved."""
    with pytest.raises(ContractViolation, match="at least"):
        check_driver(described(driver="memory", size=4096))


def test_the_same_seed_makes_the_same_requests() -> None:
    """A violation can be repeated."""
    seen: list[list[tuple[str, int]]] = []

    class Watched(Faulty):
        async def read_into(self, offset: int, buffer: memoryview) -> None:
            seen[-1].append(("read", offset))
            await super().read_into(offset, buffer)

    for _ in range(2):
        seen.append([])
        check_driver(described(driver="faulty", size=SIZE), drivers=[Watched], steps=40, seed=9)
    assert seen[0] == seen[1] and len(seen[0]) > 10
