"""Throttle groups as objects, and the limits of drives, over QMP and HMP."""

from __future__ import annotations

from typing import Any

import pytest

from qblock.devices.drives import parse_drive
from qblock.errors import CommandError
from qblock.monitor.client import QmpClient, QmpError
from qblock.monitor.dialects import Dialect
from qblock.monitor.hub import MonitorHub
from qblock.policy import OpenPolicy
from qblock.system import BlockSystem
from qblock.testing.simloop import run
from qblock.throttle_limits import ThrottleLimits

from .test_commands import refused, with_client

ZERO = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)


def test_a_throttle_group_is_an_object_whose_limits_can_be_read_and_changed() -> None:
    """The members that a qom-set does not name stay; the unstable twins cannot be set later."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        await client.execute("object-add", {"qom-type": "throttle-group", "id": "g", "limits": {"iops-total": 5},
                                            "x-bps-read": 7})  # fmt: skip
        await client.execute("qom-set", path="g", property="limits", value={"iops-total": 6})
        limits = await client.execute("qom-get", path="/objects/g", property="limits")
        assert {key: value for key, value in limits.items() if value > 1} == {"iops-total": 6, "bps-read": 7}
        assert len(limits) == 19
        assert await client.execute("qom-get", path="objects/g", property="x-iops-total") == 6
        await refused(client, "qom-set", path="g", property="x-iops-total", value=8)
        await refused(client, "qom-set", path="g", property="limits", value={"bps-total": 8})
        assert system.env.throttle_groups.find("g").limits == ThrottleLimits(iops_total=6, bps_read=7)

    with_client(body)


def test_a_group_in_use_stays() -> None:
    """The node would have no limits to keep to."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        del system
        await client.execute("object-add", qom_type="throttle-group", id="g")
        node = {"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": {"driver": "null-co"}}
        await client.execute("blockdev-add", node)
        await refused(client, "object-del", id="g")
        await client.execute("blockdev-del", node_name="t")
        await client.execute("object-del", id="g")
        await refused(client, "blockdev-add", node)

    with_client(body)


def test_an_object_of_a_bad_description_leaves_nothing() -> None:
    """The name is free afterwards."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        bad: dict[str, Any]
        for bad in ({"limits": {"iops-size": 4}}, {"limits": 4}, {"x-iops-size": 4}, {"x-iops-nope": 4}, {"limits": None}):
            await refused(client, "object-add", {"qom-type": "throttle-group", "id": "g", **bad})
        assert not system.objects.objects
        await client.execute("object-add", qom_type="throttle-group", id="g")
        await refused(client, "object-add", qom_type="secret", id="g", data="x")

    with_client(body)


def test_the_tree_of_objects_shows_types_and_never_secrets() -> None:
    """qom-get of a secret's data would print it into a log."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        del system
        await client.execute("object-add", qom_type="secret", id="s", data="geheim")
        await client.execute("object-add", qom_type="throttle-group", id="g")
        listed = {entry["name"]: entry["type"] for entry in await client.execute("qom-list", path="/objects")}
        assert listed == {"type": "string", "s": "child<secret>", "g": "child<throttle-group>"}
        assert "data" not in {entry["name"] for entry in await client.execute("qom-list", path="s")}
        assert await client.execute("qom-get", path="s", property="format") == "raw"
        assert await client.execute("qom-get", path="/objects", property="type") == "container"
        await refused(client, "qom-get", path="s", property="data")
        await refused(client, "qom-set", path="s", property="format", value="base64")
        await refused(client, "qom-set", path="s", property="type", value="x")
        assert (await refused(client, "qom-get", path="/machine/nosuch", property="type")).error_class == "DeviceNotFound"

    with_client(body)


async def machine_with_drives(body: Any) -> None:
    """``d0`` with limits in its options, ``d1`` without, ``e`` empty."""
    async with BlockSystem.create(policy=OpenPolicy.follow()) as system:
        hub = MonitorHub(system, dialect=Dialect.SYSTEM)
        hub.open()
        await system.drive_add("if=virtio,id=d0,driver=null-co,throttling.iops-total=100,iops_max=200,iops_size=4096")
        await system.drive_add("if=none,id=d1,driver=null-co")
        await system.drive_add("if=none,id=e")
        async with await QmpClient.in_process(hub) as client:
            await body(client, system)
        await hub.close()


async def limits_shown(client: QmpClient) -> dict[str, dict[str, Any]]:
    """What query-block shows of limits, without zeroes."""
    names = ("bps", "iops", "group")
    return {
        entry["device"]: {k: v for k, v in entry.get("inserted", {}).items() if k.startswith(names) and v != 0}
        for entry in await client.execute("query-block")
    }


def test_drives_have_limits_which_query_block_shows() -> None:
    """Those of the command line, and those of block_set_io_throttle, which replace them; a group is shared."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        of_options = {"iops": 100, "iops_max": 200, "iops_max_length": 1, "iops_size": 4096, "group": "d0"}
        assert await limits_shown(client) == {"d0": of_options, "d1": {}, "e": {}}
        device = system.graph.find_backend("d0").device.name
        await client.execute("block_set_io_throttle", {**ZERO, "id": device, "bps_rd": 5, "group": "both"})
        await client.execute("block_set_io_throttle", {**ZERO, "device": "d1", "bps_rd": 6, "group": "both"})
        shown = {"bps_rd": 6, "group": "both"}
        assert await limits_shown(client) == {"d0": shown, "d1": shown, "e": {}}
        await client.execute("block_set_io_throttle", {**ZERO, "device": "d1", "iops": 9})
        assert (await limits_shown(client))["d0"] == {"iops": 9, "group": "both"}, "the group stays when none is named"
        await client.execute("block_set_io_throttle", {**ZERO, "device": "d0"})
        assert await limits_shown(client) == {"d0": {}, "d1": {"iops": 9, "group": "both"}, "e": {}}
        await system.drive_del("d1")
        with pytest.raises(CommandError):
            system.env.throttle_groups.find("both")

    run(lambda: machine_with_drives(body))


def test_limits_are_refused_for_no_drive_and_when_they_contradict_each_other() -> None:
    """The classes are QEMU's; nothing changes."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        del system
        before = await limits_shown(client)
        for wrong, error in (
            ({"device": "nope"}, "DeviceNotFound"), ({"id": "nope"}, "DeviceNotFound"), ({}, "GenericError"),
            ({"device": "d0", "id": "d0"}, "GenericError"), ({"device": "e", "bps": 1}, "GenericError"),
            ({"device": "d0", "bps": 1, "bps_rd": 1}, "GenericError"), ({"device": "d0", "bps": -1}, "GenericError"),
        ):  # fmt: skip
            assert (await refused(client, "block_set_io_throttle", {**ZERO, **wrong})).error_class == error, wrong
        with pytest.raises(QmpError):
            await client.execute("block_set_io_throttle", device="d0", bps=1)
        assert await limits_shown(client) == before

    run(lambda: machine_with_drives(body))


def test_the_human_monitor_sets_and_shows_limits() -> None:
    """By the name of a drive."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        del system

        async def hmp(line: str) -> str:
            return str(await client.execute("human-monitor-command", command_line=line))

        assert await hmp("block_set_io_throttle d0 0 1000 0 0 0 0") == ""
        expected = (
            "    I/O throttling:   bps=0 bps_rd=1000 bps_wr=0 bps_max=0 bps_rd_max=0 bps_wr_max=0 iops=0 iops_rd=0 iops_wr=0 "
            "iops_max=0 iops_rd_max=0 iops_wr_max=0 iops_size=0 group=d0"
        )
        shown = await hmp("info block")
        assert [line for line in shown.splitlines() if "throttling" in line] == [expected]
        assert (await hmp("block_set_io_throttle nope 1 0 0 0 0 0")).startswith("Error: ")

    run(lambda: machine_with_drives(body))


@pytest.mark.parametrize(
    "options",
    [
        "bps=5,throttling.bps-total=5", "group=g,throttling.group=g", "throttling.iops-total=x", "throttling.nope=1",
        "throttling=1", "bps_max_length=3,bps=1,bps_max=2", "throttling.bps-total=1,throttling.bps-read=1", "iops_size=5",
    ],
)  # fmt: skip
def test_limits_of_a_drive_that_make_no_sense_are_refused(options: str) -> None:
    """Also where only the older names are known that there are."""

    async def main() -> None:
        async with BlockSystem.create() as system:
            with pytest.raises(CommandError):
                await system.drive_add(f"if=none,id=d,driver=null-co,{options}")
            assert not system.graph.backends and not system.graph.nodes

    run(main)


def test_older_names_of_limits_mean_the_same() -> None:
    """Command lines of years ago have them."""
    drive = parse_drive("driver=null-co,bps_rd=5,bps_rd_max=9,iops=3,iops_size=7,group=g")
    assert drive.limits == ThrottleLimits(bps_read=5, bps_read_max=9, iops_total=3, iops_size=7)
    assert drive.group == "g"
