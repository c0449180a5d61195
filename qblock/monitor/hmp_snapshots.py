"""The commands of the human monitor about snapshots of the whole machine.

Signatures and output are those of hmp-block.md; where QEMU lists the snapshots of a node without a drive, it shows no name.
"""

from __future__ import annotations

import time

import attrs

from qblock.jobs.machine_snapshots import SnapshottedDisk, delete_machine, disks_of_machine, load_all, save_machine
from qblock.monitor.hmp_command import HmpCall, hmp_command
from qblock.snapshots import HEADING, SnapshotInfo


@hmp_command("savevm", "name:s?", "[tag]", "keep the machine and its disks as they are now in internal snapshots")
async def savevm(call: HmpCall) -> None:
    """All writable disks; the state of the machine is kept beside the first one."""
    system = call.context.system
    seconds, _ = system.clock.wall()
    disks = disks_of_machine(system)
    tag = call.text("name") or time.strftime("vm-%Y%m%d%H%M%S", time.localtime(seconds))
    await save_machine(system, tag, disks, disks[0])


@hmp_command("loadvm", "name:s", "tag", "put the machine and its disks back to a snapshot")
async def loadvm(call: HmpCall) -> None:
    """The guest stays stopped when that fails."""
    await load_all(call.context.system, call.text("name") or "")


@hmp_command("delvm", "name:s", "tag", "delete the snapshots of that name")
async def delvm(call: HmpCall) -> None:
    """Disks that have no such snapshot are passed over."""
    system = call.context.system
    await delete_machine(system, call.text("name") or "", disks_of_machine(system))


@hmp_command("info snapshots", "", "", "show the internal snapshots of the disks")
async def info_snapshots(call: HmpCall) -> None:
    """First those that all disks have and that can be loaded, then the others, disk by disk."""
    disks = disks_of_machine(call.context.system)
    keeper, *others = disks
    whole = [one for one in keeper.driver.snapshots() if one.vm_state_size and all(disk.find(one.name) for disk in others)]
    partial = {disk: [one for one in disk.driver.snapshots() if not _has(whole, one.name)] for disk in disks}
    if not whole and not any(partial.values()):
        call.say("There is no snapshot available.")
        return
    call.say("List of snapshots present on all disks:")
    for line in [HEADING, *(attrs.evolve(one, id="--").line() for one in whole)] if whole else ["None"]:
        call.say(line)
    for disk, snapshots in partial.items():
        if snapshots:
            call.say(f"\nList of partial (non-loadable) snapshots on '{_name(disk)}':")
            for line in (HEADING, *(one.line() for one in snapshots)):
                call.say(line)


def _has(snapshots: list[SnapshotInfo], name: str) -> bool:
    return any(one.name == name for one in snapshots)


def _name(disk: SnapshottedDisk) -> str:
    parents = (edge.parent for edge in disk.node.parents)
    return next((name for parent in parents if (name := getattr(parent, "name", ""))), disk.node.node_name)
