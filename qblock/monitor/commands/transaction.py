"""transaction: several actions that happen together or not at all.

Models QEMU's command (semantics.md section 5); how actions are performed is in `qblock.actions.action`. Which actions there are
is a table per dialect. ``drive-mirror`` and ``blockdev-mirror`` are ours: no QEMU takes them here, though the announcement of
mirroring in 2012 says that they could be added.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from qblock import options
from qblock.actions.action import Abort, Action, perform
from qblock.driver import Json
from qblock.errors import InvalidParameter
from qblock.monitor.command import CommandContext, NoArguments, command
from qblock.monitor.commands import backup, bitmaps, blkmirror_2012, mirror, rfc_2012, snapshots
from qblock.monitor.dialects import HISTORIC, Dialect
from qblock.options import option, required
from qblock.system import BlockSystem


@attrs.frozen
class ActionKind:
    """One kind of action: the class of its ``data``, and what makes an action of that."""

    arguments: type[Any]
    make: Callable[[BlockSystem, Any], Action]


_SNAPSHOT_SYNC: Final = ActionKind(snapshots.BlockdevSnapshotSyncArguments, snapshots.snapshot_sync_action)
_OF_7_2: Final[Mapping[str, ActionKind]] = {
    "abort": ActionKind(NoArguments, lambda system, _: Abort(system)),
    "block-dirty-bitmap-add": ActionKind(bitmaps.BitmapAddArguments, bitmaps.add_action),
    "block-dirty-bitmap-clear": ActionKind(bitmaps.BitmapArguments, bitmaps.clear_action),
    "block-dirty-bitmap-disable": ActionKind(bitmaps.BitmapArguments, bitmaps.disable_action),
    "block-dirty-bitmap-enable": ActionKind(bitmaps.BitmapArguments, bitmaps.enable_action),
    "block-dirty-bitmap-merge": ActionKind(bitmaps.BitmapMergeArguments, bitmaps.merge_action),
    "block-dirty-bitmap-remove": ActionKind(bitmaps.BitmapArguments, bitmaps.remove_action),
    "blockdev-backup": ActionKind(backup.BlockdevBackupArguments, backup.blockdev_backup_action),
    "blockdev-mirror": ActionKind(mirror.BlockdevMirrorArguments, mirror.blockdev_mirror_action),
    "blockdev-snapshot": ActionKind(snapshots.BlockdevSnapshotArguments, snapshots.snapshot_action),
    "blockdev-snapshot-internal-sync": ActionKind(
        snapshots.InternalSnapshotArguments, snapshots.internal_snapshot_action
    ),
    "blockdev-snapshot-sync": _SNAPSHOT_SYNC,
    "drive-backup": ActionKind(backup.DriveBackupArguments, backup.drive_backup_action),
    "drive-mirror": ActionKind(mirror.DriveMirrorArguments, mirror.drive_mirror_action),
}

ACTIONS: Final[Mapping[Dialect, Mapping[str, ActionKind]]] = {
    Dialect.SYSTEM: _OF_7_2,
    Dialect.STORAGE_DAEMON: _OF_7_2,
    Dialect.RFC_2012: {
        "blockdev-snapshot-sync": _SNAPSHOT_SYNC,
        "drive-mirror": ActionKind(rfc_2012.DriveMirrorOf2012, rfc_2012.drive_mirror_action),
    },
    Dialect.BLKMIRROR_2012: {
        "blockdev-snapshot-sync": _SNAPSHOT_SYNC,
        "drive-mirror": ActionKind(blkmirror_2012.DriveMirrorOfMarch2012, blkmirror_2012.drive_mirror_action),
    },
    Dialect.BLOCK_COPY_2011: {"blockdev-snapshot-sync": _SNAPSHOT_SYNC},
}
"""The actions of each dialect, by their wire names."""


class CompletionMode(enum.Enum):
    """How the jobs of a transaction end."""

    INDIVIDUAL = "individual"
    GROUPED = "grouped"


@attrs.frozen
class TransactionAction:
    """One action. What ``data`` is made of depends on ``type``."""

    type: str = required(doc="kind of the action")
    data: Mapping[str, Json] = required(doc="arguments of the action")


@attrs.frozen
class TransactionProperties:
    """What holds for a transaction as a whole."""

    completion_mode: CompletionMode = option(
        CompletionMode.INDIVIDUAL, doc="whether jobs end one by one, or all together"
    )


@attrs.frozen
class TransactionArguments:
    """Arguments of transaction."""

    actions: list[TransactionAction] = required(doc="what is to be done, in this order")
    properties: TransactionProperties = option(TransactionProperties(), doc="what holds for all of them")


@attrs.frozen
class TransactionArgumentsOf2012:
    """Arguments of transaction as it was in QEMU 1.1."""

    actions: list[TransactionAction] = required(doc="what is to be done, in this order")


def read_actions(ctx: CommandContext, given: list[TransactionAction]) -> list[Action]:
    """Make actions of what was given; raises `InvalidParameter` before anything is looked up."""
    kinds = ACTIONS[ctx.dialect]
    read = []
    for index, action in enumerate(given):
        kind = kinds.get(action.type)
        if kind is None:
            raise InvalidParameter(
                f"actions[{index}].type", f"does not accept the value '{action.type:.200}'; it takes {', '.join(kinds)}"
            )
        read.append((kind, options.visit(kind.arguments, action.data, path=f"actions[{index}].data")))
    return [kind.make(ctx.system, data) for kind, data in read]


@command("transaction", since="1.1", alone=True)
async def transaction(ctx: CommandContext, args: TransactionArguments) -> None:
    """Do several things at one moment, all or none of them."""
    grouped = args.properties.completion_mode is CompletionMode.GROUPED
    await perform(ctx.system, read_actions(ctx, args.actions), grouped=grouped)


@command("transaction", since="1.1", dialects=HISTORIC, alone=True)
async def transaction_of_2012(ctx: CommandContext, args: TransactionArgumentsOf2012) -> None:
    """Do several things at one moment, all or none of them."""
    await perform(ctx.system, read_actions(ctx, args.actions))
