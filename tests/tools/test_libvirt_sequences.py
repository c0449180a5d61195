"""What libvirt says to an emulator is answered by qblock-system so that libvirt goes on: its record, played without libvirt."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from libvirt_words import PROBE, PROBE_OPTIONS, domain_commands, domain_options, make_images
from qblock.monitor.client import QmpClient, QmpError

PROGRAM: Final = (sys.executable, "-m", "qblock.tools.system")
ABSENT: Final = {
    "virtio-balloon-ccw", "virtio-balloon-device", "virtio-gpu-device", "virtio-net-ccw", "virtio-scsi-ccw", "kvm-pit",
    "usb-host",
}  # fmt: skip
"""Device models that libvirt asks for and a machine of ours does not have: those of another architecture, parts of others."""


async def _answers(path: Path, commands: list[dict[str, Any]]) -> list[Any]:
    """The result or the error of each command; ``wait`` entries are waited for."""
    results: list[Any] = []
    async with await QmpClient.connect(str(path)) as client:
        for step in commands:
            if "wait" in step:
                await client.wait_event(step["wait"]["event"], **step["wait"]["data"])
                continue
            try:
                results.append(await client.execute(step["execute"], step.get("arguments")))
            except QmpError as error:
                results.append(error)
    return results


def test_an_emulator_that_libvirt_does_not_know_answers_its_questions(tmp_path: Path) -> None:
    """Started as libvirt starts it, in the background; what it has and what it lacks is told in a form that libvirt takes."""
    monitor = tmp_path / "qmp.monitor"
    options = ("-qmp", f"unix:{monitor},server=on,wait=off", "-pidfile", str(tmp_path / "pid"), "-daemonize")
    subprocess.run([*PROGRAM, *PROBE_OPTIONS, *options], check=True, timeout=60)
    pid = int((tmp_path / "pid").read_text())
    try:
        answers = dict(zip(map(str, PROBE), asyncio.run(_answers(monitor, PROBE)), strict=True))
    finally:
        os.kill(pid, signal.SIGTERM)
    refused = {
        step.get("arguments", step).get("typename"): answer.error_class
        for step, answer in zip(PROBE, answers.values(), strict=True)
        if isinstance(answer, QmpError)
    }
    assert refused == dict.fromkeys(ABSENT, "DeviceNotFound")
    by_name = {step["execute"]: answers[str(step)] for step in PROBE}
    assert by_name["query-target"] == {"arch": "x86_64"}
    assert by_name["query-kvm"] == {"enabled": False, "present": False}
    assert {"scsi-hd", "virtio-blk-pci", "tcg-accel", "secret", "iothread"} <= {t["name"] for t in by_name["qom-list-types"]}
    (default,) = (machine for machine in by_name["query-machines"] if machine.get("is-default"))
    assert (default["name"], default["alias"]) == ("pc-i440fx-7.2", "pc")
    while (tmp_path / "pid").exists():  # SIGTERM has been sent: it removes the file at its end
        time.sleep(0.01)


def test_a_domain_of_libvirt_lives_its_whole_life(tmp_path: Path) -> None:
    """Every command of it is carried out; only the processor that libvirt looks for is not there."""
    monitor = tmp_path / "monitor.sock"
    make_images(tmp_path, (sys.executable, "-m", "qblock.tools.img"))
    with subprocess.Popen([*PROGRAM, *domain_options(tmp_path, monitor)], stdout=subprocess.DEVNULL) as process:
        while not monitor.exists():
            assert process.poll() is None
            time.sleep(0.01)
        answers = asyncio.run(asyncio.wait_for(_answers(monitor, domain_commands(tmp_path)), 100))
        process.terminate()
        assert process.wait(30) == 0
    refused = [answer for answer in answers if isinstance(answer, QmpError)]
    assert [(error.command, error.error_class) for error in refused] == [("qom-list", "DeviceNotFound")], refused
