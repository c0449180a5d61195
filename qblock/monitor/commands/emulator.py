"""Commands by which management software finds out what program it has started: architecture, machine types, processors, options.

Models these commands of QEMU 7.2 in its layout. Differs from QEMU in the answers: there are no processors here, no memory, no
accelerator and no TPM, so the lists of such things are empty.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import attrs

from qblock.devices.machine_types import MACHINE_TYPES
from qblock.driver import Json
from qblock.errors import CommandError
from qblock.monitor.command import CommandContext, NoArguments, command
from qblock.monitor.commandline import GROUPS, ParameterType
from qblock.monitor.dialects import SYSTEM_ONLY
from qblock.monitor.qom_types import CPU_TYPE
from qblock.objects import IOThreadObject
from qblock.options import option, required


@attrs.frozen
class TargetInfo:
    """Reply of query-target."""

    arch: Literal["x86_64"] = required(doc="the architecture whose machine types there are")


@attrs.frozen
class KvmInfo:
    """Reply of query-kvm."""

    enabled: bool = required(doc="always false")
    present: bool = required(doc="always false")


@attrs.frozen
class UuidInfo:
    """Reply of query-uuid."""

    uuid: str = required(doc="what -uuid said", name="UUID")


@attrs.frozen
class MachineInfo:
    """Entry of query-machines; a default processor and a place for memory are members that no type here has."""

    name: str = required(doc="the type")
    alias: str | None = option(None, doc="another name of it")
    is_default: bool | None = option(None, doc="true for the one that is meant when none is named")
    cpu_max: int = required(doc="how many processors -smp may ask for")
    hotpluggable_cpus: bool = required(doc="always false")
    numa_mem_supported: bool = required(doc="always false")
    deprecated: bool = required(doc="always false")


@attrs.frozen
class CurrentMachineParams:
    """Reply of query-current-machine."""

    wakeup_suspend_support: bool = required(doc="always false: no guest goes to sleep")


@attrs.frozen
class IOThreadInfo:
    """Entry of query-iothreads."""

    id: str = required(doc="id of the object")
    thread_id: int = required(doc="thread that serves it: the program's one loop")
    poll_max_ns: int = required(doc="how long it would poll at most, in nanoseconds")
    poll_grow: int = required(doc="what the time to poll would be multiplied by")
    poll_shrink: int = required(doc="what the time to poll would be divided by")
    aio_max_batch: int = required(doc="requests that would go to the kernel at once")


@attrs.frozen
class CommandLineParameterInfo:
    """A parameter of an option."""

    name: str = required(doc="its name")
    type: ParameterType = required(doc="what it takes")


@attrs.frozen
class CommandLineOptionInfo:
    """Entry of query-command-line-options."""

    option: str = required(doc="the option, without its dash")
    parameters: list[CommandLineParameterInfo] = required(doc="its parameters; none when they depend on the option's first word")


@attrs.frozen
class CommandLineOptionArguments:
    """Arguments of query-command-line-options."""

    option: str | None = option(None, doc="the only option to tell of")


@command("query-target", since="1.2", returns=TargetInfo, dialects=SYSTEM_ONLY)
async def query_target(ctx: CommandContext, args: NoArguments) -> TargetInfo:
    """Tell which architecture's machines are modelled."""
    del ctx, args
    return TargetInfo(arch="x86_64")


@command("query-kvm", since="0.14", returns=KvmInfo, dialects=SYSTEM_ONLY)
async def query_kvm(ctx: CommandContext, args: NoArguments) -> KvmInfo:
    """Tell whether a processor is accelerated."""
    del ctx, args
    return KvmInfo(enabled=False, present=False)


@command("query-uuid", since="0.14", returns=UuidInfo, dialects=SYSTEM_ONLY)
async def query_uuid(ctx: CommandContext, args: NoArguments) -> UuidInfo:
    """Tell the machine's UUID."""
    del args
    return UuidInfo(uuid=ctx.system.board.identity.uuid)


@command("query-machines", since="1.2", returns=list[MachineInfo], dialects=SYSTEM_ONLY)
async def query_machines(ctx: CommandContext, args: NoArguments) -> list[MachineInfo]:
    """List the machine types."""
    del ctx, args
    return [
        MachineInfo(
            name=kind.name,
            alias=kind.alias,
            is_default=kind.is_default or None,
            cpu_max=kind.max_cpus,
            hotpluggable_cpus=False,
            numa_mem_supported=False,
            deprecated=False,
        )
        for kind in MACHINE_TYPES.values()
    ]


@command("query-current-machine", since="4.0", returns=CurrentMachineParams, dialects=SYSTEM_ONLY)
async def query_current_machine(ctx: CommandContext, args: NoArguments) -> CurrentMachineParams:
    """Tell what this machine can do."""
    del ctx, args
    return CurrentMachineParams(wakeup_suspend_support=False)


@command("query-iothreads", since="2.0", returns=list[IOThreadInfo], dialects=SYSTEM_ONLY)
async def query_iothreads(ctx: CommandContext, args: NoArguments) -> list[IOThreadInfo]:
    """List the I/O threads with their settings. All requests are served by one loop, whatever these say."""
    del args
    threads = [found.thread for found in ctx.system.objects.objects.values() if isinstance(found, IOThreadObject)]
    return [
        IOThreadInfo(
            id=thread.name,
            thread_id=os.getpid(),
            poll_max_ns=thread.settings.poll_max_ns,
            poll_grow=thread.settings.poll_grow,
            poll_shrink=thread.settings.poll_shrink,
            aio_max_batch=thread.settings.aio_max_batch,
        )
        for thread in threads
    ]


@command("query-command-line-options", since="1.5", returns=list[CommandLineOptionInfo], dialects=SYSTEM_ONLY)
async def query_command_line_options(ctx: CommandContext, args: CommandLineOptionArguments) -> list[CommandLineOptionInfo]:
    """List the options of the command line with their parameters."""
    del ctx
    if args.option is not None and args.option not in GROUPS:
        raise CommandError(f"There is no option '-{args.option}' that has parameters")
    return [
        CommandLineOptionInfo(
            option=name, parameters=[CommandLineParameterInfo(name=key, type=kind) for key, kind in parameters.items()]
        )
        for name, parameters in GROUPS.items()
        if args.option in (None, name)
    ]


# ----------------------------------------------------------------------------------------- what there is none of


@attrs.frozen
class CpuDefinitionInfo:
    """Entry of query-cpu-definitions."""

    name: str = required(doc="what -cpu calls it")
    typename: str = required(doc="its type of objects")
    unavailable_features: list[str] = required(doc="what it lacks on this host: nothing, as it has nothing")
    static: bool = required(doc="always false")
    migration_safe: bool = required(doc="always false")
    deprecated: bool = required(doc="always false")


@command("query-cpu-definitions", since="1.2", returns=list[CpuDefinitionInfo], dialects=SYSTEM_ONLY)
async def query_cpu_definitions(ctx: CommandContext, args: NoArguments) -> list[CpuDefinitionInfo]:
    """List the models of processors that can be asked for: ``max``, which is all that there is, and that is none."""
    del ctx, args
    return [
        CpuDefinitionInfo(
            name="max", typename=CPU_TYPE, unavailable_features=[], static=False, migration_safe=False, deprecated=False
        )
    ]


@command("query-cpus-fast", since="2.12", returns=list[Any], dialects=SYSTEM_ONLY)
async def query_cpus_fast(ctx: CommandContext, args: NoArguments) -> list[Json]:
    """List the processors: there are none."""
    del ctx, args
    return []


@attrs.frozen
class DisplayServerInfo:
    """Reply of query-vnc."""

    enabled: bool = required(doc="always false")


@command("query-vnc", since="0.14", returns=DisplayServerInfo, dialects=SYSTEM_ONLY)
async def query_vnc(ctx: CommandContext, args: NoArguments) -> DisplayServerInfo:
    """Tell whether the display can be seen from elsewhere: there is none."""
    del ctx, args
    return DisplayServerInfo(enabled=False)


@command("query-tpm-models", since="1.5", returns=list[str], dialects=SYSTEM_ONLY)
async def query_tpm_models(ctx: CommandContext, args: NoArguments) -> list[str]:
    """List the models of trusted platform modules: there are none."""
    del ctx, args
    return []


@command("query-tpm-types", since="1.5", returns=list[str], dialects=SYSTEM_ONLY)
async def query_tpm_types(ctx: CommandContext, args: NoArguments) -> list[str]:
    """List what a trusted platform module could be backed by: there is none."""
    del ctx, args
    return []
