"""block-stream on real qcow2 files: what is copied, what the header says afterwards, what is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from chains import NAMES, SIZE, Faulty, chain
from qblock.driver import BackingLink
from qblock.errors import CommandError, NodeBusy, QBlockError
from qblock.jobs.state import OnError
from qblock.jobs.stream import StreamRequest, start_stream
from qblock.testing.jobbench import eventually
from qblock.testing.simloop import run
from qblock.units import KiB, MiB


def test_streaming_everything_makes_the_image_independent(tmp_path: Path) -> None:
    """No base: the chain collapses into the top image, the header forgets its backing file, the content stays."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            before = await made.disk.read(0, SIZE)
            job = await made.stream()
            await made.system.jobs.wait(job)
            assert job.error is None
            assert made.link("top") is None
            assert made.node("top").backing is None
            assert made.disk.node is made.node("top")
            assert (job.progress_done, job.progress_total) == (SIZE, SIZE)
            assert await made.disk.read(0, SIZE) == before
            assert set(made.system.graph.nodes) >= set(NAMES)
            assert not any(edge.frozen for node in map(made.node, NAMES) for edge in node.children.values())
            assert made.story == [
                "created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null",
            ]  # fmt: skip

    run(main)


@pytest.mark.parametrize("how", ["base", "base-node", "bottom"])
def test_streaming_to_a_base_keeps_the_base(tmp_path: Path, how: str) -> None:
    """Three ways to say where to stop; the header then names the base with its format."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            before = await made.disk.read(0, SIZE)
            members = {
                "base": {"base": made.path("base")}, "base-node": {"base_node": "base"}, "bottom": {"bottom": "low"},
            }[how]  # fmt: skip
            job = await made.stream(**members)
            await made.system.jobs.wait(job)
            assert job.error is None
            top = made.node("top")
            assert top.backing is not None
            assert top.backing.node is made.node("base")
            assert made.link("top") == BackingLink(made.path("base"), "qcow2")
            assert await made.disk.read(0, SIZE) == before

    run(main)


def test_the_text_for_the_header_is_stored_as_it_is(tmp_path: Path) -> None:
    """Management knows under which name others will find the base."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            job = await made.stream(base_node="low", backing_file="low.qcow2")
            await made.system.jobs.wait(job)
            assert made.link("top") == BackingLink("low.qcow2", "qcow2")

    run(main)


def test_streaming_a_middle_layer_leaves_the_top_alone(tmp_path: Path) -> None:
    """Any node of the chain can be the device; it may be read-only, as backing nodes usually are."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            await made.system.opener.reopen(made.node("mid"), read_only=True)
            before = await made.disk.read(0, SIZE)
            job = await made.stream("mid")
            await made.system.jobs.wait(job)
            assert job.error is None
            assert made.node("mid").backing is None
            assert made.node("mid").read_only
            assert made.link("top") == BackingLink("mid.qcow2", "qcow2")
            assert await made.disk.read(0, SIZE) == before

    run(main)


def test_two_streams_on_one_chain_do_not_meet(tmp_path: Path) -> None:
    """Disjoint parts: top over mid, and low over base."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            before = await made.disk.read(0, SIZE)
            upper = await made.stream(base_node="low", speed=4 * MiB)
            lower = await start_stream(made.system, device="low", request=StreamRequest(job_id="k"))
            await made.system.jobs.wait(lower)
            await made.system.jobs.wait(upper)
            assert upper.error is None
            assert lower.error is None
            assert [node.node_name for node in made.system.graph.backing_chain(made.node("top"))] == ["top", "low"]
            assert await made.disk.read(0, SIZE) == before

    run(main)


def test_a_shorter_backing_file_reads_as_zeroes_behind_its_end(tmp_path: Path) -> None:
    """What lies behind the end of a lower layer is copied as zeroes, so a longer base cannot show through."""

    async def main() -> None:
        async with chain(tmp_path, sizes={"low": 2 * MiB}) as made:
            before = await made.disk.read(0, SIZE)
            job = await made.stream(base_node="base")
            await made.system.jobs.wait(job)
            assert job.error is None
            assert await made.disk.read(0, SIZE) == before

    run(main)


def test_guest_writes_win_over_what_is_streamed(tmp_path: Path) -> None:
    """The guest writes all over the disk while data come up from below."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            model = bytearray(await made.disk.read(0, SIZE))
            job = await made.stream(speed=8 * MiB)
            for number in range(60):
                offset = number * 67 * KiB % (SIZE - 4096)
                await made.disk.write(offset, bytes([200 + number % 50]) * 4096)
                model[offset : offset + 4096] = bytes([200 + number % 50]) * 4096
                await asyncio.sleep(0.004)
            await made.system.jobs.wait(job)
            assert job.error is None
            assert await made.disk.read(0, SIZE) == bytes(model)

    run(main)


def test_nothing_below_is_success_at_once(tmp_path: Path) -> None:
    """len and offset are 0, and the backing link stays."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            job = await made.stream(base_node="mid")
            await made.system.jobs.wait(job)
            assert (job.error, job.progress_total) == (None, 0)
            assert made.node("top").backing is not None

    run(main)


def test_cancelling_leaves_the_chain_as_it_was(tmp_path: Path) -> None:
    """A stream is cancelled by force always; what was copied does no harm."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            before = await made.disk.read(0, SIZE)
            job = await made.stream(speed=MiB)
            await asyncio.sleep(0.5)
            assert 0 < job.progress_done < SIZE
            await made.system.jobs.cancel(job, force=False)
            await made.system.jobs.wait(job)
            assert made.story[-3:] == ["BLOCK_JOB_CANCELLED", "concluded", "null"]
            assert made.link("top") == BackingLink("mid.qcow2", "qcow2")
            assert await made.disk.read(0, SIZE) == before
            assert not any(edge.frozen for node in map(made.node, NAMES) for edge in node.children.values())
            assert not any(node.blockers for node in map(made.node, NAMES))

    run(main)


def test_the_chain_is_frozen_and_blocked_meanwhile(tmp_path: Path) -> None:
    """Nobody may take a layer away, or stream it at the same time."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            job = await made.stream(speed=MiB)
            with pytest.raises(NodeBusy):
                await start_stream(made.system, device="low", request=StreamRequest(job_id="k"))
            top = made.node("top")
            assert top.backing is not None
            assert top.backing.frozen
            await made.system.jobs.cancel(job)
            await made.system.jobs.wait(job)

    run(main)


def test_what_makes_no_sense_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """Each refusal names what is wrong; the graph is as before."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            nodes = set(made.system.graph.nodes)
            wrong: list[dict[str, Any]] = [
                {"base": "x", "base_node": "low"},
                {"bottom": "low", "base_node": "low"},
                {"base": "nofile"},
                {"base_node": "nope"},
                {"base_node": "top"},
                {"backing_file": "x"},
                {"filter_node_name": "mid"},
                {"speed": -1},
                {"bottom": "nope"},
            ]
            for members in wrong:
                with pytest.raises(CommandError):
                    await made.stream(**members)
            with pytest.raises(CommandError, match="not a backing image"):
                await made.stream("mid", base_node="top")
            assert set(made.system.graph.nodes) == nodes
            assert made.story == ["created", "null"]
            assert not made.node("top").blockers
            assert not made.node("top").quiesce_counter

    run(main)


@pytest.mark.parametrize(("layer", "method"), [("mid", "read_into"), ("top", "write_from"), ("top", "flush")])
@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.IGNORE, OnError.STOP])
def test_errors_follow_the_policy(tmp_path: Path, policy: OnError, layer: str, method: str) -> None:
    """report ends at once; ignore goes on and fails at the end with the link kept; stop waits, and retries when resumed."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            before = await made.disk.read(0, SIZE)
            fault = Faulty(made.node(layer), method)
            job = await made.stream(on_error=policy)
            if policy is OnError.STOP:
                await eventually(lambda: job.paused)
                await asyncio.sleep(1)
                fault.mend()
                await made.system.jobs.resume(job)
            await made.system.jobs.wait(job)
            fault.mend()
            assert (job.error is None) == (policy is OnError.STOP)
            assert (made.link("top") is None) == (policy is OnError.STOP)
            actions = [data["action"] for name, data in made.events if name == "BLOCK_JOB_ERROR"]
            assert actions
            assert set(actions) == {policy.value}
            assert len(actions) == 1 or policy is OnError.IGNORE
            assert await made.disk.read(0, SIZE) == before

    run(main)


def test_a_stream_survives_any_failing_finish(tmp_path: Path) -> None:
    """The header cannot be written: the job fails, and the chain is what it was."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            driver = made.node("top").driver

            async def fail(link: BackingLink | None) -> None:
                raise QBlockError("no room in the header")

            driver.change_backing_link = fail  # type: ignore[attr-defined]
            job = await made.stream(base_node="base")
            await made.system.jobs.wait(job)
            assert str(job.error) == "no room in the header"
            assert made.story[-4:] == ["aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"]
            assert [node.node_name for node in made.system.graph.backing_chain(made.node("top"))] == [*reversed(NAMES)]
            assert made.disk.node is made.node("top")

    run(main)
