"""Making new image files: the texts of -o, the checks of qemu-img, and the making.

Models ``qemu-img create`` and the output of ``convert`` for raw and qcow2; the options are those of `qblock.formatting`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from qblock.driver import Json
from qblock.errors import CommandError, QBlockError
from qblock.filenames import combine_filename, has_protocol
from qblock.formatting import CreateOption, options_of, options_with_file
from qblock.options import split_items, unflatten_dotted
from qblock.tools.arguments import size_of
from qblock.tools.images import ImageArguments, ImageSession
from qblock.units import align_up

SECTOR: Final = 512
VERSIONS: Final = {"0.10": "v2", "v2": "v2", "1.1": "v3", "v3": "v3"}
FILE_HINTS: Final = ("nocow", "extent-size-hint")
"""Options of ``blockdev-create`` for the file that holds an image of a format."""
FOREIGN_FORMATS: Final = frozenset({
    "bochs", "cloop", "dmg", "luks", "parallels", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc",
})  # fmt: skip
"""What QEMU can have below an image besides the formats of qblock."""


def checked_option_lists(texts: Iterable[str]) -> list[str]:
    """The texts of all -o; raises for one that is empty, or begins or ends in a comma."""
    lists = list(texts)
    for text in lists:
        commas = len(text) - len(text.rstrip(","))
        if not text or text.startswith(",") or commas % 2:
            raise CommandError(f"Invalid option list: '{text}'")
    return lists


def wants_help(texts: Iterable[str]) -> bool:
    """True when one of the -o texts asks which options there are."""
    return any(item in ("help", "?") for text in texts for item in split_items(text))


def print_help(fmt: str, *, file: bool) -> None:
    """What -o help prints; with ``file`` (the name of one was given) the options of a file are among them."""
    print_options(f"Supported {'' if file else fmt + ' '}options:", options_with_file(fmt) if file else options_of(fmt))
    if not file:
        print("\nThe protocol level may support further options.")
        print("Specify the target filename to include those options.")


def print_options(title: str, options: Iterable[CreateOption]) -> None:
    """A list of options for a person, by name."""
    print(title)
    for option in sorted(options, key=lambda option: option.name):
        print(f"  {option.name + '=<' + option.kind + '>':<22} - {option.doc}")


def parse_value(option: CreateOption, text: str) -> Json:
    """The value that the text of -o stands for."""
    if option.kind == "size":
        return size_of(text, f"value of '{option.name}'")
    if option.kind == "num":
        if not text.isdigit():
            raise CommandError(f"Parameter '{option.name}' expects a number, not '{text}'")
        return int(text)
    if option.kind == "bool (on/off)":
        if text not in ("on", "off"):
            raise CommandError(f"Parameter '{option.name}' expects 'on' or 'off', not '{text}'")
        return text == "on"
    return text


def parse_options(fmt: str, texts: Iterable[str]) -> dict[str, Json]:
    """The values of all -o texts, by option name."""
    return parse_values(options_with_file(fmt), texts, f"is no creation option of the format '{fmt}'; see -o help")


def parse_values(options: Iterable[CreateOption], texts: Iterable[str], complaint: str) -> dict[str, Json]:
    """The values that -o texts give to ``options``. A name alone means on, one that begins with ``no`` off.

    Raises `CommandError` with the name and the ``complaint`` for any other option.
    """
    table = {option.name: option for option in options}
    values: dict[str, Json] = {}
    for text in texts:
        for item in split_items(text):
            name, equals, value = item.partition("=")
            if not equals:
                name, value = (name.removeprefix("no"), "off") if name.startswith("no") and name not in table else (name, "on")
            if name not in table:
                raise CommandError(f"'{name}' {complaint}")
            values[name] = parse_value(table[name], value)
    return values


def add_backing(fmt: str, values: dict[str, Json], backing: str | None, backing_fmt: str | None) -> None:
    """Put -b and -F among the options; raises where the format has no backing files."""
    for name, value in (("backing_file", backing), ("backing_fmt", backing_fmt)):
        if value is None:
            continue
        if not any(option.name == name for option in options_of(fmt)):
            raise CommandError(f"the format '{fmt}' has no backing files")
        values[name] = value


def check_backing(filename: str, values: Mapping[str, Json]) -> None:
    """Raise when the backing file's format is missing, or when it would be the image itself."""
    backing, backing_fmt = values.get("backing_file"), values.get("backing_fmt")
    if backing is None:
        return
    if backing == filename:
        raise CommandError(f"{filename}: an image cannot be its own backing file")
    if backing_fmt is None:
        raise CommandError(f"{filename}: a backing file needs its format too (-F): it is never guessed")


def check_backing_format(session: ImageSession, filename: str, values: Mapping[str, Json]) -> None:
    """Raise for a format without a backing file, or of a name that no program knows."""
    backing_fmt = values.get("backing_fmt")
    if backing_fmt is None:
        return
    if "backing_file" not in values:
        raise CommandError(f"{filename}: a backing format was given, but no backing file")
    if backing_fmt not in FOREIGN_FORMATS and backing_fmt not in session.opener.registry.names():
        raise CommandError(f"{filename}: there is no format '{backing_fmt}' for its backing file")


def creation_values(fmt: str, values: Mapping[str, Json]) -> dict[str, Any]:
    """The options by their names in ``blockdev-create``; the version of qcow2 as that takes it."""
    wire = {option.wire or option.name: values[option.name] for option in options_of(fmt) if option.name in values}
    if "version" in wire:
        wire["version"] = _version(wire["version"])
    if (encryption := encryption_format(values)) is not None:
        wire["encrypt.format"] = "qcow" if encryption == "aes" else encryption
    wire.pop("encryption", None)
    return unflatten_dotted(wire)


def encryption_format(values: Mapping[str, Json]) -> str | None:
    """How the image is to be encrypted, aes or luks; None: not at all."""
    if "encryption" in values and "encrypt.format" in values:
        raise CommandError("'encryption' is another name of 'encrypt.format': they cannot be given together")
    if values.get("encryption"):
        return "aes"
    name = values.get("encrypt.format")
    if name not in (None, "aes", "luks"):
        raise CommandError(f"'{name}' is no way to encrypt an image: encrypt.format takes luks or aes")
    return name


def unlocking_options(values: Mapping[str, Json]) -> dict[str, str]:
    """Node options that unlock an image which was made with these creation options."""
    if encryption_format(values) is None:
        return {}
    return {"encrypt.key-secret": values["encrypt.key-secret"]}


async def backing_length(session: ImageSession, filename: str, values: Mapping[str, Json]) -> int:
    """The length of the backing file in bytes; it is opened (alone, without its own backing file) and closed again."""
    name = combine_filename(filename, values["backing_file"])
    try:
        backend = await session.open(ImageArguments(name, fmt=values["backing_fmt"], backing=False))
    except QBlockError as error:
        raise CommandError(f"{filename}: the backing file cannot be opened: {error}") from error
    try:
        return backend.length
    finally:
        await session.close(backend)


async def create_file(session: ImageSession, filename: str, fmt: str, values: Mapping[str, Json]) -> None:
    """Make the image, and its data file; ``values`` hold its size. What was not there before is removed when this fails."""
    size = align_up(values["size"], SECTOR)
    path = file_path(filename)
    table = {option.wire: values[option.name] for option in options_with_file(fmt) if option.name in values}
    hints: dict[str, Json] = {name: table[name] for name in FILE_HINTS if name in table}
    data_file = values.get("data_file")
    fresh = [name for name in (path, data_file) if name is not None and not os.path.lexists(name)]
    if data_file is not None and os.path.realpath(data_file) == os.path.realpath(path):
        raise CommandError(f"{filename}: an image cannot be its own data file")
    try:
        if fmt == "raw":
            await session.opener.create_image(
                "file", {"filename": path, "size": size, "preallocation": values.get("preallocation", "off"), **hints}
            )
            return
        await session.opener.create_image("file", {"filename": path, "size": 0, **hints})
        wire = creation_values(fmt, values) | {"file": {"driver": "file", "filename": path}, "size": size}
        if data_file is not None:
            await session.opener.create_image("file", {"filename": data_file, "size": 0})
            wire["data-file"] = {"driver": "file", "filename": data_file}
        await session.opener.create_image(fmt, wire)
    except QBlockError as error:
        for name in fresh:
            remove_file(name)
        raise CommandError(f"{filename}: {error}") from error


def file_path(filename: str) -> str:
    """The path of the file that is to be made; raises `CommandError` for a name that is no file's."""
    path = filename.removeprefix("file:")
    if path == filename and has_protocol(filename):
        raise CommandError(f"{filename}: only files can be created, nothing behind the protocol '{filename.partition(':')[0]}'")
    return path


def _version(compat: str) -> str:
    if compat not in VERSIONS:
        raise CommandError(f"'{compat}' is no version of qcow2: compat takes v2 (0.10) or v3 (1.1)")
    return VERSIONS[compat]


def remove_file(filename: str, *, unlink: Callable[[str], None] = os.unlink) -> None:
    """Remove a file that a failed run has made."""
    try:
        unlink(filename)
    except OSError:
        pass
