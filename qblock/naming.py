"""By which name a node can be opened again: its plain file name, or all its options as a ``json:`` name.

Models what QEMU 7.2 shows as ``filename`` (semantics.md section 7) and writes into headers when a job changes a backing link.
What does not change what a node shows is left out. Nothing here blocks.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Iterable, Mapping
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
_AFTER_DRIVER: Final = (
    "size", "log-append", "file", "target", "filename", "blkverify", "rewrite-corrupted", "vote-threshold",
)  # fmt: skip
"""Options that QEMU prints behind the driver in ``json:`` names; the others come before it."""
_RULES: Final = ("inject-error", "set-state")
"""Options that are lists of objects; QEMU gives each of their members a dotted key."""
_BEHIND_CHILDREN: Final = ("log-sector-size",)
"""Options that come behind the children before the driver; the others before it come in their order, then the children."""
_SHOWN: Final[Mapping[str, frozenset[str]]] = {
    "blkdebug": frozenset({
        "align", "config", "inject-error", "max-discard", "max-transfer", "max-write-zero", "opt-discard", "opt-write-zero",
        "set-state",
    }),
    "blklogwrites": frozenset({"log-append", "log-sector-size"}),
    "blkverify": frozenset(),
    "compress": frozenset(),
    "copy-before-write": frozenset(),
    "copy-on-read": frozenset(),
    "file": frozenset({"filename"}),
    "null-aio": frozenset({"read-zeroes", "size"}),
    "null-co": frozenset({"read-zeroes", "size"}),
    "preallocate": frozenset(),
    "qcow2": frozenset(),
    "quorum": frozenset({"blkverify", "read-pattern", "rewrite-corrupted", "vote-threshold"}),
    "raw": frozenset({"offset", "size"}),
    "snapshot-access": frozenset(),
    "throttle": frozenset({"throttle-group"}),
}
"""The options that change what a node of the driver shows; of drivers not listed all are shown."""
_NAMED_BY_CHILD: Final = frozenset({"commit_top", "copy-before-write", "mirror_top", "snapshot-access"})
"""Drivers whose nodes show the file name of the node they lie on."""
_INSERTED_BY_JOBS: Final = frozenset({"commit_top", "mirror_top"})
"""Drivers of nodes that cannot be opened by options."""


def filename_of(node: BlockDriverState) -> str:
    """The plain name from which ``node`` can be opened again, or its options as a ``json:`` name."""
    if node.storage is not None and (node.implicit or node.driver.name in _NAMED_BY_CHILD):
        return filename_of(node.storage.node)
    name = node.driver.filename()
    is_enough = name is not None and (node.driver.is_filter or not _backing_differs(node))
    return name if name is not None and is_enough else "json:" + json.dumps(_options_of(node))


def _without_filters_of_jobs(node: BlockDriverState) -> BlockDriverState:
    while node.filtered is not None and (node.implicit or node.driver.name in _INSERTED_BY_JOBS):
        node = node.filtered.node
    return node


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
    node = _without_filters_of_jobs(node)
    shown = _SHOWN.get(node.driver.name, node.options_given.keys() - _COMMON)
    values = dump(node.driver.options)
    options: dict[str, Json] = {}
    for key in node.options_given:
        if key in shown and key in values:
            options |= _flat_rules(key, node.options_given[key]) if key in _RULES else {key: values[key]}
    shows_backing = not node.driver.is_filter and _backing_differs(node)
    for child, edge in node.children.items():
        if edge.role is ChildRole.BACKING and not shows_backing:
            continue
        name, dot, _ = child.partition(".")
        if dot:  # one of a list
            options.setdefault(name, []).append(_options_of(edge.node))
        else:
            options[child] = _options_of(edge.node)
    if shows_backing and node.driver.supports_backing:
        options.setdefault("backing", None)
    early = [key for key in options if key not in _AFTER_DRIVER]
    first = {key: options[key] for key in sorted(early, key=lambda key: key in _BEHIND_CHILDREN)}
    last = {key: options[key] for key in _AFTER_DRIVER if key in options}
    return first | {"driver": node.driver.name} | last


def _flat_rules(key: str, rules: Iterable[Mapping[str, Json]]) -> dict[str, Json]:
    """``inject-error`` and the like with a key for each member, as they were given."""
    return {f"{key}.{index}.{name}": value for index, rule in enumerate(rules) for name, value in rule.items()}


def link_to(node: BlockDriverState, *, text: str | None = None) -> BackingLink:
    """What a header is to say of ``node`` as its backing: ``text``, or the name of the node, and the name of its driver."""
    return BackingLink(text or filename_of(node), "raw" if node.driver.is_protocol else node.driver.name)
