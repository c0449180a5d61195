"""``qblock-img convert``: copy images to a new one of any format that can be created, or into an existing one (-n).

Command line and checks as qemu-img 7.2's. Differs from QEMU: when a run that has made the output file fails, the unfinished
file is removed.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any, Final

import attrs

from qblock.backend import BlockBackend
from qblock.chain import chain_next, find_backing_image, skip_filters
from qblock.errors import CommandError
from qblock.filenames import combine_filename
from qblock.formatting import options_of
from qblock.node import BlockDriverState
from qblock.registry import DriverRegistry
from qblock.tools.arguments import Arguments, UsageError, is_writethrough
from qblock.tools.console import Progress, complain
from qblock.tools.converting import Converter, ConvertSettings
from qblock.tools.copying_bitmaps import check_options as check_bitmap_options
from qblock.tools.copying_bitmaps import check_source, check_target, copy_bitmaps
from qblock.tools.creation import (
    add_backing,
    check_backing,
    check_backing_format,
    checked_option_lists,
    create_file,
    encryption_format,
    parse_options,
    print_help,
    remove_file,
    unlocking_options,
    wants_help,
)
from qblock.tools.images import ImageArguments, ImageSession, Watch, cache_flags, run_session, with_secrets
from qblock.units import MiB

MAX_WORKERS: Final = 16
MAX_SPARSE: Final = 16 * MiB
LONG: Final = {
    "object=": "object", "image-opts": "image-opts",
    "target-image-opts": "target-image-opts", "force-share": "U", "target-is-zero": "target-is-zero",
    "salvage": "salvage", "bitmaps": "bitmaps", "skip-broken-bitmaps": "skip-broken-bitmaps", "backing=": "B",
}  # fmt: skip


@attrs.frozen
class _Request:
    """One checked command line."""

    arguments: Arguments
    sources: list[str]
    output: str
    fmt: str
    values: dict[str, Any]
    settings: ConvertSettings

    @property
    def creates(self) -> bool:
        """False with -n: the output is there already."""
        return "n" not in self.arguments


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    arguments = Arguments(args, "B:CF:O:S:T:UWcf:l:m:no:pqr:t:", LONG)
    fmt = arguments.get("O") or "raw"
    if wants_help(checked_option_lists(arguments.all("o"))):
        print_help(fmt, file=len(arguments.words) > 1)
        return 0
    request = _checked(arguments, fmt)
    existed = os.path.lexists(request.output)
    try:
        progress = Progress("p" in arguments and "q" not in arguments)
        with progress.line(from_start=True):
            run_session(lambda session: _convert(session, request, progress), with_secrets(arguments, watch))
    except BaseException:
        if request.creates and not existed:
            remove_file(request.output)
        raise
    return 0


def _checked(arguments: Arguments, fmt: str) -> _Request:
    if len(arguments.words) < 2:
        raise UsageError("Must specify image file names: one or more to read, and one to write")
    *sources, output = arguments.words
    arguments.check_image_opts()
    arguments.check_image_opts("O", opts="target-image-opts")
    check_bitmap_options(arguments, len(sources))
    if "l" in arguments and len(sources) > 1:
        raise CommandError("-l takes a snapshot of one image: it cannot be used with several")
    creates = "n" not in arguments
    if "target-is-zero" in arguments and creates:
        raise CommandError("--target-is-zero requires -n: a new image is known to be zero")
    if "target-image-opts" in arguments and creates:
        raise CommandError("--target-image-opts requires -n: options open an image, they do not create one")
    if not creates and arguments.all("o"):
        raise CommandError("-o has no effect with -n: nothing is created")
    values: dict[str, Any] = {}
    if creates:
        options_of(fmt)
        values = parse_options(fmt, arguments.all("o"))
        if "c" in arguments and not DriverRegistry().get(fmt).supports_compressed:
            raise CommandError(f"-c cannot be used: images of the format '{fmt}' have no compressed clusters")
        add_backing(fmt, values, arguments.get("B"), arguments.get("F"))
        check_backing(output, values)
    elif backing := arguments.get("B"):
        values["backing_file"] = backing
    settings = _settings(arguments)
    if settings.compressed and encryption_format(values) is not None:
        raise CommandError("-c cannot be used together with encryption: compressed clusters are not encrypted")
    if settings.compressed and values.get("preallocation", "off") != "off":
        raise CommandError("-c and preallocation exclude each other: what is compressed takes less space")
    if settings.compressed and encryption_format(values) is not None:
        raise CommandError("-c and encryption exclude each other: the format does not encrypt what is compressed")
    if "backing_file" in values and len(sources) > 1:
        raise CommandError("several images joined into one cannot have a backing file")
    return _Request(arguments, sources, output, fmt, values, settings)


def _settings(arguments: Arguments) -> ConvertSettings:
    sparse = arguments.size("S", "size for -S")
    if sparse is not None and (sparse % 512 or sparse > MAX_SPARSE):
        raise CommandError(f"-S takes a multiple of 512 up to {MAX_SPARSE}, or 0 to write everything as data")
    if "C" in arguments and sparse is not None:
        raise CommandError("-C lets the storage copy, so nothing is looked at: it cannot be used with -S")
    for name, option in (("c", "-c"), ("salvage", "--salvage")):
        if "C" in arguments and name in arguments:
            raise CommandError(f"-C lets the storage copy, as it is: it cannot be used with {option}")
    workers = arguments.get("m", "8") or ""
    if not workers.isdigit() or not 1 <= int(workers) <= MAX_WORKERS:
        raise CommandError(f"-m takes a number of coroutines from 1 to {MAX_WORKERS}")
    return ConvertSettings(
        workers=int(workers),
        in_order="W" not in arguments,
        sparse=4096 if sparse is None else sparse,
        offload="C" in arguments,
        target_is_zero="target-is-zero" in arguments,
        speed=arguments.size("r", "rate limit") or 0,
        compressed="c" in arguments,
        salvage=partial(_unreadable, quiet="q" in arguments) if "salvage" in arguments else None,
    )


def _unreadable(text: str, *, quiet: bool) -> None:
    """Tell of what cannot be read, and becomes zeroes."""
    if not quiet:
        complain("qblock-img", f"warning: {text}")


async def _convert(session: ImageSession, request: _Request, progress: Progress) -> None:
    arguments = request.arguments
    sources = [
        await session.open(
            ImageArguments.of(
                arguments,
                name,
                flags=cache_flags(arguments.get("T"), "source cache option"),
                snapshot=arguments.get("l"),
                steady="U" not in arguments,
            )
        )
        for name in request.sources
    ]
    if "bitmaps" in arguments:
        check_source(sources[0].node, skip_broken="skip-broken-bitmaps" in arguments)
    cache = arguments.get("t") or "unsafe"
    total = sum(source.length for source in sources)
    if request.creates:
        # The size is that of the sources, as in QEMU, whatever -o says.
        values = request.values | {"size": total}
        check_backing_format(session, request.output, values)
        await create_file(session, request.output, request.fmt, values)
    target = await session.open(
        ImageArguments(
            request.output,
            fmt=None if "target-image-opts" in arguments else request.fmt,
            image_opts="target-image-opts" in arguments,
            writable=True,
            flags=cache_flags(cache, discard=True),
            extra=unlocking_options(request.values) if request.creates else {},
        )
    )
    target.writethrough = is_writethrough(cache)
    if request.settings.compressed and not target.node.driver.supports_compressed:
        raise CommandError(f"-c cannot be used: '{request.output}' cannot hold compressed clusters")
    if "bitmaps" in arguments:
        check_target(sources[0].node, target.node)
    if target.length < total:
        raise CommandError(f"the output has {target.length} bytes, which is less than the {total} to be written")
    settings = _fitted(request, sources[0], target)
    await Converter(sources, target, settings, session.environment.clock, progress).run()
    if "bitmaps" in arguments:
        await copy_bitmaps(sources[0].node, target.node, session.environment)


def _fitted(request: _Request, source: BlockBackend, target: BlockBackend) -> ConvertSettings:
    """The settings with what is only known when the images are open."""
    backing = request.values.get("backing_file")
    if backing is not None:
        base = _base_in_source(source.node, combine_filename(request.output, backing))
        return attrs.evolve(request.settings, has_backing=True, base=base)
    # What was made just now reads as zeroes, preallocated or not.
    return attrs.evolve(request.settings, target_is_zero=request.settings.target_is_zero or request.creates)


def _base_in_source(source: BlockDriverState, filename: str) -> BlockDriverState | None:
    """The layer of the source that the target's backing file is; if it is another file, the layer below the top."""
    found = find_backing_image(source, filename)
    return found if found is not None and found is not skip_filters(source) else chain_next(source)
