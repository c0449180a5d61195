"""``drive-mirror`` of March 2012, alone or in a transaction: a ``blkmirror`` is put over the image of a device.

Models the proposal that the seed competed with (rfc-2012.md, "Commands, by dialect"). The new image is made, unless it exists,
with the device's size and the source's own backing file (``absolute-paths``: the two share it) or with none
(``no-backing-file``); it is opened without its backing file, and appended over the device's node together with the mirror. From
then on whatever the guest writes goes to both. What was on the disk before is not in the target: stream it through
(`jobs/stream_through.py`). The mirror ends when ``drive-reopen`` gives the device another image, and with the device.

How to use it, from a command or from ``transaction`` (a snapshot first, then the mirror of the new top)::

    action = MirrorByDriver(system, device="virtio0", target=BlkmirrorTarget(filename="copy.qcow2", format="qcow2"))
    await perform(system, [action])          # or: await action.prepare(); action.commit(); await action.afterwards()

Undone it leaves nothing behind but the file, if it has made one.
"""

from __future__ import annotations

import enum
import os.path
from typing import TYPE_CHECKING, ClassVar

import attrs

from qblock.actions.action import Action
from qblock.blockers import OpType
from qblock.creating import create_image_file
from qblock.driver import BackingLink
from qblock.drivers.blkmirror import BlkmirrorDriver, BlkmirrorOptions
from qblock.errors import CommandError, DeviceInUse
from qblock.filenames import has_protocol
from qblock.naming import format_of
from qblock.nodespec import MediumFlags, NodeFlags
from qblock.permissions import ChildRole
from qblock.requests import refresh_length
from qblock.transaction import Transaction

if TYPE_CHECKING:
    from qblock.node import BlockDriverState
    from qblock.system import BlockSystem


class BlkmirrorMode(enum.Enum):
    """Whether the target is made, and over what; the values are the wire names."""

    EXISTING = "existing"
    ABSOLUTE_PATHS = "absolute-paths"
    NO_BACKING_FILE = "no-backing-file"


@attrs.frozen(kw_only=True)
class BlkmirrorTarget:
    """The second image that is written."""

    filename: str
    format: str
    mode: BlkmirrorMode = BlkmirrorMode.ABSOLUTE_PATHS


class MirrorByDriver(Action):
    """See the module. Raises `DeviceNotFound`, `NodeBusy`, `CommandError` and its kin when prepared, and what making and
    opening the target raise.
    """

    kind: ClassVar[str] = "drive-mirror"

    def __init__(self, system: BlockSystem, *, device: str, target: BlkmirrorTarget) -> None:
        super().__init__(system)
        self.device = device
        self.target = target
        self._change = Transaction()
        self._opened: BlockDriverState | None = None

    async def prepare(self) -> None:
        """See `Action`."""
        source = self._source()
        await self.drain(source)
        target = await self._open_target(source)
        target.monitor_owned = True  # until it has users of its own
        self._opened = target
        try:
            if self._source() is not source:
                raise DeviceInUse(self.device, "its images have changed meanwhile")
            self._put_over(source, target)
        except BaseException:
            self._change.abort()
            await self._let_go()
            raise

    def commit(self) -> None:
        """See `Action`."""
        self._change.commit()

    async def afterwards(self) -> None:
        """See `Action`."""
        await self._let_go()

    async def abort(self) -> None:
        """See `Action`."""
        self._change.abort()
        await self._let_go()

    def _source(self) -> BlockDriverState:
        """What the device shows now."""
        graph = self.system.graph
        backend = graph.find_backend(self.device)
        if backend.root is None:
            raise CommandError(f"Device '{self.device}' has no medium")
        graph.check_op(backend.root.node, OpType.MIRROR_SOURCE)
        return backend.root.node

    async def _open_target(self, source: BlockDriverState) -> BlockDriverState:
        system, target = self.system, self.target
        image = system.graph.skip_filters(source)
        if target.mode is not BlkmirrorMode.EXISTING:
            link = None
            if target.mode is BlkmirrorMode.ABSOLUTE_PATHS and image.backing is not None:
                link = self._shared(image.backing.node)
            await create_image_file(
                system.opener, target.filename, target.format,
                size=source.length, backing=link, announce=system.announce,
            )  # fmt: skip
        medium = MediumFlags.of(image).options()
        return await system.opener.open_image(
            target.filename,
            fmt=target.format,
            read_only=False,
            backing=False,
            options={"cache": medium["cache"], "discard": medium["discard"]},
            inherited=NodeFlags(aio=image.aio),
        )

    def _shared(self, backing: BlockDriverState) -> BackingLink:
        """What the header of the new image says of its backing file, which is the source's."""
        image = self.system.graph.skip_filters(backing)
        name = image.driver.filename()
        if name is None:
            raise CommandError(
                f"Node '{image.node_name}' has no file name for the new image's header; use the mode no-backing-file"
            )
        if not self.system.registry.get(self.target.format).supports_backing:
            raise CommandError(
                f"Images of format '{self.target.format}' cannot have a backing file; use the mode no-backing-file"
            )
        return BackingLink(name if has_protocol(name) else os.path.abspath(name), format_of(image))

    def _put_over(self, source: BlockDriverState, target: BlockDriverState) -> None:
        system, change = self.system, self._change
        driver = system.opener.make_filter(
            BlkmirrorDriver, BlkmirrorOptions(target=target.node_name),
            node_name=None, above=source, implicit=False, change=change,
        )  # fmt: skip
        node = driver.node
        system.graph.attach(node, target, name="target", role=ChildRole.DATA, change=change)
        system.graph.append(node, onto=source, change=change)
        refresh_length(node)
        driver.check_place()
        if (hit := system.env.trace.blkmirror_install) is not None:
            hit(device=self.device, node=node.node_name, target=target.node_name)

    async def _let_go(self) -> None:
        """Close the target if nobody uses it."""
        if self._opened is not None:
            self._opened.monitor_owned = False
            self._opened = None
            await self.system.opener.close_orphans()
