"""The ``compress`` filter: what is written is stored packed by the format below.

Models QEMU's filter of that name (semantics.md section 17). Requests are aligned to the clusters of the child, so a write of a
part of one is a read-modify-write here. What the child cannot do with packed clusters fails: qcow2 answers EIO where something is
stored already. Zero writes and discards pass as they are.
"""

from __future__ import annotations

from typing import ClassVar

from attrs import evolve, frozen

from qblock import requests
from qblock.errors import CommandError
from qblock.filtering import FilterDriver
from qblock.options import ChildRef, DriverOptions, child
from qblock.permissions import ChildRole


@frozen
class CompressOptions(DriverOptions):
    """``BlockdevOptionsGenericFormat``: the child alone."""

    file: ChildRef = child(ChildRole.FILTERED, doc="the image that stores clusters packed", since="4.2")


class CompressDriver(FilterDriver):
    """Turns writes into compressed ones."""

    name: ClassVar[str] = "compress"
    options_class: ClassVar[type[DriverOptions]] = CompressOptions
    supports_copy_range: ClassVar[bool] = False
    supports_reopen: ClassVar[bool] = False

    async def open(self) -> None:
        """See `Driver`. Raises `CommandError` when the child cannot compress."""
        below = self.child.node.driver
        if not below.supports_compressed:
            raise CommandError(
                f"Node '{self.node.node_name}': a {below.name} node stores nothing compressed; put the filter over a qcow2 image"
            )
        self.limits = evolve(self.limits, request_alignment=below.info().cluster_size or 1)

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`; the last cluster may end where the disk does."""
        await requests.write_compressed(self.child, offset, buffer[: max(0, self.length() - offset)])
        if fua:
            await self.flush()
