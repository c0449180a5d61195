"""``qblock-img amend``: change what is otherwise chosen when an image is made.

Command line and exit codes of qemu-img 7.2. What can be changed is in a table: version, refcount width, lazy refcounts, size,
the name of the data file, and the passphrases of an encrypted image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from qblock.backend import BlockBackend
from qblock.driver import Json, SupportsAmend, SupportsKeySlots
from qblock.errors import CommandError
from qblock.formatting import CreateOption
from qblock.tools.arguments import Arguments, UsageError, is_writethrough
from qblock.tools.console import Progress, Teller
from qblock.tools.creation import checked_option_lists, parse_values, print_options, wants_help
from qblock.tools.images import ImageArguments, ImageSession, Watch, cache_flags, run_session, with_secrets

LONG: Final = {"object=": "object", "image-opts": "image-opts", "force": "force"}
KEY_OPTIONS: Final = (
    CreateOption("encrypt.iter-time", "num", "Milliseconds that unlocking is to take"),
    CreateOption("encrypt.keyslot", "num", "Number of the key slot to change"),
    CreateOption("encrypt.new-secret", "str", "Id of the secret object with the passphrase to add"),
    CreateOption("encrypt.old-secret", "str", "Id of the secret object with the passphrase to erase"),
    CreateOption("encrypt.state", "str", "What the key slot is to be: active, inactive"),
)
IMAGE_OPTIONS: Final = (
    CreateOption("backing_file", "str", "File name of the backing file (only the present one: see rebase)"),
    CreateOption("backing_fmt", "str", "Format of the backing file (only the present one: see rebase)"),
    CreateOption("compat", "str", "Version of the format: 0.10 (v2) or 1.1 (v3)"),
    CreateOption("data_file", "str", "Name of the external data file"),
    CreateOption("data_file_raw", "bool (on/off)", "Keep the external data file usable as a raw image"),
    CreateOption("lazy_refcounts", "bool (on/off)", "Allow to postpone refcount updates"),
    CreateOption("refcount_bits", "num", "Width of a refcount in bits"),
    CreateOption("size", "size", "Size of the disk"),
)
AMENDABLE: Final[Mapping[str, tuple[CreateOption, ...]]] = {"qcow2": (*IMAGE_OPTIONS, *KEY_OPTIONS)}
"""The options of each format that can be changed."""


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    arguments = Arguments(args, "f:t:o:pq", LONG)
    texts = checked_option_lists(arguments.all("o"))
    if not texts:
        raise UsageError("Must specify options (-o)")
    if wants_help(texts) and (fmt := arguments.get("f")) is not None:
        _print_help(fmt)
        return 0
    if len(arguments.words) != 1:
        raise UsageError("Expecting one image file name")
    arguments.check_image_opts()
    progress = Progress("p" in arguments and "q" not in arguments)
    with progress.line():
        run_session(lambda session: _amend(session, arguments, texts, progress), with_secrets(arguments, watch))
    return 0


def _print_help(fmt: str) -> None:
    print_options(f"Amend options for '{fmt}':", _options_of(fmt))


def _options_of(fmt: str) -> tuple[CreateOption, ...]:
    if fmt not in AMENDABLE:
        raise CommandError(f"images of the format '{fmt}' cannot be amended")
    return AMENDABLE[fmt]


def parse_amendments(fmt: str, texts: Iterable[str]) -> dict[str, Json]:
    """The values of all -o texts, by option name; raises for what cannot be changed."""
    return parse_values(_options_of(fmt), texts, f"cannot be amended in images of the format '{fmt}'; see -o help")


async def _amend(session: ImageSession, arguments: Arguments, texts: list[str], progress: Progress) -> None:
    cache = arguments.get("t", "writeback")
    helps = wants_help(texts)
    disk = await session.open(
        ImageArguments.of(
            arguments,
            arguments.words[0],
            writable=not helps,
            flags=cache_flags(cache),
            data_file=not helps,
        )
    )
    disk.writethrough = is_writethrough(cache)
    driver = disk.node.driver
    if helps:
        _print_help(driver.name)
        return
    await amend_image(disk, parse_amendments(driver.name, texts), progress, force="force" in arguments)


def check_amendments(fmt: str, values: Mapping[str, Json]) -> None:
    """Raise `CommandError` for an option that cannot be amended."""
    known = {option.name for option in _options_of(fmt)}
    for name in values:
        if name not in known:
            raise CommandError(f"'{name}' cannot be amended in images of the format '{fmt}'")


async def amend_image(disk: BlockBackend, values: Mapping[str, Json], progress: Teller, *, force: bool = False) -> None:
    """Change options of an image that is open for writing. Raises `QBlockError`."""
    driver = disk.node.driver
    keys = {name.removeprefix("encrypt."): value for name, value in values.items() if name.startswith("encrypt.")}
    progress.show(0, 1)
    if keys:
        if not isinstance(driver, SupportsKeySlots):
            raise CommandError(f"images of the format '{driver.name}' have no key slots")
        await driver.change_key_slots(keys, force=force)
    if others := {name: value for name, value in values.items() if not name.startswith("encrypt.")}:
        if not isinstance(driver, SupportsAmend):
            raise CommandError(f"images of the format '{driver.name}' cannot be amended")
        await driver.amend(others, progress.show)
    await disk.flush()
    progress.show(1, 1)
