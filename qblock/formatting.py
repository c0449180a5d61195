"""The options of new images as people write them, and the line that tells what is being made.

Models option names, their order and their defaults in QEMU 7.2 for raw and qcow2: what qemu-img takes with ``-o``, and what all
programs print when they make an image. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs

from qblock.errors import CommandError


@attrs.frozen
class CreateOption:
    """One option of -o. ``kind`` is how the value is written; ``wire`` its name in ``blockdev-create``."""

    name: str
    kind: str
    doc: str
    default: Any = None
    wire: str = ""

    def shown(self, value: Any) -> str:
        """The value as the "Formatting" line prints it."""
        if isinstance(value, bool):
            return "on" if value else "off"
        return str(value).replace(",", ",,")


QCOW2_OPTIONS: Final = (
    CreateOption("encryption", "bool (on/off)", "Encrypt the disk with AES; on is short for encrypt.format=aes", None, ""),
    CreateOption("encrypt.format", "str", "Encrypt the disk: luks, or aes (obsolete)", None, "encrypt.format"),
    CreateOption("encrypt.key-secret", "str", "Id of the secret object with the passphrase", None, "encrypt.key-secret"),
    CreateOption("encrypt.cipher-alg", "str", "Cipher: aes-128, aes-192, aes-256", None, "encrypt.cipher-alg"),
    CreateOption("encrypt.cipher-mode", "str", "Mode of the cipher: xts, cbc", None, "encrypt.cipher-mode"),
    CreateOption("encrypt.ivgen-alg", "str", "What vectors are made of: plain, plain64, essiv", None, "encrypt.ivgen-alg"),
    CreateOption("encrypt.ivgen-hash-alg", "str", "Hash for the vectors of essiv", None, "encrypt.ivgen-hash-alg"),
    CreateOption("encrypt.hash-alg", "str", "Hash for the passphrase", None, "encrypt.hash-alg"),
    CreateOption("encrypt.iter-time", "num", "Milliseconds that unlocking is to take", None, "encrypt.iter-time"),
    CreateOption("cluster_size", "size", "Size of a cluster, 512 to 2M", 65536, "cluster-size"),
    CreateOption("extended_l2", "bool (on/off)", "Subclusters (extended L2 tables)", False, "extended-l2"),
    CreateOption("preallocation", "str", "What to allocate at once: off, metadata, falloc, full", None, "preallocation"),
    CreateOption("compression_type", "str", "How clusters are compressed: zlib, zstd", "zlib", "compression-type"),
    CreateOption("size", "size", "Size of the disk", None, "size"),
    CreateOption("compat", "str", "Version of the format: v2 [0.10] or v3 [1.1]", None, "version"),
    CreateOption("backing_file", "str", "File that holds what is not in this one", None, "backing-file"),
    CreateOption("backing_fmt", "str", "Format of the backing file", None, "backing-fmt"),
    CreateOption("data_file", "str", "File that holds the data, while this one holds metadata", None, "data-file"),
    CreateOption("data_file_raw", "bool (on/off)", "Keep the data file usable as a raw image", None, "data-file-raw"),
    CreateOption("lazy_refcounts", "bool (on/off)", "Write reference counts late", False, "lazy-refcounts"),
    CreateOption("refcount_bits", "num", "Width of a reference count", 16, "refcount-bits"),
)
FILE_OPTIONS: Final = (
    CreateOption("size", "size", "Size of the disk", None, "size"),
    CreateOption("nocow", "bool (on/off)", "No copy-on-write by the file system (btrfs)", None, "nocow"),
    CreateOption("preallocation", "str", "What to allocate at once: off, falloc, full", None, "preallocation"),
    CreateOption("extent_size_hint", "size", "Unit in which the file system allocates (XFS)", None, "extent-size-hint"),
)
"""What a plain file can be given; formats that are stored in one take them besides their own."""
RAW_OPTIONS: Final = FILE_OPTIONS[:1]
_ALWAYS: Final = tuple(option for option in QCOW2_OPTIONS if option.name in ("size", "backing_file", "backing_fmt"))
FORMATS: Final[Mapping[str, tuple[CreateOption, ...]]] = {"qcow2": QCOW2_OPTIONS, "raw": RAW_OPTIONS}
"""The options of each format itself, see `options_with_file`."""


def options_of(fmt: str) -> tuple[CreateOption, ...]:
    """The options of a format that can be created; raises for any other."""
    if fmt not in FORMATS:
        raise CommandError(f"images of the format '{fmt}' cannot be created; these can: {', '.join(sorted(FORMATS))}")
    return FORMATS[fmt]


def options_with_file(fmt: str) -> tuple[CreateOption, ...]:
    """The options of a format and those of the file that holds it, in the order of the "Formatting" line."""
    own = options_of(fmt)
    if fmt == "raw":
        return FILE_OPTIONS
    names = {option.name for option in own}
    return own + tuple(option for option in FILE_OPTIONS if option.name not in names)


def formatting_line(filename: str, fmt: str, values: Mapping[str, Any]) -> str:
    """The line that tells what is being made; of a format that is not known here, size and backing file only."""
    words = [f"Formatting '{filename}', fmt={fmt}"]
    for option in options_with_file(fmt) if fmt in FORMATS else _ALWAYS:
        value = values.get(option.name, option.default)
        if value is not None:
            words.append(f"{option.name}={option.shown(value)}")
    return " ".join(words)
