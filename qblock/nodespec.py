"""From options to a checked description of a tree of nodes, before any of them is opened.

Models the input side of ``blockdev-add`` (semantics.md section 10.1): the whole tree is checked against the options of its
drivers first, so that a wrong member opens no file. Differs from QEMU in that inheritance of common options from parent to
child is resolved here, in one place: a child takes over ``read-only``, ``auto-read-only``, ``cache`` and ``force-share`` of its
parent unless it sets them itself, and ``aio`` where a command line gives it for a whole tree; the storage of a format takes
``discard`` (the format decides what it passes on); a backing child is read-only unless its own options say otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

import attrs

from qblock.driver import Driver, Json
from qblock.errors import CommandError, InvalidParameter
from qblock.node import BlockDriverState
from qblock.options import ABSENT, Field, dump, fields, option, required, visit
from qblock.permissions import ChildRole
from qblock.registry import DriverRegistry

MAX_NESTING: Final = 200
"""How deep options may be nested; longer chains are opened from headers or built by reference."""


DISCARD_WORDS: Final[Mapping[str, str]] = {"ignore": "ignore", "off": "ignore", "unmap": "unmap", "on": "unmap"}
"""The option ``discard`` as command lines may spell it."""


@attrs.frozen
class CacheOptions:
    """``BlockdevCacheOptions``."""

    direct: bool | None = option(None, doc="bypass the host's page cache (O_DIRECT)", since="2.9")
    no_flush: bool | None = option(None, doc="ignore flush requests: data are lost in a crash", since="2.9")


@attrs.frozen
class CommonOptions:
    """The members that the options of every driver have (``BlockdevOptions``)."""

    driver: str = required(doc="name of the driver", since="2.9")
    node_name: str | None = option(None, doc="name of the node", since="2.0")
    discard: Literal["ignore", "unmap"] | None = option(None, doc="whether discard requests are passed on", since="2.9")
    cache: CacheOptions | None = option(None, doc="cache-related options", since="2.9")
    read_only: bool | None = option(None, doc="whether the node is read-only", since="2.9")
    auto_read_only: bool | None = option(None, doc="fall back to read-only when writing is not possible", since="3.1")
    force_share: bool | None = option(None, doc="read an image that others may be writing to", since="2.10")
    detect_zeroes: Literal["off", "on", "unmap"] = option(
        "off", doc="turn writes of zeroes into zero writes", since="2.1"
    )


@attrs.frozen
class NodeFlags:
    """The common options in force on a node, inheritance resolved."""

    read_only: bool = False
    auto_read_only: bool = False
    cache_direct: bool = False
    cache_no_flush: bool = False
    force_share: bool = False
    discard_unmap: bool = False
    aio: str = "threads"
    """How files run their requests that do not say it themselves: ``BlockdevAioOptions``."""
    describe_only: bool = False
    """Opened to be asked what it is; an encrypted image is not unlocked for that, and shows no content."""
    to_check: bool = False
    """Opened to be checked and repaired: damage that a repair mends does not forbid writing."""

    def for_child(self, role: ChildRole) -> NodeFlags:
        """What a child in ``role`` inherits when its own options are silent."""
        if role is ChildRole.BACKING:
            return attrs.evolve(self, read_only=True, auto_read_only=False, discard_unmap=False, to_check=False)
        passes_discard = role in (ChildRole.STORAGE, ChildRole.METADATA, ChildRole.DATA)
        return attrs.evolve(self, discard_unmap=passes_discard or self.discard_unmap)

    def apply(self, common: CommonOptions) -> NodeFlags:
        """These flags where ``common`` is silent, its own otherwise."""
        cache = common.cache or CacheOptions()
        return NodeFlags(
            read_only=_either(common.read_only, self.read_only),
            auto_read_only=_either(common.auto_read_only, self.auto_read_only),
            cache_direct=_either(cache.direct, self.cache_direct),
            cache_no_flush=_either(cache.no_flush, self.cache_no_flush),
            force_share=_either(common.force_share, self.force_share),
            discard_unmap=self.discard_unmap if common.discard is None else common.discard == "unmap",
            aio=self.aio,
            describe_only=self.describe_only,
            to_check=self.to_check,
        )

    def for_another(self) -> NodeFlags:
        """What an image takes over that is opened by its file name to go above this one, or to get its content."""
        return NodeFlags(
            cache_direct=self.cache_direct, cache_no_flush=self.cache_no_flush, discard_unmap=self.discard_unmap, aio=self.aio
        )

    def set_on(self, node: BlockDriverState) -> None:
        """Store the flags in the node's fields of the same names."""
        for name, value in attrs.asdict(self).items():
            setattr(node, name, value)

    @classmethod
    def of(cls, node: BlockDriverState) -> NodeFlags:
        """The flags that a node has."""
        return cls(**{field.name: getattr(node, field.name) for field in attrs.fields(cls)})


NO_FLAGS: Final = NodeFlags()
"""What a node inherits that is opened by itself."""


@attrs.frozen
class MediumFlags:
    """How the image of a drive is opened, whichever it is: what a drive keeps when it gets another one."""

    flags: NodeFlags = NO_FLAGS
    detect_zeroes: str = "off"
    copy_on_read: bool = False

    def options(self) -> dict[str, Any]:
        """The options of the image's top node that stand for them; read-only and force-share are not among them."""
        return {
            "cache": {"direct": self.flags.cache_direct, "no-flush": self.flags.cache_no_flush},
            "discard": "unmap" if self.flags.discard_unmap else "ignore",
            "detect-zeroes": self.detect_zeroes,
            "auto-read-only": self.flags.auto_read_only,
        }

    @classmethod
    def of(cls, node: BlockDriverState) -> MediumFlags:
        """Those of an open image."""
        return cls(NodeFlags.of(node), node.detect_zeroes, bool(node.copy_on_read))


def _either(own: bool | None, inherited: bool) -> bool:
    return inherited if own is None else own


@attrs.frozen
class NodeReference:
    """A child given by the name of a device or node that exists already."""

    name: str
    path: str


@attrs.frozen(eq=False)
class UnprobedSpec:
    """A child that is an image whose options do not tell its driver, with the flags that it inherits."""

    given: Mapping[str, Json]
    flags: NodeFlags
    path: str


@attrs.frozen(eq=False)
class NodeSpec:
    """One node to be opened. ``children`` holds the inline and referenced ones; ``backing`` is absent from it when it is to
    be taken from the header, and None when there shall be none.
    """

    driver: type[Driver]
    common: CommonOptions
    options: Any
    flags: NodeFlags
    children: Mapping[str, NodeSpec | NodeReference | UnprobedSpec | None]
    given: Mapping[str, Json]


def specs_of(spec: NodeSpec) -> Iterator[NodeSpec]:
    """A node's description, and those of all inline nodes below it."""
    yield spec
    for child in spec.children.values():
        if isinstance(child, NodeSpec):
            yield from specs_of(child)


def child_fields(driver: type[Driver]) -> list[Field]:
    """The options of a driver that name children."""
    return [field for field in fields(driver.options_class) if field.role is not None]


def child_names(spec: NodeSpec) -> Iterator[tuple[str, Field]]:
    """The names that the children of a node can have by its driver and its options, each with its option."""
    for field in child_fields(spec.driver):
        if field.many:
            yield from ((name, field) for name in spec.children if name.startswith(f"{field.wire}."))
        else:
            yield field.wire, field


_COMMON: Final = frozenset(field.wire for field in fields(CommonOptions))


@attrs.frozen
class SpecReader:
    """Checks options against the drivers of a registry. ``strings``: leaves may be text, as on a command line.

    ``keeps_text``: what nodes remember of their options is that text (drives do that), and not the values that it stands for.
    """

    registry: DriverRegistry
    strings: bool = False
    keeps_text: bool = False

    def read(self, given: Mapping[str, Json], inherited: NodeFlags, *, path: str = "", depth: int = 0) -> NodeSpec:
        """The checked description of a node and its inline children; raises `InvalidParameter` and `UnknownDriver`."""
        if depth > MAX_NESTING:
            raise CommandError(f"The options are nested more than {MAX_NESTING} deep at '{path}'")
        prefix = f"{path}." if path else ""
        if not isinstance(given.get("driver"), str):
            raise InvalidParameter(f"{prefix}driver", "must be a string" if "driver" in given else "is missing")
        driver = self.registry.get(given["driver"])
        own = {key: value for key, value in given.items() if key not in _COMMON}
        shared = {key: value for key, value in given.items() if key in _COMMON}
        common: CommonOptions = visit(CommonOptions, shared, path=path, strings=self.strings)
        options = visit(driver.options_class, own, path=path, strings=self.strings)
        flags = inherited.apply(common)
        _check_combination(common, flags, prefix)
        children = {
            name: self._child(field, ref, flags, f"{prefix}{name}", depth)
            for name, field, ref in _references(driver, options)
        }
        remembered = dict(given) if self.keeps_text else _as_values(given, dump(options))
        return NodeSpec(driver, common, options, flags, children, remembered)

    def flags(self, given: Mapping[str, Json], inherited: NodeFlags) -> NodeFlags:
        """The common flags that the options of a node set, whose driver may not be known yet; raises `InvalidParameter`."""
        shared = {key: value for key, value in given.items() if key in _COMMON}
        return inherited.apply(visit(CommonOptions, {"driver": "", **shared}, strings=self.strings))

    def read_file(self, given: Mapping[str, Json], inherited: NodeFlags, *, path: str, depth: int = 0) -> NodeSpec:
        """As `read`; in text a child with a ``filename`` and without a ``driver`` is a file."""
        if self.strings and "driver" not in given and "filename" in given:
            given = {"driver": "file", **given}
        return self.read(given, inherited, path=path, depth=depth)

    def _child(
        self, field: Field, ref: Any, flags: NodeFlags, path: str, depth: int
    ) -> NodeSpec | NodeReference | UnprobedSpec | None:
        assert field.role is not None
        if ref is None or (ref == "" and field.nullable):
            return None
        if isinstance(ref, str):
            return NodeReference(ref, path)
        if field.standalone and ref.get("backing") is not None:
            raise InvalidParameter(
                f"{path}.backing", "can only be null here: this image is opened without its backing file"
            )
        is_image = field.standalone or field.probed
        if is_image and self.strings and "driver" not in ref and isinstance(ref.get("file"), Mapping):
            return UnprobedSpec(ref, flags.for_child(field.role), path)
        return self.read_file(ref, flags.for_child(field.role), path=path, depth=depth + 1)


def _references(driver: type[Driver], options: Any) -> Iterator[tuple[str, Field, Any]]:
    """The children that options give: name, option, and what the option says; raises `InvalidParameter`."""
    for field in child_fields(driver):
        given = getattr(options, field.attribute)
        if not field.many:
            if given is not ABSENT:
                yield field.wire, field, given
            continue
        for index, ref in enumerate(given):
            if ref is None:
                raise InvalidParameter(f"{field.wire}[{index}]", "must not be null")
            yield f"{field.wire}.{index}", field, ref


def _as_values(given: Any, values: Any) -> Any:
    """``given`` with the ``values`` that its leaves stand for; members that have none stay as they are."""
    if isinstance(given, Mapping) and isinstance(values, Mapping):
        return {key: _as_values(item, values[key]) if key in values else item for key, item in given.items()}
    if isinstance(given, list) and isinstance(values, list):
        return [_as_values(item, value) for item, value in zip(given, values, strict=True)]
    return values


def _check_combination(common: CommonOptions, flags: NodeFlags, prefix: str) -> None:
    if common.detect_zeroes == "unmap" and not flags.discard_unmap:
        raise InvalidParameter(f"{prefix}detect-zeroes", "can be 'unmap' only together with discard=unmap")
    if flags.force_share and not flags.read_only:
        raise InvalidParameter(f"{prefix}force-share", "can be on only for a node that is read-only")
    if common.cache == CacheOptions():
        raise InvalidParameter(f"{prefix}cache", "must say something of 'direct' or 'no-flush'; leave it out if it shall not")
