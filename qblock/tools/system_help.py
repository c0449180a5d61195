"""What ``qblock-system`` answers to questions on its command line: ``-machine help``, ``-device MODEL,help`` and so on.

The layout is that of qemu-system-x86_64 7.2, which management software reads.
"""

from __future__ import annotations

from typing import Final

from qblock.devices.machine_types import MACHINE_TYPES
from qblock.devices.models import find_model, help_lines
from qblock.devices.properties import help_lines as property_lines
from qblock.errors import CommandError
from qblock.objects import object_kinds
from qblock.tools.system_options import Given

ACCELERATORS: Final = ("tcg", "kvm", "qtest")
"""What can be asked for; there is no processor to be accelerated, and ``qtest`` means that time stands still."""
_CHARDEVS: Final = ("stdio", "null", "socket", "vc", "file", "pty")


def answer(option: Given) -> str | None:
    """The answer to an option that asks; None when it does not. Raises `CommandError`."""
    words = option.value.split(",")
    asks = bool({"help", "?"} & set(words))
    match option.name:
        case "machine" | "M" if asks and len(words) == 1:
            lines = (line for kind in MACHINE_TYPES.values() for line in kind.help_lines())
            return "\n".join(["Supported machines are:", *lines])
        case "accel" if asks:
            return "\n".join(["Accelerators supported in QEMU binary:", *ACCELERATORS])
        case "cpu" if asks:
            return "Available CPUs:\nx86 max                   none of them, as nothing is executed"
        case "device" if asks and not option.value.startswith("{"):
            return "\n".join(help_lines()) if len(words) == 1 else _device_help(words[0])
        case "object" if asks and len(words) == 1:
            return "\n".join(["List of user creatable objects:", *(f"  {kind}" for kind in object_kinds())])
        case "chardev" if asks:
            return "\n".join(["Available chardev backend types: ", *(f"  {kind}" for kind in _CHARDEVS)])
        case _:
            return None


def _device_help(name: str) -> str:
    model = find_model(name.removeprefix("driver="))
    if model is None:
        raise CommandError(f"-device {name},help: there is no device model '{name}'; see '-device help'")
    if model.properties is None:
        return f"{model.name} options: whatever is given is accepted, and has no effect"
    return "\n".join(property_lines(model.name, model.properties))
