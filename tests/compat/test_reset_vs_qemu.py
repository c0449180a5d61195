"""A reset and the power button, and what -no-reboot and -no-shutdown make of them, in both programs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from qmp_pair import do, running

LINE = ("-nodefaults", "-display", "none", "-machine", "pc", "-qmp", "unix:{socket},server=on,wait=off")
PROGRAMS = (("qemu-system-x86_64", *LINE), (sys.executable, "-m", "qblock.tools.system", *LINE))


def _lived(argv: tuple[str, ...], place: Path, commands: list[str], *, ends: bool = False) -> list[Any]:
    """The events and the reply of each command, and what comes until the program hangs up, if it ``ends``."""
    place.mkdir()
    seen: list[Any] = []
    with running(argv, place) as connection:
        connection.execute(do("qmp_capabilities"))
        for name in commands:
            events, reply = connection.execute(do(name))
            seen += [(event["event"], event.get("data")) for event in events]
            seen.append(reply["return"] if "return" in reply else reply["error"]["class"])
        while ends and (message := connection.receive()) is not None:
            seen.append((message["event"], message.get("data")))
    return seen


@pytest.mark.parametrize("options", [(), ("-no-shutdown",), ("-no-reboot", "-no-shutdown"), ("-S", "-no-shutdown")], ids=" ".join)
def test_a_machine_that_stays_tells_the_same(options: tuple[str, ...], tmp_path: Path) -> None:
    """Which events there are, with which reasons, and in which run state it is then."""
    commands = ["system_powerdown", "system_reset", "cont", "stop", "system_reset", "system_powerdown"]
    commands = [part for name in commands for part in (name, "query-status")]
    real, ours = (_lived((*argv, *options), tmp_path / str(n), commands) for n, argv in enumerate(PROGRAMS))
    assert real == ours


def test_a_machine_that_is_not_to_reboot_ends_instead(tmp_path: Path) -> None:
    """SHUTDOWN with the reason, and then the program is gone."""
    real, ours = (
        _lived((*argv, "-no-reboot"), tmp_path / str(n), ["system_reset"], ends=True) for n, argv in enumerate(PROGRAMS)
    )
    assert ours == [("SHUTDOWN", {"guest": False, "reason": "host-qmp-system-reset"}), {}]
    assert real == ours
