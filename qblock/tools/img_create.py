"""``qblock-img create``: make a new image, alone or on top of a backing file."""

from __future__ import annotations

from typing import Any

from qblock.errors import CommandError
from qblock.formatting import formatting_line, options_of
from qblock.tools.arguments import Arguments, UsageError, size_of
from qblock.tools.creation import (
    add_backing,
    backing_length,
    check_backing,
    check_backing_format,
    checked_option_lists,
    create_file,
    file_path,
    parse_options,
    print_help,
    wants_help,
)
from qblock.tools.images import ImageSession, Watch, run_session, with_secrets


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    arguments = Arguments(args, "f:b:F:o:uq", {"object=": "object"})
    fmt = arguments.get("f") or "raw"
    texts = checked_option_lists(arguments.all("o"))
    words = arguments.words
    if wants_help(texts):
        print_help(fmt, file=bool(words))
        return 0
    if not words:
        raise UsageError("Expecting image file name")
    if len(words) > 2:
        raise UsageError(f"Unexpected argument: {words[2]}")
    watch = with_secrets(arguments, watch)
    filename = words[0]
    options_of(fmt)
    values: dict[str, Any] = parse_options(fmt, texts)
    add_backing(fmt, values, arguments.get("b"), arguments.get("F"))
    check_backing(filename, values)
    file_path(filename)
    if len(words) == 2:
        if "size" in values:
            raise CommandError(f"{filename}: the size was given twice, by -o and at the end of the line")
        values["size"] = size_of(words[1], "image size")
    return run_session(lambda session: _create(session, filename, fmt, values, arguments), watch)


async def _create(session: ImageSession, filename: str, fmt: str, values: dict[str, Any], arguments: Arguments) -> int:
    if "backing_file" in values and "u" not in arguments:
        length = await backing_length(session, filename, values)
        values.setdefault("size", length)
    if "size" not in values:
        raise CommandError(f"{filename}: give a size: there is no backing file to take it from")
    if "q" not in arguments:
        print(formatting_line(filename, fmt, values), flush=True)
    check_backing_format(session, filename, values)
    await create_file(session, filename, fmt, values)
    return 0
