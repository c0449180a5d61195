"""drive-reopen over a real socket: the witness comes by SCM_RIGHTS, and its descriptor is given back on every path.

Real files, real threads and real time in the second half; the images are then looked at by the real qemu-img.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qblock.clock import RealClock
from qblock.guest import ContentMap
from qblock.image import open_image
from qblock.monitor.client import QmpClient, QmpError
from qblock.monitor.dialects import Dialect
from qblock.monitor.machine import Machine, MachineOptions, qmp_socket
from qblock.testing.images import make_image
from qblock.testing.machines import ServedMachine
from qblock.units import KiB, MiB
from reopen_desk import SIZE, prove


class Management:
    """What libvirt would be: one connection, one request after the other, descriptors beside them."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.replies = self.socket.makefile("rb")
        assert "QMP" in json.loads(self.replies.readline())
        self.ask("qmp_capabilities")

    def send(self, *requests: tuple[str, dict[str, Any]], fds: Sequence[int] = ()) -> None:
        lines = (json.dumps({"execute": name, "arguments": arguments}) + "\n" for name, arguments in requests)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        self.socket.sendmsg(["".join(lines).encode()], rights)

    def reply(self) -> Any:
        while "event" in (message := json.loads(self.replies.readline())):
            pass
        return message.get("return", message.get("error", {}).get("class"))

    def ask(self, name: str, *, fds: Sequence[int] = (), **arguments: Any) -> Any:
        self.send((name, {key.replace("_", "-"): value for key, value in arguments.items()}), fds=fds)
        return self.reply()

    def close(self) -> None:
        self.replies.close()
        self.socket.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedMachine]:
    make_image(tmp_path / "old", SIZE)
    make_image(tmp_path / "new", SIZE)
    with ServedMachine(tmp_path / "qmp", MachineOptions(seed=0)) as machine:
        machine.add_drive(tmp_path / "old")
        yield machine


@pytest.fixture
def management(served: ServedMachine) -> Iterator[Management]:
    client = Management(served.socket_path)
    yield client
    client.close()


@contextlib.contextmanager
def witness(path: Path) -> Iterator[int]:
    fd = os.open(path / "witness", os.O_WRONLY | os.O_CREAT)
    try:
        yield fd
    finally:
        os.close(fd)


def holders(path: Path, name: str = "witness") -> int:
    """How many descriptors of this process lead to the file."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{fd}") == str(path / name)
    return count


def test_the_byte_is_there_and_the_descriptor_is_closed_before_the_reply(
    management: Management, tmp_path: Path
) -> None:
    """Management asks, is answered, and may look at once."""
    with witness(tmp_path) as fd:
        assert management.ask("getfd", fdname="w", fds=[fd]) == {}
        assert holders(tmp_path) == 2
        assert management.ask("drive-reopen", device="virtio0", new_image_file=f"{tmp_path}/new", witness="w") == {}
        assert holders(tmp_path) == 1
    assert (tmp_path / "witness").stat().st_size == 1
    assert management.ask("closefd", fdname="w") == "GenericError"


def test_descriptor_and_both_commands_in_one_message(management: Management, tmp_path: Path) -> None:
    """A client may send all at once; what belongs together is told by the order of the bytes."""
    reopen = {"device": "virtio0", "new-image-file": f"{tmp_path}/new", "witness": "w"}
    with witness(tmp_path) as fd:
        management.send(("getfd", {"fdname": "w"}), ("drive-reopen", reopen), fds=[fd])
        assert [management.reply(), management.reply()] == [{}, {}]
        assert holders(tmp_path) == 1
    assert (tmp_path / "witness").stat().st_size == 1


def test_of_several_descriptors_the_named_one_is_the_witness(management: Management, tmp_path: Path) -> None:
    """Others of the same message stay whatever they are."""
    with witness(tmp_path) as fd, (tmp_path / "other").open("wb") as other:
        management.send(("getfd", {"fdname": "o"}), ("getfd", {"fdname": "w"}), fds=[other.fileno(), fd])
        assert [management.reply(), management.reply()] == [{}, {}]
        assert management.ask("drive-reopen", device="virtio0", new_image_file=f"{tmp_path}/new", witness="w") == {}
        assert (holders(tmp_path), holders(tmp_path, "other")) == (1, 2)
        assert management.ask("closefd", fdname="o") == {}
        assert holders(tmp_path, "other") == 1
    assert [(tmp_path / name).stat().st_size for name in ("witness", "other")] == [1, 0]


def test_a_name_given_again_closes_what_had_it(management: Management, tmp_path: Path) -> None:
    """The newer file is the witness."""
    with witness(tmp_path) as fd, (tmp_path / "first").open("wb") as first:
        assert management.ask("getfd", fdname="w", fds=[first.fileno()]) == {}
        assert management.ask("getfd", fdname="w", fds=[fd]) == {}
        assert holders(tmp_path, "first") == 1
        assert management.ask("drive-reopen", device="virtio0", new_image_file=f"{tmp_path}/new", witness="w") == {}
    assert [(tmp_path / name).stat().st_size for name in ("witness", "first")] == [1, 0]


REFUSALS = {
    "an unknown device": ({"device": "nosuch"}, "DeviceNotFound"),
    "an unknown format": ({"format": "nosuch"}, "GenericError"),
    "an image that is not there": ({"new-image-file": "/nosuch/image"}, "OpenFileFailed"),
    "an unexpected member": ({"nosuch": 1}, "GenericError"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_nothing_is_held_after_an_error(refusal: str, management: Management, tmp_path: Path) -> None:
    """Once the command has begun the witness is its own; what was not understood has not begun."""
    members, error_class = REFUSALS[refusal]
    reopen = {"device": "virtio0", "new-image-file": f"{tmp_path}/new", "witness": "w", **members}
    with witness(tmp_path) as fd:
        assert management.ask("getfd", fdname="w", fds=[fd]) == {}
        management.send(("drive-reopen", reopen))
        assert management.reply() == error_class
        if refusal == "an unexpected member":
            assert management.ask("closefd", fdname="w") == {}
        assert holders(tmp_path) == 1
    assert (tmp_path / "witness").stat().st_size == 0


def test_a_busy_drive_gives_the_descriptor_back(served: ServedMachine, management: Management, tmp_path: Path) -> None:
    """The mirror is killed, and management has nothing to wait for."""
    job = {"device": "virtio0", "target": f"{tmp_path}/copy", "sync": "full", "speed": 1, "buf-size": 65536}
    with open_image(tmp_path / "new", writable=True) as image:
        image.write(0, b"n" * MiB)
    served.qmp("drive-reopen", {"device": "virtio0", "new-image-file": f"{tmp_path}/new"})
    with witness(tmp_path) as fd:
        management.send(("drive-mirror", job), ("getfd", {"fdname": "w"}), fds=[fd])
        assert [management.reply(), management.reply()] == [{}, {}]
        reopened = management.ask("drive-reopen", device="virtio0", new_image_file=f"{tmp_path}/copy", witness="w")
        assert reopened == "DeviceInUse"
        assert holders(tmp_path) == 1


@pytest.mark.parametrize("half", [True, False], ids=["one direction", "both directions"])
def test_management_that_dies_in_the_middle_has_its_answer_in_the_file(
    half: bool, served: ServedMachine, tmp_path: Path
) -> None:
    """It is what the witness is for: the reply never arrives, the byte does, and nothing is held."""
    client = Management(served.socket_path)
    reopen = {"device": "virtio0", "new-image-file": f"{tmp_path}/new", "witness": "w"}
    with witness(tmp_path) as fd:
        client.send(("getfd", {"fdname": "w"}), ("drive-reopen", reopen), ("getfd", {"fdname": "x"}), fds=[fd, fd])
        if half:
            client.socket.shutdown(socket.SHUT_WR)
            assert [client.reply() for _ in range(3)] == [{}, {}, {}]
        client.close()
        next_one = Management(served.socket_path)  # is served when the first one has gone
        next_one.close()
        assert holders(tmp_path) == 1
    assert (tmp_path / "witness").stat().st_size == 1


# ---------------------------------------------------------------------------------------------------- in real time


def on_a_real_machine(path: Path, dialect: Dialect, body: Callable[[Machine, QmpClient], Awaitable[None]]) -> None:
    """A machine with real threads and real time, a drive on ``old``, and a client at its socket."""
    if not (path / "old").exists():
        make_image(path / "old", SIZE, {0: b"o" * 64 * KiB})
    drive = f"if=virtio,id=virtio0,file={path}/old,format=qcow2"
    options = MachineOptions(drives=(drive,), qmp=(qmp_socket(path / "qmp"),), seed=1, dialect=dialect)

    async def main() -> None:
        machine = await Machine.open(options, clock=RealClock())
        try:
            async with await QmpClient.connect(str(path / "qmp")) as client:
                await body(machine, client)
        finally:
            await machine.close()

    asyncio.run(asyncio.wait_for(main(), 60))


async def until_in_sync(client: QmpClient) -> None:
    while True:
        (job,) = await client.execute("query-block-jobs")
        if job["offset"] == job["len"] and job.get("ready", True):
            return
        await asyncio.sleep(0)


async def until_written(machine: Machine, client: QmpClient, count: int) -> None:
    goal = machine.guest("virtio0").counters.bytes_written + count
    while machine.guest("virtio0").counters.bytes_written < goal:
        await client.execute("query-status")


async def move(machine: Machine, client: QmpClient, path: Path, target: str, seen: list[str]) -> None:
    """Mirror, wait, and reopen with a witness, while the guest writes as fast as it can."""
    how = {"full": True} if machine.hub.dialect is Dialect.RFC_2012 else {"sync": "full"}
    machine.start_guest("virtio0", writes_per_second=10_000)
    await until_written(machine, client, MiB)
    await client.execute("drive-mirror", device="virtio0", target=f"{path}/{target}", format="qcow2", **how)
    await until_in_sync(client)
    await until_written(machine, client, MiB // 4)
    done = partial(
        lambda counters: (counters.writes, counters.reads, counters.flushes), machine.guest("virtio0").counters
    )
    counts = []
    for step in ("closed", "opened", "witness_written", "witness_synced", "done"):
        machine.system.env.trace.listen(f"drive_reopen_{step}", lambda name, members: counts.append(done()))
    with witness(path) as fd:
        await client.execute("getfd", fdname="w", fds=[fd])
        await client.execute("drive-reopen", device="virtio0", new_image_file=f"{path}/{target}", witness="w")
        seen.append(f"{(path / 'witness').stat().st_size} byte")
    assert len(counts) == 5
    assert len(set(counts)) == 1  # nothing of the guest was done from the closing to the end
    await until_written(machine, client, MiB // 2)
    await machine.stop_guest("virtio0")


@pytest.mark.parametrize("dialect", [Dialect.SYSTEM, Dialect.RFC_2012])
def test_in_real_time_a_guest_moves_to_the_copy_and_loses_nothing(dialect: Dialect, tmp_path: Path) -> None:
    """Threads, files and sockets as they are; the whole protocol of the proposal."""
    seen: list[str] = []
    contents: list[ContentMap] = []

    async def body(machine: Machine, client: QmpClient) -> None:
        await move(machine, client, tmp_path, "copy", seen)
        assert machine.guest("virtio0").counters.failed == 0
        await client.execute("drive-reopen", device="virtio0", new_image_file=f"{tmp_path}/old")
        contents.append(machine.guest("virtio0").content)

    on_a_real_machine(tmp_path, dialect, body)
    prove(contents[0], tmp_path / "copy")
    assert seen == ["1 byte"]


def test_in_real_time_a_guest_stays_and_loses_nothing_when_it_cannot_move(tmp_path: Path) -> None:
    """The way back is as safe as the way forward: many times, for one reason or another."""
    contents: list[ContentMap] = []

    async def body(machine: Machine, client: QmpClient) -> None:
        machine.start_guest("virtio0", writes_per_second=10_000)
        for witnessed in (False, True) * 5:
            await until_written(machine, client, MiB // 4)
            reopen: dict[str, Any] = {"device": "virtio0", "new-image-file": f"{tmp_path}/nosuch"}
            if witnessed:
                with open("/dev/full", "wb") as full:
                    await client.execute("getfd", fdname="w", fds=[full.fileno()])
                reopen |= {"new-image-file": f"{tmp_path}/new", "witness": "w"}
            with pytest.raises(QmpError) as caught:
                await client.execute("drive-reopen", reopen)
            assert caught.value.error_class == "OpenFileFailed"
        await until_written(machine, client, MiB // 4)
        await machine.stop_guest("virtio0")
        assert machine.guest("virtio0").counters.failed == 0
        await client.execute("drive-reopen", device="virtio0", new_image_file=f"{tmp_path}/new")
        contents.append(machine.guest("virtio0").content)

    make_image(tmp_path / "new", SIZE)
    on_a_real_machine(tmp_path, Dialect.SYSTEM, body)
    prove(contents[0], tmp_path / "old")
    with open_image(tmp_path / "new") as image:
        assert image.read(0, SIZE) == bytes(SIZE)


@pytest.mark.qemu
@pytest.mark.parametrize("dialect", [Dialect.SYSTEM, Dialect.RFC_2012])
def test_the_real_program_finds_both_images_clean_and_the_copy_complete(dialect: Dialect, tmp_path: Path) -> None:
    """The old image is what it was at the moment of the switch; the new one has all since."""
    seen: list[str] = []

    async def body(machine: Machine, client: QmpClient) -> None:
        await move(machine, client, tmp_path, "copy", seen)
        guest = machine.guest("virtio0")
        with (tmp_path / "model").open("wb") as model:
            for run, _ in guest.content.runs():
                data = await guest.read(run.offset, run.length)
                model.seek(run.offset)
                model.write(data)
            model.truncate(SIZE)

    on_a_real_machine(tmp_path, dialect, body)
    for name in ("old", "copy"):
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(tmp_path / name)], check=True)
    compare = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(tmp_path / "copy"), str(tmp_path / "model")]
    assert subprocess.run(compare, check=False).returncode == 0
    compare[-2] = str(tmp_path / "old")
    assert subprocess.run(compare, check=False).returncode == 1
