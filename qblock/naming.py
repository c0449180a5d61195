"""By which name a node can be opened again: its plain file name, or all its options as a ``json:`` name.

Models what QEMU 7.2 shows as ``filename`` (semantics.md section 7) and writes into headers when a job changes a backing link.
What does not change what a node shows is left out. Nothing here blocks.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from qblock.driver import BackingLink, SupportsBacking
from qblock.filenames import combine_filename
from qblock.nodespec import CommonOptions
from qblock.options import dump, fields
from qblock.permissions import ChildRole

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.node import BlockDriverState

_COMMON: Final = frozenset(field.wire for field in fields(CommonOptions))
_AFTER_DRIVER: Final = ("size", "file", "target", "filename")
"""Options that QEMU prints behind the driver in ``json:`` names; the others come before it."""
_SHOWN: Final[Mapping[str, frozenset[str]]] = {
    "compress": frozenset(),
    "copy-before-write": frozenset(),
    "copy-on-read": frozenset(),
    "file": frozenset({"filename"}),
    "null-aio": frozenset({"read-zeroes", "size"}),
    "null-co": frozenset({"read-zeroes", "size"}),
    "preallocate": frozenset(),
    "qcow2": frozenset(),
    "raw": frozenset({"offset", "size"}),
    "snapshot-access": frozenset(),
    "throttle": frozenset({"throttle-group"}),
}
"""The options that change what a node of the driver shows; of drivers not listed all are shown."""
_NAMED_BY_CHILD: Final = frozenset({"commit_top", "copy-before-write", "mirror_top", "snapshot-access"})
"""Drivers whose nodes show the file name of the node they lie on."""


def filename_of(node: BlockDriverState) -> str:
    """The plain name from which ``node`` can be opened again, or its options as a ``json:`` name."""
    if node.storage is not None and (node.implicit or node.driver.name in _NAMED_BY_CHILD):
        return filename_of(node.storage.node)
    name = node.driver.filename()
    is_enough = name is not None and (node.driver.is_filter or not _backing_differs(node))
    return name if name is not None and is_enough else "json:" + json.dumps(_options_of(node))


def _backing_differs(node: BlockDriverState) -> bool:
    """Whether opening the image without telling its backing image would give it another one than it has now."""
    link = link_of(node)
    if link is None or node.backing is None:
        return (link is None) is not (node.backing is None)
    meant, present = combine_filename(_file_below(node), link.filename), filename_of(node.backing.node)
    return meant != present and (
        present.startswith("json:") or os.path.abspath(meant) != os.path.abspath(present)
    )


def _file_below(node: BlockDriverState) -> str:
    """The plain name of the file in which an image is stored, whatever lies in between; empty when there is none."""
    while (name := node.driver.filename()) is None and node.storage is not None:
        node = node.storage.node
    return name or ""


def link_of(node: BlockDriverState) -> BackingLink | None:
    """What the header of ``node`` says of its backing file; None when it names none."""
    driver = node.driver
    return driver.backing_link() if isinstance(driver, SupportsBacking) else None


def _options_of(node: BlockDriverState) -> dict[str, Json]:
    """The options from which ``node`` can be opened again, without those that do not change what it shows."""
    shown = _SHOWN.get(node.driver.name, node.options_given.keys() - _COMMON)
    values = dump(node.driver.options)
    options = {key: values[key] for key in node.options_given if key in shown and key in values}
    shows_backing = not node.driver.is_filter and _backing_differs(node)
    for child, edge in node.children.items():
        if edge.role is not ChildRole.BACKING or shows_backing:
            options[child] = _options_of(edge.node)
    if shows_backing and node.driver.supports_backing:
        options.setdefault("backing", None)
    first = {key: value for key, value in options.items() if key not in _AFTER_DRIVER}
    last = {key: options[key] for key in _AFTER_DRIVER if key in options}
    return first | {"driver": node.driver.name} | last


def link_to(node: BlockDriverState, *, text: str | None = None) -> BackingLink:
    """What a header is to say of ``node`` as its backing: ``text``, or the name of the node, and the name of its driver."""
    return BackingLink(text or filename_of(node), "raw" if node.driver.is_protocol else node.driver.name)
