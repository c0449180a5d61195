"""Images that keep their data in another file, without the real programs: opening, reopening, order of effects, refusals."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from qblock.drivers.qcow2.driver import Qcow2Driver
from qblock.errors import BlockIOError, InvalidParameter, OpenDenied
from qblock.opening import OpenPolicy
from qblock.permissions import Perm
from qblock.testing.formats import FormatBench
from qblock.testing.simloop import run
from qblock.tools.images import ImageArguments, ImageSession, run_session
from qblock.units import KiB, MiB

BASE = {"size": MiB, "data_file": "data"}


def test_an_image_without_its_data_file_says_what_it_is_but_has_no_content() -> None:
    """For info, which must work when the data file is gone."""

    async def main() -> None:
        bench = FormatBench(Qcow2Driver)
        await bench.create(**BASE, preallocation="metadata")
        bench.data_content = None
        disk = await bench.open(flags={"read_only": True})
        info = bench.node.driver.specific_info()
        assert info is not None and info["data"]["data-file-raw"] is False
        with pytest.raises(BlockIOError) as caught:
            await disk.read(0, 512)
        assert caught.value.errno == errno.ENOMEDIUM

    run(main)


def test_a_data_file_for_an_image_that_has_none_is_refused() -> None:
    """It would be ignored otherwise."""

    async def main() -> None:
        bench = FormatBench(Qcow2Driver)
        await bench.create(size=MiB)
        with pytest.raises(InvalidParameter, match="data-file"):
            await bench.open(data=bytes(MiB))

    run(main)


def test_what_a_data_file_holds_at_creation_stays() -> None:
    """A raw image gets metadata beside it, and is the disk."""

    async def main() -> None:
        bench = FormatBench(Qcow2Driver)
        await bench.create(**BASE, data_file_raw=True)
        content = bytes(range(256)) * (MiB // 256)
        disk = await bench.open(data=content)
        assert await disk.read(0, MiB) == content
        await disk.discard(0, 64 * KiB)
        await disk.write_zeroes(100 * KiB, 3 * KiB)
        await disk.write(200 * KiB, b"x" * KiB)
        assert bench.data is not None and bytes(bench.data.live) == await disk.read(0, MiB)
        await bench.close()
        result = await bench.check()
        assert (result.corruptions, result.leaks, result.allocated_clusters) == (0, 0, 15)

    run(main)


def test_data_are_durable_before_entries_that_refer_to_them() -> None:
    """Of two storages the data file is flushed first, between the data and the L2 table."""

    async def main() -> None:
        bench = FormatBench(Qcow2Driver)
        await bench.create(**BASE)
        disk = await bench.open()
        await disk.write(0, b"x" * (64 * KiB))
        await disk.flush()
        data, image = bench.data, bench.storage
        assert data is not None and [effect.kind for effect in data.effects][:2] == ["write", "flush"]
        table = next(at for at, effect in enumerate(image.effects) if effect.kind == "write" and b"\x80" in effect.data[:1])
        owners = image.journal
        flushed = next(at for at, owner in enumerate(owners) if owner is data and at and owners[:at].count(data) == 1)
        assert owners[:flushed].count(image) <= table

    run(main)


@pytest.mark.parametrize("raw", [False, True])
def test_the_disk_and_its_data_file_change_their_size_together(raw: bool) -> None:
    """Growing adds zeroes, even where the data file was longer; shrinking cuts it."""

    async def main() -> None:
        bench = FormatBench(Qcow2Driver)
        await bench.create(**BASE, data_file_raw=raw)
        disk = await bench.open(data=b"d" * (2 * MiB))
        await disk.truncate(3 * MiB // 2)
        assert await disk.read(MiB, MiB // 2) == bytes(MiB // 2)
        assert bench.data is not None and bench.data.length() == 3 * MiB // 2
        await disk.truncate(512 * KiB)
        assert bench.data.length() == 512 * KiB
        assert await disk.read(0, 512 * KiB) == (b"d" if raw else b"\0") * (512 * KiB)

    run(main)


def make(tmp_path: Path) -> Path:
    """An image file with a data file, and something in it."""
    image = tmp_path / "image"

    async def body(session: ImageSession) -> None:
        await session.opener.create_image("file", {"filename": str(image), "size": 0})
        await session.opener.create_image("file", {"filename": str(tmp_path / "data"), "size": 0})
        options = {"file": {"driver": "file", "filename": str(image)}, "size": MiB}
        data = {"driver": "file", "filename": str(tmp_path / "data")}
        await session.opener.create_image("qcow2", options | {"data-file": data})
        backend = await session.open(ImageArguments(str(image), writable=True))
        await backend.write(0, b"one")
        await session.close(backend)

    run_session(body)
    return image


def test_a_reopened_image_takes_its_data_file_along(tmp_path: Path) -> None:
    """From read-only to read-write and back."""

    async def body(session: ImageSession) -> None:
        backend = await session.open(ImageArguments(str(make_once)))
        node = backend.node
        data = node.children["data-file"].node
        assert node.read_only and data.read_only
        await session.opener.reopen(node, read_only=False)
        assert not node.read_only and not data.read_only
        backend.set_permissions(Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
        await backend.write(0, b"two")
        backend.set_permissions(Perm.CONSISTENT_READ, Perm.ALL)
        await session.opener.reopen(node, read_only=True)
        assert node.read_only and data.read_only
        assert await backend.read(0, 3) == b"two"

    make_once = make(tmp_path)
    run_session(body)
    assert (tmp_path / "data").read_bytes()[:3] == b"two"


def test_nothing_is_opened_that_the_policy_does_not_allow(tmp_path: Path) -> None:
    """The library asks before it follows a header."""
    image = make(tmp_path)

    async def body(session: ImageSession) -> None:
        session.opener.policy = OpenPolicy.deny()
        with pytest.raises(OpenDenied, match="data file"):
            await session.opener.open_image(str(image))
        given = {"data-file": {"driver": "file", "filename": str(tmp_path / "data")}}
        node = await session.opener.open_image(str(image), options=given)
        await session.opener.close_orphans()
        assert node.closed

    run_session(body)
