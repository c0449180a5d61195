"""Commands about guest devices: coming, going, and what their requests are measured by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, cast

import attrs

from qblock.devices.models import BOARD_MODELS, MODELS
from qblock.devices.plugging import plug, read_request, unplug
from qblock.driver import Json
from qblock.errors import CommandError, DeviceNotFound, InvalidParameter
from qblock.monitor.command import CommandContext, command
from qblock.monitor.commands.media import DeviceIdArguments
from qblock.monitor.commands.qom import ObjectPropertyInfo, TypeNameArguments
from qblock.monitor.dialects import SYSTEM_ONLY
from qblock.monitor.qom_types import object_types
from qblock.options import option, required


@attrs.frozen
class DeviceAddArguments:
    """What device_add always takes; the other members are properties of the device."""

    driver: str = required(doc="device model")
    bus: str | None = option(None, doc="bus that it goes on; the first fitting one when absent")
    id: str | None = option(None, doc="id of the new device")


@attrs.frozen
class HistogramArguments:
    """Arguments of block-latency-histogram-set. All boundaries are nanoseconds."""

    id: str = required(doc="id or path of the guest device")
    boundaries: list[int] | None = option(None, doc="boundaries for all kinds of requests")
    boundaries_read: list[int] | None = option(None, doc="boundaries for reads")
    boundaries_write: list[int] | None = option(None, doc="boundaries for writes")
    boundaries_flush: list[int] | None = option(None, doc="boundaries for flushes")


_JSON: Final = ("json-cli", "json-cli-hotplug")
"""Devices can be asked for in JSON on the command line, and be unplugged then."""


@command("device_add", since="0.13", open_arguments=DeviceAddArguments, features=_JSON, dialects=SYSTEM_ONLY)
async def device_add(ctx: CommandContext, args: Mapping[str, Json]) -> None:
    """Plug in a device."""
    plug(ctx.system, read_request(args, strings=False, defaults=ctx.system.board.defaults), hot=ctx.system.board.started)


@command("device_del", since="0.14", dialects=SYSTEM_ONLY)
async def device_del(ctx: CommandContext, args: DeviceIdArguments) -> None:
    """Pull out a device; DEVICE_DELETED tells when it is gone."""
    unplug(ctx.system, args.id)


@command("device-list-properties", since="1.2", returns=list[ObjectPropertyInfo], dialects=SYSTEM_ONLY)
async def device_list_properties(ctx: CommandContext, args: TypeNameArguments) -> list[ObjectPropertyInfo]:
    """List the properties of a device model."""
    model = MODELS.get(args.typename) or BOARD_MODELS.get(args.typename)
    if model is None:
        if args.typename in object_types(ctx.dialect):
            raise CommandError(f"'{args.typename}' is no device model")
        raise DeviceNotFound(args.typename)
    return [
        ObjectPropertyInfo(
            name=prop.name, type=prop.kind, description=prop.doc or None, default_value=prop.default
        )
        for prop in model.properties or ()
    ]  # fmt: skip


@command("block-latency-histogram-set", since="4.0", dialects=SYSTEM_ONLY)
async def block_latency_histogram_set(ctx: CommandContext, args: HistogramArguments) -> None:
    """Count how long requests take, in the classes that the boundaries make; without any boundaries stop counting."""
    accounting = ctx.system.devices.find_disk(args.id).accounting
    kinds = (("rd", args.boundaries_read), ("wr", args.boundaries_write), ("flush", args.boundaries_flush))
    if args.boundaries is None and all(own is None for _, own in kinds):
        accounting.histograms.clear()
        return
    for kind, own in kinds:
        boundaries = args.boundaries if own is None else own
        if boundaries is None:
            continue
        if any(value < 0 for value in boundaries):
            raise InvalidParameter("boundaries", "must not be negative")
        accounting.set_histogram(cast(Literal["rd", "wr", "flush"], kind), boundaries)
