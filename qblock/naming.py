"""By which name a node can be opened again: its plain file name, or all its options as a ``json:`` name.

Models what QEMU 7.2 shows as ``filename`` (semantics.md section 7) and writes into headers when a job changes a backing link.
What does not change what a node shows is left out. Nothing here blocks.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

import attrs

from qblock.driver import BackingLink, SupportsBacking
from qblock.filenames import combine_filename
from qblock.nodespec import CommonOptions
from qblock.options import fields
from qblock.permissions import ChildRole

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.node import BlockDriverState

_COMMON: Final = frozenset(field.wire for field in fields(CommonOptions))
_ORDER: Final = (
    "opt-write-zero", "max-write-zero", "offset", "read-zeroes", "read-pattern", "throttle-group", "children", "test", "log",
    "log-sector-size", "backing", "image", "max-transfer", "driver", "config", "opt-discard", "max-discard", "align", "raw",
    "size", "log-append", "file", "target", "filename", "blkverify", "rewrite-corrupted", "vote-threshold",
)  # fmt: skip
"""The order in which QEMU prints options in ``json:`` names; what is not listed comes before."""
_RULES: Final = ("inject-error", "set-state")
"""Options that are lists of objects; QEMU gives each of their members a dotted key."""
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


MAX_NAME: Final = 4095
"""Characters of a name that are shown, as in QEMU; of a longer one the end is replaced by dots."""


@attrs.define(eq=False)
class Names:
    """The names of nodes, each worked out once, however deep the chain: for one question, during which nothing changes."""

    _options: dict[BlockDriverState, str] = attrs.field(factory=dict, init=False)

    def filename_of(self, node: BlockDriverState) -> str:
        """The plain name from which ``node`` can be opened again, or its options as a ``json:`` name."""
        while (edge := node.storage) is not None and (node.implicit or node.driver.name in _NAMED_BY_CHILD):
            node = edge.node
        name = node.driver.filename()
        if name is not None and not self._differs(node):
            return name
        shown = f"json:{self._options_of(node)}"
        return shown if len(shown) <= MAX_NAME else f"{shown[: MAX_NAME - 3]}..."

    def _differs(self, node: BlockDriverState) -> bool:
        """Whether opening ``node`` by its plain name would give it something else below."""
        if node.driver.is_filter:
            return node.storage is not None and self.filename_of(node.storage.node).startswith("json:")
        return self._backing_differs(node)

    def _backing_differs(self, node: BlockDriverState) -> bool:
        """Whether opening the image without telling its backing image would give it another one than it has now."""
        link = link_of(node)
        if link is None or node.backing is None:
            return (link is None) is not (node.backing is None)
        self._options_of(node.backing.node)  # from the bottom of the chain, lest the next line descends as deep as the chain
        meant, present = combine_filename(_file_below(node), link.filename), self.filename_of(node.backing.node)
        return meant != present and (
            present.startswith("json:") or os.path.abspath(meant) != os.path.abspath(present)
        )

    def _options_of(self, node: BlockDriverState) -> str:
        """The options from which ``node`` can be opened again, as JSON, without those that do not change what it shows.

        Texts are cut where nothing that is shown can come from behind, so that they stay short in the longest chain.
        """
        pending = [node]
        while pending:
            current = pending[-1]
            below = [edge.node for edge in current.children.values() if edge.node not in self._options]
            if below:
                pending += below
            else:
                pending.pop()
                if current not in self._options:
                    self._options[current] = self._describe(current)[: MAX_NAME + 1]
        return self._options[node]

    def _describe(self, node: BlockDriverState) -> str:
        if node.filtered is not None and (node.implicit or node.driver.name in _INSERTED_BY_JOBS):
            return self._options[node.filtered.node]
        shown = _SHOWN.get(node.driver.name, node.options_given.keys() - _COMMON)
        options: dict[str, str] = {}
        for key, value in node.options_given.items():
            if key in shown:
                given = _flat_rules(key, value) if key in _RULES else {key: value}
                options |= {name: json.dumps(one) for name, one in given.items()}
        shows_backing = not node.driver.is_filter and self._backing_differs(node)
        lists: dict[str, list[str]] = {}
        for child, edge in node.children.items():
            if edge.role is ChildRole.BACKING and not shows_backing:
                continue
            name, dot, _ = child.partition(".")
            text = self._options[edge.node]
            if dot:  # one of a list
                lists.setdefault(name, []).append(text)
                text = "[" + ", ".join(lists[name]) + "]"
            options[name] = text
        if shows_backing and node.driver.supports_backing:
            options.setdefault("backing", "null")
        options["driver"] = json.dumps(node.driver.name)
        keys = [key for key in options if key not in _ORDER] + [key for key in _ORDER if key in options]
        return "{" + ", ".join(f"{json.dumps(key)}: {options[key]}" for key in keys) + "}"


def filename_of(node: BlockDriverState) -> str:
    """The name of one node; see `Names.filename_of`."""
    return Names().filename_of(node)


def _file_below(node: BlockDriverState) -> str:
    """The plain name of the file in which an image is stored, whatever lies in between; empty when there is none."""
    while (name := node.driver.filename()) is None and node.storage is not None:
        node = node.storage.node
    return name or ""


def link_of(node: BlockDriverState) -> BackingLink | None:
    """What the header of ``node`` says of its backing file; None when it names none."""
    driver = node.driver
    return driver.backing_link() if isinstance(driver, SupportsBacking) else None


def _flat_rules(key: str, rules: Iterable[Mapping[str, Json]]) -> dict[str, Json]:
    """``inject-error`` and the like with a key for each member, as they were given."""
    return {f"{key}.{index}.{name}": value for index, rule in enumerate(rules) for name, value in rule.items()}


def link_to(node: BlockDriverState, *, text: str | None = None) -> BackingLink | None:
    """What a header is to say of ``node`` as its backing: ``text``, or the name of the node, and the name of its driver; nothing
    if the text is empty.
    """
    name = filename_of(node) if text is None else text
    return BackingLink(name, node.driver.name) if name else None


def format_of(node: BlockDriverState) -> str:
    """The format of an image: raw for storage without one."""
    return "raw" if node.driver.is_protocol else node.driver.name
