"""blkdebug: which requests fail when, what limits it imposes, and what it refuses."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from qblock.backend import BlockBackend
from qblock.driver import CheckFix, SupportsCheck
from qblock.drivers.blkdebug import BlkdebugDriver, InjectError, SetState, read_config
from qblock.errors import BlockIOError, CommandError, InvalidParameter, PermissionConflict
from qblock.permissions import Perm
from qblock.requests import block_status, chain_status
from qblock.system import BlockSystem
from qblock.testing.simloop import run

KiB = 1024


async def debugged(system: BlockSystem, **options: Any) -> tuple[BlkdebugDriver, BlockBackend]:
    """A blkdebug node ``bd`` on 64 KiB of memory, and a backend that may do everything with it."""
    image = {"driver": "memory", "size": 64 * KiB, "discard": "unmap"}
    given = {"driver": "blkdebug", "node-name": "bd", "discard": "unmap", "image": image, **options}
    node = await system.opener.open_blockdev(given)
    node.monitor_owned = True
    assert isinstance(node.driver, BlkdebugDriver)
    backend = BlockBackend(system.graph, perm=Perm.CONSISTENT_READ | Perm.WRITE, shared=Perm.ALL)
    backend.insert(node)
    return node.driver, backend


def with_rules(check: Callable[[BlkdebugDriver, BlockBackend], Awaitable[None]], **options: Any) -> None:
    """Run ``check`` on a debugged disk in a system of its own."""

    async def main() -> None:
        async with BlockSystem.create() as system:
            await check(*await debugged(system, **options))

    run(main)


async def error_of(request: Awaitable[object]) -> int | None:
    """The errno with which a request fails; None when it works."""
    try:
        await request
    except BlockIOError as error:
        return error.errno
    return None


def test_a_rule_is_in_force_only_from_its_event_on() -> None:
    """A fault is aimed at one step of a format driver's work; requests before that step must not see it."""

    async def check(driver: BlkdebugDriver, disk: BlockBackend) -> None:
        assert await error_of(disk.read(0, 512)) is None
        driver.debug_event("l2_load")
        assert await error_of(disk.read(0, 512)) == errno.EIO
        assert await error_of(disk.read(0, 512)) == errno.EIO

    with_rules(check, **{"inject-error": [{"event": "l2_load"}]})


def test_the_event_none_puts_rules_in_force_when_the_node_opens() -> None:
    """Without a format above nothing else would ever raise an event."""

    async def check(driver: BlkdebugDriver, disk: BlockBackend) -> None:
        assert await error_of(disk.write(0, bytes(512))) == errno.ENOSPC

    with_rules(check, **{"inject-error": [{"event": "none", "errno": errno.ENOSPC}]})


def test_a_rule_for_once_hits_one_request_and_is_gone() -> None:
    """Transient faults: the retry works, and the event does not bring the rule back."""

    async def check(driver: BlkdebugDriver, disk: BlockBackend) -> None:
        driver.debug_event("read_aio")
        assert await error_of(disk.read(0, 512)) == errno.EIO
        assert await error_of(disk.read(0, 512)) is None
        driver.debug_event("read_aio")
        assert await error_of(disk.read(0, 512)) is None

    with_rules(check, **{"inject-error": [{"event": "read_aio", "once": True, "immediately": True}]})


def test_a_rule_with_a_sector_hits_requests_with_its_first_byte() -> None:
    """A bad sector: what lies beside it can be read; a flush has no sector."""

    async def check(driver: BlkdebugDriver, disk: BlockBackend) -> None:
        assert await error_of(disk.read(0, 1536)) is None
        assert await error_of(disk.read(1535, 2)) == errno.EIO
        assert await error_of(disk.read(1537, 100)) is None
        assert await error_of(disk.read(2048, 512)) is None
        assert await error_of(disk.flush()) is None

    with_rules(check, **{"inject-error": [{"event": "none", "sector": 3}]})


@pytest.mark.parametrize("kind", ["read", "write", "write-zeroes", "discard", "flush"])
def test_a_rule_with_an_iotype_hits_only_requests_of_that_kind(kind: str) -> None:
    """Each kind has its own error path in a format driver."""

    async def check(driver: BlkdebugDriver, disk: BlockBackend) -> None:
        outcomes = {
            "read": await error_of(disk.read(0, 512)),
            "write": await error_of(disk.write(0, b"x" * 512)),
            "write-zeroes": await error_of(disk.write_zeroes(0, 512)),
            "discard": await error_of(disk.discard(0, 512)),
            "flush": await error_of(disk.flush()),
        }
        assert {name for name, outcome in outcomes.items() if outcome is not None} == {kind}

    with_rules(check, **{"inject-error": [{"event": "none", "iotype": kind}]})


def test_the_first_matching_rule_decides_and_errno_zero_lets_pass() -> None:
    """In the order given, as in the real program: an exception for one sector is written before the general rule."""

    async def check(driver: BlkdebugDriver, disk: BlockBackend) -> None:
        assert await error_of(disk.read(512, 512)) is None
        assert await error_of(disk.read(1024, 512)) == errno.EIO

    rules = [{"event": "none", "sector": 1, "errno": 0}, {"event": "none"}]
    with_rules(check, **{"inject-error": rules})


def test_states_let_the_second_occurrence_of_an_event_fail() -> None:
    """How one aims at the n-th time: set-state counts, the rule waits for its state."""

    async def check(driver: BlkdebugDriver, disk: BlockBackend) -> None:
        driver.debug_event("l2_update")
        assert (driver.state, await error_of(disk.read(0, 512))) == (2, None)
        driver.debug_event("l2_update")
        assert (driver.state, await error_of(disk.read(0, 512))) == (2, errno.EIO)

    rule = {"event": "l2_update", "state": 2}
    change = {"event": "l2_update", "state": 1, "new_state": 2}
    with_rules(check, **{"inject-error": [rule], "set-state": [change]})


def test_an_event_without_matching_rule_leaves_the_rules_in_force() -> None:
    """Matching rules replace those in force; an event that nobody cares about must not lift a fault."""

    async def check(driver: BlkdebugDriver, disk: BlockBackend) -> None:
        driver.debug_event("l2_load")
        driver.debug_event("cluster_alloc")
        assert await error_of(disk.read(0, 512)) == errno.EIO
        driver.debug_event("read_aio")
        assert await error_of(disk.read(0, 512)) == errno.EPERM

    rules = [{"event": "l2_load"}, {"event": "read_aio", "errno": errno.EPERM}]
    with_rules(check, **{"inject-error": rules})


def test_writes_raise_their_own_events() -> None:
    """``pwritev`` comes before the write it is about, ``pwritev_done`` after it."""

    async def check(driver: BlkdebugDriver, disk: BlockBackend) -> None:
        assert await error_of(disk.read(0, 512)) is None
        assert await error_of(disk.write_zeroes(0, 512)) is None
        assert await error_of(disk.write(0, b"x" * 512)) == errno.EIO

    with_rules(check, **{"inject-error": [{"event": "pwritev", "iotype": "write"}]})


@pytest.mark.parametrize(
    ("event", "offset", "fails"),
    [
        ("pwritev_rmw_head", 512, True),
        ("pwritev_rmw_after_head", 512, True),
        ("pwritev_rmw_tail", 512, True),
        ("pwritev_rmw_after_tail", 512, True),
        ("pwritev_rmw_head", 0, False),
        ("pwritev_rmw_tail", 0, False),
    ],
)
def test_a_write_of_parts_of_blocks_raises_the_events_of_reading_them(event: str, offset: int, fails: bool) -> None:
    """The border's read-modify-write has error paths of its own; a write of whole blocks takes none of them."""

    async def check(driver: BlkdebugDriver, disk: BlockBackend) -> None:
        assert await error_of(disk.write(offset, b"x" * 4096)) == (errno.EIO if fails else None)

    with_rules(check, **{"align": 4096, "inject-error": [{"event": event}]})


def test_a_question_for_block_status_can_fail() -> None:
    """The only kind of request that a rule without iotype is not about; filters are not looked through for it here."""

    async def check(driver: BlkdebugDriver, disk: BlockBackend) -> None:
        assert await error_of(disk.read(0, 512)) is None
        assert await error_of(block_status(driver.node, 0, 512)) == errno.EIO
        assert await error_of(chain_status(driver.node, 0, 512)) == errno.EIO

    with_rules(check, **{"inject-error": [{"event": "none", "iotype": "block-status"}]})


@pytest.mark.parametrize("event", ["read_aio", "write_aio", "flush_to_os", "flush_to_disk"])
def test_a_raw_image_announces_its_steps(event: str) -> None:
    """A fault can be aimed at one kind of step of the simplest format too."""

    async def main() -> None:
        async with BlockSystem.create() as system:
            image = {"driver": "blkdebug", "image": {"driver": "memory", "size": 64 * KiB}}
            image["inject-error"] = [{"event": event, "once": True}]
            raw = await system.opener.open_blockdev({"driver": "raw", "node-name": "disk", "file": image})
            disk = BlockBackend(system.graph, perm=Perm.CONSISTENT_READ | Perm.WRITE, shared=Perm.ALL)
            disk.insert(raw)
            outcomes = {"write_aio": await error_of(disk.write(0, b"x"))}
            outcomes["read_aio"] = await error_of(disk.read(0, 512))
            outcomes["flush"] = await error_of(disk.flush())
            failed = {name for name, outcome in outcomes.items() if outcome is not None}
            assert failed == {event.partition("_to_")[0]}

    run(main)


@pytest.mark.parametrize("kind", ["write", "write-zeroes"])
def test_a_write_that_failed_is_done_too(kind: str) -> None:
    """The real program raises ``pwritev_done`` also after a failure, so that states can follow what a retry meets."""

    async def check(driver: BlkdebugDriver, disk: BlockBackend) -> None:
        request = disk.write(0, b"x" * 512) if kind == "write" else disk.write_zeroes(0, 512)
        assert await error_of(request) == errno.EIO
        assert await error_of(disk.read(0, 512)) == errno.ENOSPC

    rules = [{"event": "none", "iotype": kind}, {"event": "pwritev_done", "errno": errno.ENOSPC}]
    with_rules(check, **{"inject-error": rules})


def test_limits_cut_requests_for_the_node() -> None:
    """Fragmenting code is tried with limits far below those of real storage."""

    async def check(driver: BlkdebugDriver, disk: BlockBackend) -> None:
        seen: list[tuple[int, int]] = []
        original = BlkdebugDriver.write_from

        async def note(offset: int, buffer: memoryview, *, fua: bool = False) -> None:
            seen.append((offset, len(buffer)))
            await original(driver, offset, buffer, fua=fua)

        driver.write_from = note  # type: ignore[method-assign]
        await disk.write(100, b"q" * 3000)
        assert all(offset % 512 == 0 and length % 512 == 0 and length <= 1024 for offset, length in seen)
        assert await disk.read(0, 4096) == bytes(100) + b"q" * 3000 + bytes(996)

    with_rules(check, **{"align": 512, "max-transfer": 1024})


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"align": 768}, "align"),
        ({"align": 4096, "max-transfer": 512}, "max-transfer"),
        ({"opt-write-zero": 4096, "max-write-zero": 6144}, "max-write-zero"),
        ({"align": 1024, "opt-discard": 512}, "opt-discard"),
        ({"max-discard": -512}, "max-discard"),
        ({"align": 1 << 31}, "align"),
        ({"max-transfer": 1 << 40}, "max-transfer"),
        ({"inject-error": [{"event": "none", "errno": -5}]}, "errno"),
        ({"inject-error": [{"event": "none", "sector": -2}]}, "sector"),
        ({"inject-error": [{"event": "none", "state": -1}]}, "state"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(options: dict[str, Any], culprit: str) -> None:
    """The message names the option; nothing stays open."""

    async def main() -> None:
        async with BlockSystem.create() as system:
            with pytest.raises(InvalidParameter) as refused:
                await debugged(system, **options)
            assert refused.value.name == culprit
            assert not system.graph.nodes

    run(main)


def test_permissions_can_be_taken_and_withheld() -> None:
    """Permission conflicts are provoked without a second program."""

    async def main() -> None:
        async with BlockSystem.create() as system:
            disk = await system.opener.open_blockdev({"driver": "memory", "node-name": "disk", "size": 64 * KiB})
            disk.monitor_owned = True
            options = {"driver": "blkdebug", "node-name": "bd", "image": "disk"}
            lists = {"take-child-perms": ["write"], "unshare-child-perms": ["write", "resize"]}
            node = await system.opener.open_blockdev({**options, **lists})
            node.monitor_owned = True
            (edge,) = disk.parents
            assert Perm.WRITE in edge.perm
            assert edge.shared == Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
            other = BlockBackend(system.graph, perm=Perm.WRITE, shared=Perm.ALL)
            with pytest.raises(PermissionConflict):
                other.insert(disk)

    run(main)


def test_rules_come_from_a_configuration_file_too(tmp_path: Path) -> None:
    """The files that exist for QEMU's tests can be used as they are."""
    config = tmp_path / "rules.cfg"
    config.write_text(
        '# a comment\n[inject-error]\nevent = "read_aio"\nerrno = "28"\nonce = "on"\n\n'
        '[set-state "again"]\nstate = "1"\nevent = "l2_load"\nnew_state = "2"\n'
    )
    error, change = read_config(config)
    assert isinstance(error, InjectError) and isinstance(change, SetState)
    assert (error.event, error.errno, error.once) == ("read_aio", errno.ENOSPC, True)
    assert (change.state, change.event, change.new_state) == (1, "l2_load", 2)

    async def check(driver: BlkdebugDriver, disk: BlockBackend) -> None:
        driver.debug_event("read_aio")
        assert await error_of(disk.read(0, 512)) == errno.ENOSPC

    with_rules(check, config=str(config))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[inject-errors]\n", ":1"),
        ('event = "none"\n', ":1"),
        ('[inject-error]\nevent = "nope"\n', ":1: in [inject-error]: Parameter 'event'"),
        ('[set-state]\n\nevent = "none"\n', "new_state"),
        ("[inject-error]\nevent none\n", ":2"),
    ],
)
def test_a_wrong_configuration_file_is_refused_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    """Who writes rules by hand needs to know which line."""
    config = tmp_path / "rules.cfg"
    config.write_text(text)
    with pytest.raises(CommandError) as refused:
        read_config(config)
    assert told in str(refused.value)
    with pytest.raises(CommandError):
        read_config(tmp_path / "missing.cfg")


QCOW2_STEPS = [
    "cluster_alloc", "cluster_free", "cow_read", "cow_write", "flush_to_disk", "flush_to_os", "l1_grow_activate_table",
    "l1_grow_alloc_table", "l1_grow_write_table", "l1_shrink_write_table", "l1_update", "l2_alloc_write", "l2_load",
    "l2_update", "read_aio", "refblock_alloc", "refblock_alloc_hookup", "refblock_alloc_write", "refblock_load",
    "refblock_update_part", "write_aio",
    "cluster_alloc_bytes", "l2_update_compressed", "write_compressed", "l1_shrink_free_l2_clusters",
]  # fmt: skip
"""Steps that the work below leads qcow2 through."""


async def work_on(disk: BlockBackend) -> list[BlockIOError]:
    """Write, overwrite, read, zero, discard, grow and shrink, going on after errors; gives those."""
    errors = []
    blocks = [disk.write(offset, b"y" * 700) for offset in range(0, 512 * KiB, 2560)]
    steps = [disk.flush(), disk.write(0, b"z" * 100), disk.read(0, 4096), disk.write_zeroes(4096, 8192)]
    packed = memoryview(b"p" * 512)
    steps += [disk.discard(16 * KiB, 32 * KiB), disk.flush(), disk.write_compressed(20 * KiB, packed)]
    steps += [disk.truncate(64 << 20), disk.truncate(512 * KiB), disk.flush()]
    for request in [*blocks, *steps]:
        try:
            await request
        except BlockIOError as error:
            errors.append(error)
    return errors


async def image_of(system: BlockSystem, path: Path, **rules: Any) -> BlockBackend:
    """The qcow2 image ``path`` on blkdebug with these rules."""
    image = {"driver": "file", "filename": str(path)}
    below = {"driver": "blkdebug", "image": image, **rules}
    node = await system.opener.open_blockdev({"driver": "qcow2", "file": below, "discard": "unmap"}, root=False)
    disk = BlockBackend(system.graph, perm=Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE, shared=Perm.ALL)
    disk.insert(node)
    return disk


@pytest.mark.parametrize("event", QCOW2_STEPS)
def test_a_qcow2_image_fails_at_the_step_that_a_rule_names_and_stays_consistent(event: str, tmp_path: Path) -> None:
    """The error paths of a format are the ones that nobody walks by chance: at worst they may leak clusters."""
    path = tmp_path / "disk.qcow2"

    async def main() -> None:
        async with BlockSystem.create(warn=lambda text: None) as system:
            await system.opener.create_image("file", {"filename": str(path), "size": 0})
            options = {"file": {"driver": "file", "filename": str(path)}, "size": 512 * KiB, "cluster-size": 512}
            await system.opener.create_image("qcow2", options)
            errors: list[BlockIOError] = []
            for _ in range(2):  # some steps are for empty images, others for images with tables
                rule = {"event": event, "once": True, "errno": errno.ENOSPC}
                disk = await image_of(system, path, **{"inject-error": [rule]})
                errors = errors or await work_on(disk)
                disk.close()
                await system.opener.close_orphans()
            assert errors and errors[0].errno == errno.ENOSPC and f"'{event}'" in str(errors[0])
            again = await image_of(system, path)
            driver = again.node.driver
            assert isinstance(driver, SupportsCheck)
            result = await driver.check(CheckFix.NONE)
            assert (result.corruptions, result.check_errors) == (0, 0)

    run(main)
