"""The parameters of the command line's options, as query-command-line-options tells of them.

Models the layout of QEMU 7.2. What is listed is what ``qblock-system`` honours, or accepts because it has no effect here; options
whose parameters depend on their first word (``-device``, ``-object``, ``-netdev``) are listed without any, as in QEMU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from qblock.options import fields
from qblock.throttle_limits import ThrottleLimits

ParameterType: TypeAlias = Literal["string", "boolean", "number", "size"]

Parameters: TypeAlias = Mapping[str, ParameterType]


def _all(kind: ParameterType, names: str) -> dict[str, ParameterType]:
    return dict.fromkeys(names.split(), kind)


_DRIVE: Final[Parameters] = {
    **_all("string", "if file format driver node-name id media cache aio discard detect-zeroes werror rerror"),
    **_all("number", "bus unit index"),
    **_all("boolean", "snapshot read-only auto-read-only force-share copy-on-read cache.writeback cache.direct cache.no-flush"),
    **_all("boolean", "stats-account-failed stats-account-invalid"),
    **{f"throttling.{field.wire}": "number" for field in fields(ThrottleLimits)},
    "throttling.group": "string",
}

GROUPS: Final[Mapping[str, Parameters]] = {
    "machine": {
        **_all("string", "type accel kernel initrd append dtb firmware"),
        **_all("boolean", "usb dump-guest-core mem-merge suppress-vmdesc"),
    },
    "drive": _DRIVE,
    "device": {},
    "object": {},
    "global": _all("string", "driver property value"),
    "chardev": {
        **_all("string", "backend path host port fd"),
        **_all("boolean", "server wait append signal"),
        **_all("number", "width height cols rows"),
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
    "accel": {},
    "net": {},
    "netdev": {},
    "nic": {},
    "numa": {},
    "smbios": {},
    "tpmdev": {},
}
"""Option to parameter to what it takes."""
