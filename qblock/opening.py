"""From options or a file name to open nodes, and from unused nodes back to closed files.

Models ``bdrv_open`` and ``blockdev-add`` (semantics.md section 10.1). A tree is checked whole (`nodespec.py`), then opened
from the storage upwards; a failure closes what was opened. What an image's header names is opened only when the `OpenPolicy`
says so. Backing chains are walked in a loop, not by recursion, so their length is bounded by memory and descriptors only; a
chain that leads back to itself is refused. Differs from QEMU in that a node without users is closed by `close_orphans`, an
explicit step of whoever took the last user away, since closing has to wait for writes.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os.path
from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

import attrs

from qblock.backend import BlockBackend
from qblock.drain import pause_above, wait_idle
from qblock.driver import BackingLink, Driver, Json, SupportsBacking, SupportsDataFile
from qblock.environment import Environment
from qblock.errors import BlockIOError, CommandError, CorruptImage, InvalidParameter, NodeNotFound, QBlockError
from qblock.filenames import combine_filename, has_protocol
from qblock.graph import Graph, check_node_name
from qblock.node import BlockDriverState
from qblock.nodespec import (
    MAX_NESTING,
    NO_FLAGS,
    NodeFlags,
    NodeReference,
    NodeSpec,
    SpecReader,
    UnprobedSpec,
    child_names,
    specs_of,
)
from qblock.options import DriverOptions, parse_json_filename, unflatten_dotted
from qblock.permissions import ChildRole, Perm
from qblock.policy import Mention, OpenPolicy
from qblock.registry import DriverRegistry
from qblock.requests import flush, refresh_length
from qblock.transaction import Transaction

__all__ = ["OpenPolicy", "Opener", "combine_filename"]

PROBE_SIZE: Final = 2048
"""How many bytes of a file a driver's ``probe`` is shown."""
MAX_LENGTH: Final = (1 << 63) - (1 << 30)
"""How many bytes a node may have: what 64 bits with a sign can count, less a margin for aligning."""
PROBED_FIRST: Final = ("qcow2", "raw")
"""Our own formats; drivers of other packages are loaded for probing only when none but raw fits."""

_FilterDriver = TypeVar("_FilterDriver", bound=Driver)


@attrs.frozen(eq=False)
class _Layer:
    """An open node whose backing is still to be seen to, with the options it was opened by."""

    node: BlockDriverState
    spec: NodeSpec


class Opener:
    """Opens and closes nodes of one graph. ``policy`` decides on files that an image only mentions."""

    def __init__(self, graph: Graph, registry: DriverRegistry, env: Environment, policy: OpenPolicy) -> None:
        self.graph = graph
        self.registry = registry
        self.env = env
        self.policy = policy
        self._pinned: set[BlockDriverState] = set()
        self._closing: asyncio.Lock | None = None

    # ------------------------------------------------------------------------------------------------------- opening

    async def open_blockdev(
        self,
        options: Mapping[str, Json],
        *,
        strings: bool = False,
        root: bool = True,
        inherited: NodeFlags = NO_FLAGS,
    ) -> BlockDriverState:
        """Open the tree that ``options`` (nested JSON; with ``strings`` leaves may be text) describe; gives its root.

        ``root``: the node is to be the monitor's, so it needs a ``node-name``. ``inherited`` holds where options are silent.
        Raises `CommandError` (options, names, permissions), `ImageError` and `BlockIOError`; nothing stays open then. The
        caller gives the node its first user, or sets ``monitor_owned``, before it awaits again.
        """
        spec = SpecReader(self.registry, strings).read(options, inherited)
        if root and not spec.common.node_name:
            raise InvalidParameter("node-name", "is missing: the root of a tree of nodes needs a name")
        return await self._open_tree(spec)

    async def open_image(
        self,
        filename: str,
        *,
        fmt: str | None = None,
        read_only: bool = True,
        backing: bool = True,
        data_file: bool = True,
        options: Mapping[str, Json] | None = None,
        force_share: bool = False,
        to_check: bool = False,
        node_name: str | None = None,
        inherited: NodeFlags = NO_FLAGS,
    ) -> BlockDriverState:
        """Open an image by file name (or ``json:{…}``), probing the format when ``fmt`` is None.

        ``options`` are more options of the format node (dotted keys and text leaves are allowed). ``backing=False`` leaves
        the backing file of the header closed, ``data_file=False`` its data file: what the image says of itself can be asked
        then, not its content. ``to_check``: for a check and repair, see `NodeFlags`. ``inherited`` are flags for which there
        is no argument here. Raises and returns as `open_blockdev`.
        """
        flags = attrs.evolve(
            inherited, read_only=read_only, force_share=force_share, describe_only=not data_file, to_check=to_check
        )
        extra = unflatten_dotted(options or {})
        if node_name is not None:
            check_node_name(node_name)
            extra["node-name"] = node_name
        layer = await self._open_named(filename, fmt, flags, extra, data_file=data_file)
        if not backing:
            return self._hand_over(layer.node)
        return await self._with_backing(layer, {_identity(layer.node)})

    async def open_described(
        self, options: Mapping[str, Json], *, inherited: NodeFlags = NO_FLAGS
    ) -> BlockDriverState:
        """Open an image by options of its nodes, dotted keys and text leaves allowed; without a ``driver`` it is probed.

        Arguments, result and errors as of `open_blockdev`.
        """
        layer = await self._open_given(unflatten_dotted(options), inherited, shown="the drive")
        return await self._with_backing(layer, {_identity(layer.node)})

    async def open_backing_chain(self, node: BlockDriverState) -> None:
        """Open what the header of ``node`` names as its backing file, and the chain below; no link, nothing to do."""
        flags = NodeFlags.of(node)
        await self._open_chain(node, None, flags, {_identity(node)})

    async def _open_tree(self, spec: NodeSpec) -> BlockDriverState:
        node = await self._open_layer(spec)
        return await self._with_backing(_Layer(node, spec), {_identity(node)})

    async def _with_backing(self, layer: _Layer, seen: set[str]) -> BlockDriverState:
        try:
            await self._open_chain(layer.node, layer.spec, layer.spec.flags, seen)
        except BaseException:
            await self._close_tree(layer.node)
            raise
        return self._hand_over(layer.node)

    def _hand_over(self, node: BlockDriverState) -> BlockDriverState:
        self._pinned.discard(node)
        return node

    async def _open_layer(
        self, spec: NodeSpec, storage: BlockDriverState | None = None, *, data_file: bool = True
    ) -> BlockDriverState:
        """Open one node with all its children but the backing; ``storage`` is its storage child if it was opened for probing.

        ``data_file=False`` leaves a data file that its header names closed: it can be asked what it is, but has no content.
        """
        node = self._make_node(spec)
        node.probed = storage is not None and spec.driver.name == "raw"
        node.closed = True  # others who find it by its name must not use it yet
        self._pinned.add(node)
        try:
            for name, field in child_names(spec):
                assert field.role is not None
                ref = spec.children.get(name)
                if storage is not None and field.role in (ChildRole.STORAGE, ChildRole.PRIMARY_DATA):
                    self._attach(node, storage, name, field.role)
                elif ref is not None and field.role is not ChildRole.BACKING:
                    child = await self._open_child(ref, standalone=field.standalone)
                    if name == "file" and isinstance(ref, NodeReference):
                        await pause_above(child, times=2)
                    self._attach(node, child, name, field.role)
                if name == "file":
                    self.graph.list_last(node)
            await self._open_data_file(node, spec.flags, wanted=data_file)
            if (hit := self.env.trace.bdrv_open_common) is not None:
                hit(node=node.node_name, filename=node.driver.filename() or "", driver=node.driver.name)
            await node.driver.open()
            _check_length(node)
        except BaseException:
            await self._close_tree(node, opened=False)
            await self.close_orphans()  # a child that could not be attached
            raise
        node.closed = False
        refresh_length(node)
        return node

    async def _open_data_file(self, node: BlockDriverState, flags: NodeFlags, *, wanted: bool) -> None:
        """Open the data file that the header of ``node`` names. It must be plain storage, so that it names no more files."""
        if not isinstance(node.driver, SupportsDataFile):
            return
        name = await node.driver.data_file_link() if wanted else None
        if name is None:
            return
        image = _file_of(node) or node.node_name
        self.policy.check(Mention(image, name, "data file", "raw"))
        if os.path.realpath(name) == os.path.realpath(image):
            raise CorruptImage(image, "its data file is the image file itself")
        options = parse_json_filename(name) or self._storage_of(name)
        spec = SpecReader(self.registry, strings=True).read_file(options, flags.for_child(ChildRole.DATA), path="data-file")
        if any(hasattr(part.driver, "data_file_link") for part in specs_of(spec)):
            raise CorruptImage(image, f"its data file '{name}' is an image itself; give it in the options if it shall be")
        try:
            child = await self._open_tree(spec)
        except QBlockError as error:
            error.add_note(f"'{name}' is the data file of '{image}'")
            raise
        self._pinned.add(child)
        if _identity(child) == os.path.realpath(image):
            await self._close_tree(child)
            raise CorruptImage(image, "its data file is the image file itself")
        self._attach(node, child, "data-file", ChildRole.DATA)

    def _make_node(self, spec: NodeSpec) -> BlockDriverState:
        node = BlockDriverState(spec.common.node_name or "", options_given=spec.given)
        spec.flags.set_on(node)
        node.detect_zeroes = spec.common.detect_zeroes
        node.driver = spec.driver(node, spec.options, self.env)
        self.graph.add_node(node)
        return node

    async def _open_child(self, ref: NodeSpec | NodeReference | UnprobedSpec, *, standalone: bool) -> BlockDriverState:
        if isinstance(ref, NodeReference):
            node = self.graph.lookup(ref.name)
            if node.closed:  # it is being opened or closed: not to be attached, nor to be closed when that fails
                raise NodeNotFound(ref.name)
            return node
        if isinstance(ref, UnprobedSpec):
            layer = await self._open_given(ref.given, ref.flags, shown=ref.path)
            return layer.node if standalone else await self._with_backing(layer, {_identity(layer.node)})
        return await (self._open_layer(ref) if standalone else self._open_tree(ref))

    def _attach(self, parent: BlockDriverState, child: BlockDriverState, name: str, role: ChildRole) -> None:
        fell_back = child.read_only and child.auto_read_only and not child.options_given.get("read-only")
        if fell_back and not parent.read_only and parent.auto_read_only and role is not ChildRole.BACKING:
            parent.read_only = True
        try:
            with Transaction() as change:
                self.graph.attach(parent, child, name=name, role=role, change=change)
        finally:
            self._pinned.discard(child)

    # --------------------------------------------------------------------------------------------------- backing chain

    async def _open_chain(
        self, node: BlockDriverState, spec: NodeSpec | None, flags: NodeFlags, seen: set[str]
    ) -> None:
        """Open the backing of ``node``, the backing of that, and so on; ``seen`` are the files opened so far."""
        while node.driver.supports_backing and node.backing is None:
            flags = flags.for_child(ChildRole.BACKING)
            if spec is not None and "backing" in spec.children:
                ref = spec.children["backing"]
                if ref is None:
                    return
                if isinstance(ref, NodeReference):
                    self._attach(node, self.graph.lookup(ref.name), "backing", ChildRole.BACKING)
                    return
                assert isinstance(ref, NodeSpec), "a backing child has a driver"
                below = _Layer(await self._open_layer(ref), ref)
            else:
                mentioned = await self._open_mentioned(node, flags, seen)
                if mentioned is None:
                    return
                below = mentioned
            try:
                self._attach(node, below.node, "backing", ChildRole.BACKING)
            except BaseException:
                await self._close_tree(below.node)
                raise
            seen.add(_identity(below.node))
            node, spec, flags = below.node, below.spec, below.spec.flags

    async def _open_mentioned(self, node: BlockDriverState, flags: NodeFlags, seen: set[str]) -> _Layer | None:
        """What the header of ``node`` names as its backing file, opened; None when it names none."""
        link = _link_of(node)
        if link is None:
            return None
        image = _file_of(node)
        if image is None and not (has_protocol(link.filename) or os.path.isabs(link.filename)):
            raise CommandError(
                f"Node '{node.node_name}' names the backing file '{link.filename}', but is stored in no file whose "
                "directory that could be relative to; give its backing node in the options"
            )
        image = image or node.node_name
        if "\0" in link.filename:
            raise CorruptImage(image, "the name of its backing file has a zero byte in it")
        filename = combine_filename(image, link.filename)
        self.policy.check(Mention(image, filename, "backing file", link.format))
        # Checked before the file is opened, which its locks may forbid, and after, since a json: name hides which file it is.
        if os.path.realpath(filename) in seen:
            raise _loop(image, filename)
        try:
            below = await self._open_named(filename, link.format, flags, {})
        except QBlockError as error:
            error.add_note(f"'{filename}' is the backing file of '{image}'")
            raise
        if _identity(below.node) in seen:
            await self._close_tree(below.node)
            raise _loop(image, filename)
        return below

    # ------------------------------------------------------------------------------------------------ names and probing

    async def _open_named(
        self, filename: str, fmt: str | None, flags: NodeFlags, extra: Mapping[str, Json], *, data_file: bool = True
    ) -> _Layer:
        """The node of an image file, without its backing."""
        given = merge(self._options_of(filename, fmt), extra)
        return await self._open_given(given, flags, shown=filename, data_file=data_file)

    async def _open_given(
        self, given: Mapping[str, Json], flags: NodeFlags, *, shown: str, data_file: bool = True
    ) -> _Layer:
        reader = SpecReader(self.registry, strings=True, keeps_text=True)
        if "driver" in given:
            spec = reader.read(given, flags)
            return _Layer(await self._open_layer(spec, data_file=data_file), spec)
        if not isinstance(given.get("file"), Mapping):
            raise CommandError(f"'{shown}' tells neither a driver nor a file to probe for one")
        # What is opened for probing stays, so it is opened as the format's child that it will be.
        inherited = reader.flags(given, flags).for_child(ChildRole.STORAGE)
        below = reader.read_file(given["file"], inherited, path="file")
        storage = await self._open_tree(below)
        self._pinned.add(storage)
        try:
            driver = await self.probe(storage, shown)
            spec = reader.read({**given, "driver": driver}, flags)
            node = await self._open_layer(spec, storage, data_file=data_file)
        except BaseException:
            if not storage.parents and not storage.closed:
                await self._close_tree(storage)
            raise
        return _Layer(node, spec)

    def _options_of(self, filename: str, fmt: str | None) -> dict[str, Json]:
        """Options for a file name: those in a ``json:`` name, or a plain file; ``fmt`` is the driver of the top node then."""
        parsed = parse_json_filename(filename)
        if parsed is not None:
            return parsed if fmt is None else {**parsed, "driver": fmt}
        file = self._storage_of(filename)
        if fmt is None:
            return file if self.driver_in_name(filename) is not None else {"file": file}
        if fmt == file["driver"] or self.registry.get(fmt).is_protocol:
            return {**file, "driver": fmt}
        return {"driver": fmt, "file": file}

    def driver_in_name(self, filename: str) -> str | None:
        """The driver of the node that a file name stands for, if it tells that itself: it is no storage to find a format on."""
        name = filename.partition(":")[0]
        known = has_protocol(filename) and name in self.registry.names()
        return name if known and self.registry.get(name).names_whole_nodes else None

    def protocol_of(self, filename: str) -> str:
        """The driver of the storage that a file name stands for."""
        parsed = parse_json_filename(filename)
        return str((self._storage_of(filename) if parsed is None else parsed)["driver"])

    def _storage_of(self, filename: str, depth: int = 0) -> dict[str, Json]:
        """Options of the storage that a file name stands for: a file, or what the driver of its protocol makes of it."""
        if depth > MAX_NESTING:
            raise CommandError(f"'{filename:.40}…' is nested more than {MAX_NESTING} deep")
        path = filename.removeprefix("file:")
        if path != filename or not has_protocol(filename):
            return {"driver": "file", "filename": path}
        protocol = filename.partition(":")[0]
        options = None
        if protocol in self.registry.names():
            options = self.registry.get(protocol).parse_filename(
                filename, lambda name: self._storage_of(name, depth + 1)
            )
        if options is None:
            raise CommandError(
                f"'{filename}' begins with a protocol that there is no driver for; write './…' for a file"
            )
        return options

    async def probe(self, storage: BlockDriverState, filename: str) -> str:
        """The name of the format that the content of ``storage`` looks most like; ``raw`` when nothing else fits."""
        backend = BlockBackend(self.graph, perm=Perm.CONSISTENT_READ, shared=Perm.ALL, description="format probing")
        backend.disable_queuing = True  # a command may probe what is drained for its sake
        try:
            backend.insert(storage)
            head = await backend.read(0, min(PROBE_SIZE, storage.length))
        finally:
            backend.close()
        best = _most_likely([self.registry.get(name) for name in PROBED_FIRST], head, filename)
        if best == "raw":
            best = _most_likely(self.registry.formats(), head, filename)
        return best

    # ---------------------------------------------------------------------------------------------- nodes made by others

    def make_filter(
        self,
        driver: type[_FilterDriver],
        options: DriverOptions,
        *,
        node_name: str | None,
        above: BlockDriverState,
        implicit: bool,
        change: Transaction,
    ) -> _FilterDriver:
        """The driver of a new filter node, which is in the graph, without edges so far; length and flags are those of ``above``,
        but for the cache.

        The driver needs no opening. Raises `InvalidParameter` and `DuplicateName`.
        """
        if node_name is not None:
            check_node_name(node_name)
        node = BlockDriverState(node_name or "", implicit=implicit)
        attrs.evolve(NodeFlags.of(above), cache_direct=False, cache_no_flush=False).set_on(node)
        node.length = above.length
        node.driver = made = driver(node, options, self.env)
        self.graph.add_node(node, change)
        return made

    # ------------------------------------------------------------------------------------------------------- closing

    async def close_orphans(self) -> None:
        """Flush and close every node that has no user any more, and those below that lose their last user by it.

        A node that cannot be flushed or closed cleanly is closed all the same; what went wrong goes to ``env.warn``.
        """
        if self._closing is None:
            self._closing = asyncio.Lock()
        async with self._closing:
            while orphans := [node for node in self.graph.orphans() if node not in self._pinned]:
                for node in orphans:
                    if not node.parents and self._is_open(node):
                        await self.close_node(node)
            for node in [node for node in self.graph.nodes.values() if node.driver.unsettled]:
                await node.driver.settle()
                with Transaction() as change:
                    self.graph.refresh_permissions([node], change)

    def _is_open(self, node: BlockDriverState) -> bool:
        """Whether nobody has closed ``node``, or is at it."""
        return node not in self._pinned and self.graph.nodes.get(node.node_name) is node

    async def close_node(self, node: BlockDriverState, *, opened: bool = True) -> None:
        """Flush and close one node that has no parents, and take it out of the graph; its children stay.

        Requests of a user that has let go of the node already are waited for. Nobody can begin to use it from now on.
        """
        assert not node.parents, f"{node!r} is still in use"
        self._pinned.add(node)
        node.closed = True
        try:
            await wait_idle(node)
            if opened:
                await self._shut(node)
        except BaseException:
            # Cancelled: whoever closes orphans next closes this one.
            self._pinned.discard(node)
            node.closed = False
            raise
        with Transaction() as change:
            for edge in list(node.children.values()):
                self.graph.detach(edge, change)
        self.graph.remove_node(node)
        self._pinned.discard(node)

    async def _shut(self, node: BlockDriverState) -> None:
        try:
            if not node.read_only and node.poisoned is None:
                await flush(node)
        except QBlockError as error:
            self.env.warn(f"Node '{node.node_name}' could not be flushed when it was closed: {error}")
        try:
            await node.driver.close()
        except QBlockError as error:
            self.env.warn(f"Node '{node.node_name}' could not be closed cleanly: {error}")

    async def _close_tree(self, root: BlockDriverState, *, opened: bool = True) -> None:
        """Close a node whose opening failed, and everything below it that nobody else uses."""
        pending = [edge.node for edge in root.children.values()]
        await self.close_node(root, opened=opened)
        while pending:
            node = pending.pop()
            if node.parents or node.monitor_owned or node.holders or node.closed:
                continue
            pending += [edge.node for edge in node.children.values()]
            await self.close_node(node)

    # ------------------------------------------------------------------------------------------- creating and reopening

    async def create_image(self, driver: str, options: Mapping[str, Json], *, strings: bool = False) -> None:
        """Make a new image as ``blockdev-create`` does; ``options`` without ``driver``. See `creating.create_image`."""
        from qblock.creating import create_image  # noqa: PLC0415  start-up time: most only open images

        await create_image(self, driver, options, strings=strings)

    async def reopen(self, node: BlockDriverState, *, read_only: bool) -> None:
        """Make a node read-only or writable in place; see `reopening.reopen`."""
        from qblock.reopening import reopen  # noqa: PLC0415  start-up time

        await reopen(self, node, read_only=read_only)

    async def reopen_described(self, descriptions: Sequence[Mapping[str, Json]], *, strings: bool = False) -> None:
        """Give nodes new options in place, all or none; see `reopening.reopen_described`."""
        from qblock.reopening import reopen_described  # noqa: PLC0415  start-up time

        await reopen_described(self, descriptions, strings=strings)


def merge(base: Mapping[str, Json], extra: Mapping[str, Json]) -> dict[str, Json]:
    """``base`` with the members of ``extra`` added, objects member by member; ``extra`` wins."""
    result = dict(base)
    for key, value in extra.items():
        below = result.get(key)
        result[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def _check_length(node: BlockDriverState) -> None:
    length = node.driver.length()
    if length > MAX_LENGTH:
        raise BlockIOError(errno.EFBIG, f"node '{node.node_name}' has {length} bytes, and {MAX_LENGTH} are the most")


def _link_of(node: BlockDriverState) -> BackingLink | None:
    return node.driver.backing_link() if isinstance(node.driver, SupportsBacking) else None


def _file_of(node: BlockDriverState) -> str | None:
    """The name of the file at the bottom of the storage of ``node``, whatever lies in between; None when it is no file."""
    while (edge := node.storage) is not None:
        node = edge.node
    filename = getattr(node.driver.options, "filename", None)
    return filename if isinstance(filename, str) else None


def _identity(node: BlockDriverState) -> str:
    """The same for two nodes that were opened from the same image in the same way."""
    filename = node.driver.filename()
    return os.path.realpath(filename) if filename is not None else json.dumps(node.options_given, sort_keys=True)


def _loop(image: str, filename: str) -> CorruptImage:
    return CorruptImage(image, f"its backing file '{filename}' is above it in the same chain: the chain is a loop")


def _most_likely(drivers: list[type[Driver]], head: bytes, filename: str) -> str:
    scores = [(driver.probe(head, filename), driver.name) for driver in drivers]
    return max(scores, key=lambda score: score[0])[1]
