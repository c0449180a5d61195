"""What a command line of ``qblock-system`` asks for, read before anything is made: board, fittings, defaults, time.

Models how qemu-system-x86_64 7.2 decides which devices a machine has that nobody has asked for.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

from qblock.devices.board import BOARDS, BoardType, Fittings
from qblock.devices.machine_types import Identity, MachineType, machine_type
from qblock.errors import CommandError, InvalidParameter
from qblock.monitor.commandline import check_members
from qblock.options import split_keyval
from qblock.tools.idle_values import check_idle
from qblock.tools.system_help import ACCELERATORS
from qblock.tools.system_options import GROUPS, About, Given
from qblock.units import parse_size

_DISPLAYS: Final = frozenset(
    {
        "VGA", "ati-vga", "cirrus-vga", "isa-cirrus-vga", "isa-vga", "qxl-vga", "virtio-vga", "virtio-vga-gl", "vmware-svga",
    }
)  # fmt: skip
SUPERSEDES: Final[Mapping[str, str]] = {
    **dict.fromkeys(_DISPLAYS, "vga"),
    **dict.fromkeys(("ide-cd", "ide-hd", "scsi-cd", "scsi-hd"), "cdrom"),
    **dict.fromkeys(("floppy", "isa-fdc"), "floppy"),
    "isa-parallel": "parallel",
    "isa-serial": "serial",
}
"""Devices that take the place of a default one."""
MAX_PARALLEL: Final = 3
MAX_CPUS: Final = 255
"""As many processors a machine can have."""
_VGA: Final = frozenset({"std", "cirrus", "vmware", "qxl", "xenfb", "virtio", "none"})
MACHINE_PROPERTIES: Final = frozenset(
    {
        "acpi", "aes-key-wrap", "append", "boot", "bus-lock-ratelimit", "confidential-guest-support",
        "default-bus-bypass-iommu", "dea-key-wrap", "dt-compatible", "dtb", "dump-guest-core", "dumpdtb", "firmware", "graphics",
        "hmat", "hpet", "i8042", "igd-passthru", "initrd", "kernel", "kernel-irqchip", "kernel_irqchip", "kvm-shadow-mem",
        "max-fw-size", "max-ram-below-4g", "mem-merge", "memory", "memory-backend", "memory-encryption", "nvdimm",
        "phandle-start", "pic", "pit", "sata", "sgx-epc", "smbios-entry-point-type", "smbus", "smm", "smp", "suppress-vmdesc",
        "vmport", "x-oem-id", "x-oem-table-id",
    }
)  # fmt: skip
"""Properties of the machine that have no effect here."""


@attrs.frozen
class Plan:
    """The options, and what follows from all of them together."""

    given: Sequence[Given]
    identity: Identity = Identity()
    board: BoardType = BOARDS["pc"]
    fittings: Fittings = Fittings()
    default_drives: Sequence[str] = ()
    flash: Mapping[int, str] = attrs.field(factory=dict)
    usb: bool = False
    virtual_time: bool = False

    @classmethod
    def of(cls, given: Sequence[Given]) -> Plan:
        """Read the options; raises `CommandError` and `InvalidParameter`."""
        for option in given:
            if option.name in GROUPS:
                with About(option):
                    option.members()
            with About(option):
                check_idle(option)
        properties = _machine(given)
        kind = machine_type(properties.pop("type", "pc"))
        board = BOARDS[kind.board]
        if kind.board == "pc" and (properties.get("acpi") in ("off", "no", "false") or any(o.name == "no-acpi" for o in given)):
            board = attrs.evolve(board, pci_hotplug=False)  # it is ACPI that tells the guest
        defaults = _defaults(given, board)
        return cls(
            given,
            _identity(given, kind),
            board,
            _fittings(given, defaults, board),
            [kind for kind in ("cdrom", "floppy", "sdcard") if kind in defaults],
            _flash(properties),
            any(option.name == "usb" for option in given) or properties.get("usb") in ("on", "yes", "true"),
            "qtest" in _accelerators(given, properties),
        )

    def has(self, name: str) -> bool:
        """Whether an option was given."""
        return any(option.name == name for option in self.given)

    def values(self, name: str) -> list[str]:
        """The values of an option, in their order."""
        return [option.value for option in self.given if option.name == name]

    def last(self, name: str) -> str | None:
        """The value of an option; the last one wins."""
        values = self.values(name)
        return values[-1] if values else None


def _machine(given: Sequence[Given]) -> dict[str, str]:
    """The properties of the machine, those of a later ``-machine`` on top."""
    properties: dict[str, str] = {}
    for option in given:
        if option.name in ("machine", "M"):
            for key, value in split_keyval(option.value, implied_key="type").items():
                known = key in MACHINE_PROPERTIES | {"type", "accel", "usb"} or key.startswith(("pflash", "smp.", "memory."))
                if not known and not key.startswith(("cxl-fmw.", "sgx-epc.", "boot.")):
                    raise CommandError(f"{option}: a machine has no property '{key}'")
                properties[key] = str(value)
    return properties


def _identity(given: Sequence[Given], kind: MachineType) -> Identity:
    """What ``-uuid`` and ``-m`` say; the last one wins."""
    found = Identity(kind)
    for option in given:
        if option.name == "uuid":
            try:
                found = attrs.evolve(found, uuid=str(uuid.UUID(option.value)))
            except ValueError:
                found = attrs.evolve(found, uuid="")
            if found.uuid != option.value.lower():
                raise CommandError(f"{option}: this is no UUID")
        elif option.name == "m":
            size = option.members().get("size", found.memory >> 20)
            try:
                found = attrs.evolve(found, memory=parse_size(str(size), default_unit="M"))
            except ValueError as error:
                raise CommandError(f"{option}: {error}") from None
    return found


def _accelerators(given: Sequence[Given], properties: Mapping[str, str]) -> list[str]:
    names = properties.get("accel", "").split(":")
    for option in given:
        if option.name == "accel":
            names.append(str(split_keyval(option.value, implied_key="accel").get("accel", "")))
    for name in filter(None, names):
        if name not in ACCELERATORS:
            raise CommandError(f"There is no accelerator '{name}'; see '-accel help'")
    return names


def _flash(properties: Mapping[str, str]) -> dict[int, str]:
    flash = {}
    for key, value in properties.items():
        if key.startswith("pflash"):
            if key not in ("pflash0", "pflash1"):
                raise InvalidParameter(key, "is none of a machine's: there are pflash0 and pflash1")
            flash[int(key[-1])] = value
    return flash


def _defaults(given: Sequence[Given], board: BoardType) -> frozenset[str]:
    """The devices that there are without anybody asking."""
    if not board.has_defaults or any(option.name == "nodefaults" for option in given):
        return frozenset()
    wanted = {"serial", "parallel", "vga", "nic", "cdrom", "floppy", "sdcard", "monitor"}
    if "floppy" not in board.default_drives:
        wanted.discard("floppy")
    for option in given:
        if option.name in ("serial", "parallel", "vga"):
            wanted.discard(option.name)
        elif option.name in ("net", "netdev", "nic"):
            wanted.discard("nic")
        elif option.name == "device" and not option.value.startswith("{"):
            wanted.discard(SUPERSEDES.get(option.value.partition(",")[0].removeprefix("driver="), ""))
    return frozenset(wanted)


def _fittings(given: Sequence[Given], defaults: frozenset[str], board: BoardType) -> Fittings:
    counts = {kind: int(kind in defaults) for kind in ("serial", "parallel", "vga", "nic")}
    cpus = 1
    for option in given:
        match option.name:
            case "serial" | "parallel" if option.value != "none":
                counts[option.name] += 1
            case "vga":
                if option.value not in _VGA:
                    raise CommandError(f"{option}: there is no such display card; there are {', '.join(sorted(_VGA))}")
                counts["vga"] = int(option.value != "none" and board.pci_bus)
            case "nic" if option.value != "none":
                counts["nic"] += 1
            case "net" if option.value.startswith("nic"):
                counts["nic"] += 1
            case "smp":
                cpus = _cpus(option)
    if counts["parallel"] > MAX_PARALLEL:
        raise CommandError(f"-parallel: there can be {MAX_PARALLEL} parallel ports")
    return Fittings(cpu=cpus, **counts)


def _cpus(option: Given) -> int:
    """How many processors ``-smp`` asks for: the number, or the product of its parts, of which 0 stands for none given."""
    members = {key: str(value) for key, value in split_keyval(option.value, implied_key="cpus").items()}
    check_members("smp-opts", members)
    numbers = {}
    for key, value in members.items():
        if not value.isdigit():
            raise CommandError(f"{option}: '{key}' must be a number")
        numbers[key] = int(value)
    parts = {key: numbers.get(key, 0) for key in ("sockets", "dies", "clusters", "cores", "threads")}
    cpus = numbers.get("cpus", 0) or numbers.get("maxcpus", 0)
    most = numbers.get("maxcpus", 0) or cpus
    if most:
        # What was not given is 1, but for the first of these, which fills up.
        filler = next((key for key in ("cores", "sockets", "threads") if not parts[key]), None)
        rest = math.prod(number or 1 for key, number in parts.items() if key != filler)
        if (most // rest * rest if filler else rest) != most:
            raise CommandError(f"{option}: the parts do not multiply to the {most} processors that there can be")
    cpus = cpus or math.prod(number or 1 for number in parts.values())
    if cpus > (most or cpus) or max(cpus, most) > MAX_CPUS or parts["clusters"] > 1:
        raise CommandError(f"{option}: there can be {min(most or MAX_CPUS, MAX_CPUS)} processors, and no clusters of them")
    return cpus
