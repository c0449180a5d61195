"""What libvirt 9.0 says to an emulator, as it was recorded: its questions to one that it does not know, and the life of a domain.

The domain is one as virt-install makes it (``q35``, a disk with cache=none on virtio, one with copy-on-read on SATA, an empty CD
drive, a network card, a console, a guest agent's channel, a balloon). Its life: snapshots, block-commit of an inner layer and of
the active one, block-stream, a copy that it moves to, a copy that is given up, resize, throttling, a disk that comes and goes, a
CD, a checkpoint with a full and an incremental backup, a reset.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

_RECORD: Final[dict[str, Any]] = json.loads((Path(__file__).parent / "libvirt_9_0.json").read_text())
PROBE: Final[list[dict[str, Any]]] = _RECORD["probe"]
"""The commands sent to an emulator that it does not know yet."""
DOMAIN: Final[str] = json.dumps(_RECORD["domain"])
"""The commands of a domain's life, and the events that it waits for, as JSON; ``{dir}`` is the folder of its images."""
PROBE_OPTIONS: Final = ("-S", "-no-user-config", "-nodefaults", "-nographic", "-machine", "none,accel=kvm:tcg")
"""The options of an emulator that is only asked; a monitor on a socket, ``-pidfile`` and ``-daemonize`` come with them."""


def domain_options(place: Path, socket: Path) -> list[str]:
    """The options that the domain is started with."""
    words = [word for option in _RECORD["options"] for word in option]
    return [word.replace("{dir}", str(place)).replace("{socket}", str(socket)) for word in words]


def domain_commands(place: Path) -> list[dict[str, Any]]:
    """The commands, and the events that are waited for as ``{"wait": ...}``."""
    commands: list[dict[str, Any]] = json.loads(DOMAIN.replace("{dir}", str(place)))
    return commands


def make_images(place: Path, image_program: Sequence[str]) -> None:
    """The files that are there before the domain is started, and those that libvirt makes before a node is opened on them."""
    for name, size in (("vda.qcow2", "64M"), ("sdb.qcow2", "64M"), ("add.qcow2", "16M")):
        subprocess.run([*image_program, "create", "-q", "-f", "qcow2", place / name, size], check=True)
    (place / "cd2.iso").write_bytes(bytes(4 << 20))
    (place / "master-key.aes").write_bytes(bytes(32))
    for name in ("vda.s1", "vda.s2", "vda.s3", "sda.s2", "copy.qcow2", "copy2.qcow2", "full.qcow2", "inc.qcow2"):
        (place / name).touch()
