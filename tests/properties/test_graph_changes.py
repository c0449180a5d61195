"""Random graph changes: an abort restores everything, a commit leaves permissions and drained sections consistent."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qblock.errors import CommandError
from qblock.graph import Graph
from qblock.node import BlockDriverState
from qblock.permissions import ChildRole, Perm
from qblock.testing.graphs import (
    CountingUser,
    PassiveDriver,
    PassiveFilter,
    PassiveFormat,
    assert_consistent,
    describe_graph,
    passive_node,
)
from qblock.transaction import Transaction

CHILD_ROLES = {
    "file": ChildRole.STORAGE,
    "data-file": ChildRole.DATA,
    "raw": ChildRole.PRIMARY_DATA,
    "backing": ChildRole.BACKING,
}
SEEDS = st.integers(min_value=0, max_value=2**32 - 1)


class OneChange:
    """Random steps of one transaction, drawn from a seed; each raises `CommandError` when it is refused."""

    def __init__(self, graph: Graph, users: list[CountingUser], random: Random, change: Transaction) -> None:
        self.graph = graph
        self.users = users
        self.random = random
        self.change = change

    def node(self) -> BlockDriverState:
        return self.random.choice(list(self.graph.nodes.values()))

    def pick(self, wanted: type[PassiveDriver]) -> BlockDriverState | None:
        nodes = [node for node in self.graph.nodes.values() if isinstance(node.driver, wanted)]
        return self.random.choice(nodes) if nodes else None

    def perms(self) -> Perm:
        """Anything, but often the harmless extremes, so that changes succeed too."""
        return self.random.choice(
            [Perm.NONE, Perm.CONSISTENT_READ, Perm.ALL, Perm.ALL, Perm(self.random.randrange(16))]
        )

    def step(self) -> None:
        steps = [
            self.add_node,
            self.attach_child,
            self.attach_user,
            self.detach,
            self.change_permissions,
            self.replace_child,
            self.replace_node,
            self.append,
            self.drop,
            self.set_backing,
            self.turn_read_only,
        ]
        self.random.choice(steps)()

    def add_node(self) -> None:
        if len(self.graph.nodes) < 12:
            node = BlockDriverState("", read_only=self.random.random() < 0.3)
            kind = self.random.choice([PassiveDriver, PassiveFormat, PassiveFilter])
            passive = passive_node(Graph(), "x")
            node.driver = kind(node, passive.driver.options, passive.driver.env)
            self.graph.add_node(node, self.change)

    def attach_child(self) -> None:
        parent = self.node()
        if parent.driver.is_filter:
            self.graph.attach(parent, self.node(), name="file", role=ChildRole.FILTERED, change=self.change)
        else:
            name, role = self.random.choice(list(CHILD_ROLES.items()))
            self.graph.attach(parent, self.node(), name=name, role=role, change=self.change)

    def attach_user(self) -> None:
        idle = [user for user in self.users if user.root is None]
        if idle:
            user = self.random.choice(idle)
            role = self.random.choice([ChildRole.ROOT, ChildRole.JOB])
            self.change.add(abort=lambda: setattr(user, "root", None))
            user.root = self.graph.attach(
                user,
                self.node(),
                name="root",
                role=role,
                perm=self.perms(),
                shared=self.perms(),
                change=self.change,
            )

    def detach(self) -> None:
        edges = self.node().parents
        if edges:
            edge = self.random.choice(edges)
            self.graph.detach(edge, self.change)
            if isinstance(edge.parent, CountingUser):
                user = edge.parent
                self.change.add(abort=lambda: setattr(user, "root", edge))
                user.root = None

    def change_permissions(self) -> None:
        roots = [user.root for user in self.users if user.root is not None]
        if roots:
            self.graph.set_edge_permissions(self.random.choice(roots), self.perms(), self.perms(), self.change)

    def replace_child(self) -> None:
        edges = self.node().parents
        if edges:
            self.graph.replace_child(self.random.choice(edges), self.node(), self.change)

    def replace_node(self) -> None:
        old, new = self.node(), self.node()
        if old is not new:
            self.graph.replace_node(old, new, self.change, only=lambda edge: self.random.random() < 0.8)

    def append(self) -> None:
        overlay = self.pick(self.random.choice([PassiveFilter, PassiveFormat]))
        if overlay is not None:
            self.graph.append(overlay, onto=self.node(), change=self.change)

    def drop(self) -> None:
        node = self.pick(PassiveFilter)
        if node is not None and node.filtered is not None:
            self.graph.drop(node, self.change)

    def set_backing(self) -> None:
        self.graph.set_backing(self.node(), self.random.choice([None, self.node()]), self.change)

    def turn_read_only(self) -> None:
        node = self.node()
        before = node.read_only
        self.change.add(abort=lambda: setattr(node, "read_only", before))
        node.read_only = not before
        self.graph.refresh_permissions([node], self.change)


class GraphMachine(RuleBasedStateMachine):
    """Transactions of random steps, some of them aborted, with drained sections beginning and ending in between."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph(random=Random(0))
        self.users = [CountingUser(f"u{index}") for index in range(4)]
        self.sections: Counter[BlockDriverState] = Counter()
        for name, kind in (("p", PassiveDriver), ("q", PassiveFormat), ("r", PassiveFormat), ("s", PassiveFilter)):
            passive_node(self.graph, name, kind)

    @rule(seed=SEEDS, steps=st.integers(1, 6), abort=st.booleans(), deferred=st.booleans())
    def change(self, seed: int, steps: int, abort: bool, deferred: bool) -> None:
        before, roots = describe_graph(self.graph), [user.root for user in self.users]
        change = Transaction()
        one = OneChange(self.graph, self.users, Random(seed), change)
        try:
            if deferred:
                with self.graph.deferred_permissions(change):
                    for _ in range(steps):
                        one.step()
            else:
                for _ in range(steps):
                    one.step()
        except CommandError:
            abort = True
        if abort:
            change.abort()
            assert describe_graph(self.graph) == before
            assert [user.root for user in self.users] == roots
        else:
            change.commit()

    @rule(seed=SEEDS, drained=st.lists(st.integers(0, 3), max_size=3))
    def drain_during_a_change_that_is_undone(self, seed: int, drained: list[int]) -> None:
        """Sections begun between two steps survive the undoing of both."""
        change = Transaction()
        one = OneChange(self.graph, self.users, Random(seed), change)
        try:
            one.step()
            for index in drained:
                self.quiesce(index)
            one.step()
        except CommandError:
            pass
        change.abort()

    @rule(index=st.integers(0, 3))
    def quiesce(self, index: int) -> None:
        node = self.graph.nodes["pqrs"[index]]
        node.quiesce()
        self.sections[node] += 1

    @precondition(lambda self: any(self.sections.values()))
    @rule(index=st.integers(0, 10))
    def resume(self, index: int) -> None:
        begun = [node for node, count in self.sections.items() if count]
        node = begun[index % len(begun)]
        node.resume()
        self.sections[node] -= 1

    @invariant()
    def all_is_consistent(self) -> None:
        assert_consistent(self.graph, self.sections)

    @invariant()
    def users_are_quiesced_as_often_as_their_node(self) -> None:
        for user in self.users:
            assert user.sections == (0 if user.root is None else user.root.node.quiesce_counter)

    @invariant()
    def nobody_writes_to_what_is_read_only(self) -> None:
        for node in self.graph.nodes.values():
            if node.read_only:
                assert not any(edge.may_write for edge in node.parents)


TestGraphChanges = GraphMachine.TestCase
