"""Permission rules by role, against what the graph dump of the real program shows (semantics.md section 4.8)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest

from qblock.errors import PermissionConflict
from qblock.graph import Graph
from qblock.node import BdrvChild
from qblock.permissions import (
    SINGLE_PERMISSIONS,
    ChildRole,
    Perm,
    cumulative,
    default_child_permissions,
    find_clash,
    permission_names,
)
from qblock.testing.graphs import CountingUser, passive_node

LETTERS = dict(zip("RWUZ", SINGLE_PERMISSIONS, strict=True))
WIRE = dict(zip(("consistent-read", "write", "write-unchanged", "resize"), "RWUZ", strict=True))


def perms(text: str) -> Perm:
    """'RWZ' as permissions; '-' is none."""
    result = Perm.NONE
    for letter in text.replace("-", ""):
        result |= LETTERS[letter]
    return result


def letters(perm: Perm) -> str:
    return "".join(letter for letter, single in LETTERS.items() if single in perm) or "-"


RULES = [
    # role, read-only, taken by the parents, shared by the parents, taken on the child, shared on the child; each line was
    # read off x-debug-query-block-graph of qemu-storage-daemon 7.2: idle, under an NBD export, as a target of a mirror
    (ChildRole.STORAGE, False, "-", "RWUZ", "RWZ", "RU"),
    (ChildRole.STORAGE, False, "R", "RWU", "RWZ", "RU"),
    (ChildRole.STORAGE, False, "RW", "RWU", "RWZ", "RU"),
    (ChildRole.STORAGE, False, "RU", "RWU", "RWUZ", "RU"),
    (ChildRole.STORAGE, False, "W", "U", "RWZ", "U"),
    (ChildRole.STORAGE, True, "-", "RWUZ", "R", "RU"),
    (ChildRole.STORAGE, True, "R", "RWU", "R", "RU"),
    (ChildRole.METADATA, False, "-", "RWUZ", "RWZ", "RU"),
    (ChildRole.METADATA, False, "R", "RWU", "RWZ", "RU"),
    (ChildRole.METADATA, False, "RW", "RWU", "RWZ", "RU"),
    (ChildRole.METADATA, False, "W", "U", "RWZ", "U"),
    (ChildRole.METADATA, True, "-", "RWUZ", "R", "RU"),
    (ChildRole.DATA, False, "-", "RWUZ", "-", "RWU"),
    (ChildRole.DATA, False, "R", "RWU", "R", "RWU"),
    (ChildRole.DATA, False, "RW", "RWU", "RWZ", "RWU"),
    (ChildRole.DATA, False, "W", "U", "WZ", "U"),
    (ChildRole.DATA, True, "-", "RWUZ", "-", "RWU"),
    (ChildRole.PRIMARY_DATA, False, "-", "RWUZ", "-", "RWUZ"),
    (ChildRole.PRIMARY_DATA, False, "RW", "RWU", "RW", "RWU"),
    (ChildRole.PRIMARY_DATA, False, "W", "U", "W", "U"),
    (ChildRole.PRIMARY_DATA, True, "R", "RWU", "R", "RWU"),
    (ChildRole.FILTERED, False, "-", "RWUZ", "-", "RWUZ"),
    (ChildRole.FILTERED, False, "RW", "RWU", "RW", "RWU"),
    (ChildRole.FILTERED, True, "R", "RWU", "R", "RWU"),
    (ChildRole.BACKING, False, "-", "RWUZ", "-", "RWUZ"),
    (ChildRole.BACKING, False, "R", "RWU", "R", "RWUZ"),
    (ChildRole.BACKING, False, "RW", "RWU", "R", "RWUZ"),
    (ChildRole.BACKING, False, "W", "U", "-", "RU"),
    (ChildRole.BACKING, True, "R", "RWU", "R", "RWUZ"),
    # a guest device that shares nothing of writing: what is below must not be written either
    (ChildRole.BACKING, False, "RW", "RU", "R", "RU"),
    (ChildRole.FILTERED, False, "RW", "RU", "RW", "RU"),
]


@pytest.mark.parametrize(("role", "read_only", "perm", "shared", "taken", "given"), RULES)
def test_rules_by_role(role: ChildRole, read_only: bool, perm: str, shared: str, taken: str, given: str) -> None:
    """What a node takes and shares on a child, as the real program does."""
    node = passive_node(Graph(), "n", read_only=read_only)
    pair = default_child_permissions(node.driver, role, perms(perm), perms(shared))
    assert (letters(pair.perm), letters(pair.shared)) == (taken, given)


@pytest.mark.parametrize("role", [role for role in ChildRole if role not in (ChildRole.ROOT, ChildRole.JOB)])
def test_needs_never_shrink_when_parents_need_more(role: ChildRole) -> None:
    """More taken above is more taken below, less shared above is less shared below: so conflicts cannot hide."""
    node = passive_node(Graph(), "n")
    every = [Perm(bits) for bits in range(16)]
    for small, large in product(every, every):
        if small & large != small:
            continue
        for other in every:
            less = default_child_permissions(node.driver, role, small, other)
            more = default_child_permissions(node.driver, role, large, other)
            assert less.perm & more.perm == less.perm
            closed = default_child_permissions(node.driver, role, other, small)
            wide = default_child_permissions(node.driver, role, other, large)
            assert closed.shared & wide.shared == closed.shared


def edge(perm: str, shared: str) -> BdrvChild:
    node = passive_node(Graph(), "n")
    return BdrvChild("root", ChildRole.ROOT, node, CountingUser("d"), perm=perms(perm), shared=perms(shared))


def test_cumulative_is_union_of_needs_and_intersection_of_sharing() -> None:
    """One node, several users."""
    assert cumulative([]) == (Perm.NONE, Perm.ALL)
    assert cumulative([edge("R", "RWU"), edge("W", "RU")]) == (perms("RW"), perms("RU"))


def test_a_clash_needs_two_different_edges() -> None:
    """A guest that writes and lets nobody else write does not exclude itself."""
    selfish = edge("RW", "R")
    assert find_clash([selfish]) is None
    assert find_clash([selfish, edge("R", "RWUZ")]) is None
    reader = edge("R", "RU")
    found = find_clash([reader, selfish])
    assert found is not None
    assert (found.user, found.holder, found.perm) == (selfish, reader, Perm.WRITE)


def test_a_clash_is_found_wherever_it_stands() -> None:
    """The order of the edges does not matter, nor that one of them is both user and holder."""
    one, two, three = edge("RW", "RU"), edge("W", "RWUZ"), edge("-", "RWUZ")
    for order in permutations([one, two, three]):
        found = find_clash(order)
        assert found is not None
        assert (found.user, found.holder) == (two, one)


def test_two_selfish_writers_clash_and_all_contested_permissions_are_told() -> None:
    """The report names everything that one takes and the other keeps."""
    found = find_clash([edge("RWZ", "RU"), edge("RWZ", "RU")])
    assert found is not None
    assert permission_names(found.perm) == ["write", "resize"]
    assert found.user is not found.holder


def test_names_come_in_the_order_of_the_bits() -> None:
    """The same order as in lock bytes and reports."""
    assert permission_names(Perm.ALL) == ["consistent-read", "write", "write-unchanged", "resize"]
    assert permission_names(Perm.NONE) == []


def test_a_conflict_tells_both_sides() -> None:
    """Who wants what, on which node, and who is in the way: as text and as fields."""
    error = PermissionConflict(
        node="n",
        user="block device 'a'",
        holder="node 'b'",
        permissions="write",
        user_child="root",
        holder_child="file",
    )
    for part in ("block device 'a'", "'root'", "write", "node 'n'", "node 'b'", "'file'"):
        assert part in str(error)
    assert (error.node, error.user_child, error.holder_child) == ("n", "root", "file")
    assert "child" not in str(PermissionConflict(node="n", user="it", holder="another program", permissions="write"))


# ------------------------------------------------------------------------------------------- the real program as oracle


class StorageDaemon:
    """A qemu-storage-daemon with a monitor on its standard streams."""

    def __init__(self, directory: Path) -> None:
        command = ["qemu-storage-daemon", "--chardev", "stdio,id=m", "--monitor", "chardev=m"]
        self._process = subprocess.Popen(
            command, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()
        self.execute("qmp_capabilities")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while True:
            message: dict[str, Any] = json.loads(self._process.stdout.readline())
            if "event" not in message:
                return message

    def execute(self, command: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        assert "return" in answer, answer
        return answer["return"]

    def edges(self) -> dict[tuple[str, str], tuple[str, str]]:
        """(child name, node below) -> (taken, shared), in the letters of semantics.md."""
        dump = self.execute("x-debug-query-block-graph")
        names = {node["id"]: node["name"] for node in dump["nodes"]}

        def text(wire: list[str]) -> str:
            return letters(perms("".join(WIRE[name] for name in wire)))

        return {
            (edge["name"], names[edge["child"]]): (text(edge["perm"]), text(edge["shared-perm"]))
            for edge in dump["edges"]
        }

    def close(self) -> None:
        self._process.kill()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StorageDaemon]:
    server = StorageDaemon(tmp_path)
    yield server
    server.close()


@pytest.mark.qemu
@pytest.mark.parametrize("read_only", [False, True])
def test_an_idle_chain_has_the_same_edges_as_in_the_real_program(
    daemon: StorageDaemon, tmp_path: Path, read_only: bool
) -> None:
    """qcow2 over a file, with a read-only backing: nobody uses it yet."""
    for image in ("base", "top"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / image), "1M"], check=True)
    backing = {
        "driver": "qcow2",
        "node-name": "b",
        "read-only": True,
        "file": {"driver": "file", "filename": "base", "node-name": "bf"},
    }
    file = {"driver": "file", "filename": "top", "node-name": "tf"}
    daemon.execute(
        "blockdev-add",
        **{"driver": "qcow2", "node-name": "t", "read-only": read_only, "file": file, "backing": backing},
    )
    graph = Graph()
    top, base = passive_node(graph, "t", read_only=read_only), passive_node(graph, "b", read_only=True)
    ours = {
        ("file", "tf"): default_child_permissions(top.driver, ChildRole.STORAGE, Perm.NONE, Perm.ALL),
        ("backing", "b"): default_child_permissions(top.driver, ChildRole.BACKING, Perm.NONE, Perm.ALL),
        ("file", "bf"): default_child_permissions(base.driver, ChildRole.STORAGE, Perm.NONE, Perm.ALL),
    }
    assert daemon.edges() == {key: (letters(pair.perm), letters(pair.shared)) for key, pair in ours.items()}
