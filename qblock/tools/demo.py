"""``qblock demo``: a disk with two backing files is mirrored while a guest writes to it, and the result is proved.

Everything is the real thing: image files, a QMP server on a unix socket, and this program as its client. On virtual
time the same seed gives the same transcript; on real time the guest and the job race each other as they would in a
machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random as random_module
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from qblock.errors import QBlockError
from qblock.guest import ContentMap, Workload, expected_bytes
from qblock.monitor.client import QmpClient
from qblock.monitor.drawing import GraphDrawing
from qblock.monitor.machine import Machine, MachineOptions, qmp_socket
from qblock.testing.images import make_chain
from qblock.tools.arguments import UsageError
from qblock.tools.command_line import HELP_FLAGS, CommandLine, parse_command_line, run_program
from qblock.tools.demo_proofs import collect_proofs
from qblock.tools.demo_show import JsonPresenter, Presenter, Proof, TextPresenter
from qblock.tools.machine_line import answers_trace_help, loop_factory, start_machine
from qblock.tools.tracing import Tracer
from qblock.units import MILLISECOND_NS, SECOND_NS, KiB, MiB, align_up, format_size, parse_size

if TYPE_CHECKING:
    from qblock.driver import Json

PROGRAM: Final = "qblock demo"
DEVICE: Final = "virtio0"
LAYERS: Final = ("base.qcow2", "middle.qcow2", "top.qcow2")
COPY: Final = "copy.qcow2"
BLOCK: Final = 64 * KiB
MAX_BLOCKS: Final = 128
"""Blocks of known content in each layer, at most (a quarter of a small disk)."""
MIN_SPEED: Final = 8 * MiB
POLL_NS: Final = 100 * MILLISECOND_NS
TIMEOUT_NS: Final = 600 * SECOND_NS
WORKLOAD: Final = Workload(interval_ns=20 * MILLISECOND_NS, discards=0)
"""No discards: afterwards every byte of the disk is known."""

HELP: Final = """usage: qblock demo [OPTIONS]
Mirrors a running disk to a new image and switches over to it, then proves that nothing was lost.

  --size SIZE           size of the disk (default: 64M)
  --clock real|virtual  the time that the machine lives on (default: real)
  --seed N              the seed of all chances; on virtual time it decides every line (default: 1)
  --hmp                 use the human monitor's commands instead of QMP's
  --json                tell it as JSON, one object a line
  --dir DIRECTORY       put the files there, and keep them
  --keep                keep the temporary directory
  --trace PATTERN       write trace events to standard error, as 'mirror_*' (see qblock --help)
  -h, --help            show this

Exit code: 0 all proofs hold, 1 one does not."""


def main(argv: Sequence[str]) -> int:
    """The sub-command; returns the exit code."""
    return run_program(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    valued, flags = frozenset({"size", "clock", "seed", "dir", "trace"}), HELP_FLAGS | {"hmp", "json", "keep"}
    line = parse_command_line(argv, valued=valued, flags=flags)
    if line.has("h") or line.has("help"):
        print(HELP)
        return 0
    if answers_trace_help(line):
        return 0
    if line.words:
        raise UsageError(f"the demo takes options only, not '{line.words[0]}'")
    clock = line.choice("clock", ("real", "virtual"))
    with closing(Tracer.of(PROGRAM, line.values.get("trace", ()))) as tracer, _directory(line) as directory:
        seed, hmp = line.number("seed") or 1, line.has("hmp")
        demo = Demo(directory, _presenter(line), _size(line), seed, hmp=hmp, tracer=tracer)
        try:
            proofs = demo.run(clock)
        except KeyboardInterrupt:
            if sys.stdout.isatty():
                print("\ninterrupted")  # the bar's line is not ended yet
            raise
    return 0 if all(proof.holds for proof in proofs) else 1


def _size(line: CommandLine) -> int:
    try:
        size = align_up(parse_size(line.last("size", "64M")), 512)
    except ValueError as error:
        raise UsageError(f"--size: {error}") from None
    if size < MiB:
        raise UsageError("--size: the disk must have at least 1M")
    return size


def _presenter(line: CommandLine) -> Presenter:
    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    if line.has("json"):
        return JsonPresenter(write)
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    width = max(40, min(shutil.get_terminal_size().columns, 100)) if terminal else 100
    colours = terminal and not os.environ.get("NO_COLOR")
    return TextPresenter(write, terminal, colours, unicode=encoding.startswith("utf"), width=width)


@contextlib.contextmanager
def _directory(line: CommandLine) -> Iterator[Path]:
    if line.has("dir"):
        directory = Path(line.last("dir", ""))
        directory.mkdir(parents=True, exist_ok=True)
        for name in (*LAYERS, COPY):
            if (directory / name).exists():
                raise UsageError(f"--dir: {directory / name} exists already")
        yield directory.resolve()
        return
    directory = Path(tempfile.mkdtemp(prefix="qblock-demo-"))
    try:
        yield directory
    finally:
        if line.has("keep"):
            print(f"the files are in {directory}", file=sys.stderr)
        else:
            shutil.rmtree(directory, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------- the story


@attrs.define(eq=False)
class Demo:
    """One run. ``known`` is the content that the images were made with: (offset, tag) of blocks of 64 KiB."""

    directory: Path
    show: Presenter
    size: int
    seed: int
    hmp: bool
    tracer: Tracer
    known: dict[int, int] = attrs.field(init=False, factory=dict)
    _machine: Machine = attrs.field(init=False)
    _client: QmpClient = attrs.field(init=False)

    def run(self, clock: str) -> list[Proof]:
        """Tell it from beginning to end; returns the proofs."""
        self._make_chain()
        with asyncio.Runner(loop_factory=loop_factory(clock, manual=False)) as runner:
            content, ended_ns = runner.run(self._tell())
        proofs = collect_proofs(self.directory, copy=COPY, layers=LAYERS, content=content)
        self.show.proofs(ended_ns, proofs)
        return proofs

    def _make_chain(self) -> None:
        """Three images, each with known blocks; where they overlap, the upper one counts."""
        random = random_module.Random(self.seed)
        places = self.size // BLOCK
        layers = []
        for number, name in enumerate(LAYERS):
            chosen = sorted(random.sample(range(places), min(MAX_BLOCKS, max(1, places // 4))))
            tags = {place * BLOCK: number * places + place + 1 for place in chosen}
            layers.append((name, {offset: expected_bytes(tag, offset, BLOCK) for offset, tag in tags.items()}))
            self.known |= tags
        make_chain(self.directory, self.size, layers)

    async def _tell(self) -> tuple[ContentMap, int]:
        """The part with the machine; returns what the disk must hold, and the time at the end."""
        with tempfile.TemporaryDirectory(prefix="qblock-qmp-") as own:  # the name of a socket must be short
            return await self._tell_over(Path(own) / "qmp.sock")

    async def _tell_over(self, socket: Path) -> tuple[ContentMap, int]:
        drive = f"if=virtio,id={DEVICE},file={str(self.directory / LAYERS[-1]).replace(',', ',,')},format=qcow2"
        options = MachineOptions(drives=(drive,), qmp=(qmp_socket(socket),), seed=self.seed, watch=self.tracer.watch)
        self._machine = await start_machine(options)
        try:
            async with await QmpClient.connect(str(socket)) as self._client:
                self._introduce()
                await self._mirror()
                await self._complete()
            content = await self._guest_stops()
            ended_ns = self._now()
        finally:
            await self._machine.close()
        return content, ended_ns

    def _introduce(self) -> None:
        self.show.heading(
            self._now(),
            "A disk in three layers, and a guest that writes to it",
            f"{DEVICE} is {format_size(self.size)}: {LAYERS[2]} over {LAYERS[1]} over {LAYERS[0]}, qcow2 files in a directory "
            "of their own. From now on the guest writes to it, without a pause until the end.",
        )
        self._draw("before")
        guest = self._machine.guest(DEVICE)
        guest.expect(0, self.size, 0)
        for offset, tag in self.known.items():
            guest.expect(offset, BLOCK, tag)
            while guest.new_tag() < tag:
                pass
        guest.start(WORKLOAD)

    async def _mirror(self) -> None:
        self.show.heading(
            self._now(),
            "The monitor is told to mirror it",
            "All that the three files hold is copied to a new one, and what the guest writes meanwhile is copied after it, "
            "until both are in step (READY).",
        )
        if self.hmp:
            await self._human(f"drive_mirror -f {DEVICE} {self._quoted(COPY)} qcow2")
            await self._human(f"block_job_set_speed {DEVICE} {self._speed() // MiB}M")
        else:
            await self._execute(
                "drive-mirror",
                {"device": DEVICE, "target": str(self.directory / COPY), "format": "qcow2", "sync": "full",
                 "speed": self._speed(), "buf-size": MiB},
            )  # fmt: skip
        await self._follow_until("BLOCK_JOB_READY")
        self._draw("during")

    async def _complete(self) -> None:
        self.show.heading(
            self._now(),
            "In step: the guest is switched over to the copy",
            "For another second the mirror keeps step with the guest; then it is told to complete. The disk is the new image "
            "from there on, and the old chain is closed.",
        )
        await self._machine.clock.sleep_ns(SECOND_NS)
        if self.hmp:
            await self._human("info block-jobs")
            await self._human(f"block_job_complete {DEVICE}")
        else:
            await self._execute("query-block-jobs")
            await self._execute("block-job-complete", {"device": DEVICE})
        await self._follow_until("BLOCK_JOB_COMPLETED")
        self._draw("after")

    async def _guest_stops(self) -> ContentMap:
        guest = self._machine.guest(DEVICE)
        await self._machine.clock.sleep_ns(SECOND_NS)
        await guest.stop()
        await guest.flush()
        done = guest.counters
        self.show.heading(
            self._now(),
            "What is left to prove",
            f"The guest has gone on for another second and stops: {done.writes} writes, {done.zero_writes} zero writes, "
            f"{done.reads} reads (each compared), {done.flushes} flushes, {format_size(done.bytes_written)} in all.",
        )
        return guest.content

    # --------------------------------------------------------------------------------------------------------- monitor

    async def _execute(self, command: str, arguments: Mapping[str, Json] | None = None) -> Json:
        message = {"execute": command} | ({"arguments": arguments} if arguments else {})
        self.show.message(self._now(), "sent", self._masked(message))
        result = await self._client.execute(command, arguments)
        self.show.message(self._now(), "received", self._masked({"return": result}))
        return result

    async def _human(self, line: str) -> None:
        self.show.message(self._now(), "sent", self._masked(f"(qemu) {line}"))
        output = await self._client.hmp(line)
        if output:
            self.show.message(self._now(), "received", self._masked(output))
        if output.startswith("Error:"):
            raise QBlockError(output.strip())

    async def _follow_until(self, wanted: str) -> None:
        """Show the job's progress until it comes to ``wanted``; raises `QBlockError` when it ends otherwise."""
        deadline = self._machine.clock.now_ns() + TIMEOUT_NS
        while self._machine.clock.now_ns() < deadline:
            for event in list(self._client.events):
                self._client.events.remove(event)
                if event.name.startswith("BLOCK_JOB"):
                    self._show_last_progress(event.data)
                    self.show.message(self._now(), "event", {"event": event.name, "data": dict(event.data)})
                    if event.name != wanted or "error" in event.data:
                        raise QBlockError(f"the mirror has ended with {event.name}: {event.data.get('error', '')}")
                    return
            for job in await self._client.execute("query-block-jobs") if wanted == "BLOCK_JOB_READY" else ():
                self.show.progress(self._now(), job["offset"], job["len"])
            await self._machine.clock.sleep_ns(POLL_NS)
        raise TimeoutError(f"{wanted} did not come within {TIMEOUT_NS // SECOND_NS} seconds")

    def _show_last_progress(self, data: Mapping[str, Json]) -> None:
        if "error" not in data:
            self.show.progress(self._now(), data["offset"], data["len"])

    # --------------------------------------------------------------------------------------------------------- showing

    def _now(self) -> int:
        return self._machine.clock.now_ns() - self._machine.started_ns

    def _draw(self, when: str) -> None:
        nodes = tuple(self._machine.system.graph.nodes.values())
        self.show.graph(self._now(), when, GraphDrawing(nodes, self.show.strokes).lines())

    def _masked(self, value: Json) -> Json:
        """``value`` without the name of the directory, which differs from run to run."""
        if isinstance(value, str):
            return value.replace(str(self.directory), "DIR")
        if isinstance(value, Mapping):
            return {key: self._masked(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._masked(item) for item in value]
        return value

    def _quoted(self, name: str) -> str:
        path = str(self.directory / name).replace("\\", "\\\\").replace('"', '\\"')
        return f'"{path}"'

    def _speed(self) -> int:
        """Bytes per second at which there is something to see, and which is more than the guest writes."""
        return max(MIN_SPEED, len(self.known) * BLOCK // 2 // MiB * MiB)
