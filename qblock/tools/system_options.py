"""The options of ``qblock-system``: which there are, which have an effect, and how a command line is taken apart.

Models the command line of qemu-system-x86_64 7.2: one dash or two, a value is the next word, a word that is no option is the
image of the first hard disk; ``-readconfig`` reads options from a file, ``-set`` adds to an option given before. Differs
from QEMU in what its last table says: what would need a processor, or what this program cannot do, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs

from qblock.errors import CommandError, QBlockError
from qblock.monitor.commandline import check_members
from qblock.options import split_opts
from qblock.tools.arguments import UsageError

VALUED: Final = frozenset(
    {
        "accel", "action", "add-fd", "blockdev", "cdrom", "chardev", "device", "drive", "fda", "fdb", "global", "hda", "hdb",
        "hdc", "hdd", "loadvm", "m", "M", "machine", "mon", "monitor", "mtdblock", "name", "net", "netdev", "nic", "object",
        "parallel", "pflash", "pidfile", "qmp", "qmp-pretty", "qtest", "readconfig", "sd", "seed", "serial", "set", "smp",
        "trace", "uuid", "vga",
    }
)  # fmt: skip
"""Options with a value that have an effect here."""
FLAGS: Final = frozenset(
    {
        "daemonize", "enable-kvm", "h", "help", "no-reboot", "no-shutdown", "nodefaults", "nographic", "S", "snapshot", "usb",
        "version",
    }
)  # fmt: skip
"""Options without a value that have an effect here."""
IDLE_VALUED: Final = frozenset(
    {
        "acpitable", "append", "audio", "audiodev", "bios", "boot", "compat", "cpu", "D", "d", "debugcon", "dfilter", "display",
        "dtb", "echr", "fsdev", "fw_cfg", "icount", "initrd", "iscsi", "k", "kernel", "L", "mem-path", "msg", "numa",
        "option-rom", "overcommit", "plugin", "qtest-log", "rotate", "rtc", "sandbox", "smbios", "spice", "tpmdev",
        "usbdevice", "virtfs", "vnc", "watchdog-action",
    }
)  # fmt: skip
"""Options with a value that have no effect on a machine without a processor."""
IDLE_FLAGS: Final = frozenset(
    {
        "async-teardown", "enable-sync-profile", "full-screen", "mem-prealloc", "no-acpi", "no-fd-bootchk", "no-hpet",
        "no-user-config", "only-migratable", "portrait", "singlestep", "win2k-hack",
    }
)  # fmt: skip
"""The same without a value."""
REFUSED: Final[Mapping[str, str]] = {
    "audio-help": "there is no sound",
    "chroot": "the program keeps the root directory that it was started with",
    "dump-vmstate": "there is no state of a processor and its memory",
    "gdb": "there is no processor to be debugged",
    "incoming": "a machine without memory and processor cannot be migrated; start it with its disks, and mirror these",
    "preconfig": "the machine is always set up from its command line",
    "runas": "the program keeps the user that it was started by; start it by another one",
    "s": "there is no processor to be debugged",
    "xen-attach": "there is no hypervisor",
    "xen-domid": "there is no hypervisor",
    "xen-domid-restrict": "there is no hypervisor",
}
"""What is refused, and why."""

DISKS: Final[Mapping[str, Mapping[str, str]]] = {
    "hda": {"index": "0", "media": "disk"},
    "hdb": {"index": "1", "media": "disk"},
    "hdc": {"index": "2", "media": "disk"},
    "hdd": {"index": "3", "media": "disk"},
    "cdrom": {"index": "2", "media": "cdrom"},
    "fda": {"if": "floppy", "index": "0"},
    "fdb": {"if": "floppy", "index": "1"},
    "mtdblock": {"if": "mtd"},
    "pflash": {"if": "pflash"},
    "sd": {"if": "sd"},
}
"""Short options, and the members of ``-drive`` that they stand for beside the file."""


GROUPS: Final[Mapping[str, tuple[str, str | None]]] = {
    "action": ("action", None),
    "add-fd": ("add-fd", None),
    "chardev": ("chardev", "backend"),
    "fw_cfg": ("fw_cfg", "name"),
    "icount": ("icount", "shift"),
    "iscsi": ("iscsi", None),
    "m": ("memory", "size"),
    "mon": ("mon", "chardev"),
    "msg": ("msg", None),
    "name": ("name", "guest"),
    "option-rom": ("option-rom", "romfile"),
    "overcommit": ("overcommit", None),
    "rtc": ("rtc", None),
    "sandbox": ("sandbox", "enable"),
}
"""Options whose members are known, as query-command-line-options lists them: under which name, and what a first word alone is."""
_SECTIONS: Final = {"boot-opts": "boot", "memory": "m", "smp-opts": "smp"}
"""Options that are called otherwise in files of options."""


@attrs.frozen
class Given:
    """One option as it was given, without its dashes; ``value`` is empty for a flag."""

    name: str
    value: str = ""

    def members(self) -> dict[str, str]:
        """The members of one of `GROUPS`; raises `CommandError`, and `InvalidParameter` for what it has not."""
        group, implied = GROUPS[self.name]
        members = split_opts(self.value, implied_key=implied)
        check_members(group, members)
        return members

    def __str__(self) -> str:
        return f"-{self.name} {self.value}".rstrip()


@attrs.frozen
class About:
    """Errors inside begin with the option that they are about."""

    option: Given

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, QBlockError):
            raise CommandError(f"{self.option}: {error}") from error


def parse_options(argv: Sequence[str]) -> list[Given]:
    """The options of a command line, in their order, files and ``-set`` worked in; raises `UsageError`."""
    given: list[Given] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            given.append(Given("hda", word))
            continue
        name = word[2:] if word.startswith("--") else word[1:]
        if name in FLAGS or name in IDLE_FLAGS:
            given.append(Given(name))
        elif name in VALUED or name in IDLE_VALUED:
            if not rest:
                raise UsageError(f"-{name} needs a value")
            _enter(given, Given(name, rest.pop(0)))
        elif name in REFUSED:
            raise UsageError(f"-{name} is not supported: {REFUSED[name]}")
        else:
            raise UsageError(f"{word} is no option that there is")
    return given


def _enter(given: list[Given], one: Given) -> None:
    if one.name == "readconfig":
        given += read_config(one.value)
    elif one.name == "set":
        _set(given, one.value)
    else:
        given.append(one)


# --------------------------------------------------------------------------------------------------- -set and -readconfig

_SETTING: Final = re.compile(r"([\w-]+)\.([^.]+)\.([^=]+)=(.*)", re.DOTALL)
_SECTION: Final = re.compile(r'\[\s*([\w-]+)(?:\s+"([^"]*)")?\s*\]')
_LINE: Final = re.compile(r'([\w.-]+)\s*=\s*"([^"]*)"')


def escape(value: str) -> str:
    """A value as it stands in ``key=value`` text, where a comma is written twice."""
    return value.replace(",", ",,")


def _set(given: list[Given], text: str) -> None:
    """``GROUP.ID.ARGUMENT=VALUE`` for an option that was given before."""
    found = _SETTING.fullmatch(text)
    if found is None:
        raise UsageError(f"-set takes GROUP.ID.ARGUMENT=VALUE, not '{text}'")
    group, name, argument, value = found.groups()
    for place, option in enumerate(given):
        if option.name == group and re.search(rf"(?:^|,)id={re.escape(escape(name))}(?:,|$)", option.value):
            given[place] = Given(group, f"{option.value},{argument}={escape(value)}")
            return
    raise UsageError(f"-set {text}: there is no -{group} with id={name} before it")


def read_config(path: str) -> list[Given]:
    """The options in a file of ``[group "id"]`` sections with ``key = "value"`` lines; raises `UsageError`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"-readconfig: '{path}' cannot be read: {reason}") from None
    return list(_sections(path, text))


def _sections(path: str, text: str) -> Iterator[Given]:
    group, members = "", list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if section := _SECTION.fullmatch(line):
            if group:
                yield Given(group, ",".join(members))
            group, name = _SECTIONS.get(section[1], section[1]), section[2]
            if group not in VALUED | IDLE_VALUED or group in ("set", "readconfig"):
                raise UsageError(f"-readconfig: line {number} of '{path}': there is no option -{group}")
            members = [] if name is None else [f"id={escape(name)}"]
        elif (member := _LINE.fullmatch(line)) and group:
            members.append(f"{member[1]}={escape(member[2])}")
        else:
            raise UsageError(f'-readconfig: line {number} of \'{path}\' is neither [group "id"] nor key = "value"')
    if group:
        yield Given(group, ",".join(members))
