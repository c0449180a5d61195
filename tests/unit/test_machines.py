"""The kit for other people's tests: fixtures, machines on virtual time, image shapes."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

import qblock
from qblock.clock import LoopClock
from qblock.monitor.client import QmpClient, QmpError
from qblock.monitor.dialects import Dialect
from qblock.system import BlockSystem
from qblock.testing.images import DiskModel, make_chain, random_blocks
from qblock.testing.machines import LocalMachine, LocalQmp, ServedMachine, TestMachineError
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run

pytest_plugins = ["pytester"]

KiB, MiB = 1 << 10, 1 << 20


def start_mirror(qmp: LocalQmp, target: Path, *, speed: int) -> None:
    qmp.execute(
        "drive-mirror", device="virtio0", target=str(target), sync="full", format="qcow2", speed=speed, buf_size=MiB
    )


def test_time_passes_only_when_the_test_says_so(
    qblock_machine: LocalMachine, qblock_qmp: LocalQmp, qblock_image: Callable[..., Path], tmp_path: Path
) -> None:
    """Four seconds of copying: not ready after two, ready after four, and no second of ours is spent."""
    qblock_machine.add_drive(qblock_image("disk.qcow2", "8M", {0: b"x" * 4 * MiB}))
    start_mirror(qblock_qmp, tmp_path / "copy.qcow2", speed=MiB)
    qblock_machine.advance("2s")
    (job,) = qblock_qmp.execute("query-block-jobs")
    assert not job["ready"]
    assert MiB <= job["offset"] <= 3 * MiB
    with pytest.raises(TestMachineError, match=r"BLOCK_JOB_READY .*did not come within 1s"):
        qblock_qmp.wait_event("BLOCK_JOB_READY", within="1s", device="virtio0")
    qblock_qmp.wait_event("BLOCK_JOB_READY", within="2s")
    assert qblock_machine.now_ns <= 5_000_000_000


def test_the_client_speaks_qmp_and_hmp(qblock_machine: LocalMachine, qblock_qmp: LocalQmp) -> None:
    """Errors are exceptions with QMP's class; events can be looked through."""
    with pytest.raises(QmpError) as caught:
        qblock_qmp.execute("no-such-command")
    assert caught.value.error_class == "CommandNotFound"
    assert "No active jobs" in qblock_qmp.hmp("info block-jobs")
    qblock_qmp.execute("stop")
    assert [event.name for event in qblock_qmp.events()] == ["STOP"]
    assert qblock_qmp.events() == []
    assert qblock_machine.qmp is qblock_qmp


def test_the_guest_reads_what_it_wrote(qblock_machine: LocalMachine, qblock_chain: Callable[..., list[Path]]) -> None:
    """Through the machine's disk, which is the top of a chain."""
    _, top = qblock_chain("1M", [("base.qcow2", {"64k": b"base" * 128}), ("top.qcow2", {0: b"top!" * 128})])
    qblock_machine.add_drive(top)
    assert qblock_machine.guest_read("virtio0", 0, 512) == b"top!" * 128
    assert qblock_machine.guest_read("virtio0", 64 * KiB, 512) == b"base" * 128
    qblock_machine.guest_write("virtio0", 64 * KiB, 512, 9)
    assert qblock_machine.guest_read("virtio0", 64 * KiB, 512) == b"\x09" * 512


def test_a_failure_names_the_schedule(tmp_path: Path) -> None:
    """So that it can be repeated with --qblock-schedule."""

    async def fail() -> None:
        raise ValueError("on purpose")

    with LocalMachine(Seeded(5)) as machine:
        with pytest.raises(ValueError, match="on purpose") as caught:
            machine.run(fail())
        assert caught.value.__notes__[0].startswith("schedule: seed:5")


def test_a_served_machine_answers_on_its_socket(qblock_served: ServedMachine) -> None:
    """Plain synchronous code connects, in the test's own thread."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(qblock_served.socket_path)
        with connection.makefile("rw") as file:
            replies = [json.loads(file.readline())]
            for command in ("qmp_capabilities", "query-status"):
                file.write(json.dumps({"execute": command}))
                file.flush()
                replies.append(json.loads(file.readline()))
    assert replies[0].keys() == {"QMP"}
    assert replies[2]["return"]["running"] is True
    assert qblock_served.now_ns == 0
    qblock_served.advance("1500ms")
    assert qblock_served.now_ns == 1_500_000_000


def test_a_served_machine_can_be_steered_beside_its_socket(
    qblock_served: ServedMachine, qblock_image: Callable[..., Path], tmp_path: Path
) -> None:
    """Commands, events and time, all from the test's thread."""
    qblock_served.add_drive(qblock_image("disk.qcow2", "2M", {0: b"x" * 2 * MiB}))
    target = str(tmp_path / "copy.qcow2")
    qblock_served.qmp("drive-mirror", device="virtio0", target=target, sync="full", format="qcow2", speed=MiB)
    assert qblock_served.await_event("JOB_STATUS_CHANGE", status="running").subject == "virtio0"
    qblock_served.guest_write("virtio0", 0, 512, 1)
    with pytest.raises(TestMachineError, match="did not come within"):
        qblock_served.advance_until("BLOCK_JOB_CANCELLED", within="1s")
    qblock_served.advance_until("BLOCK_JOB_READY", within="1m", device="virtio0")


def test_a_disk_model_finds_the_first_wrong_byte(tmp_path: Path) -> None:
    """Chains of random blocks, and what their top should read as."""
    random = Random(1)
    layers = [(name, random_blocks(random, 2 * MiB, count=5)) for name in ("base.qcow2", "middle.qcow2", "top.qcow2")]
    *_, top = make_chain(tmp_path, 2 * MiB, layers)
    model = DiskModel.of_chain(2 * MiB, layers)
    with qblock.open(top, backing=True, writable=True) as image:
        assert model.first_difference(image) is None
        model.write(1_000_000, b"abc")
        image.write(1_000_000, b"abd")
        assert model.first_difference(image) == 1_000_002
        image.write(1_000_002, b"c")
        assert model.first_difference(image) is None
        assert DiskModel(3 * MiB).first_difference(image) is not None
        model.save_raw(tmp_path / "expected.raw")
        assert (tmp_path / "expected.raw").read_bytes() == image.read(0, 2 * MiB) == model.read(0, 2 * MiB)


def test_the_plugin_is_there_for_other_projects(pytester: pytest.Pytester) -> None:
    """The test of docs/testing-your-software.md, in a project of its own, under a schedule of the user's choice."""
    document = Path(__file__).parents[2] / "docs" / "testing-your-software.md"
    code = document.read_text().split("```python\n")[1].split("```")[0]
    pytester.makepyfile(code)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--qblock-schedule", "seed:7")
    result.assert_outcomes(passed=1)
    assert pytester.runpytest_subprocess("--qblock-schedule", "lifo").ret != 0


def test_fixtures_speak_a_named_dialect(pytester: pytest.Pytester) -> None:
    """A test module overrides one fixture, and its machines are of that time."""
    pytester.makepyfile(
        """
        import pytest
        from qblock.monitor.client import QmpError

        @pytest.fixture
        def qblock_dialect():
            return "rfc-2012"

        def test_local(qblock_qmp):
            with pytest.raises(QmpError) as caught:
                qblock_qmp.execute("query-jobs")
            assert caught.value.error_class == "CommandNotFound"

        def test_s(qblock_served):
            assert qblock_served.qmp("query-block-jobs") == []
            with pytest.raises(QmpError):
                qblock_served.qmp("query-jobs")
        """
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=2)


def test_a_client_of_a_bare_system_speaks_the_dialect_that_it_is_given() -> None:
    """For the library: no machine, no socket."""

    async def main() -> None:
        async with BlockSystem.create(clock=LoopClock()) as system:
            async with await QmpClient.in_process(system, dialect=Dialect.RFC_2012) as qmp:
                names = {command["name"] for command in await qmp.execute("query-commands")}
            assert "drive-mirror" in names
            assert "blockdev-mirror" not in names

    run(main)
