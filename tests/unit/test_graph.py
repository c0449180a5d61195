"""The graph: names, lookups, edges, insertion and removal, permissions along the way, and undoing all of it."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from qblock.blockers import ALLOWED_ON_BACKING, OpType
from qblock.errors import (
    CommandError,
    DeviceNotFound,
    DuplicateName,
    FrozenLink,
    InvalidParameter,
    NodeBusy,
    NodeNotFound,
    PermissionConflict,
    ReadOnlyNode,
)
from qblock.graph import Graph, check_identifier, check_node_name
from qblock.node import BdrvChild, BlockDriverState
from qblock.permissions import ChildRole, Perm
from qblock.testing.graphs import (
    CountingUser,
    PassiveDriver,
    PassiveFilter,
    assert_consistent,
    describe_graph,
    passive_node,
)
from qblock.transaction import Transaction

READ, WRITE, RESIZE = Perm.CONSISTENT_READ, Perm.WRITE, Perm.RESIZE
GUEST_SHARES = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED


@pytest.fixture
def graph() -> Graph:
    return Graph(random=Random(1))


def use(
    graph: Graph, node: BlockDriverState, name: str = "d", perm: Perm = READ, shared: Perm = Perm.ALL
) -> CountingUser:
    """A named block backend on ``node``."""
    user = CountingUser(name)
    graph.add_backend(user)  # type: ignore[arg-type]  # the graph looks at its name and root only
    with Transaction() as change:
        user.root = graph.attach(user, node, name="root", role=ChildRole.ROOT, perm=perm, shared=shared, change=change)
    return user


def link(graph: Graph, parent: BlockDriverState, child: BlockDriverState, name: str, role: ChildRole) -> BdrvChild:
    with Transaction() as change:
        return graph.attach(parent, child, name=name, role=role, change=change)


def turn(graph: Graph, node: BlockDriverState, *, read_only: bool) -> None:
    """What reopening does with the flag."""
    with Transaction() as change:
        change.add(abort=lambda: setattr(node, "read_only", not read_only))
        node.read_only = read_only
        graph.refresh_permissions([node], change)


def chain_of(graph: Graph, *names: str) -> list[BlockDriverState]:
    """Images, the first on top, each with a file of its own; those below are read-only."""
    nodes = [passive_node(graph, name, read_only=bool(index)) for index, name in enumerate(names)]
    for node in nodes:
        link(graph, node, passive_node(graph, f"{node.node_name}-f", PassiveDriver), "file", ChildRole.STORAGE)
    for above, below in pairwise(nodes):
        link(graph, above, below, "backing", ChildRole.BACKING)
    return nodes


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["a", "Disk0", "n-1.x_y", "a" * 31])
def test_good_node_names(name: str) -> None:
    """A letter, then letters, digits and three marks, 31 in all."""
    check_node_name(name)


@pytest.mark.parametrize("name", ["", "9x", "-a", "#block1", "a b", "a/b", "a#", "ä", "aä", "a²", "a" * 32])
def test_bad_node_names(name: str) -> None:
    """Refused with the name of the parameter."""
    with pytest.raises(InvalidParameter) as caught:
        check_node_name(name)
    assert caught.value.name == "node-name"


def test_other_identifiers_may_be_longer() -> None:
    """The limit of 31 characters is for nodes only."""
    check_identifier("j" * 100, parameter="job-id")


def test_automatic_names_count_and_end_in_two_digits(graph: Graph) -> None:
    """As in QEMU: a counter per graph, then two random digits."""
    names = [passive_node(graph).node_name for _ in range(12)]
    for index, name in enumerate(names):
        assert name.startswith(f"#block{index}") and len(name) == len(f"#block{index}") + 2
    assert len(set(names)) == 12


def test_an_automatic_name_is_accepted_once_and_only_if_it_was_made_here(graph: Graph) -> None:
    """A user cannot choose such a name; the opener may ask for one in advance."""
    name = graph.make_name()
    assert passive_node(graph, name).node_name == name
    with pytest.raises(InvalidParameter):
        passive_node(graph, name)
    with pytest.raises(InvalidParameter):
        passive_node(graph, "#block999")


def test_node_and_device_names_share_one_space(graph: Graph) -> None:
    """A name must mean one thing: nodes and devices exclude each other both ways."""
    node = passive_node(graph, "n0")
    use(graph, node, "d0")
    for name in ("n0", "d0"):
        with pytest.raises(DuplicateName):
            passive_node(graph, name)
        with pytest.raises(DuplicateName):
            use(graph, node, name)
    use(graph, node, "")
    use(graph, node, "")
    with pytest.raises(InvalidParameter):
        use(graph, node, "0d")


def test_lookup_takes_the_device_first_and_then_the_node(graph: Graph) -> None:
    """Semantics section 2; errors differ for nodes and devices."""
    node = passive_node(graph, "n0")
    user = use(graph, node, "d0")
    assert graph.lookup("d0") is node and graph.lookup("n0") is node
    assert graph.find_node("n0") is node
    assert graph.find_backend("d0") is user
    with pytest.raises(NodeNotFound, match="neither a device nor a block node"):
        graph.lookup("nope")
    with pytest.raises(NodeNotFound):
        graph.lookup("")
    with pytest.raises(NodeNotFound):
        graph.find_node("d0")
    with pytest.raises(DeviceNotFound):
        graph.find_backend("n0")
    user.root = None
    with pytest.raises(CommandError, match="no medium"):
        graph.lookup("d0")


def test_lookup_does_not_skip_implicit_filters(graph: Graph) -> None:
    """Most commands mean the device's direct node."""
    node = passive_node(graph, "n0")
    use(graph, node, "d0")
    top = passive_node(graph, "", PassiveFilter)
    top.implicit = True
    with Transaction() as change:
        graph.append(top, onto=node, change=change)
    assert graph.lookup("d0") is top
    assert graph.skip_implicit(graph.lookup("d0")) is node


def test_adding_and_removing_nodes_is_undone_in_place(graph: Graph) -> None:
    """The order of the nodes is what queries show."""
    a, b, _ = (passive_node(graph, name) for name in "abc")
    before = describe_graph(graph)
    change = Transaction()
    graph.remove_node(b, change)
    graph.remove_node(a, change)
    extra = BlockDriverState("x")
    graph.add_node(extra, change)
    assert list(graph.nodes) == ["c", "x"]
    change.abort()
    assert describe_graph(graph) == before and list(graph.nodes) == ["a", "b", "c"]


def test_orphans_are_nodes_that_nobody_holds(graph: Graph) -> None:
    """The monitor's own nodes stay without any user."""
    top, base = chain_of(graph, "t", "b")
    assert graph.orphans() == [top]
    top.monitor_owned = True
    assert graph.orphans() == []
    with Transaction() as change:
        graph.set_backing(top, None, change)
    assert graph.orphans() == [base]


# --------------------------------------------------------------------------------------------------------------- edges


def test_a_chain_takes_what_its_user_needs_level_by_level(graph: Graph) -> None:
    """The edges of semantics section 4.8, under a writable export that shares all but resize."""
    top, base = chain_of(graph, "t", "b")
    use(graph, top, perm=READ | WRITE, shared=Perm.ALL & ~RESIZE)
    file, backing = top.children["file"], top.children["backing"]
    assert (file.perm, file.shared) == (READ | WRITE | RESIZE, GUEST_SHARES)
    assert (backing.perm, backing.shared) == (READ, Perm.ALL)
    assert base.children["file"].perm == READ
    assert file.may_write and file.may_resize
    assert not backing.may_write and not base.children["file"].may_write
    assert_consistent(graph)


def test_a_link_needs_a_child_name_that_is_free(graph: Graph) -> None:
    """Two children of one name could not be told apart."""
    top, base = chain_of(graph, "t", "b")
    with pytest.raises(CommandError, match="'backing' already"):
        link(graph, top, base, "backing", ChildRole.BACKING)


def test_loops_are_refused_and_nothing_changes(graph: Graph) -> None:
    """A node below itself would never answer a read."""
    top, middle, base = chain_of(graph, "t", "m", "b")
    before = describe_graph(graph)
    for above, below in ((base, top), (base, middle), (base, base)):
        with pytest.raises(CommandError, match="would create a cycle"), Transaction() as change:
            graph.set_backing(above, below, change)
        with pytest.raises(CommandError, match="would create a cycle"), Transaction() as change:
            graph.attach(above, below, name="other", role=ChildRole.DATA, change=change)
    with pytest.raises(CommandError, match="would create a cycle"), Transaction() as change:
        graph.replace_child(middle.children["backing"], top, change)
    assert describe_graph(graph) == before


def test_permission_conflicts_name_both_users_and_leave_no_trace(graph: Graph) -> None:
    """The second writer is refused, with everything needed to find the first one."""
    top, _ = chain_of(graph, "t", "b")
    use(graph, top, "d0", READ | WRITE, GUEST_SHARES)
    before = describe_graph(graph)
    with pytest.raises(PermissionConflict) as caught:
        use(graph, top, "d1", READ | WRITE, Perm.ALL)
    assert describe_graph(graph) == before
    error = caught.value
    assert (error.node, error.user, error.holder) == ("t", "block device 'd1'", "block device 'd0'")
    assert (error.permissions, error.user_child, error.holder_child) == ("write", "root", "root")


def test_a_conflict_deep_below_undoes_everything_above(graph: Graph) -> None:
    """Two formats on one file exclude each other as soon as the second one opens it for writing."""
    one = passive_node(graph, "one")
    two = passive_node(graph, "two")
    file = passive_node(graph, "f", PassiveDriver)
    link(graph, one, file, "file", ChildRole.STORAGE)
    before = describe_graph(graph)
    with pytest.raises(PermissionConflict) as caught:
        link(graph, two, file, "file", ChildRole.STORAGE)
    assert caught.value.permissions == "write, resize" and caught.value.user_child == "file"
    assert describe_graph(graph) == before
    assert_consistent(graph)


def test_read_only_nodes_give_no_write_permission(graph: Graph) -> None:
    """Neither kind of writing, neither at once nor by way of a filter; reading is fine."""
    node = passive_node(graph, "n", read_only=True)
    top = passive_node(graph, "F", PassiveFilter)
    link(graph, top, node, "file", ChildRole.FILTERED)
    use(graph, top, "reader")
    for target, perm, names in ((node, WRITE | READ, "write"), (top, Perm.WRITE_UNCHANGED, "write-unchanged")):
        with pytest.raises(ReadOnlyNode) as caught:
            use(graph, target, "", perm)
        assert (caught.value.node, caught.value.permissions) == ("n", names)
    assert_consistent(graph)


def test_turning_read_only_under_a_writer_is_refused(graph: Graph) -> None:
    """Reopening sets the flag and refreshes: the refusal names the writer."""
    (top,) = chain_of(graph, "t")
    alone = passive_node(graph, "p", PassiveDriver)
    for node in (top, alone):
        use(graph, node, f"on-{node.node_name}", READ | WRITE)
        with pytest.raises(ReadOnlyNode, match=f"on-{node.node_name}"):
            turn(graph, node, read_only=True)
        assert not node.read_only
    assert_consistent(graph)


def test_turning_read_only_gives_back_the_file_for_writing(graph: Graph) -> None:
    """And turning writable takes it again; another holder of the file may be in the way then."""
    (top,) = chain_of(graph, "t")
    file = top.children["file"]
    turn(graph, top, read_only=True)
    assert file.perm == READ and not file.may_write
    other = passive_node(graph, "other")
    link(graph, other, file.node, "file", ChildRole.PRIMARY_DATA)
    use(graph, other, "w", READ, shared=READ)
    with pytest.raises(PermissionConflict):
        turn(graph, top, read_only=False)
    assert file.perm == READ
    assert_consistent(graph)


def test_a_refusing_driver_undoes_the_change(graph: Graph) -> None:
    """File locks are taken while permissions are checked; another program may hold them."""
    top, base = chain_of(graph, "t", "b")
    file = base.children["file"].node
    use(graph, top, "d0")
    assert isinstance(file.driver, PassiveDriver) and isinstance(base.driver, PassiveDriver)
    before, held = describe_graph(graph), base.driver.held
    file.driver.refusal = CommandError("locked elsewhere")
    with pytest.raises(CommandError, match="locked elsewhere"):
        turn(graph, base, read_only=False)
    assert describe_graph(graph) == before
    assert base.driver.checked == held == base.driver.held


def test_drivers_above_a_refusing_one_are_told_that_the_change_is_off(graph: Graph) -> None:
    """They have taken their locks already and must give them back."""
    top, _ = chain_of(graph, "t", "b")
    lower = passive_node(graph, "p", PassiveDriver)
    over = passive_node(graph, "F", PassiveFilter)
    link(graph, over, lower, "file", ChildRole.FILTERED)
    assert isinstance(over.driver, PassiveDriver) and isinstance(lower.driver, PassiveDriver)
    lower.driver.refusal = CommandError("locked elsewhere")
    before = describe_graph(graph)
    with pytest.raises(CommandError, match="locked elsewhere"):
        use(graph, over, "d0", READ | WRITE)
    assert over.driver.checked == over.driver.held == (Perm.NONE, Perm.ALL)
    assert describe_graph(graph) == before
    use(graph, top, "d1", READ | WRITE)


def test_force_share_lets_others_do_anything(graph: Graph) -> None:
    """A node opened that way looks at an image that somebody else is using."""
    node = passive_node(graph, "n", read_only=True)
    node.force_share = True
    edge = link(graph, node, passive_node(graph, "f", PassiveDriver), "file", ChildRole.STORAGE)
    assert (edge.perm, edge.shared) == (READ, Perm.ALL)


def test_backends_change_their_permissions_in_place(graph: Graph) -> None:
    """More is refused where others object, less is always granted, and an abort gives back what was."""
    (node,) = chain_of(graph, "n")
    user = use(graph, node, "d0", READ | WRITE, GUEST_SHARES)
    assert user.root is not None
    use(graph, node, "d1", READ, READ | WRITE | Perm.WRITE_UNCHANGED)
    with pytest.raises(PermissionConflict), Transaction() as change:
        graph.set_edge_permissions(user.root, READ | RESIZE, Perm.ALL, change)
    assert user.root.perm == READ | WRITE and user.root.may_write
    with Transaction() as change:
        graph.set_edge_permissions(user.root, Perm.NONE, Perm.ALL, change)
    assert node.perm == READ and not user.root.may_write
    assert_consistent(graph)


def test_deferred_permissions_allow_a_conflict_that_ends_in_the_same_change(graph: Graph) -> None:
    """Exchanging two exclusive users must not depend on who goes first."""
    (node,) = chain_of(graph, "n")
    first = use(graph, node, "d0", READ | WRITE, READ)
    assert first.root is not None
    second = CountingUser("d1")
    with Transaction() as change, graph.deferred_permissions(change):
        graph.attach(second, node, name="root", role=ChildRole.ROOT, perm=READ | WRITE, shared=READ, change=change)
        with graph.deferred_permissions(change):
            graph.detach(first.root, change)
    assert [edge.parent for edge in node.parents] == [second]
    assert_consistent(graph)


def test_after_a_failed_deferred_block_permissions_are_checked_again(graph: Graph) -> None:
    """An exception in the block leaves nothing behind that the next change would trip over."""
    (node,) = chain_of(graph, "n")
    before = describe_graph(graph)

    def fail() -> None:
        with Transaction() as change, graph.deferred_permissions(change):
            graph.attach(CountingUser("x"), node, name="root", role=ChildRole.ROOT, perm=READ, change=change)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert describe_graph(graph) == before
    use(graph, node, "d0", READ | WRITE, READ)
    with pytest.raises(PermissionConflict):
        use(graph, node, "d1", WRITE)


def test_permissions_of_a_diamond_are_computed_parents_first(graph: Graph) -> None:
    """A node under two parents is settled once both are: otherwise a passing state could be refused."""
    left, right = passive_node(graph, "l", PassiveFilter), passive_node(graph, "r", PassiveFilter)
    top = passive_node(graph, "t")
    bottom = passive_node(graph, "b", PassiveDriver)
    link(graph, left, bottom, "file", ChildRole.FILTERED)
    link(graph, right, bottom, "file", ChildRole.FILTERED)
    link(graph, top, left, "one", ChildRole.FILTERED)
    link(graph, top, right, "two", ChildRole.FILTERED)
    user = use(graph, top, "d0", READ, Perm.ALL)
    assert user.root is not None
    with Transaction() as change:
        graph.set_edge_permissions(user.root, READ | WRITE, Perm.ALL, change)
    assert bottom.perm == READ | WRITE
    with pytest.raises(PermissionConflict) as caught, Transaction() as change:
        graph.set_edge_permissions(user.root, READ | WRITE, READ, change)
    assert caught.value.node == "b"
    assert_consistent(graph)


def test_the_work_of_a_refresh_is_linear_even_in_ladders_of_diamonds(graph: Graph) -> None:
    """Twenty diamonds have a million paths; each node is computed once."""
    calls = 0

    class Counted(PassiveDriver):
        is_filter = True

        def check_permissions(self, perm: Perm, shared: Perm) -> None:
            nonlocal calls
            calls += 1
            super().check_permissions(perm, shared)

    below = passive_node(graph, "bottom", Counted)
    for level in range(20):
        top = passive_node(graph, f"t{level}", Counted)
        for side in ("l", "r"):
            middle = passive_node(graph, f"{side}{level}", Counted)
            link(graph, middle, below, "file", ChildRole.FILTERED)
            link(graph, top, middle, side, ChildRole.FILTERED)
        below = top
    assert calls == 0
    use(graph, below, "d0", READ)
    assert calls == len(graph.nodes)


def test_very_long_chains_do_not_exhaust_the_stack(graph: Graph) -> None:
    """Some people take a snapshot every minute."""
    nodes = [passive_node(graph, f"n{index}", read_only=True) for index in range(1500)]
    with Transaction() as change:
        for above, below in pairwise(nodes):
            graph.set_backing(above, below, change)
    user = use(graph, nodes[0])
    assert nodes[-1].perm == READ and graph.base_of(nodes[0]) is nodes[-1]
    nodes[-1].quiesce()
    assert user.sections == 1 and not nodes[-1].is_busy()
    nodes[-1].resume()
    with pytest.raises(CommandError, match="cycle"), Transaction() as change:
        graph.set_backing(nodes[-1], nodes[0], change)


# -------------------------------------------------------------------------------------------------- insertion, removal


def test_an_appended_overlay_takes_over_the_users(graph: Graph) -> None:
    """A snapshot: the guest writes to the overlay, the old image becomes its backing; bitmaps stay with the old one."""
    (old,) = chain_of(graph, "old")
    user = use(graph, old, "d0", READ | WRITE)
    bitmap = object()
    old.dirty_bitmaps.append(bitmap)  # type: ignore[arg-type]  # only its place matters
    overlay = passive_node(graph, "new")
    with Transaction() as change:
        graph.append(overlay, onto=old, change=change)
    assert user.root is not None and user.root.node is overlay
    assert overlay.backing is not None and overlay.backing.node is old
    assert old.parents == [overlay.backing] and old.perm == READ
    assert old.dirty_bitmaps == [bitmap] and overlay.dirty_bitmaps == []
    assert_consistent(graph)


def test_an_appended_filter_is_dropped_without_trace(graph: Graph) -> None:
    """What a job inserts at its start it takes out at its end."""
    top, base = chain_of(graph, "t", "b")
    use(graph, top, "d0", READ | WRITE)
    before = describe_graph(graph)
    between = passive_node(graph, "F", PassiveFilter)
    with Transaction() as change:
        graph.append(between, onto=base, change=change, name="backing")
    assert top.children["backing"].node is between and between.children["backing"].node is base
    assert graph.cow_node(top) is between and graph.chain_next(top) is base
    assert between.backing is None and between.filtered is not None
    assert_consistent(graph)
    with Transaction() as change:
        graph.drop(between, change)
        graph.remove_node(between, change)
    assert describe_graph(graph) == before


def test_appending_to_a_driver_without_backing_is_refused(graph: Graph) -> None:
    """A raw overlay would hide what is below."""
    (node,) = chain_of(graph, "n")
    raw = passive_node(graph, "raw", PassiveDriver)
    with pytest.raises(CommandError, match="no such link"), Transaction() as change:
        graph.append(raw, onto=node, change=change)
    with pytest.raises(CommandError, match="no such link"), Transaction() as change:
        graph.set_backing(raw, node, change)


def test_replacing_a_node_leaves_edges_of_jobs_and_parents_below_the_new_one(graph: Graph) -> None:
    """A job means this very node, and a parent that is reached from the new node would close a loop."""
    old, new = passive_node(graph, "old"), passive_node(graph, "new")
    between = passive_node(graph, "F", PassiveFilter)
    link(graph, between, old, "file", ChildRole.FILTERED)
    link(graph, new, between, "backing", ChildRole.BACKING)
    user = use(graph, old, "d0")
    job = CountingUser("job")
    with Transaction() as change:
        graph.attach(job, old, name="source", role=ChildRole.JOB, change=change)
    with Transaction() as change:
        graph.replace_node(old, new, change)
    assert [edge.parent for edge in old.parents] == [between, job]
    assert [edge.parent for edge in new.parents] == [user]
    assert_consistent(graph)


def test_replacing_can_be_limited_to_some_users(graph: Graph) -> None:
    """Only the edges that the caller names."""
    old, new = passive_node(graph, "old"), passive_node(graph, "new")
    one, two = use(graph, old, "d1"), use(graph, old, "d2")
    with Transaction() as change:
        graph.replace_node(old, new, change, only=lambda edge: edge.parent is two)
    assert one.root is not None and one.root.node is old
    assert two.root is not None and two.root.node is new


def test_changing_the_backing(graph: Graph) -> None:
    """Another one, none, the same; all of it undone by an abort."""
    top, base = chain_of(graph, "t", "b")
    other = passive_node(graph, "o", read_only=True)
    before = describe_graph(graph)
    change = Transaction()
    graph.set_backing(top, base, change)
    graph.set_backing(top, other, change)
    assert base.parents == [] and graph.chain_next(top) is other
    graph.set_backing(top, None, change)
    assert top.backing is None and other.parents == []
    graph.set_backing(top, base, change)
    assert list(top.children) == ["file", "backing"]
    change.abort()
    assert describe_graph(graph) == before


# --------------------------------------------------------------------------------------------------------- frozen links


def test_frozen_links_do_not_move(graph: Graph) -> None:
    """While a job relies on a chain nobody may pull it apart."""
    top, middle, base = chain_of(graph, "t", "m", "b")
    graph.freeze_chain(top, base)
    before = describe_graph(graph)
    other = passive_node(graph, "o", PassiveFilter)
    graph.nodes.pop("o")
    with pytest.raises(FrozenLink) as caught, Transaction() as change:
        graph.set_backing(top, None, change)
    assert (caught.value.name, caught.value.parent, caught.value.child) == ("backing", "node 't'", "m")
    with pytest.raises(FrozenLink), Transaction() as change:
        graph.set_backing(top, base, change)
    with pytest.raises(FrozenLink), Transaction() as change:
        graph.append(other, onto=middle, change=change)
    with pytest.raises(FrozenLink), Transaction() as change:
        graph.replace_node(base, other, change)
    with pytest.raises(FrozenLink):
        graph.freeze_chain(middle, base)
    assert describe_graph(graph) == before
    graph.unfreeze_chain(top, base)
    with Transaction() as change:
        graph.set_backing(top, base, change)
    assert_consistent(graph)


def test_freezing_is_all_or_nothing(graph: Graph) -> None:
    """A chain of which a part is frozen already is left as it was."""
    top, middle, base = chain_of(graph, "t", "m", "b")
    graph.freeze_chain(middle, None)
    with pytest.raises(FrozenLink):
        graph.freeze_chain(top, None)
    assert not top.children["backing"].frozen and middle.children["backing"].frozen
    graph.unfreeze_chain(middle, base)


# ----------------------------------------------------------------------------------------------------------- chain walks


@pytest.fixture
def filtered(graph: Graph) -> dict[str, BlockDriverState]:
    """F (implicit) -> t -> G -> m -> b, where F and G are filters."""
    top, middle, base = chain_of(graph, "t", "m", "b")
    above, between = passive_node(graph, "F", PassiveFilter), passive_node(graph, "G", PassiveFilter)
    above.implicit = True
    with Transaction() as change:
        graph.append(above, onto=top, change=change)
        graph.append(between, onto=middle, change=change)
    return {"F": above, "t": top, "G": between, "m": middle, "b": base}


def test_chain_walks_look_through_filters(graph: Graph, filtered: dict[str, BlockDriverState]) -> None:
    """The backing chain has images only; the whole chain has everything."""
    above, top, between, middle, base = filtered.values()
    assert list(graph.backing_chain(above)) == [top, middle, base]
    assert list(graph.whole_chain(above)) == [above, top, between, middle, base]
    assert graph.skip_filters(above) is top and graph.skip_filters(base) is base
    assert graph.skip_implicit(above) is top and graph.skip_implicit(between) is between
    assert graph.cow_node(above) is between and graph.cow_node(base) is None
    assert graph.chain_next(top) is middle and graph.chain_next(base) is None
    assert graph.base_of(above) is base
    assert graph.find_overlay(above, base) is middle
    assert graph.find_overlay(above, between) is top
    assert graph.find_overlay(middle, top) is None
    assert graph.contains(above, between) and graph.contains(top, top)
    assert not graph.contains(middle, top)


def test_roots_have_only_backends_above(graph: Graph, filtered: dict[str, BlockDriverState]) -> None:
    """Some commands insist on it; a filter, an overlay or a job above spoil it."""
    assert graph.is_root(filtered["F"]) and not graph.is_root(filtered["t"]) and not graph.is_root(filtered["b"])
    use(graph, filtered["F"], "d0")
    assert graph.is_root(filtered["F"])
    with Transaction() as change:
        graph.attach(CountingUser("j"), filtered["F"], name="main node", role=ChildRole.JOB, change=change)
    assert not graph.is_root(filtered["F"])


def test_backing_images_are_found_by_their_file_names(graph: Graph, filtered: dict[str, BlockDriverState]) -> None:
    """As plain names, relative to the overlay's directory, or made absolute; never the top itself."""
    for name, node in filtered.items():
        node.driver.filename = lambda name=name: f"/images/{name}.qcow2"  # type: ignore[method-assign]
    for text in ("/images/b.qcow2", "b.qcow2", "./b.qcow2", "../images/b.qcow2"):
        assert graph.find_backing_image(filtered["F"], text) is filtered["b"]
    assert graph.find_backing_image(filtered["F"], "t.qcow2") is None
    assert graph.find_backing_image(filtered["F"], "/elsewhere/b.qcow2") is None


# -------------------------------------------------------------------------------------------------------------- blockers


def test_blocked_operations_tell_the_holder(graph: Graph) -> None:
    """The device's name is shown instead of the node's when there is one."""
    node = passive_node(graph, "n")
    graph.check_op(node, OpType.RESIZE)
    token = graph.block_all(node, "it is in use by mirror job 'j'", except_=[OpType.DATAPLANE])
    graph.check_op(node, OpType.DATAPLANE)
    with pytest.raises(NodeBusy, match="'n' is busy: it is in use by mirror job 'j'") as caught:
        graph.check_op(node, OpType.RESIZE)
    assert caught.value.holder == "it is in use by mirror job 'j'"
    use(graph, node, "d0")
    with pytest.raises(NodeBusy, match="'d0'"):
        graph.check_op(node, OpType.EJECT)
    second = graph.block_all(node, "again")
    graph.unblock(token)
    with pytest.raises(NodeBusy, match="again"):
        graph.check_op(node, OpType.DATAPLANE)
    graph.unblock(second)
    graph.check_op(node, OpType.RESIZE)


@pytest.mark.parametrize("op", OpType)
def test_a_backing_node_is_blocked_by_its_overlay(graph: Graph, op: OpType) -> None:
    """Only what leaves its guest-visible content alone is allowed, until it is detached."""
    top, base = chain_of(graph, "t", "b")
    if op in ALLOWED_ON_BACKING:
        graph.check_op(base, op)
    else:
        with pytest.raises(NodeBusy, match="node 't' uses it as its backing"):
            graph.check_op(base, op)
    with Transaction() as change:
        graph.set_backing(top, None, change)
    graph.check_op(base, op)
