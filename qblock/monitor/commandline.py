"""The parameters of the command line's options, as query-command-line-options tells of them.

Models the layout of QEMU 7.2. What is listed is what ``qblock-system`` honours, or accepts because it has no effect here; options
whose parameters depend on their first word (``-device``, ``-object``, ``-netdev``) are listed without any, as in QEMU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from qblock.errors import InvalidParameter
from qblock.graph import check_identifier
from qblock.options import fields
from qblock.throttle_limits import ThrottleLimits
from qblock.units import parse_size

ParameterType: TypeAlias = Literal["string", "boolean", "number", "size"]

Parameters: TypeAlias = Mapping[str, ParameterType]


def _all(kind: ParameterType, names: str) -> dict[str, ParameterType]:
    return dict.fromkeys(names.split(), kind)


_DRIVE: Final[Parameters] = {
    **_all("string", "if file format driver node-name media aio discard detect-zeroes werror rerror"),
    **_all("number", "bus unit index"),
    **_all("boolean", "snapshot read-only auto-read-only force-share copy-on-read cache.writeback cache.direct cache.no-flush"),
    **_all("boolean", "stats-account-failed stats-account-invalid"),
    **{f"throttling.{field.wire}": "number" for field in fields(ThrottleLimits)},
    "throttling.group": "string",
}

GROUPS: Final[Mapping[str, Parameters]] = {
    "machine": {
        **_all("string", "type accel kernel initrd append dtb dumpdtb dt_compatible firmware loadparm"),
        **_all("boolean", "usb dump-guest-core mem-merge suppress-vmdesc kernel_irqchip iommu aes-key-wrap dea-key-wrap"),
        "kvm_shadow_mem": "size",
        "phandle_start": "number",
    },
    "drive": _DRIVE,
    "device": {},
    "object": {},
    "global": _all("string", "driver property value"),
    "chardev": {
        **_all("string", "backend path host port fd localaddr localport name chardev logfile tls-creds tls-authz"),
        **_all("boolean", "server wait append signal ipv4 ipv6 delay nodelay telnet tn3270 websocket mux logappend"),
        **_all("boolean", "abstract tight mouse clipboard"),
        **_all("number", "width height cols rows to reconnect debug"),
        "size": "size",
    },
    "mon": {**_all("string", "chardev mode"), "pretty": "boolean"},
    "add-fd": {**_all("number", "fd set"), "opaque": "string"},
    "name": {**_all("string", "guest process"), "debug-threads": "boolean"},
    "action": _all("string", "shutdown reboot panic watchdog"),
    "trace": _all("string", "enable events file"),
    "smp-opts": _all("number", "cpus sockets dies clusters cores threads maxcpus"),
    "memory": {**_all("size", "size maxmem"), "slots": "number"},
    "boot-opts": {
        **_all("string", "order once splash"),
        **_all("boolean", "menu strict"),
        **_all("number", "splash-time reboot-timeout"),
    },
    "rtc": _all("string", "base clock driftfix"),
    "msg": _all("boolean", "timestamp guest-name"),
    "overcommit": _all("boolean", "mem-lock cpu-pm"),
    "icount": {**_all("string", "shift rr rrfile rrsnapshot"), **_all("boolean", "align sleep")},
    "sandbox": {"enable": "boolean", **_all("string", "obsolete elevateprivileges spawn resourcecontrol")},
    "fw_cfg": _all("string", "name file string gen_id"),
    "iscsi": {**_all("string", "user password password-secret header-digest initiator-name"), "timeout": "number"},
    "option-rom": {"romfile": "string", "bootindex": "number"},
    "accel": {},
    "acpi": {},
    "plugin": {},
    "net": {},
    "netdev": {},
    "nic": {},
    "numa": {},
    "smbios": {},
    "tpmdev": {},
}
"""Option to parameter to what it takes."""


def check_members(group: str, members: Mapping[str, str]) -> None:
    """Raise `InvalidParameter` unless ``members`` are parameters of the option ``group``, with values that these take."""
    known = GROUPS[group]
    for name, value in members.items():
        if name == "id":
            check_identifier(value, parameter="id")
        elif name not in known:
            raise InvalidParameter(name, f"is unexpected; there are {', '.join(known)}")
        else:
            _check(known[name], name, value)


def _check(kind: ParameterType, name: str, value: str) -> None:
    if kind == "boolean" and value not in ("on", "off"):
        raise InvalidParameter(name, f"takes on or off, not '{value:.100}'")
    try:
        if kind == "number":
            int(value, 0)
        elif kind == "size":
            parse_size(value)
    except ValueError:
        raise InvalidParameter(name, f"must be a {kind}, not '{value:.100}'") from None
