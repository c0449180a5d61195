"""Commands about the monitor itself: negotiation, what there is, descriptors, the end."""

from __future__ import annotations

from typing import Literal

import attrs

from qblock.driver import Json
from qblock.errors import CommandError, CommandNotFound, InvalidParameter, UnknownFd
from qblock.monitor import schema
from qblock.monitor.command import CommandContext, NoArguments, command
from qblock.monitor.descriptors import ReceivedFds
from qblock.monitor.dialects import SYSTEM_ONLY
from qblock.monitor.qmp import QEMU_VERSION
from qblock.monitor.replies import (
    AddfdInfo,
    ChardevInfo,
    CommandInfo,
    FdsetFdInfo,
    FdsetInfo,
    VersionInfo,
    VersionTriple,
)
from qblock.options import option, required


@attrs.frozen
class CapabilitiesArguments:
    """Arguments of qmp_capabilities."""

    enable: list[Literal["oob"]] = option((), doc="capabilities to switch on")


@attrs.frozen
class FdNameArguments:
    """Arguments of getfd and closefd."""

    fdname: str = required(doc="name of the file descriptor")


@command("qmp_capabilities", since="0.13")
async def qmp_capabilities(ctx: CommandContext, args: CapabilitiesArguments) -> None:
    """Begin the session: choose capabilities, after which all commands can be used."""
    if ctx.session is None:
        raise CommandNotFound("qmp_capabilities", "belongs to QMP sessions")
    ctx.session.qmp.negotiate(args.enable)


@command("query-version", since="0.14", returns=VersionInfo)
async def query_version(ctx: CommandContext, args: NoArguments) -> VersionInfo:
    """Tell which QEMU is modelled, and which program answers."""
    del args
    major, minor, micro = QEMU_VERSION
    return VersionInfo(qemu=VersionTriple(major=major, minor=minor, micro=micro), package=ctx.hub.package)


@command("query-commands", since="0.14", returns=list[CommandInfo])
async def query_commands(ctx: CommandContext, args: NoArguments) -> list[CommandInfo]:
    """List the commands that can be used."""
    del args
    return [CommandInfo(name=name) for name in ctx.hub.commands]


@command("query-qmp-schema", since="2.5", returns=list[schema.SchemaInfo])
async def query_qmp_schema(ctx: CommandContext, args: NoArguments) -> list[Json]:
    """Describe all commands, events and types in QAPI's terms."""
    del args
    return schema.introspect(ctx.hub.commands, ctx.system.registry)


@command("query-chardev", since="0.14", returns=list[ChardevInfo])
async def query_chardev(ctx: CommandContext, args: NoArguments) -> list[ChardevInfo]:
    """List the character devices, newest first."""
    del args
    return [
        ChardevInfo(label=device.label, filename=device.filename, frontend_open=device.frontend_open)
        for device in ctx.hub.chardevs
    ]


@command("getfd", since="0.14", dialects=SYSTEM_ONLY)
async def getfd(ctx: CommandContext, args: FdNameArguments) -> None:
    """Keep the file descriptor that came with the command under a name, until closefd or the end of the session."""
    if ctx.fds is None:
        raise CommandError("A file descriptor can only be passed over a unix socket")
    fd = ctx.fds.claim()
    if args.fdname[:1].isdecimal():
        ReceivedFds.discard(fd)
        raise InvalidParameter("fdname", "must not begin with a digit")
    assert ctx.session is not None
    ctx.session.fds.name(args.fdname, fd)


@command("closefd", since="0.14", dialects=SYSTEM_ONLY)
async def closefd(ctx: CommandContext, args: FdNameArguments) -> None:
    """Close a descriptor that getfd has kept."""
    if ctx.session is None:
        raise UnknownFd(args.fdname)
    ctx.session.fds.close_named(args.fdname)


@attrs.frozen
class AddFdArguments:
    """Arguments of add-fd."""

    fdset_id: int | None = option(None, doc="set that it goes to; a new one when absent")
    opaque: str | None = option(None, doc="what its owner says of it")


@attrs.frozen
class RemoveFdArguments:
    """Arguments of remove-fd."""

    fdset_id: int = required(doc="number of the set")
    fd: int | None = option(None, doc="the descriptor; all of the set when absent")


@command("add-fd", since="1.2", returns=AddfdInfo, dialects=SYSTEM_ONLY)
async def add_fd(ctx: CommandContext, args: AddFdArguments) -> AddfdInfo:
    """Put the file descriptor that came with the command into a set, where it is the file /dev/fdset/N."""
    if ctx.fds is None:
        raise CommandError("A file descriptor can only be passed over a unix socket")
    fd = ctx.fds.claim()
    try:
        number = ctx.system.env.fdsets.add(fd, args.fdset_id, args.opaque)
    except CommandError:
        ReceivedFds.discard(fd)
        raise
    return AddfdInfo(fdset_id=number, fd=fd)


@command("remove-fd", since="1.2", dialects=SYSTEM_ONLY)
async def remove_fd(ctx: CommandContext, args: RemoveFdArguments) -> None:
    """Take a file descriptor, or all, out of a set."""
    ctx.system.env.fdsets.remove(args.fdset_id, args.fd)


@command("query-fdsets", since="1.2", returns=list[FdsetInfo], dialects=SYSTEM_ONLY)
async def query_fdsets(ctx: CommandContext, args: NoArguments) -> list[FdsetInfo]:
    """List the sets of file descriptors."""
    del args
    return [
        FdsetInfo(fdset_id=number, fds=[FdsetFdInfo(fd=member.fd, opaque=member.opaque) for member in members])
        for number, members in sorted(ctx.system.env.fdsets.sets.items())
    ]


@command("quit", since="0.14")
async def quit_program(ctx: CommandContext, args: NoArguments) -> None:
    """Cancel all jobs and end the program."""
    del args
    await ctx.hub.quit()
