"""``qblock-img measure``: how many bytes a new image would take, for an empty disk or for the content of another image.

Command line, exit codes and output as qemu-img 7.2's.
"""

from __future__ import annotations

import json
from typing import Any

import attrs

from qblock.driver import Measurement, SupportsMeasure
from qblock.errors import CommandError
from qblock.formatting import options_of
from qblock.node import BlockDriverState
from qblock.registry import DriverRegistry
from qblock.tools.arguments import Arguments
from qblock.tools.creation import SECTOR, checked_option_lists, creation_values, parse_options
from qblock.tools.images import ImageArguments, ImageSession, Watch, run_session, with_secrets
from qblock.units import align_up


@attrs.frozen
class _Request:
    """One checked command line: the driver that measures, its creation options, and what is to be measured."""

    driver: type[Any]
    values: dict[str, Any]
    size: int | None
    source: ImageArguments | None


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    arguments = Arguments(
        args, "f:l:o:O:U", {"output=": "output", "object=": "object", "image-opts": "image-opts", "size=": "size",
                            "force-share": "U"}
    )  # fmt: skip
    output = arguments.output_format()
    watch = with_secrets(arguments, watch)
    request = _checked(arguments)
    result = run_session(lambda session: _measure(session, request), watch)
    if output == "json":
        print(json.dumps(_members(result), indent=4))
        return 0
    print(f"required size: {result.required}")
    print(f"fully allocated size: {result.fully_allocated}")
    if result.bitmaps is not None:
        print(f"bitmaps size: {result.bitmaps}")
    return 0


def _members(result: Measurement) -> dict[str, int]:
    bitmaps = {} if result.bitmaps is None else {"bitmaps": result.bitmaps}
    return {**bitmaps, "required": result.required, "fully-allocated": result.fully_allocated}


def _checked(arguments: Arguments) -> _Request:
    arguments.check_image_opts()
    size = arguments.size("size", "image size")
    if len(arguments.words) > 1:
        raise CommandError("At most one image file name is allowed")
    if not arguments.words and any(name in arguments for name in ("image-opts", "f", "l")):
        raise CommandError("--image-opts, -f and -l need an image file name")
    if size is None and not arguments.words:
        raise CommandError("Either --size or an image file name must be given")
    if size is not None and arguments.words:
        raise CommandError("--size cannot be used together with an image file name")
    fmt = arguments.get("O") or "raw"
    options_of(fmt)
    driver = DriverRegistry().get(fmt)
    if not issubclass(driver, SupportsMeasure):
        raise CommandError(f"images of the format '{fmt}' cannot be measured")
    values = creation_values(fmt, parse_options(fmt, checked_option_lists(arguments.all("o"))))
    source = None
    if arguments.words:
        source = ImageArguments.of(arguments, arguments.words[0], snapshot=arguments.get("l"))
    return _Request(driver, values, size, source)


async def _measure(session: ImageSession, request: _Request) -> Measurement:
    node: BlockDriverState | None = None
    if request.source is not None:
        node = (await session.open(request.source)).node
    length = node.length if node is not None else align_up(request.size or 0, SECTOR)
    measured: Measurement = await request.driver.measure(request.values, length, node)
    return measured
