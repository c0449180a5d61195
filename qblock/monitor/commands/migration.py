"""Commands about migration, of which there is none: a machine without memory and processor has no state to send.

Models what management software of QEMU 7.2 sets on every machine, before it knows whether it will ever migrate it; ``migrate``
itself is not there. Disks are moved by mirrors. Differs from QEMU: of the parameters there is only the one about dirty bitmaps,
by which management software tells that bitmaps can be relied on for incremental backups.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from qblock.driver import Json
from qblock.errors import CommandError
from qblock.monitor.command import CommandContext, NoArguments, command
from qblock.monitor.dialects import SYSTEM_ONLY
from qblock.options import dump, fields, option, required, visit

_KNOWN = ("events",)


@attrs.frozen
class MigrationCapabilityStatus:
    """A switch. There is ``events``: whether MIGRATION tells of the progress of a migration."""

    capability: str = required(doc="its name")
    state: bool = required(doc="whether it is on")


@attrs.frozen
class CapabilitiesArguments:
    """Arguments of migrate-set-capabilities."""

    capabilities: list[MigrationCapabilityStatus] = required(doc="the switches to set")


@attrs.frozen
class BitmapTransform:
    """What becomes of a bitmap on the way."""

    persistent: bool | None = option(None, doc="whether it is stored in its image")


@attrs.frozen
class BitmapAlias:
    """A bitmap under the name that it travels by."""

    name: str = required(doc="its name")
    alias: str = required(doc="what it is called on the way")
    transform: BitmapTransform | None = option(None, doc="what becomes of it")


@attrs.frozen
class NodeAlias:
    """A node under the name that its bitmaps travel by."""

    node_name: str = required(doc="the node")
    alias: str = required(doc="what it is called on the way")
    bitmaps: list[BitmapAlias] = required(doc="its bitmaps that travel")


@attrs.frozen
class MigrationParameters:
    """Parameters of a migration."""

    block_bitmap_mapping: list[NodeAlias] | None = option(None, doc="which dirty bitmaps travel, and by which names")


@command("query-migrate-capabilities", since="1.2", returns=list[MigrationCapabilityStatus], dialects=SYSTEM_ONLY)
async def query_migrate_capabilities(ctx: CommandContext, args: NoArguments) -> list[MigrationCapabilityStatus]:
    """List the switches for migrations."""
    del args
    return [MigrationCapabilityStatus(capability=name, state=name in ctx.hub.migration_switches) for name in _KNOWN]


@command("migrate-set-capabilities", since="1.2", dialects=SYSTEM_ONLY)
async def migrate_set_capabilities(ctx: CommandContext, args: CapabilitiesArguments) -> None:
    """Set switches for migrations; one that would have an effect on a migration is refused, as there is none."""
    switches = set(ctx.hub.migration_switches)
    for given in args.capabilities:
        if given.capability not in _KNOWN and given.state:
            raise CommandError(f"The migration capability '{given.capability}' is not there: this machine cannot be migrated")
        (switches.add if given.state else switches.discard)(given.capability)
    ctx.hub.migration_switches = switches


@command("query-migrate-parameters", since="2.4", returns=MigrationParameters, dialects=SYSTEM_ONLY)
async def query_migrate_parameters(ctx: CommandContext, args: NoArguments) -> MigrationParameters:
    """Tell the parameters that were set for migrations."""
    del args
    return visit(MigrationParameters, ctx.hub.migration_parameters)


@command("migrate-set-parameters", since="2.4", open_arguments=MigrationParameters, dialects=SYSTEM_ONLY)
async def migrate_set_parameters(ctx: CommandContext, args: Mapping[str, Json]) -> None:
    """Keep parameters for a migration."""
    known = {field.wire for field in fields(MigrationParameters)}
    for name in args:
        if name not in known:
            raise CommandError(f"There is no migration parameter '{name}': without memory and processor nothing can be migrated")
    ctx.hub.migration_parameters |= dump(visit(MigrationParameters, args))
