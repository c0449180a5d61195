"""`FormatBench`: image formats on `CrashStorage`: create, open, reopen, and the content of the file at any moment.

Part of the public kit, for drivers of formats. ::

    bench = FormatBench(Qcow2Driver)
    await bench.create(size=MiB)
    disk = await bench.open()
    await disk.write(0, b"hello")
    await bench.close()
    image = bytes(bench.storage.live)
"""

from __future__ import annotations

from typing import Any

from qblock import requests
from qblock.backend import BlockBackend
from qblock.driver import CheckFix, CheckResult, Driver, SupportsCheck
from qblock.environment import Environment
from qblock.errors import QBlockError
from qblock.node import BlockDriverState
from qblock.permissions import ChildRole, Perm
from qblock.testing.crash import CrashStorage, CrashStorageOptions
from qblock.testing.nodes import NodeBench


class _Target:
    """A `CreateTarget` on a storage driver."""

    def __init__(self, storage: CrashStorage) -> None:
        self._storage = storage
        self.length = storage.length
        self.filename = storage.filename
        self.read_into = storage.read_into
        self.write_from = storage.write_from
        self.write_zeroes = storage.write_zeroes
        self.truncate = storage.truncate
        self.flush = storage.flush

    async def release(self) -> None:
        """See `CreateTarget`."""


class FormatBench:
    """One image of a format. ``storage`` is the storage node's driver (of the present opening), ``bench`` its graph."""

    def __init__(self, driver: type[Driver]) -> None:
        self.driver = driver
        self.bench = NodeBench()
        self.content = b""
        self.data_content: bytes | None = None
        self.storage: CrashStorage
        self.data: CrashStorage | None = None
        """The storage of the data file, of an image that was created with ``data_file="data"``."""
        self.node: BlockDriverState
        self.secrets: dict[str, bytes] = {}
        """Values of secret objects, for formats that encrypt."""
        self.always: dict[str, Any] = {}
        """Options of the driver for every opening, such as those that unlock the image."""

    @property
    def env(self) -> Environment:
        """The environment (see `CreateContext`)."""
        return self.bench.env

    async def open_reference(self, ref: Any) -> _Target:
        """See `CreateContext`: ``data`` means the image's data file, any other reference the image's own storage."""
        storage = CrashStorage(BlockDriverState("target"), CrashStorageOptions(), self.env)
        if ref == "data":
            self.data = storage
        else:
            self.storage = storage
        return _Target(storage)

    async def create(self, **options: Any) -> None:
        """Make a new image with these creation options."""
        create: Any = self.driver
        self.env.secrets.update(self.secrets)
        await create.create(create.create_options_class(file="storage", **options), self)
        self.content = bytes(self.storage.live)
        self.data_content = bytes(self.data.live) if self.data is not None else None

    async def open(
        self,
        *,
        backing: BlockDriverState | None = None,
        content: bytes | None = None,
        data: bytes | None = None,
        flags: dict[str, Any] | None = None,
        **options: Any,
    ) -> BlockBackend:
        """Open the image, with other ``content`` and ``data`` file than was kept if they are given.

        ``flags`` are fields of its node, ``options`` the driver's.
        """
        self.bench = NodeBench() if backing is None else self.bench
        self.env.secrets.update(self.secrets)
        storage = await self._add_storage(self.content if content is None else content)
        assert isinstance(storage.driver, CrashStorage)
        self.storage = storage.driver
        children = {"file": (storage, ChildRole.STORAGE)}
        data = self.data_content if data is None else data
        if data is not None:
            beside = await self._add_storage(data)
            assert isinstance(beside.driver, CrashStorage)
            self.data = beside.driver
            self.data.journal = self.storage.journal
            children["data-file"] = (beside, ChildRole.DATA)
        if backing is not None:
            children["backing"] = (backing, ChildRole.BACKING)
        state: dict[str, Any] = {"discard_unmap": True, **(flags or {})}
        made: Any = self.driver.options_class
        self.node = await self.bench.add(self.driver, made(file="storage", **(self.always | options)), children=children, **state)
        return self.bench.backend(self.node) if not self.node.read_only else _reader(self.bench, self.node)

    async def _add_storage(self, content: bytes) -> BlockDriverState:
        node = await self.bench.add(CrashStorage, CrashStorageOptions(), discard_unmap=True)
        assert isinstance(node.driver, CrashStorage)
        node.driver.fill(content)
        requests.refresh_length(node)
        return node

    async def close(self) -> None:
        """Close the image, and keep its content for the next opening."""
        await self.node.driver.close()
        self.content = bytes(self.storage.live)
        self.data_content = bytes(self.data.live) if self.data is not None else None

    async def check(self, content: bytes | None = None, fix: CheckFix = CheckFix.NONE) -> CheckResult:
        """Open a content (default: what `close` kept) on a bench of its own, and check it."""
        other = FormatBench(self.driver)
        other.data_content, other.secrets, other.always = self.data_content, self.secrets, self.always
        await other.open(
            content=self.content if content is None else content, flags={"read_only": fix is CheckFix.NONE}
        )
        driver = other.node.driver
        assert isinstance(driver, SupportsCheck)
        result = await driver.check(fix)
        if fix is not CheckFix.NONE:
            await other.close()
            self.content = other.content
        return result


def _reader(bench: NodeBench, node: BlockDriverState) -> BlockBackend:
    return bench.backend(node, perm=Perm.CONSISTENT_READ)


async def is_refused(opening: Any) -> str:
    """Await an opening that must fail with a `QBlockError`; returns its text."""
    try:
        await opening
    except QBlockError as error:
        return str(error)
    raise AssertionError("it was opened")
