"""Opening images for one run of an offline tool: a graph of its own, closed again at the end.

Models what qemu-img does around its sub-commands: images are opened by name with probing, by options, or by ``json:``
names; backing files that an image mentions are followed. No jobs, devices or monitor are loaded: start-up time counts.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from random import Random
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

import attrs

from qblock.backend import BlockBackend
from qblock.clock import RealClock
from qblock.driver import SupportsSnapshots
from qblock.environment import Environment
from qblock.errors import CommandError, QBlockError
from qblock.graph import Graph
from qblock.node import BlockDriverState
from qblock.nodespec import DISCARD_WORDS, NO_FLAGS, NodeFlags
from qblock.opening import Opener, OpenPolicy
from qblock.options import fields, parse_keyval, parse_options, split_items
from qblock.permissions import Perm
from qblock.registry import DriverRegistry
from qblock.snapshots import find_described
from qblock.tools.arguments import CACHE_MODES, Arguments
from qblock.tools.console import end_program

T = TypeVar("T")

Watch: TypeAlias = Callable[[Environment], object]
"""Listens to what happens in the session that has this environment, by its trace events."""


def cache_flags(mode: str | None, what: str = "cache option", *, discard: bool = False) -> NodeFlags:
    """How nodes are opened for a cache mode of -t or -T, where their options do not say it; writethrough is handled by whoever
    writes. ``discard``: discards are passed on.
    """
    if mode is not None and mode not in CACHE_MODES:
        raise CommandError(f"Invalid {what}: '{mode}' (choose from {', '.join(CACHE_MODES)})")
    return NodeFlags(
        cache_direct=mode in ("none", "off", "directsync"), cache_no_flush=mode == "unsafe", discard_unmap=discard
    )


@attrs.frozen
class ImageArguments:
    """How one image is to be opened: its name or options, its format (None: probe), and the access wanted.

    ``writethrough``: every write is durable when it completes. ``copy_on_read``: what is read from the backing file is copied up.
    ``to_check``: damage that a repair mends does not forbid writing. ``resizable``: it may get another size. ``steady``:
    nobody else may write to it meanwhile (formats ask for that anyway; of raw images QEMU's convert does, other commands do not).
    ``extra`` are further options of the node, as dotted keys with strings (``encrypt.key-secret``). ``backing`` False leaves the
    backing file closed, ``data_file`` False its data file: then it has no content, but can be asked what it is.
    """

    name: str
    fmt: str | None = None
    image_opts: bool = False
    writable: bool = False
    resizable: bool = False
    steady: bool = False
    force_share: bool = False
    to_check: bool = False
    backing: bool = True
    data_file: bool = True
    writethrough: bool = False
    copy_on_read: bool = False
    temporary: bool = False
    """Writes go to an overlay that is gone with the session; the image itself is opened for reading."""
    flags: NodeFlags = NO_FLAGS
    """How its nodes are opened where their options do not say it; those that are fields of their own are ignored."""
    extra: Mapping[str, str] = attrs.field(factory=dict)
    snapshot: str | None = None
    """The internal snapshot to show in place of the disk, see `snapshots.find_described`; the size stays the disk's."""

    @classmethod
    def of(cls, arguments: Arguments, name: str, fmt: str = "f", **wanted: Any) -> ImageArguments:
        """The image ``name`` as a command line has it: with the format of the option ``fmt``, ``--image-opts`` and ``-U``.

        ``wanted`` are the other fields.
        """
        return cls(
            name,
            fmt=arguments.get(fmt),
            image_opts="image-opts" in arguments,
            force_share="U" in arguments,
            **wanted,
        )


class OnlyHelp(Exception):
    """The command line asks for help that has been printed; nothing else is to be done."""


class ImageNotOpened(CommandError):
    """An image of the command line could not be opened; ``cause`` says why."""

    def __init__(self, name: str, cause: QBlockError) -> None:
        notes = "".join(f" ({note})" for note in getattr(cause, "__notes__", ()))
        super().__init__(f"Could not open '{name}': {cause}{notes}")
        self.cause = cause


@attrs.define(eq=False)
class ImageSession:
    """All images that one run has open. An async context manager: leaving it flushes and closes them."""

    graph: Graph
    opener: Opener
    environment: Environment
    backends: list[BlockBackend] = attrs.field(factory=list)

    @classmethod
    def create(cls) -> ImageSession:
        """A session on real time, real files and a small pool of threads."""
        environment = Environment(
            clock=RealClock(),
            executor=ThreadPoolExecutor(max_workers=8, thread_name_prefix="qblock-io"),
            random=Random(),
            emit=lambda name, data: None,
            warn=lambda text: print(f"warning: {text}", file=sys.stderr),
            fatal=end_program,
            loop_is_shared=False,
        )
        graph = Graph(random=environment.random)
        opener = Opener(graph, DriverRegistry(), environment, OpenPolicy.follow())
        return cls(graph, opener, environment)

    async def open_node(self, wanted: ImageArguments) -> BlockDriverState:
        """The top node of an image; raises a QBlockError. The caller gives it a user before awaiting anything else."""
        name = wanted.name
        if wanted.image_opts:
            name = "json:" + json.dumps(_with_drivers(parse_keyval(wanted.name), root=True))
        return await self.opener.open_image(
            name,
            fmt=wanted.fmt,
            read_only=not wanted.writable or wanted.temporary,
            backing=wanted.backing,
            data_file=wanted.data_file,
            options=dict(wanted.extra),
            force_share=wanted.force_share,
            to_check=wanted.to_check,
            inherited=wanted.flags,
        )

    async def open(self, wanted: ImageArguments) -> BlockBackend:
        """A backend on an image that was opened as `open_node` does; errors name the image."""
        try:
            node = await self.open_node(wanted)
            if wanted.temporary:
                node = await self._temporary_overlay(node, wanted)
            perm = Perm.CONSISTENT_READ | (Perm.WRITE if wanted.writable else Perm.NONE)
            perm |= Perm.RESIZE if wanted.resizable else Perm.NONE
            shared = Perm.ALL & ~Perm.WRITE if wanted.steady else Perm.ALL
            backend = BlockBackend(self.graph, perm=perm, shared=shared, description=f"the image '{wanted.name}'")
            self.backends.append(backend)
            backend.insert(node)
            if wanted.snapshot is not None:
                await _show_snapshot(node, wanted.snapshot)
        except QBlockError as error:
            raise ImageNotOpened(wanted.name, error) from error
        backend.writethrough = wanted.writethrough
        if wanted.copy_on_read:
            node.copy_on_read += 1
        return backend

    async def _temporary_overlay(self, node: BlockDriverState, wanted: ImageArguments) -> BlockDriverState:
        """A qcow2 image over ``node`` in a file that has no name any more."""
        import tempfile

        fd, name = tempfile.mkstemp(prefix="qblock-", dir=os.environ.get("TMPDIR", "/var/tmp"))
        os.close(fd)
        keeper = BlockBackend(self.graph, perm=Perm.NONE, shared=Perm.ALL, description="the temporary overlay")
        keeper.insert(node)
        try:
            file = {"driver": "file", "filename": name}
            await self.opener.create_image("qcow2", {"file": file, "size": node.length})
            options = {"backing": node.node_name, "discard": "unmap" if wanted.flags.discard_unmap else "ignore"}
            return await self.opener.open_image(name, fmt="qcow2", read_only=not wanted.writable, options=options)
        finally:
            keeper.close()
            os.unlink(name)

    async def close(self, backend: BlockBackend) -> None:
        """Flush and close one image before the session ends."""
        self.backends.remove(backend)
        backend.close()
        await self.opener.close_orphans()

    async def __aenter__(self) -> ImageSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for backend in self.backends:
            backend.close()
        self.backends.clear()
        await self.opener.close_orphans()
        self.environment.executor.shutdown(wait=False)


async def _show_snapshot(node: BlockDriverState, text: str) -> None:
    driver = node.driver
    if not isinstance(driver, SupportsSnapshots):
        raise CommandError(f"images of the format '{driver.name}' have no snapshots")
    await driver.view_snapshot(find_described(driver.snapshots(), text), keep_size=True)


def _with_drivers(options: Mapping[str, Any], *, root: bool = False) -> dict[str, Any]:
    """Options of --image-opts in which ``file.filename`` alone means a file. Raises `CommandError`."""
    nested = {key: _with_drivers(value) if isinstance(value, Mapping) else value for key, value in options.items()}
    if root and nested.get("backing") == "":
        nested["backing"] = None  # QEMU's older way to say that there is none
    if isinstance(discard := nested.get("discard"), str):
        nested["discard"] = DISCARD_WORDS.get(discard, discard)
    if "filename" not in nested or "driver" in nested:
        return nested
    if root:
        raise CommandError("'filename' alone does not say what is in the file: give 'driver' as well, or 'file.filename'")
    return {"driver": "file", **nested}


def with_secrets(arguments: Arguments, watch: Watch | None) -> Watch | None:
    """``watch``, after the objects of --object have been made for the session; these are what opens encrypted images."""
    texts = arguments.all("object")
    if not texts:
        return watch
    for text in texts:
        _answer_help(text)

    def prepare(env: Environment) -> None:
        from qblock.objects import ObjectTable

        table = ObjectTable(env)
        for text in texts:
            given, strings = parse_options(text, implied_key="qom-type")
            table.add(given, strings=strings)
        if watch is not None:
            watch(env)

    return prepare


def _answer_help(text: str) -> None:
    """Print what objects there are (``help``), or what one takes (``secret,help``), and raise `OnlyHelp`."""
    kind, _, rest = text.partition(",")
    if text == "help":
        print("List of user creatable objects:\n  secret")
        raise OnlyHelp
    if kind == "secret" and "help" in split_items(rest):
        from qblock.objects import SecretOptions

        print("secret options:")
        for field in sorted(fields(SecretOptions), key=lambda field: field.wire):
            if field.wire not in ("qom-type", "id"):
                print(f"  {field.wire}=<string>")
        raise OnlyHelp


def run_session(body: Callable[[ImageSession], Awaitable[T]], watch: Watch | None = None) -> T:
    """Run ``body`` with a session on a loop of its own; ``watch`` gets its environment before anything is opened."""

    async def main() -> T:
        async with ImageSession.create() as session:
            if watch is not None:
                watch(session.environment)
            return await body(session)

    return asyncio.run(main())
