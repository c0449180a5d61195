"""The commands of the human monitor. Each reads its arguments, executes QMP commands, and prints.

Signatures, parameters and output are those of hmp-block.md; help texts are our own words.
"""

from __future__ import annotations

from qblock.errors import DeviceNotFound, NodeBusy, QBlockError
from qblock.monitor import drives, hmp_render
from qblock.monitor.dialects import Dialect
from qblock.monitor.hmp_command import HmpCall, PlainError, hmp_command
from qblock.options import split_opts

# ------------------------------------------------------------------------------------------------------------- looking


@hmp_command(
    "info block",
    "nodes:-n,verbose:-v,device:B?",
    "[-n] [-v] [device]",
    "show the devices, or one of them (-n: show nodes instead; -v: show details of the images)",
)
async def info_block(call: HmpCall) -> None:
    """Prints what query-block or query-named-block-nodes answers."""
    wanted, verbose = call.text("device"), call.flag("verbose")
    if call.flag("nodes"):
        lines = hmp_render.named_nodes(await call.qmp("query-named-block-nodes"), wanted, verbose=verbose)
    else:
        lines = hmp_render.block_devices(await call.qmp("query-block"), wanted, verbose=verbose)
    for line in lines:
        call.say(line)


@hmp_command("info block-jobs", "", "", "show the progress of block jobs", since="1.1")
async def info_block_jobs(call: HmpCall) -> None:
    """Prints what query-block-jobs answers."""
    for line in hmp_render.block_jobs(await call.qmp("query-block-jobs")):
        call.say(line)


@hmp_command("info blockstats", "", "", "show how much the devices have read and written")
async def info_blockstats(call: HmpCall) -> None:
    """Prints what query-blockstats answers."""
    for line in hmp_render.block_stats(await call.qmp("query-blockstats")):
        call.say(line)


@hmp_command("info status", "", "", "show whether the guest runs")
async def info_status(call: HmpCall) -> None:
    """Prints the run state."""
    status = await call.qmp("query-status")
    detail = "" if status["status"] in ("running", "paused") else f" ({status['status']})"
    call.say(f"VM status: {'running' if status['running'] else 'paused'}{detail}")


@hmp_command("info version", "", "", "show the version")
async def info_version(call: HmpCall) -> None:
    """Prints the version of the modelled QEMU and the program."""
    version = await call.qmp("query-version")
    qemu = version["qemu"]
    call.say(f"{qemu['major']}.{qemu['minor']}.{qemu['micro']} ({version['package']})")


@hmp_command("info name", "", "", "show the name of the machine")
async def info_name(call: HmpCall) -> None:
    """Prints the name, if there is one."""
    name = (await call.qmp("query-name")).get("name")
    if name is not None:
        call.say(name)


@hmp_command("info chardev", "", "", "show the character devices")
async def info_chardev(call: HmpCall) -> None:
    """Prints what query-chardev answers."""
    for device in await call.qmp("query-chardev"):
        call.say(f"{device['label']}: filename={device['filename']}")


# ---------------------------------------------------------------------------------------------------------------- jobs


@hmp_command(
    "block_stream",
    "device:B,speed:o?,base:s?",
    "device [speed [base]]",
    "copy data of backing images into a device",
    since="1.1",
)
async def block_stream(call: HmpCall) -> None:
    """block-stream with the device's name as job id."""
    device = call.text("device")
    await call.qmp(
        "block-stream", job_id=device, device=device, base=call.text("base"), speed=call.number("speed") or 0,
        on_error="report",
    )  # fmt: skip


@hmp_command("block_job_set_speed", "device:B,speed:o", "device speed", "limit the speed of a block job", since="1.1")
async def block_job_set_speed(call: HmpCall) -> None:
    """block-job-set-speed."""
    await call.qmp("block-job-set-speed", device=call.text("device"), speed=call.number("speed"))


@hmp_command(
    "block_job_cancel",
    "force:-f,device:B",
    "[-f] device",
    "stop a block job (-f: at once, even if it is ready or paused)",
    since="1.1",
)
async def block_job_cancel(call: HmpCall) -> None:
    """block-job-cancel."""
    await call.qmp("block-job-cancel", device=call.text("device"), force=call.flag("force"))


@hmp_command("block_job_complete", "device:B", "device", "let a ready block job switch over to its target", since="1.3")
async def block_job_complete(call: HmpCall) -> None:
    """block-job-complete."""
    await call.qmp("block-job-complete", device=call.text("device"))


@hmp_command("block_job_pause", "device:B", "device", "pause a block job", since="1.3")
async def block_job_pause(call: HmpCall) -> None:
    """block-job-pause."""
    await call.qmp("block-job-pause", device=call.text("device"))


@hmp_command("block_job_resume", "device:B", "device", "let a paused block job go on", since="1.3")
async def block_job_resume(call: HmpCall) -> None:
    """block-job-resume."""
    await call.qmp("block-job-resume", device=call.text("device"))


@hmp_command(
    "drive_mirror",
    "reuse:-n,full:-f,device:B,target:s,format:s?",
    "[-n] [-f] device target [format]",
    "copy a device to a new image and keep the copy up to date (-n: the image exists; -f: copy the whole disk, "
    "not only the top image)",
    since="1.3",
)
async def drive_mirror(call: HmpCall) -> None:
    """drive-mirror with the device's name as job id."""
    device = call.text("device")
    await call.qmp(
        "drive-mirror", job_id=device, device=device, target=call.text("target"), format=call.text("format"),
        sync="full" if call.flag("full") else "top", mode="existing" if call.flag("reuse") else "absolute-paths",
        unmap=True,
    )  # fmt: skip


@hmp_command(
    "drive_backup",
    "reuse:-n,full:-f,compress:-c,device:B,target:s,format:s?",
    "[-n] [-f] [-c] device target [format]",
    "copy a device as it is now to a new image (-n: the image exists; -f: copy the whole disk, not only the top image; "
    "-c: compress the copy)",
    since="1.6",
)
async def drive_backup(call: HmpCall) -> None:
    """drive-backup with the device's name as job id."""
    device = call.text("device")
    await call.qmp(
        "drive-backup", job_id=device, device=device, target=call.text("target"), format=call.text("format"),
        sync="full" if call.flag("full") else "top", mode="existing" if call.flag("reuse") else "absolute-paths",
        compress=call.flag("compress"),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- graph


@hmp_command(
    "drive_reopen",
    "device:B,new-image-file:s,format:s?",
    "device new-image-file [format]",
    "let a device leave its image for another one, which a mirror has made for instance",
    since="7.2",
    dialects=frozenset({Dialect.SYSTEM, Dialect.RFC_2012, Dialect.BLKMIRROR_2012}),
)
async def drive_reopen(call: HmpCall) -> None:
    """drive-reopen without a witness."""
    await call.qmp(
        "drive-reopen", device=call.text("device"), new_image_file=call.text("new-image-file"),
        format=call.text("format"),
    )  # fmt: skip


@hmp_command(
    "snapshot_blkdev",
    "reuse:-n,device:B,snapshot-file:s?,format:s?",
    "[-n] device [new-image-file] [format]",
    "put a new image on top of a device; the old one becomes its backing file (-n: the image exists)",
)
async def snapshot_blkdev(call: HmpCall) -> None:
    """blockdev-snapshot-sync."""
    await call.qmp(
        "blockdev-snapshot-sync", device=call.text("device"), snapshot_file=call.text("snapshot-file"),
        format=call.text("format"), mode="existing" if call.flag("reuse") else "absolute-paths",
    )  # fmt: skip


@hmp_command(
    "commit",
    "device:B",
    "device|all",
    "move what the active layer of a device (or of all) holds into its backing file, and empty it; the device waits meanwhile",
)
async def commit(call: HmpCall) -> None:
    """Commits without a job; failures are printed without ``Error:``."""
    try:
        await drives.commit(call.context, call.text("device") or "")
    except (DeviceNotFound, drives.CommitFailed) as error:
        raise PlainError(str(error)) from error


@hmp_command(
    "snapshot_blkdev_internal", "device:B,name:s", "device name", "keep the disk as it is now as an internal snapshot"
)
async def snapshot_blkdev_internal(call: HmpCall) -> None:
    """blockdev-snapshot-internal-sync."""
    await call.qmp("blockdev-snapshot-internal-sync", device=call.text("device"), name=call.text("name"))


@hmp_command(
    "snapshot_delete_blkdev_internal", "device:B,name:s,id:s?", "device name [id]", "delete an internal snapshot"
)
async def snapshot_delete_blkdev_internal(call: HmpCall) -> None:
    """blockdev-snapshot-delete-internal-sync."""
    await call.qmp(
        "blockdev-snapshot-delete-internal-sync",
        device=call.text("device"), name=call.text("name"), id=call.text("id"),
    )  # fmt: skip


@hmp_command(
    "block_resize", "device:B,size:o", "device size", "change the size of a device (a plain number counts MiB)"
)
async def block_resize(call: HmpCall) -> None:
    """block_resize."""
    await call.qmp("block_resize", device=call.text("device"), size=call.number("size"))


@hmp_command(
    "block_set_io_throttle",
    "device:B,bps:l,bps_rd:l,bps_wr:l,iops:l,iops_rd:l,iops_wr:l",
    "device bps bps_rd bps_wr iops iops_rd iops_wr",
    "limit how much a device reads and writes per second (0: no limit)",
    since="1.1",
)
async def block_set_io_throttle(call: HmpCall) -> None:
    """block_set_io_throttle, with the name of a drive, otherwise of a guest device."""
    name = call.text("device")
    is_drive = any(device["device"] == name for device in await call.qmp("query-block"))
    rates = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
    limits = {rate: call.number(rate) for rate in rates}
    await call.qmp("block_set_io_throttle", {"device" if is_drive else "id": name, **limits})


@hmp_command(
    "drive_add",
    "node:-n,pci_addr:s,opts:s",
    "[-n] pci_addr [file=file][,if=none][,id=id][,format=f][,...]",
    "add a drive without a guest device (-n: add a node, from blockdev options)",
)
async def drive_add(call: HmpCall) -> None:
    """blockdev-add, or a drive as on the command line; failures are printed without ``Error:``."""
    options = call.text("opts") or ""
    try:
        if call.flag("node"):
            await drives.add_node(call.context, options)
        else:
            await call.context.system.drive_add(split_opts(options))
            call.say("OK")
    except QBlockError as error:
        raise PlainError(str(error)) from error


@hmp_command("drive_del", "id:B", "device", "take a drive or a node away; the guest's device stays, without a medium")
async def drive_del(call: HmpCall) -> None:
    """Removes a drive by name, or a node; an unknown or busy one is reported without ``Error:``."""
    try:
        await drives.delete(call.context, call.text("id") or "")
    except (DeviceNotFound, NodeBusy) as error:
        raise PlainError(str(error)) from error


@hmp_command(
    "qemu-io",
    "qdev:-d,device:B,command:s",
    '[-d] device "[command]"',
    "run a qemu-io command (-d: device is a qdev id)",
    since="1.5",
)
async def qemu_io(call: HmpCall) -> None:
    """Runs the command; as in QEMU what it prints goes to the program's standard output, and here only what is refused."""
    name, line = call.text("device") or "", call.text("command") or ""
    if not await call.context.hub.io.run(name, line, is_qdev=call.flag("qdev"), complain=call.say):
        call.fail()


# ------------------------------------------------------------------------------------------------------------ program


@hmp_command("getfd", "fdname:s", "getfd name", "keep a file descriptor that came with the command under a name")
async def getfd(call: HmpCall) -> None:
    """getfd."""
    await call.qmp("getfd", fdname=call.text("fdname"))


@hmp_command("closefd", "fdname:s", "closefd name", "close a file descriptor that getfd has kept")
async def closefd(call: HmpCall) -> None:
    """closefd."""
    await call.qmp("closefd", fdname=call.text("fdname"))


@hmp_command("stop|s", "", "", "stop the guest")
async def stop(call: HmpCall) -> None:
    """stop."""
    await call.qmp("stop")


@hmp_command("cont|c", "", "", "let the guest go on")
async def cont(call: HmpCall) -> None:
    """cont."""
    await call.qmp("cont")


@hmp_command("quit|q", "", "", "end the program")
async def quit_program(call: HmpCall) -> None:
    """quit."""
    await call.qmp("quit")


@hmp_command("help|?", "name:S?", "[cmd]", "show the help")
async def help_command(call: HmpCall) -> None:
    """Prints the commands, or one of them (``help info block`` for those of info)."""
    name = " ".join((call.text("name") or "").split())
    if name == "info":
        _list_info(call)
    elif name:
        command = call.monitor.find(name)
        if command is None:
            call.fail(f"unknown command: '{name}'")
        else:
            call.say(command.synopsis)
    else:
        for command in call.monitor:
            if not command.name.startswith("info "):
                call.say(command.synopsis)


@hmp_command("info", "", "[subcommand]", "show various information about the system state")
async def info(call: HmpCall) -> None:
    """Without a subcommand: lists those there are."""
    _list_info(call)


def _list_info(call: HmpCall) -> None:
    for command in call.monitor.info_commands():
        call.say(command.synopsis)
