"""What the image tools do, as functions for plain scripts: typed results, exceptions, and a callback for how far they are.

Each function opens what it needs, blocks until done, and leaves nothing open. Together with `resize`, `commit`, `rebase` and
`create` these are the sub-commands of ``qblock-img``, on the same code; differs from those in that files which an image merely
mentions are opened only with ``backing=True``. Sizes and offsets are bytes; sizes can be text such as ``"64M"``, too.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, TypeVar

import attrs

from qblock.driver import CheckFix, CheckResult, Measurement, Progress, SupportsMeasure, no_progress
from qblock.errors import CommandError, QBlockError
from qblock.image import ImageInfo, MapExtent, describe, open_image
from qblock.inspecting import Layer, inspect_chain
from qblock.node import BlockDriverState
from qblock.nodespec import NodeFlags
from qblock.offline import run_offline
from qblock.opening import Opener
from qblock.registry import DriverRegistry
from qblock.tools.console import Told
from qblock.tools.converting import Converter, ConvertSettings
from qblock.tools.creation import create_file, creation_values, remove_file
from qblock.tools.images import ImageArguments, ImageNotOpened, ImageSession
from qblock.tools.img_amend import amend_image, check_amendments
from qblock.tools.img_check import check_image
from qblock.tools.img_compare import Comparison, Difference
from qblock.units import align_up, parse_size

T = TypeVar("T")

Path: TypeAlias = "str | os.PathLike[str]"
Repair: TypeAlias = Literal["leaks", "all"]
_FIXES: Final[Mapping[str | None, CheckFix]] = {
    None: CheckFix.NONE,
    "leaks": CheckFix.LEAKS,
    "all": CheckFix.LEAKS | CheckFix.ERRORS,
}


@attrs.frozen
class Converted:
    """What `convert` made: a disk of ``length`` bytes, which takes ``allocated`` bytes on its host (None: not told)."""

    length: int
    allocated: int | None


@attrs.frozen
class Compared:
    """What `compare` found: ``difference`` is None when the disks are the same, else a sentence.

    ``offset`` is the sector of 512 bytes in which content differs first; None when only sizes or allocation differ.
    """

    difference: str | None = None
    offset: int | None = None

    @property
    def identical(self) -> bool:
        """Whether the disks are the same."""
        return self.difference is None


def _run(body: Callable[[ImageSession], Awaitable[T]], *, backing: bool = False) -> T:
    async def work(opener: Opener) -> T:
        async with ImageSession(opener.graph, opener, opener.env) as session:
            return await body(session)

    try:
        return run_offline(work, backing=backing)
    except ImageNotOpened as error:
        raise error.cause from None


def info(path: Path, *, fmt: str | None = None) -> ImageInfo:
    """What the image at ``path`` says of itself; nothing that it mentions is opened. Raises `QBlockError`."""

    async def work(session: ImageSession) -> ImageInfo:
        wanted = ImageArguments(os.fspath(path), fmt=fmt, force_share=True, backing=False, data_file=False)
        return describe((await session.open(wanted)).node)

    return _run(work)


def layers(path: Path, *, fmt: str | None = None) -> list[Layer]:
    """The images of a chain, the top one first: what each is, mentions, who has it open, and what is not safe about it.

    Each is opened by itself, for what it says only. The last one has a ``failure`` if the chain is broken there.
    """

    async def work(session: ImageSession) -> list[Layer]:
        async def open_alone(name: str, fmt: str | None) -> BlockDriverState:
            return (await session.open(ImageArguments(name, fmt=fmt, force_share=True, backing=False, data_file=False))).node

        return await inspect_chain(open_alone, os.fspath(path), fmt)

    return _run(work)


def check(
    path: Path,
    *,
    fmt: str | None = None,
    repair: Repair | None = None,
    explain: bool = False,
    progress: Progress = no_progress,
) -> CheckResult:
    """Verify the metadata of an image, and repair them if asked to; the result is that of the repaired image.

    With ``explain`` the ``details`` of the result tell which parts of the disk are concerned. ``progress`` hears of the
    disks of the image and of its snapshots: of each twice, since each is looked at and then counted. Raises `CommandError` for a
    format without a check.
    """
    fix = _FIXES[repair]

    async def work(session: ImageSession) -> CheckResult:
        name = os.fspath(path)
        wanted = ImageArguments(name, fmt=fmt, writable=fix is not CheckFix.NONE, to_check=True, backing=False)
        return (await check_image(session, wanted, fix, explain=explain, progress=progress))[1]

    return _run(work)


def map(
    path: Path, *, fmt: str | None = None, backing: bool = False, progress: Progress = no_progress
) -> list[MapExtent]:
    """What is stored where, over the whole disk; see `Image.map` for parts of it."""
    with open_image(path, fmt=fmt, backing=backing) as image:
        extents = []
        for extent in image.map():
            extents.append(extent)
            progress(extent.start + extent.length, image.length)
        return extents


def compare(
    one: Path,
    two: Path,
    *,
    fmts: tuple[str | None, str | None] = (None, None),
    strict: bool = False,
    backing: bool = False,
    progress: Progress = no_progress,
) -> Compared:
    """Whether two images hold the same disk; a longer one does if its surplus is zero.

    With ``strict`` sizes and allocation must be the same too. Raises `QBlockError` when one cannot be read.
    """

    async def work(session: ImageSession) -> Compared:
        images = [
            await session.open(ImageArguments(os.fspath(name), fmt=fmt)) for name, fmt in zip((one, two), fmts, strict=True)
        ]
        comparison = Comparison(images[0], images[1], strict=strict, quiet=True, progress=Told(progress))
        try:
            await comparison.run()
        except Difference as found:
            return Compared(str(found), found.offset)
        return Compared()

    return _run(work, backing=backing)


def convert(
    source: Path | Sequence[Path],
    target: Path,
    *,
    fmt: str = "qcow2",
    source_fmt: str | None = None,
    snapshot: str | None = None,
    backing: bool = False,
    compressed: bool = False,
    workers: int = 8,
    speed: int = 0,
    progress: Progress = no_progress,
    **options: Any,
) -> Converted:
    """Copy the disk of an image, or those of several one behind the other, to a new image in the format ``fmt``.

    ``snapshot`` is an internal snapshot to take in place of the disk; ``speed`` limits the copy to so many bytes per second.
    ``options`` are creation options as ``qblock-img convert -o`` names them (``cluster_size=65536``). A run that fails leaves no
    new file behind. Raises `QBlockError`.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    name = os.fspath(target)
    existed = os.path.lexists(name)
    if not 1 <= workers <= 16:
        raise CommandError(f"'workers' takes a number from 1 to 16, not {workers}")
    if compressed and not DriverRegistry().get(fmt).supports_compressed:
        raise CommandError(f"images of the format '{fmt}' have no compressed clusters")

    async def work(session: ImageSession) -> Converted:
        opened = [
            await session.open(ImageArguments(os.fspath(one), fmt=source_fmt, snapshot=snapshot)) for one in sources
        ]
        total = sum(one.length for one in opened)
        await create_file(session, name, fmt, {**options, "size": total})
        output = await session.open(ImageArguments(name, fmt=fmt, writable=True, flags=NodeFlags(discard_unmap=True)))
        settings = ConvertSettings(workers=workers, target_is_zero=True, speed=speed, compressed=compressed)
        await Converter(opened, output, settings, session.environment.clock, Told(progress)).run()
        return Converted(output.length, output.node.driver.allocated_size())

    try:
        return _run(work, backing=backing)
    except QBlockError:
        if not existed:
            remove_file(name)
        raise


def measure(
    source: Path | None = None,
    *,
    size: int | str | None = None,
    fmt: str = "qcow2",
    source_fmt: str | None = None,
    backing: bool = False,
    progress: Progress = no_progress,
    **options: Any,
) -> Measurement:
    """How many bytes a new image takes for the disk of ``source``, or for an empty one of ``size`` bytes.

    ``options`` are creation options as `convert` takes them. Raises `CommandError` unless one of the two is given.
    """
    if (source is None) == (size is None):
        raise CommandError("give either an image or a size to measure")
    driver: Any = DriverRegistry().get(fmt)
    if not issubclass(driver, SupportsMeasure):
        raise CommandError(f"images of the format '{fmt}' cannot be measured")

    async def work(session: ImageSession) -> Measurement:
        node = None
        if source is not None:
            node = (await session.open(ImageArguments(os.fspath(source), fmt=source_fmt))).node
        length = node.length if node is not None else align_up(parse_size(size) if isinstance(size, str) else size or 0, 512)
        measured: Measurement = await driver.measure(creation_values(fmt, options), length, node, progress)
        return measured

    return _run(work, backing=backing)


def amend(path: Path, *, fmt: str | None = None, backing: bool = False, progress: Progress = no_progress, **options: Any) -> None:
    """Change options of an image, by the names of ``qblock-img amend -o`` (``compat="1.1"``, ``refcount_bits=64``).

    Raises `CommandError` for options that cannot be changed, and other `QBlockError`.
    """
    async def work(session: ImageSession) -> None:
        disk = await session.open(ImageArguments(os.fspath(path), fmt=fmt, writable=True))
        check_amendments(disk.node.driver.name, options)
        await amend_image(disk, options, Told(progress))

    _run(work, backing=backing)
