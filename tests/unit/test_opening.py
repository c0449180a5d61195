"""Opening, probing, backing chains, unwinding, creating, reopening and closing of nodes."""

from __future__ import annotations

import errno
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest

from qblock.backend import BlockBackend
from qblock.clock import LoopClock
from qblock.drivers.raw import RawDriver, RawOptions
from qblock.errors import (
    BlockIOError,
    CommandError,
    CorruptImage,
    DuplicateName,
    ImageLocked,
    InvalidParameter,
    NodeNotFound,
    OpenDenied,
    QBlockError,
)
from qblock.filenames import combine_filename
from qblock.node import BlockDriverState
from qblock.options import ChildRef, DriverOptions, child
from qblock.permissions import ChildRole, Perm
from qblock.policy import Mention, OpenPolicy
from qblock.registry import UnknownDriver
from qblock.system import BlockSystem
from qblock.testing.simloop import run

SIZE = 256 * 1024


def with_system(work: Callable[[BlockSystem], Awaitable[None]], policy: OpenPolicy | None = None) -> list[str]:
    """Run ``work`` on a system of its own that follows headers unless told otherwise; gives its warnings."""
    warnings: list[str] = []

    async def main() -> None:
        given = {"clock": LoopClock(), "warn": warnings.append}
        async with BlockSystem.create(policy=policy or OpenPolicy.follow(), **given) as system:
            await work(system)

    run(main)
    return warnings


async def make_qcow2(system: BlockSystem, path: Path, **options: Any) -> str:
    """An empty qcow2 image; options are creation options with ``_`` for ``-``."""
    await system.opener.create_image("file", {"filename": str(path), "size": 0})
    given = {name.replace("_", "-"): value for name, value in options.items()}
    file = {"driver": "file", "filename": str(path)}
    await system.opener.create_image("qcow2", {"file": file, "size": SIZE, **given})
    return str(path)


async def make_chain(system: BlockSystem, directory: Path, depth: int) -> str:
    """``depth`` images, each on top of the one before by relative name; gives the name of the top."""
    backing: dict[str, Any] = {}
    for number in range(depth):
        path = directory / f"layer{number}"
        await make_qcow2(system, path, **backing)
        backing = {"backing_file": path.name, "backing_fmt": "qcow2"}
    return str(path)


def names(node: BlockDriverState) -> list[str | None]:
    """The files of a chain, top first."""
    result = [node.driver.filename()]
    while (edge := node.backing) is not None:
        node = edge.node
        result.append(node.driver.filename())
    return result


# ---------------------------------------------------------------------------------------------------- trees of options


def test_an_unknown_member_deep_in_the_tree_opens_no_file(tmp_path: Path) -> None:
    """The whole tree is checked before anything is touched; the message names the member by its path."""

    async def work(system: BlockSystem) -> None:
        file = {"driver": "file", "filename": str(tmp_path / "does-not-exist"), "speed": 1}
        with pytest.raises(InvalidParameter) as refused:
            await system.opener.open_blockdev(
                {"driver": "raw", "node-name": "r", "file": {"driver": "raw", "file": file}}
            )
        assert refused.value.name == "file.file.speed"
        assert not system.graph.nodes

    with_system(work)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"node-name": "n"}, "driver"),
        ({"driver": "null-co"}, "node-name"),
        ({"driver": "null-co", "node-name": "n", "size": "1M"}, "size"),
        ({"driver": "raw", "node-name": "n"}, "file"),
        ({"driver": "raw", "node-name": "n", "file": None}, "file"),
        ({"driver": "null-co", "node-name": "n", "cache": {"direkt": True}}, "cache.direkt"),
        ({"driver": "null-co", "node-name": "n", "detect-zeroes": "unmap"}, "detect-zeroes"),
        ({"driver": "null-co", "node-name": "n", "force-share": True}, "force-share"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], culprit: str) -> None:
    """What is wrong is told by the path of the member, for a monitor to answer with."""

    async def work(system: BlockSystem) -> None:
        with pytest.raises(InvalidParameter) as refused:
            await system.opener.open_blockdev(options)
        assert refused.value.name == culprit

    with_system(work)


def test_an_unknown_driver_and_an_unknown_reference_are_refused() -> None:
    """A string names a node or a device, never a file."""

    async def work(system: BlockSystem) -> None:
        with pytest.raises(UnknownDriver):
            await system.opener.open_blockdev({"driver": "nope", "node-name": "n"})
        with pytest.raises(NodeNotFound):
            await system.opener.open_blockdev({"driver": "raw", "node-name": "n", "file": "/etc/passwd"})
        assert not system.graph.nodes

    with_system(work)


def test_a_child_given_by_name_is_shared_and_one_given_inline_belongs_to_its_parent() -> None:
    """References and inline options mix; only what the monitor does not own vanishes with its last user."""

    async def work(system: BlockSystem) -> None:
        disk = await system.opener.open_blockdev({"driver": "memory", "node-name": "disk", "size": SIZE})
        disk.monitor_owned = True
        raw = await system.opener.open_blockdev({"driver": "raw", "node-name": "by-name", "file": "disk"})
        inline = {"driver": "raw", "node-name": "inline", "file": {"driver": "memory", "size": SIZE}}
        other = await system.opener.open_blockdev(inline)
        assert raw.children["file"].node is disk
        assert other.children["file"].node.node_name.startswith("#block")
        await system.opener.close_orphans()
        assert list(system.graph.nodes) == ["disk"]

    with_system(work)


@pytest.mark.parametrize("culprit", ["name", "second child", "permission"])
def test_a_failure_leaves_nothing_open(tmp_path: Path, culprit: str) -> None:
    """Names are free again, locks are given back, the nodes below are closed."""

    async def work(system: BlockSystem) -> None:
        path = await make_qcow2(system, tmp_path / "a")
        taken = await system.opener.open_blockdev({"driver": "memory", "node-name": "taken", "size": SIZE})
        taken.monitor_owned = True
        selfish = BlockBackend(system.graph, perm=Perm.NONE, shared=Perm.NONE)
        selfish.insert(taken)
        options: dict[str, Any] = {"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": path}}
        missing = {"driver": "file", "filename": str(tmp_path / "missing")}
        wrong: dict[str, Any] = {
            "name": {**options, "node-name": "taken"},
            "second child": {**options, "backing": missing},
            "permission": {"driver": "raw", "node-name": "q", "file": {"driver": "blkdebug", **TAKES_WRITE}},
        }[culprit]
        with pytest.raises(QBlockError):
            await system.opener.open_blockdev(wrong)
        assert list(system.graph.nodes) == ["taken"]
        again = await system.opener.open_blockdev(options)
        assert again.node_name == "q"

    with_system(work)


TAKES_WRITE = {"image": "taken", "take-child-perms": ["write"]}


def test_an_image_that_somebody_else_has_locked_leaves_nothing_open(tmp_path: Path) -> None:
    """Its file can be opened and not be used: the node of the file has to go as well."""

    async def work(system: BlockSystem) -> None:
        file = {"driver": "file", "filename": await make_qcow2(system, tmp_path / "a")}
        first = await system.opener.open_blockdev({"driver": "qcow2", "node-name": "q", "file": file})
        first.monitor_owned = True
        before = list(system.graph.nodes)
        with pytest.raises(ImageLocked):
            await system.opener.open_blockdev({"driver": "qcow2", "node-name": "r", "file": file})
        assert list(system.graph.nodes) == before

    with_system(work)


# ---------------------------------------------------------------------------------------------------- common options


def test_common_options_pass_from_parent_to_child_unless_it_has_its_own() -> None:
    """read-only, cache flags and force-share are inherited; detect-zeroes is not; the storage of a format may discard."""

    async def work(system: BlockSystem) -> None:
        common = {"read-only": True, "cache": {"no-flush": True}, "force-share": True, "detect-zeroes": "on"}
        file = {"driver": "raw", "file": {"driver": "null-co", "read-zeroes": True, "cache": {"no-flush": False}}}
        top = await system.opener.open_blockdev({"driver": "raw", "node-name": "top", "file": file, **common})
        middle = top.children["file"].node
        bottom = middle.children["file"].node
        assert [node.read_only for node in (top, middle, bottom)] == [True, True, True]
        assert [node.force_share for node in (top, middle, bottom)] == [True, True, True]
        assert [node.cache_no_flush for node in (top, middle, bottom)] == [True, True, False]
        assert [node.detect_zeroes for node in (top, middle, bottom)] == ["on", "off", "off"]

    with_system(work)


def test_a_backing_node_is_read_only_and_its_overlay_is_not(tmp_path: Path) -> None:
    """What lies below must not change, whatever the overlay's options say."""

    async def work(system: BlockSystem) -> None:
        top = await make_chain(system, tmp_path, 2)
        options = {"driver": "qcow2", "node-name": "t", "discard": "unmap", "file": {"driver": "file", "filename": top}}
        node = await system.opener.open_blockdev(options)
        assert node.backing is not None
        below = node.backing.node
        assert (node.read_only, node.discard_unmap) == (False, True)
        assert (below.read_only, below.discard_unmap) == (True, False)
        assert below.node_name.startswith("#block")

    with_system(work)


# ---------------------------------------------------------------------------------------------------- names and probing


def test_the_format_is_probed_and_raw_is_what_fits_nothing_else(tmp_path: Path) -> None:
    """A probed raw is marked, so that nobody can turn it into another format from inside."""

    async def work(system: BlockSystem) -> None:
        qcow2 = await make_qcow2(system, tmp_path / "q")
        plain = tmp_path / "plain"
        plain.write_bytes(b"text" * 1024)
        opened = await system.opener.open_image(qcow2)
        assert (opened.driver.name, opened.probed) == ("qcow2", False)
        raw = await system.opener.open_image(str(plain))
        assert (raw.driver.name, raw.probed) == ("raw", True)
        told = await system.opener.open_image(str(plain), fmt="raw")
        assert (told.driver.name, told.probed) == ("raw", False)
        await system.opener.close_orphans()

    with_system(work)


def test_what_may_not_be_read_is_not_probed_and_nothing_stays_of_it(tmp_path: Path) -> None:
    """Somebody who shares no reading has the file: the image is refused, and the reader for the probe is gone again."""

    async def work(system: BlockSystem) -> None:
        path = await make_qcow2(system, tmp_path / "a.qcow2")
        node = await system.opener.open_blockdev({"driver": "file", "node-name": "f", "filename": path})
        user = BlockBackend(system.graph, perm=Perm.WRITE, shared=Perm.ALL & ~Perm.CONSISTENT_READ)
        user.insert(node)
        with pytest.raises(ImageLocked):
            await system.opener.open_image(path, read_only=True)
        assert system.graph.backends == [user]
        assert list(system.graph.nodes.values()) == [node]

    with_system(work)


def test_a_guest_cannot_turn_a_probed_raw_disk_into_an_image_by_pieces(tmp_path: Path) -> None:
    """At the next start it would be opened as qcow2, with any file of the host behind it. Reopening does not forget."""
    (tmp_path / "disk.img").write_bytes(bytes(SIZE))

    async def work(system: BlockSystem) -> None:
        opener = system.opener
        node = await opener.open_image(str(tmp_path / "disk.img"), read_only=False)
        node.monitor_owned = True
        await opener.reopen(node, read_only=True)
        await opener.reopen(node, read_only=False)
        disk = BlockBackend(system.graph, perm=Perm.CONSISTENT_READ | Perm.WRITE, shared=Perm.ALL)
        disk.insert(node)
        await disk.write(1, b"FI\xfb")
        with pytest.raises(BlockIOError) as refused:
            await disk.write(0, b"Q")
        assert refused.value.errno == errno.EPERM
        assert await disk.read(0, 4) == b"\0FI\xfb"

    with_system(work)


def test_a_json_name_holds_options_with_dotted_keys_and_text(tmp_path: Path) -> None:
    """Scripts pass ``json:`` names wherever a file name goes."""

    async def work(system: BlockSystem) -> None:
        path = await make_qcow2(system, tmp_path / "q")
        name = json.dumps({"driver": "qcow2", "file.driver": "file", "file.filename": path, "read-only": "on"})
        node = await system.opener.open_image(f"json:{name}", read_only=False)
        assert (node.driver.name, node.read_only) == ("qcow2", True)
        assert node.driver.filename() == path

    with_system(work)


@pytest.mark.parametrize("name", ["json:{", "json:[]", "nosuch:thing"])
def test_a_name_that_means_nothing_is_refused(name: str) -> None:
    """An unknown protocol prefix is not taken for a file by accident."""

    async def work(system: BlockSystem) -> None:
        with pytest.raises(CommandError):
            await system.opener.open_image(name)

    with_system(work)


@pytest.mark.parametrize(
    ("image", "name", "combined"),
    [
        ("/a/b/top", "base", "/a/b/base"),
        ("/a/b/top", "../c/base", "/a/b/../c/base"),
        ("top", "base", "base"),
        ("dir/top", "/abs/base", "/abs/base"),
        ("/a/top", "json:{}", "json:{}"),
        ("/a/top", "nbd://host/x", "nbd://host/x"),
        ("/a/top", "./with:colon", "/a/./with:colon"),
        ("file:/a/top", "base", "/a/base"),
    ],
)
def test_a_relative_name_is_relative_to_the_image_that_says_it(image: str, name: str, combined: str) -> None:
    """Chains can be moved as a directory."""
    assert combine_filename(image, name) == combined


# ------------------------------------------------------------------------------------------------------ backing chains


def test_a_chain_of_three_hundred_opens_and_reads_without_recursion(tmp_path: Path) -> None:
    """The depth of a chain is bounded by descriptors, not by Python's stack."""

    async def work(system: BlockSystem) -> None:
        top = await make_chain(system, tmp_path, 300)
        node = await system.opener.open_image(top)
        assert len(names(node)) == 300
        backend = BlockBackend(system.graph, perm=Perm.CONSISTENT_READ, shared=Perm.ALL)
        backend.insert(node)
        assert await backend.read(0, SIZE) == bytes(SIZE)
        backend.close()
        await system.opener.close_orphans()
        assert not system.graph.nodes

    with_system(work)


def test_the_header_is_overruled_by_null_by_name_and_by_options(tmp_path: Path) -> None:
    """Absent means the header's; null none at all; a string a node; an object a new node."""

    async def work(system: BlockSystem) -> None:
        top = await make_chain(system, tmp_path, 2)
        file = {"driver": "file", "filename": top, "locking": "off"}
        other = await system.opener.open_blockdev({"driver": "memory", "node-name": "other", "size": SIZE})
        other.monitor_owned = True
        options = {"driver": "qcow2", "file": file, "read-only": True}
        from_header = await system.opener.open_blockdev({**options, "node-name": "a"})
        none = await system.opener.open_blockdev({**options, "node-name": "b", "backing": None})
        by_name = await system.opener.open_blockdev({**options, "node-name": "c", "backing": "other"})
        inline = {"driver": "null-co", "read-zeroes": True, "size": SIZE}
        by_options = await system.opener.open_blockdev({**options, "node-name": "d", "backing": inline})
        assert names(from_header)[1:] == [str(tmp_path / "layer0")]
        assert none.backing is None
        assert by_name.backing is not None and by_name.backing.node is other
        assert by_options.backing is not None and by_options.backing.node.driver.name == "null-co"

    with_system(work)


def test_a_relative_backing_name_is_found_below_a_filter(tmp_path: Path) -> None:
    """The directory is that of the file at the bottom, whatever lies between it and the format."""

    async def work(system: BlockSystem) -> None:
        top = await make_chain(system, tmp_path, 2)
        image = {"driver": "file", "filename": top}
        file = {"driver": "blkdebug", "image": image}
        node = await system.opener.open_blockdev({"driver": "qcow2", "node-name": "t", "file": file})
        assert names(node)[1:] == [str(tmp_path / "layer0")]

    with_system(work)


async def make_loop(system: BlockSystem, directory: Path, *, json_names: bool) -> str:
    """Two images that name each other."""
    for one, other in (("a", "b"), ("b", "a")):
        path = str(directory / other)
        options = {"driver": "qcow2", "file": {"driver": "file", "filename": path}}
        name = f"json:{json.dumps(options)}" if json_names else path
        await make_qcow2(system, directory / one, backing_file=name, backing_fmt="qcow2")
    return str(directory / "a")


@pytest.mark.parametrize("json_names", [False, True])
def test_a_chain_that_leads_back_to_itself_is_refused(tmp_path: Path, json_names: bool) -> None:
    """A hostile or careless pair of headers must not use up all descriptors."""

    async def work(system: BlockSystem) -> None:
        name = await make_loop(system, tmp_path, json_names=json_names)
        with pytest.raises(CorruptImage, match="loop"):
            await system.opener.open_image(name)
        assert not system.graph.nodes

    with_system(work)


def test_nothing_that_an_image_mentions_is_opened_unless_the_policy_says_so(tmp_path: Path) -> None:
    """An image from a stranger must not make us read another file."""
    asked: list[Mention] = []

    def allows(mention: Mention) -> bool:
        asked.append(mention)
        return False

    async def prepare(system: BlockSystem) -> None:
        await make_chain(system, tmp_path, 2)

    async def work(system: BlockSystem) -> None:
        with pytest.raises(OpenDenied) as denied:
            await system.opener.open_image(str(tmp_path / "layer1"))
        assert denied.value.mentions == str(tmp_path / "layer0")
        assert not system.graph.nodes
        alone = await system.opener.open_image(str(tmp_path / "layer1"), backing=False)
        assert alone.backing is None

    with_system(prepare)
    with_system(work, OpenPolicy.deny())
    with_system(work, OpenPolicy.ask(allows))
    image, below = str(tmp_path / "layer1"), str(tmp_path / "layer0")
    assert asked == [Mention(image=image, filename=below, what="backing file", format="qcow2")]


def test_a_missing_backing_file_fails_the_whole_and_says_whose_it_is(tmp_path: Path) -> None:
    """Half a chain would read as zeroes: better nothing."""

    async def work(system: BlockSystem) -> None:
        top = await make_chain(system, tmp_path, 3)
        (tmp_path / "layer0").unlink()
        with pytest.raises(BlockIOError) as failed:
            await system.opener.open_image(top)
        assert "layer0" in str(failed.value)
        assert any("layer1" in note for note in failed.value.__notes__)
        assert not system.graph.nodes

    with_system(work)


# -------------------------------------------------------------------------------------------------- closing, reopening


def test_closing_waits_for_a_request_whose_user_has_left() -> None:
    """A driver is never closed under a request."""

    async def work(system: BlockSystem) -> None:
        slow = {"driver": "null-co", "node-name": "n", "latency-ns": 1_000_000_000, "read-zeroes": True}
        node = await system.opener.open_blockdev(slow)
        disk = BlockBackend(system.graph, perm=Perm.CONSISTENT_READ, shared=Perm.ALL)
        disk.insert(node)
        began = system.clock.now_ns()
        request = system.jobs.spawn(read_some(disk), "reader")
        await system.env.clock.sleep_ns(1)
        disk.close()
        await system.opener.close_orphans()
        assert request.done() and system.clock.now_ns() - began >= 1_000_000_000

    with_system(work)


async def read_some(disk: BlockBackend) -> None:
    """One request, to be under way while other things happen."""
    await disk.read(0, 512)


def test_a_node_that_cannot_be_flushed_is_closed_all_the_same_and_said_so() -> None:
    """What cannot be kept must not be kept quiet either."""

    async def work(system: BlockSystem) -> None:
        rule = {"event": "none", "iotype": "flush"}
        image = {"driver": "memory", "size": SIZE}
        node = await system.opener.open_blockdev(
            {"driver": "blkdebug", "node-name": "faulty", "inject-error": [rule], "image": image}
        )
        disk = BlockBackend(system.graph, perm=Perm.WRITE, shared=Perm.ALL)
        disk.insert(node)
        await disk.write(0, b"x" * 512)
        disk.close()
        await system.opener.close_orphans()
        assert not system.graph.nodes

    (warning,) = with_system(work)
    assert "faulty" in warning


def test_reopening_switches_to_read_only_and_back_with_the_storage_below(tmp_path: Path) -> None:
    """Commit and stream write to layers that are read-only otherwise."""

    async def work(system: BlockSystem) -> None:
        path = tmp_path / "plain"
        path.write_bytes(bytes(SIZE))
        node = await system.opener.open_image(str(path), fmt="raw")
        node.monitor_owned = True
        below = node.children["file"].node
        for read_only in (False, True):
            await system.opener.reopen(node, read_only=read_only)
            assert (node.read_only, below.read_only) == (read_only, read_only)
        with pytest.raises(CommandError):
            BlockBackend(system.graph, perm=Perm.WRITE, shared=Perm.ALL).insert(node)
        await system.opener.reopen(node, read_only=False)
        disk = BlockBackend(system.graph, perm=Perm.WRITE, shared=Perm.ALL)
        disk.insert(node)
        await disk.write(0, b"x" * 512)
        assert path.read_bytes()[:513] == b"x" * 512 + b"\0"

    with_system(work)


def test_a_refused_reopen_changes_nothing(tmp_path: Path) -> None:
    """Somebody writes: the node stays as it was, at every level, and goes on working."""

    async def work(system: BlockSystem) -> None:
        path = await make_qcow2(system, tmp_path / "q")
        node = await system.opener.open_image(path, read_only=False)
        disk = BlockBackend(system.graph, perm=Perm.CONSISTENT_READ | Perm.WRITE, shared=Perm.ALL)
        disk.insert(node)
        with pytest.raises(CommandError):
            await system.opener.reopen(node, read_only=True)
        assert not node.read_only and not node.children["file"].node.read_only
        await disk.write(0, b"y" * 512)
        assert await disk.read(0, 512) == b"y" * 512

    with_system(work)


def test_reopening_takes_a_complete_description_and_keeps_what_cannot_change() -> None:
    """As blockdev-reopen: omitted options revert to defaults, a change the driver cannot make is refused by name."""

    async def work(system: BlockSystem) -> None:
        disk = await system.opener.open_blockdev({"driver": "null-co", "node-name": "disk", "size": SIZE})
        disk.monitor_owned = True
        options = {"driver": "raw", "node-name": "r", "file": "disk", "detect-zeroes": "on"}
        node = await system.opener.open_blockdev(options)
        node.monitor_owned = True
        await system.opener.reopen_described([{"driver": "raw", "node-name": "r", "file": "disk", "size": 4096}])
        assert (node.detect_zeroes, node.driver.options.size) == ("off", 4096)
        for wrong in (
            {"driver": "null-co", "node-name": "r"},
            {"driver": "raw", "file": "disk"},
            {"driver": "raw", "node-name": "r", "file": {"driver": "null-co"}},
        ):
            with pytest.raises(InvalidParameter):
                await system.opener.reopen_described([wrong])
        with pytest.raises(CommandError):
            await system.opener.reopen_described([{"driver": "null-co", "node-name": "disk", "size": 512}])

    with_system(work)


# ------------------------------------------------------------------------------------------------------------ creating


def test_creating_needs_a_driver_that_can_and_exact_options(tmp_path: Path) -> None:
    """As blockdev-create: checked before any file is made."""

    async def work(system: BlockSystem) -> None:
        with pytest.raises(CommandError, match="null-co"):
            await system.opener.create_image("null-co", {"size": 1})
        with pytest.raises(InvalidParameter):
            await system.opener.create_image("file", {"filename": str(tmp_path / "x"), "size": 1, "colour": "red"})
        assert not (tmp_path / "x").exists()

    with_system(work)


def test_an_image_is_created_on_a_node_given_by_name() -> None:
    """The file may be any writable node; it stays open afterwards."""

    async def work(system: BlockSystem) -> None:
        disk = await system.opener.open_blockdev({"driver": "memory", "node-name": "disk"})
        disk.monitor_owned = True
        await system.opener.create_image("qcow2", {"file": "disk", "size": SIZE})
        node = await system.opener.open_blockdev({"driver": "qcow2", "node-name": "q", "file": "disk"})
        assert node.length == SIZE

    with_system(work)


def test_a_name_cannot_be_used_twice() -> None:
    """Nodes and devices share one space of names."""

    async def work(system: BlockSystem) -> None:
        node = await system.opener.open_blockdev({"driver": "null-co", "node-name": "n"})
        node.monitor_owned = True
        with pytest.raises(DuplicateName):
            await system.opener.open_blockdev({"driver": "null-co", "node-name": "n"})
        assert list(system.graph.nodes) == ["n"]

    with_system(work)


# ------------------------------------------------------------------------------------------------------- protocol names


@pytest.mark.parametrize(
    ("filename", "driver", "shown"),
    [
        ("null-co://", "null-co", "null-co://"),
        ("null-aio://", "null-aio", "null-aio://"),
        ("blkdebug::disk.raw", "blkdebug", "blkdebug::disk.raw"),
        ("blkdebug:rules.conf:disk.raw", "blkdebug", "blkdebug:rules.conf:disk.raw"),
        ("blkdebug::file:disk.raw", "blkdebug", "blkdebug::disk.raw"),
        ("blkdebug::blkdebug::null-co://", "blkdebug", "blkdebug::blkdebug::null-co://"),
    ],
)
def test_names_of_protocols_open_their_drivers(
    filename: str, driver: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`blkdebug:CONFIG:FILE` and `null-co://` are names like those of files, and are shown again as they were given."""
    monkeypatch.chdir(tmp_path)
    Path("disk.raw").write_bytes(bytes(4096))
    Path("rules.conf").write_text('[inject-error]\nevent = "flush_to_disk"\n')

    async def work(system: BlockSystem) -> None:
        node = await system.opener.open_image(filename, fmt="raw")
        storage = node.children["file"].node
        assert storage.driver.name == driver
        assert storage.driver.filename() == node.driver.filename() == shown

    with_system(work)


@pytest.mark.parametrize("filename", ["null-co:", "null-co://disk", "blkdebug:disk", "blkdebug:", "blkdebug::" * 3000 + "disk"])
def test_names_that_a_protocol_does_not_have_are_refused(filename: str) -> None:
    """Each with what such a name looks like, however deep it goes."""

    async def work(system: BlockSystem) -> None:
        with pytest.raises(CommandError, match=r"is no file name of null-co|not of the form blkdebug:|nested more than|''"):
            await system.opener.open_image(filename)

    with_system(work)


@pytest.mark.parametrize(
    "options", [{"driver": "null-co", "size": 4096}, {"driver": "blkdebug", "align": 512, "image": {"driver": "null-co"}}]
)
def test_options_that_change_a_disk_leave_it_without_a_plain_name(options: dict[str, Any]) -> None:
    """Who opened it again by a plain name would get another disk."""

    async def work(system: BlockSystem) -> None:
        node = await system.opener.open_blockdev({**options, "node-name": "n"})
        node.monitor_owned = True
        assert node.driver.filename() is None

    with_system(work)


@attrs.frozen
class PairOptions(RawOptions):
    """Options of a format that may keep data beside its file."""

    side: ChildRef = child(ChildRole.DATA, optional=True, doc="more data")


class PairDriver(RawDriver):
    """A probed format with an optional second child."""

    name: ClassVar[str] = "pair"
    options_class: ClassVar[type[DriverOptions]] = PairOptions

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if head.startswith(b"PAIR") else 0


def test_a_probed_format_does_without_its_optional_children(tmp_path: Path) -> None:
    """What is not given is not opened, although the storage of a probed image is open already."""

    async def work(system: BlockSystem) -> None:
        system.registry.register(PairDriver)
        image = tmp_path / "disk.pair"
        image.write_bytes(b"PAIR" + bytes(SIZE - 4))
        node = await system.opener.open_image(str(image))
        assert node.driver.name == "pair" and list(node.children) == ["file"]
        await system.opener.close_orphans()

    with_system(work)
