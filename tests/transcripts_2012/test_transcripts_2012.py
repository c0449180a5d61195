"""Sessions with the monitor of 2012, written from rfc-2012.md alone, come out word by word: on virtual and on real time.

Each ``.txt`` file here is one session; ``#`` begins a remark. A line is one of

    dialect NAME                             whose commands there are (rfc-2012 if not said)
    image NAME SIZE [over NAME] [AT:LENGTH:BYTE]...   an image file (NAME ends in .raw: raw, else qcow2)
    drive DEVICE NAME                        a disk of the machine
    -> JSON                                  is sent
    <- JSON                                  is what comes next: a reply or an event, in this order and nothing in between
    hmp LINE                                 is typed; what it prints follows in lines that begin with |
    guest DEVICE AT LENGTH BYTE              the guest writes
    getfd NAME FILE                          a descriptor of FILE, which is made if there is none, is sent along with getfd
    until offset DEVICE N                    query-block-jobs is asked until it shows this offset
    until in sync DEVICE                     ... until the offset is the length
    nothing more                             nothing has come that is not in the session
    end of program                           after the command quit
    on DEVICE NAME                           query-block shows this image as the device's
    witness FILE N                           the file is N bytes long
    check NAME                               the image is whole
    same NAME NAME                           two images show the same
    holds NAME AT LENGTH BYTE                what an image that nobody has open shows there
    backing NAME NAME                        what the image's header names as its backing file (- for nothing)

Numbers are as in ``64k``; ``${DIR}`` is the directory of the images. Texts of errors and time stamps are not compared.
``check`` and ``same`` are done by qblock, and where it is installed by the real qemu-img.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import pytest

from qblock.clock import Clock, LoopClock, RealClock
from qblock.image import open_image
from qblock.monitor.dialects import Dialect, dialect_named
from qblock.monitor.machine import Machine, MachineOptions, qmp_socket
from qblock.monitor.replay import StreamWire
from qblock.testing.images import make_image
from qblock.testing.machines import drive_text
from qblock.testing.simloop import run
from qblock.tools.img import main as qblock_img
from qblock.units import parse_size

SESSIONS: Final = sorted(Path(__file__).parent.glob("*.txt"))
POLL_NS: Final = 1_000_000
Json = Any
T = TypeVar("T")


def apart(work: Callable[[], T]) -> T:
    """The result of ``work``, which wants to run a loop of its own; ours stands still meanwhile."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


def by_qblock(*arguments: str) -> int:
    """Run qblock-img here."""
    return apart(lambda: qblock_img(list(arguments)))


def by_qemu(*arguments: str) -> int:
    """Run the real qemu-img."""
    return subprocess.run(["qemu-img", *arguments], check=False, stdout=subprocess.DEVNULL).returncode


def on_virtual_time(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run ``main()`` where waiting costs nothing."""
    run(main)


def on_real_time(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run ``main()`` as in a program."""
    asyncio.run(main())


@attrs.define
class Session:
    """One run of a file."""

    directory: Path
    clock: Clock
    img: Callable[..., int]
    dialect: Dialect = Dialect.RFC_2012
    machine: Machine | None = None
    wire: StreamWire | None = None
    printed: list[str] = attrs.field(factory=list)
    came: list[Json] = attrs.field(factory=list)

    async def perform(self, text: str) -> None:
        """All lines, and nothing may be left over."""
        try:
            for number, line in enumerate(text.splitlines(), start=1):
                try:
                    await self._line(line.strip().replace("${DIR}", str(self.directory)))
                except BaseException as error:
                    error.add_note(f"line {number}: {line}")
                    raise
        finally:
            await self._close()

    async def _line(self, line: str) -> None:
        first, _, rest = line.partition(" ")
        if line.startswith("|"):
            assert self.printed.pop(0) == line[1:].removeprefix(" ")
            return
        assert not self.printed, "it has printed more than the session says"
        match first:
            case "" | "#":
                pass
            case "->":
                await (await self._monitor()).send(json.loads(rest))
            case "<-":
                assert _comparable(await self._next()) == json.loads(rest)
            case "hmp":
                self.printed = (await self._answer("human-monitor-command", {"command-line": rest})).splitlines()
            case _:
                await getattr(self, f"_{first}")(*rest.split())

    async def _close(self) -> None:
        if self.wire is not None:
            await self.wire.close()
        if self.machine is not None:
            await self.machine.close()
        self.wire = self.machine = None

    # --------------------------------------------------------------------------------------------------------- the monitor

    async def _running(self) -> Machine:
        if self.machine is None:
            options = MachineOptions(seed=0, dialect=self.dialect, qmp=[qmp_socket(self.directory / "qmp")])
            self.machine = await Machine.open(options, clock=self.clock)
        return self.machine

    async def _monitor(self) -> StreamWire:
        if self.wire is None:
            await self._running()
            self.wire = await StreamWire.connect(str(self.directory / "qmp"))
            assert "QMP" in await self.wire.receive()
            assert await self._answer("qmp_capabilities") == {}
        return self.wire

    async def _next(self) -> Json:
        wire = await self._monitor()
        async with asyncio.timeout(60):  # on virtual time: virtual seconds
            return self.came.pop(0) if self.came else await wire.receive()

    async def _answer(self, command: str, arguments: Json = None) -> Json:
        """The result of a command that is not in the session; events that come before it are kept for the session."""
        wire = await self._monitor()
        await wire.send({"execute": command, "id": "own"} | ({"arguments": arguments} if arguments else {}))
        while (message := await wire.receive()).get("id") != "own":
            self.came.append(message)
        return message["return"]

    # ---------------------------------------------------------------------------------------------------- words of a line

    async def _dialect(self, name: str) -> None:
        self.dialect = dialect_named(name)

    async def _image(self, name: str, size: str, *rest: str) -> None:
        backing = rest[1] if rest[:1] == ("over",) else None
        data = {}
        for part in rest[2:] if backing else rest:
            offset, length, byte = map(parse_size, part.split(":"))
            data[offset] = bytes([byte]) * length
        fmt = "raw" if name.endswith(".raw") else "qcow2"
        apart(lambda: make_image(self.directory / name, size, data, fmt=fmt, backing=backing))

    async def _drive(self, device: str, name: str) -> None:
        fmt = "raw" if name.endswith(".raw") else "qcow2"
        await (await self._running()).add_drive(drive_text(self.directory / name, device, fmt))

    async def _guest(self, device: str, offset: str, length: str, byte: str) -> None:
        await (await self._running()).guest_write(device, parse_size(offset), parse_size(length), int(byte))

    async def _getfd(self, name: str, file: str) -> None:
        wire = await self._monitor()
        descriptor = os.open(self.directory / file, os.O_WRONLY | os.O_CREAT, 0o600)
        request = {"execute": "getfd", "arguments": {"fdname": name}}
        with socket.socket(fileno=os.dup(wire.writer.get_extra_info("socket").fileno())) as beside:
            socket.send_fds(beside, [json.dumps(request).encode()], [descriptor])
        os.close(descriptor)

    async def _on(self, device: str, name: str) -> None:
        (info,) = (info for info in await self._answer("query-block") if info["device"] == device)
        assert info["inserted"]["file"] == str(self.directory / name)

    async def _witness(self, file: str, size: str) -> None:
        assert (self.directory / file).stat().st_size == int(size)

    async def _until(self, *words: str) -> None:
        """``until in sync DEVICE`` or ``until offset DEVICE N``."""
        device = words[2] if words[0] == "in" else words[1]
        while True:
            (job,) = (job for job in await self._answer("query-block-jobs") if job["device"] == device)
            if job["offset"] == (job["len"] if words[0] == "in" else parse_size(words[2])):
                return
            assert not self.came, "the session goes on without this"
            await self.clock.sleep_ns(POLL_NS)

    async def _nothing(self, more: str) -> None:
        """``nothing more``: the reply to a command overtakes nothing."""
        assert more == "more"
        await self._answer("query-status")
        assert self.came == []

    async def _end(self, *of_program: str) -> None:
        """``end of program``."""
        assert of_program == ("of", "program") and self.machine is not None and self.machine.hub.quitting
        await self._close()

    async def _check(self, name: str) -> None:
        assert self.img("check", str(self.directory / name)) == 0

    async def _same(self, one: str, other: str) -> None:
        assert self.img("compare", str(self.directory / one), str(self.directory / other)) == 0

    async def _holds(self, name: str, offset: str, length: str, byte: str) -> None:
        def read() -> bytes:
            with open_image(self.directory / name, backing=True) as image:
                return image.read(parse_size(offset), parse_size(length))

        assert apart(read) == bytes([int(byte)]) * parse_size(length)

    async def _backing(self, name: str, expected: str) -> None:
        written = apart(lambda: self._backing_in_header(name))
        assert written == (None if expected == "-" else str(self.directory / expected))

    def _backing_in_header(self, name: str) -> str | None:
        with open_image(self.directory / name, backing=True) as image:
            return image.info().backing_filename


def _comparable(message: Json) -> Json:
    """A message without what differs by nature."""
    if "error" in message:
        return {"error": message["error"]["class"]}
    if "error" in message.get("data", {}):
        message["data"]["error"] = "..."
    return {key: value for key, value in message.items() if key != "timestamp"}


@pytest.mark.parametrize("img", [by_qblock, pytest.param(by_qemu, marks=pytest.mark.qemu)])
@pytest.mark.parametrize("on_time", [on_virtual_time, on_real_time])
@pytest.mark.parametrize("path", SESSIONS, ids=lambda path: path.stem)
def test_the_session_comes_out_as_written(
    path: Path, on_time: Callable[..., None], img: Callable[..., int], tmp_path: Path
) -> None:
    """Replies, events and progress are those that the proposal promises, and so are the images afterwards."""

    async def main() -> None:
        clock = LoopClock() if on_time is on_virtual_time else RealClock()
        await Session(tmp_path, clock, img).perform(path.read_text())

    on_time(main)


def test_a_session_that_does_not_come_out_fails(tmp_path: Path) -> None:
    """The runner is no yes-man: a wrong reply, a line that is not printed and a message left over are found."""
    begin = "image disk.qcow2 4M\ndrive virtio0 disk.qcow2\n"
    for wrong in (
        '-> {"execute": "query-block-jobs"}\n<- {"return": [1]}',
        "hmp info block-jobs\n| All is well",
        "hmp info block-jobs\nnothing more",
        '-> {"execute": "stop"}\n<- {"event": "STOP"}\nnothing more',
    ):
        (tmp_path / "disk.qcow2").unlink(missing_ok=True)
        with pytest.raises(AssertionError):
            run(lambda wrong=wrong: Session(tmp_path, LoopClock(), by_qblock).perform(begin + wrong))
