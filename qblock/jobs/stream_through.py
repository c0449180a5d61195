"""Streaming through a ``blkmirror``: every part of the disk is read and written back, so that the mirror's target gets it.

Models the second half of the proposal of March 2012 (rfc-2012.md, "What it is compared with"): a mirror by driver gives its
target only what the guest writes from then on; the rest has to be streamed through it, and every bit of the source that is
stored anywhere in its chain is written again, to the source as well. ``block-stream`` on a device whose image has a blkmirror
over it does that; it is a stream job in all other respects, and at its end the source needs no backing file any more (or
another one: what is above ``base`` is streamed).

What is read is the guest's disk at that moment, and what is read is written before any write of the guest's can come between
(`rewriting.py`). What reads as zeroes is written only where the target does not read as zeroes already; and what neither the
target nor the layers above the base have is left alone if the target's header names one of the layers from which the source has
it: a shared backing file. At the end, and before the source's chain is cut, the target is made durable. So when the job has
completed the target is complete, opened with the backing file that its header names; and it stays so, since the mirror goes on.
"""

from __future__ import annotations

import os.path
from typing import TYPE_CHECKING, Final

from qblock import requests
from qblock.chain import backing_chain, chain_next, skip_filters
from qblock.copying_down import Piece
from qblock.driver import SupportsBacking
from qblock.drivers.blkmirror import BlkmirrorDriver
from qblock.extents import Unallocated, Zero
from qblock.filenames import combine_filename, has_protocol
from qblock.jobs.scanning import STEP
from qblock.jobs.stream import StreamJob, StreamRequest, start_stream
from qblock.permissions import Perm
from qblock.rewriting import rewrite
from qblock.units import MiB

if TYPE_CHECKING:
    from qblock.node import BlockDriverState
    from qblock.system import BlockSystem

ZERO_STEP: Final = 16 * MiB
"""How much of what reads as zeroes is one step."""
_OTHERS: Final = Perm.CONSISTENT_READ | Perm.WRITE | Perm.WRITE_UNCHANGED


async def start_stream_2012(system: BlockSystem, *, device: str, request: StreamRequest) -> StreamJob:
    """``block-stream`` of March 2012: through the mirror if ``device`` has one, otherwise the plain one.

    Raises as `start_stream`.
    """
    mirrored = isinstance(system.graph.lookup(device).driver, BlkmirrorDriver)
    return await start_stream(
        system, device=device, request=request, kind=StreamThroughJob if mirrored else StreamJob
    )


class StreamThroughJob(StreamJob):
    """See the module. The device's node is the mirror."""

    _shared: bool = False
    """Whether the target's header names a layer from which the source has what is not above the base."""

    @property
    def mirror(self) -> BlkmirrorDriver:
        """The driver through which everything goes."""
        assert isinstance(self.device.driver, BlkmirrorDriver)
        return self.device.driver

    def has_work(self) -> bool:
        """See `StreamJob`: always, the topmost image is rewritten too."""
        return True

    def others_at(self, layer: BlockDriverState) -> Perm:
        """See `StreamJob`: what the guest writes goes on to the image below the mirror."""
        above = self.device
        while (edge := above.filtered) is not None and above is not layer:
            above = edge.node
        return _OTHERS if above is layer else super().others_at(layer)

    async def run(self) -> None:
        """See the module."""
        if (hit := self.runner.trace.stream_through_start) is not None:
            hit(node=self.device.node_name, job=self.id)
        self._shared = self._shares_backing()
        await super().run()
        if (hit := self.runner.trace.stream_through_done) is not None:
            hit(job=self.id)

    async def part_at(self, offset: int, end: int) -> Piece:
        """See `ScanningJob`. The two sides are looked at one after the other; a write in between goes to both."""
        extent = await requests.chain_status(self.device, offset, end - offset, base=self.base)
        if extent.present and not extent.zero:
            return Piece(offset, min(extent.length, STEP))
        held = await requests.block_status(self.mirror.target.node, offset, extent.length)
        match held:
            case Zero():
                in_order = extent.zero
            case Unallocated():
                in_order = (self._shared and not extent.present) or (extent.zero and not self.mirror.hides_backing)
            case _:
                in_order = False
        if in_order:
            return Piece(offset, held.length, work=False)
        return Piece(offset, min(held.length, ZERO_STEP if extent.zero else STEP))

    async def fetch(self, part: Piece, buffer: memoryview) -> None:
        """See `ScanningJob`."""
        if (hit := self.runner.trace.stream_through_one_iteration) is not None:
            hit(job=self.id, offset=part.offset, length=part.length)
        await rewrite(self.filter.child, part.offset, part.length, buffer)

    async def prepare(self) -> None:
        """See `Job`."""
        await requests.flush(self.mirror.target.node)
        await super().prepare()

    def _shares_backing(self) -> bool:
        driver = self.mirror.target.node.driver
        link = driver.backing_link() if isinstance(driver, SupportsBacking) else None
        if link is None:
            return False
        wanted = _same_file(combine_filename(driver.filename() or "", link.filename))
        below = chain_next(self.device)
        last = skip_filters(self.base) if self.base is not None else None
        for image in backing_chain(below) if below is not None else ():
            name = image.driver.filename()
            if name is not None and _same_file(name) == wanted:
                return True
            if image is last:
                break
        return False


def _same_file(name: str) -> str:
    return name if has_protocol(name) else os.path.realpath(name)
