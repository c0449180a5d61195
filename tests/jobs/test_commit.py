"""block-commit on real qcow2 files: inner layers and the active one, what the headers say afterwards, what is refused."""

from __future__ import annotations

import asyncio
import errno
import itertools
from pathlib import Path
from typing import Any

import pytest

from chains import NAMES, SIZE, Chain, Faulty, chain
from qblock.backend import BlockBackend
from qblock.committing import commit_in_use
from qblock.driver import BackingLink
from qblock.errors import CommandError, DeviceNotFound, NodeBusy, QBlockError
from qblock.jobs.job import BlockJob
from qblock.jobs.state import JobStatus, OnError
from qblock.permissions import Perm
from qblock.testing.jobbench import eventually
from qblock.testing.simloop import run
from qblock.units import KiB, MiB


async def finished(made: Chain, job: BlockJob) -> None:
    """Let the job come to its end, which must be a good one."""
    await eventually(lambda: job.is_ready or job.concluded.done())
    if job.is_ready:
        made.system.jobs.complete(job)
    await made.system.jobs.wait(job)
    assert job.error is None


@pytest.mark.parametrize(
    ("members", "left"),
    [
        ({"top": "mid"}, ["top", "base"]),
        ({"top": "mid", "base": "low"}, ["top", "low", "base"]),
        ({"top": "low"}, ["top", "mid", "base"]),
        ({"top_node": "mid", "base_node": "base"}, ["top", "base"]),
    ],
)
def test_inner_layers_move_down_and_leave_the_chain(tmp_path: Path, members: dict[str, str], left: list[str]) -> None:
    """Every pair below the active layer; the header above names the base, and the guest's disk stays what it was."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            before = await made.disk.read(0, SIZE)
            named = {key: made.path(name) if "_" not in key else name for key, name in members.items()}
            job = await made.commit(**named)
            await finished(made, job)
            assert made.layers() == left
            for above, below in itertools.pairwise(left):
                link = made.link(above)
                assert link is not None
                assert Path(tmp_path, link.filename).name == f"{below}.qcow2"
            assert await made.disk.read(0, SIZE) == before
            assert (job.progress_done, job.progress_total) == (SIZE, SIZE)
            assert made.story == [
                "created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null",
            ]  # fmt: skip
            assert made.is_at_rest()

    run(main)


@pytest.mark.parametrize("base", ["base", "low", "mid"])
def test_the_active_layer_moves_down_and_the_base_takes_its_place(tmp_path: Path, base: str) -> None:
    """READY, then complete: the guest is on the base, which has everything."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            job = await made.commit(base_node=base)
            await eventually(lambda: job.is_ready)
            await made.disk.write(MiB, b"\x77" * 4096)
            before = await made.disk.read(0, SIZE)
            await finished(made, job)
            assert made.disk.node is made.node(base)
            assert await made.disk.read(0, SIZE) == before
            assert made.link("top") == BackingLink("mid.qcow2", "qcow2")
            assert "BLOCK_JOB_READY" in made.story
            assert made.is_at_rest()

    run(main)


@pytest.mark.parametrize("force", [False, True])
def test_a_ready_commit_that_is_cancelled_leaves_the_guest_where_it_is(tmp_path: Path, force: bool) -> None:
    """Without force it ends well with an up-to-date base, with force as cancelled."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            job = await made.commit()
            await eventually(lambda: job.is_ready)
            await made.disk.write(MiB, b"\x77" * 4096)
            before = await made.disk.read(0, SIZE)
            await made.system.jobs.cancel(job, force=force)
            await made.system.jobs.wait(job)
            assert made.story[-3] == ("BLOCK_JOB_CANCELLED" if force else "BLOCK_JOB_COMPLETED")
            assert made.layers() == [*reversed(NAMES)]
            assert await made.disk.read(0, SIZE) == before
            if not force:
                reader = BlockBackend(made.system.graph, perm=Perm.NONE, shared=Perm.ALL)
                reader.insert(made.node("base"))
                assert await reader.read(0, SIZE) == before
                reader.close()
            assert made.is_at_rest()

    run(main)


@pytest.mark.parametrize("ending", ["completed", "cancelled", "failed"])
def test_a_read_only_base_is_writable_only_while_inner_layers_are_committed(tmp_path: Path, ending: str) -> None:
    """Backing files are opened read-only; however the job ends they are so again."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            for name in ("base", "low", "mid"):
                await made.system.opener.reopen(made.node(name), read_only=True)
            fault = Faulty(made.node("mid")) if ending == "failed" else None
            job = await made.commit(top_node="mid", speed=MiB if ending == "cancelled" else 0)
            assert ending == "failed" or not made.node("base").read_only
            if ending == "cancelled":
                await made.system.jobs.cancel(job)
            await made.system.jobs.wait(job)
            if fault is not None:
                fault.mend()
            assert made.node("base").read_only
            assert made.layers() == (["top", "base"] if ending == "completed" else [*reversed(NAMES)])
            assert made.is_at_rest()

    run(main)


@pytest.mark.parametrize("active", [False, True])
def test_a_shorter_base_grows(tmp_path: Path, active: bool) -> None:
    """Data behind the end of the base must not be lost; a hole there must read as zeroes."""

    async def main() -> None:
        async with chain(tmp_path, sizes={"base": MiB, "low": 2 * MiB + 512}) as made:
            before = await made.disk.read(0, SIZE)
            await finished(made, await made.commit(top_node="top" if active else "mid"))
            assert made.node("base").length == SIZE
            assert await made.disk.read(0, SIZE) == before

    run(main)


def test_a_longer_base_keeps_its_length(tmp_path: Path) -> None:
    """The layers above hide what is behind their end; so it stays."""

    async def main() -> None:
        async with chain(tmp_path, sizes={"base": 2 * SIZE}) as made:
            before = await made.disk.read(0, SIZE)
            await finished(made, await made.commit(top_node="mid"))
            assert made.node("base").length == 2 * SIZE
            assert await made.disk.read(0, SIZE) == before

    run(main)


def test_the_text_for_the_header_is_stored_as_it_is(tmp_path: Path) -> None:
    """Management knows under which name others will find the base."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            await finished(made, await made.commit(top_node="mid", base_node="low", backing_file="low.qcow2"))
            assert made.link("top") == BackingLink("low.qcow2", "qcow2")

    run(main)


def test_an_overlay_that_is_read_only_gets_its_new_header_all_the_same(tmp_path: Path) -> None:
    """The image above the committed ones need not be the guest's."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            await made.system.opener.reopen(made.node("mid"), read_only=True)
            await finished(made, await made.commit(top_node="low"))
            assert made.link("mid") == BackingLink(made.path("base"), "qcow2")
            assert made.node("mid").read_only

    run(main)


def test_all_images_above_get_the_base(tmp_path: Path) -> None:
    """Two overlays share the layer that goes away: neither may be left with a backing file that is out of date."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            path = str(tmp_path / "twin.qcow2")
            file = {"driver": "file", "filename": path}
            await made.system.opener.create_image("file", {"filename": path, "size": 0})
            backing = {"backing-file": made.path("mid"), "backing-fmt": "qcow2"}
            await made.system.opener.create_image("qcow2", {"file": file, "size": SIZE, **backing})
            twin = await made.system.opener.open_blockdev(
                {"driver": "qcow2", "node-name": "twin", "file": file, "backing": "mid"}
            )
            twin.monitor_owned = True
            await finished(made, await made.commit(top_node="mid", base_node="low"))
            assert made.layers("twin") == ["twin", "low", "base"]
            assert made.link("twin") == BackingLink(made.path("low"), "qcow2")

    run(main)


def test_a_commit_that_has_succeeded_holds_its_nodes_until_it_is_dismissed(tmp_path: Path) -> None:
    """As in QEMU: management dismisses first, and deletes the layers then."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            job = await made.commit(top_node="mid", auto_dismiss=False)
            await finished(made, job)
            assert made.node("mid").blockers
            await made.system.jobs.dismiss(job)
            assert made.is_at_rest()

    run(main)


def test_guest_writes_win_over_what_is_committed(tmp_path: Path) -> None:
    """The guest writes all over the disk while layers go down below it, and below itself."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            model = bytearray(await made.disk.read(0, SIZE))
            for members in ({"top_node": "mid", "base_node": "low"}, {}):
                job = await made.commit(speed=8 * MiB, **members)
                for number in range(40):
                    offset = number * 67 * KiB % (SIZE - 4096)
                    await made.disk.write(offset, bytes([200 + number % 50]) * 4096)
                    model[offset : offset + 4096] = bytes([200 + number % 50]) * 4096
                    await asyncio.sleep(0.004)
                await finished(made, job)
            assert made.layers("base") == ["base"]
            assert made.disk.node is made.node("base")
            assert await made.disk.read(0, SIZE) == bytes(model)

    run(main)


def test_jobs_on_disjoint_parts_of_a_chain_do_not_meet(tmp_path: Path) -> None:
    """A stream above and a commit below run at the same time; where they touch, the second one is refused."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            before = await made.disk.read(0, SIZE)
            stream = await made.stream("mid", base_node="low", speed=MiB)
            with pytest.raises(NodeBusy):
                await made.commit(job_id="k", top_node="mid", base_node="low")
            commit = await made.commit(job_id="k", top_node="low", base_node="base", speed=MiB)
            with pytest.raises(CommandError):
                await made.commit(job_id="l", top_node="low", base_node="base")
            with pytest.raises(NodeBusy):
                await made.stream("top", job_id="l")
            for job in (commit, stream):
                await finished(made, job)
            assert made.layers() == ["top", "mid", "base"]
            assert await made.disk.read(0, SIZE) == before
            assert made.is_at_rest()

    run(main)


def test_a_stream_down_to_the_layer_that_goes_down_has_to_wait(tmp_path: Path) -> None:
    """It would hold the link that the commit has to change at its end."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            job = await made.commit(top_node="low", speed=MiB)
            with pytest.raises(NodeBusy):
                await made.stream("top", job_id="k", base_node="low")
            await finished(made, job)
            await finished(made, await made.stream("top", job_id="k", base_node="base"))
            assert made.layers() == ["top", "base"]
            assert made.is_at_rest()

    run(main)


def test_cancelling_an_inner_commit_leaves_the_chain_as_it_was(tmp_path: Path) -> None:
    """What was written to the base is hidden by the layers above it."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            before = await made.disk.read(0, SIZE)
            job = await made.commit(top_node="mid", speed=MiB)
            await asyncio.sleep(0.5)
            assert 0 < job.progress_done < SIZE
            await made.system.jobs.cancel(job, force=False)
            await made.system.jobs.wait(job)
            assert made.story[-3:] == ["BLOCK_JOB_CANCELLED", "concluded", "null"]
            assert made.layers() == [*reversed(NAMES)]
            assert await made.disk.read(0, SIZE) == before
            assert made.is_at_rest()

    run(main)


def test_what_makes_no_sense_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """Each refusal names what is wrong; the graph is as before."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            nodes = set(made.system.graph.nodes)
            wrong: list[dict[str, Any]] = [
                {"top": "x", "top_node": "mid"},
                {"base": "x", "base_node": "low"},
                {"top": "nofile"},
                {"base": "nofile"},
                {"top_node": "nope"},
                {"base_node": "nope"},
                {"top_node": "low", "base_node": "mid"},
                {"top_node": "mid", "base_node": "mid"},
                {"top_node": "base"},
                {"base_node": "top"},
                {"backing_file": "x"},
                {"filter_node_name": "mid"},
                {"top_node": "mid", "filter_node_name": "mid"},
                {"speed": -1},
                {"top_node": "mid", "speed": -1},
                {"job_id": "9"},
            ]
            for members in wrong:
                with pytest.raises(CommandError):
                    await made.commit(**members)
            with pytest.raises(CommandError, match="not a root"):
                await made.commit("mid")
            with pytest.raises(DeviceNotFound):
                await made.commit("nope")
            assert set(made.system.graph.nodes) == nodes
            assert made.story == ["created", "null"] * 3
            assert made.is_at_rest()

    run(main)


@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.IGNORE, OnError.STOP, OnError.ENOSPC])
@pytest.mark.parametrize("method", ["read_into", "write_from", "flush"])
@pytest.mark.parametrize("active", [False, True])
def test_errors_follow_the_policy(tmp_path: Path, policy: OnError, method: str, active: bool) -> None:
    """report ends the job; ignore tries again until it works; stop waits to be resumed; enospc stops for a full disk."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            before = await made.disk.read(0, SIZE)
            broken = made.node("mid" if method == "read_into" else "base")
            fault = Faulty(broken, method, errno.ENOSPC if policy is OnError.ENOSPC else errno.EIO)
            job = await made.commit(top_node="top" if active else "mid", on_error=policy)
            if policy is OnError.IGNORE:
                await asyncio.sleep(1)
                fault.mend()
            elif policy is not OnError.REPORT:
                await eventually(lambda: job.paused)
                assert job.io_status.value == ("nospace" if policy is OnError.ENOSPC else "failed")
                fault.mend()
                await made.system.jobs.resume(job)
            await eventually(lambda: job.is_ready or job.concluded.done())
            fault.mend()
            if job.is_ready:
                made.system.jobs.complete(job)
            await made.system.jobs.wait(job)
            assert (job.error is None) == (policy is not OnError.REPORT)
            told = {
                (data["operation"], data["action"]) for name, data in made.events if name == "BLOCK_JOB_ERROR"
            }
            action = "stop" if policy is OnError.ENOSPC else policy.value
            assert told == {("read" if method == "read_into" else "write", action)}
            if policy is not OnError.IGNORE and not active:
                assert made.story.count("BLOCK_JOB_ERROR") == 1
            assert await made.disk.read(0, SIZE) == before
            assert made.is_at_rest()

    run(main)


def test_a_base_that_cannot_grow_fails_the_job_before_it_copies(tmp_path: Path) -> None:
    """Nothing was moved, nothing is lost."""

    async def main() -> None:
        async with chain(tmp_path, sizes={"base": MiB}) as made:
            driver = made.node("base").driver

            async def fail(*args: object, **members: object) -> None:
                raise QBlockError("no room")

            driver.truncate = fail  # type: ignore[method-assign]
            job = await made.commit(top_node="mid")
            await made.system.jobs.wait(job)
            assert str(job.error) == "no room"
            assert job.progress_done == 0
            assert made.layers() == [*reversed(NAMES)]
            assert made.is_at_rest()

    run(main)


def test_a_header_that_cannot_be_written_fails_the_job_and_keeps_the_chain(tmp_path: Path) -> None:
    """The chain is what it was, and the job says why."""

    async def main() -> None:
        async with chain(tmp_path) as made:

            async def fail(link: BackingLink | None) -> None:
                raise QBlockError("no room in the header")

            made.node("top").driver.change_backing_link = fail  # type: ignore[attr-defined]
            job = await made.commit(top_node="mid", auto_finalize=False)
            await eventually(lambda: job.status is JobStatus.PENDING)
            await made.system.jobs.finalize(job)
            assert str(job.error) == "no room in the header"
            assert made.story[-4:] == ["aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"]
            assert made.layers() == [*reversed(NAMES)]
            assert made.is_at_rest()

    run(main)


def test_a_commit_without_a_job_moves_the_active_layer_one_down_and_empties_it(tmp_path: Path) -> None:
    """HMP's commit: the device waits, and then goes on with an empty overlay."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            await made.system.opener.reopen(made.node("mid"), read_only=True)
            before = await made.disk.read(0, SIZE)
            commit = asyncio.ensure_future(commit_in_use(made.system.opener, made.disk))
            await asyncio.sleep(0)
            await made.disk.write(MiB, b"\x77" * 512)
            result = await commit
            assert result.emptied
            assert await made.disk.read(0, SIZE) == before[:MiB] + b"\x77" * 512 + before[MiB + 512 :]
            assert made.layers() == [*reversed(NAMES)]
            assert made.node("mid").read_only
            assert not made.node("mid").discard_unmap
            assert made.is_at_rest()
            job = await made.stream(speed=MiB)
            with pytest.raises(NodeBusy):
                await commit_in_use(made.system.opener, made.disk)
            await made.system.jobs.cancel(job)

    run(main)
