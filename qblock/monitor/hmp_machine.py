"""The commands of the human monitor about the machine: media, devices, objects, reset and power.

Signatures, parameters and output are those of hmp-block.md, of character devices those of 7.2; help texts are our own words.
"""

from __future__ import annotations

from qblock.devices.plugging import plug, read_request
from qblock.errors import InvalidParameter
from qblock.monitor.chardev import ChardevOptions, chardev_from
from qblock.monitor.commandline import check_members
from qblock.monitor.commands.chardevs import add_chardev, change_chardev
from qblock.monitor.hmp_command import HmpCall, hmp_command
from qblock.monitor.qtree import qtree_lines
from qblock.options import parse_keyval, split_opts

_MODES = ("retain", "read-only", "read-write")


@hmp_command(
    "eject", "force:-f,device:B", "[-f] device", "take the medium out (-f: also when the guest has locked the tray)"
)
async def eject(call: HmpCall) -> None:
    """eject."""
    await call.qmp("eject", device=call.text("device"), force=call.flag("force"))


@hmp_command(
    "change",
    "device:B,force:-f,target:F,format:s?,read-only-mode:s?",
    "device [-f] filename [format [read-only-mode]]",
    "change the medium (-f: also when the guest has locked the tray)",
)
async def change(call: HmpCall) -> None:
    """blockdev-change-medium of a drive."""
    mode = call.text("read-only-mode")
    if mode is not None and mode not in _MODES:
        call.fail(f"Error: the read-only mode is {', '.join(_MODES[:-1])} or {_MODES[-1]}, not '{mode}'")
        return
    await call.qmp(
        "blockdev-change-medium", device=call.text("device"), filename=call.text("target"), format=call.text("format"),
        read_only_mode=mode, force=call.flag("force"),
    )  # fmt: skip


@hmp_command("device_add", "device:S", "driver[,prop=value][,...]", "plug in a device, as -device on the command line")
async def device_add(call: HmpCall) -> None:
    """As ``-device``, so values are text."""
    system = call.context.system
    options = split_opts(call.text("device") or "", implied_key="driver")
    plug(system, read_request(options, strings=True, defaults=system.board.defaults), hot=system.board.started)


@hmp_command("device_del", "id:s", "device", "pull out a device")
async def device_del(call: HmpCall) -> None:
    """device_del."""
    await call.qmp("device_del", id=call.text("id"))


@hmp_command("object_add", "object:S", "[qom-type=]type,id=str[,prop=value][,...]", "make an object")
async def object_add(call: HmpCall) -> None:
    """As ``-object``, so values are text."""
    options = parse_keyval(call.text("object") or "", implied_key="qom-type")
    await call.context.system.add_object(options, strings=True)


@hmp_command("object_del", "id:s", "id", "remove an object")
async def object_del(call: HmpCall) -> None:
    """object-del."""
    await call.qmp("object-del", id=call.text("id"))


@hmp_command("info qtree", "", "", "show the devices with their properties, bus by bus")
async def info_qtree(call: HmpCall) -> None:
    """Lines of `qtree`."""
    for line in qtree_lines(call.context.system.devices):
        call.say(line)


@hmp_command("system_reset", "", "", "reset the machine")
async def system_reset(call: HmpCall) -> None:
    """system_reset."""
    await call.qmp("system_reset")


@hmp_command("system_powerdown", "", "", "press the power button")
async def system_powerdown(call: HmpCall) -> None:
    """system_powerdown."""
    await call.qmp("system_powerdown")


@hmp_command("chardev-add", "args:s", "args", "add a character device, as -chardev does")
async def chardev_add_hmp(call: HmpCall) -> None:
    """chardev-add, from options as on the command line."""
    await add_chardev(call.context.hub, _chardev(call.text("args") or ""))


@hmp_command("chardev-change", "id:s,args:s", "id args", "put another character device in the place of one")
async def chardev_change_hmp(call: HmpCall) -> None:
    """chardev-change, from options as on the command line, without an id."""
    members = split_opts(call.text("args") or "", implied_key="backend")
    if "id" in members:
        raise InvalidParameter("id", "is unexpected: the id stays")
    await change_chardev(call.context.hub, chardev_from({**members, "id": call.text("id") or ""}))


@hmp_command("chardev-remove", "id:s", "id", "remove a character device that nobody uses")
async def chardev_remove_hmp(call: HmpCall) -> None:
    """chardev-remove."""
    await call.qmp("chardev-remove", id=call.text("id"))


def _chardev(text: str) -> ChardevOptions:
    members = split_opts(text, implied_key="backend")
    check_members("chardev", members)
    return chardev_from(members)
