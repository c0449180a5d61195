"""Throttle groups, throttle filters and the limits of drives: the same replies from the real programs and from qblock."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from qmp_pair import DAEMONS, QMP, Pair, both, do

pytestmark = pytest.mark.qemu


def group(name: str, **limits: int) -> dict[str, Any]:
    """object-add of a throttle group; names have ``_`` for ``-``."""
    given = {key.replace("_", "-"): value for key, value in limits.items()}
    twins = {key: value for key, value in given.items() if key.startswith("x-")}
    plain = {key: value for key, value in given.items() if key not in twins}
    return do("object-add", {"qom-type": "throttle-group", "id": name, "limits": plain, **twins})


def get(path: str, name: str = "limits") -> dict[str, Any]:
    return do("qom-get", path=path, property=name)


def change(path: str, value: Any, name: str = "limits") -> dict[str, Any]:
    return do("qom-set", path=path, property=name, value=value)


HUGE = 10**15
GROUPS = [
    group("g0", iops_total=100), get("/objects/g0"), get("g0"), get("objects/g0", "x-iops-total"), get("g0", "type"),
    get("g0", "nope"), get("/objects/nope"), get("/"), get("/objects", "type"),
    change("/objects/g0", {"bps-total": 5}), get("g0"), change("g0", {"bps-read": 5}), change("g0", 7),
    change("g0", {"x": 7}), change("g0", {"iops-total": "7"}), change("g0", {"iops-total": -7}), get("g0"),
    change("g0", 7, "x-iops-total"), change("g0", "x", "type"), change("g0", 1, "nope"), do("qom-list", path="nope"),
    group("g0"), group("g1"), get("g1"), group("9"), group("e", iops_total=1, iops_read=1),
    group("e", iops_total=10, iops_total_max=5), group("e", iops_total_max=5), group("e", iops_total_max_length=0),
    group("e", iops_total=1, iops_total_max_length=2), group("e", iops_size=2), group("e", iops_total=HUGE + 1),
    group("e", iops_total=HUGE), group("f", iops_total=HUGE // 10, iops_total_max=HUGE, iops_total_max_length=2),
    group("f", iops_total=1, iops_total_max=2, iops_total_max_length=1 << 32),
    group("f", bps_total=1, bps_total_max=2, bps_read_max=3), group("f", bps_total=1, bps_write_max=3),
    group("x", x_iops_total=5, x_bps_write=100, x_iops_size=4), get("x"), group("y", x_iops_total=5, iops_read=4),
    group("y", x_iops_size=5, iops_read=4), get("y"), group("z", x_iops_total=-5), group("z", x_bogus=1),
    do("object-del", id="g0"), do("object-del", id="g0"),
    do("blockdev-add", driver="throttle", node_name="t", throttle_group="no", file={"driver": "null-co"}),
    do("blockdev-add", driver="throttle", node_name="t", file={"driver": "null-co"}),
    do("blockdev-add", driver="throttle", node_name="t", throttle_group="g1", file={"driver": "null-co"}),
    do("query-named-block-nodes"), do("query-named-block-nodes", flat=True), do("x-debug-query-block-graph"),
    do("object-del", id="g1"), do("blockdev-del", node_name="t"), do("object-del", id="g1"),
]  # fmt: skip


def test_objects_and_filters(tmp_path: Path) -> None:
    """What management software does to set up limits, and the mistakes that it can make."""
    real, ours = both(DAEMONS, tmp_path, GROUPS)
    assert real == ours


def limit(device: str | None, **members: Any) -> dict[str, Any]:
    """block_set_io_throttle."""
    rates = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    return do("block_set_io_throttle", ({} if device is None else {"device": device}) | rates | members)


DRIVES = [
    "-drive", "if=none,id=d0,driver=null-co,throttling.iops-total=100,throttling.bps-total=77",
    "-drive", "if=none,id=d1,driver=null-co,bps_rd=5,bps_rd_max=9,iops=6,iops_size=512,group=foo",
    "-drive", "if=none,id=d2,driver=null-co,throttling.group=bar,bps_rd=5,bps_rd_max=9,throttling.bps-read-max-length=3",
    "-drive", "if=none,id=e0",
]  # fmt: skip
MACHINES = Pair(
    real=("qemu-system-x86_64", "-S", "-M", "none", "-display", "none", "-nodefaults", *QMP, *DRIVES),
    ours=(sys.executable, "-m", "qblock", "-monitor", "none", *QMP, *DRIVES),
)
LIMITS = [
    do("query-block"), limit("d0", bps=1000), do("query-block"),
    limit("d0", bps_rd=1000, bps_rd_max=2000, iops=5, iops_size=4096, iops_max=10, iops_max_length=3, group="both"),
    limit("d1", iops=7, group="both"), do("query-block"), limit("d0", iops=8), do("query-block"), limit("d0"),
    do("query-block"), do("query-named-block-nodes"), limit("nope", bps=1), limit(None, bps=1), limit("d0", id="d0"),
    limit(None, id="nope"), limit("e0", bps=1), limit("d0", bps=1, bps_rd=1), limit("d0", bps=-1),
    limit("d0", bps=1, bps_max_length=0), limit("d0", bps=1, bps_max_length=2), limit("d0", iops_size=4),
    limit("d0", bps_max=6), limit("d0", iops=5, iops_max=7, iops_max_length=-1), do("block_set_io_throttle", device="d0"),
    limit("d0", iops=5, group=""), do("query-block"), limit("d0", iops=5, group="9 x"), do("query-block"),
    group("d1"), group("both"), group("og", iops_total=3), limit("d0", iops=9, group="og"), get("og"), do("query-block"),
    do("object-del", id="og"), change("og", {"iops-total": 50}), do("query-block"), limit("d0"), do("object-del", id="og"),
]  # fmt: skip


def test_limits_of_drives(tmp_path: Path) -> None:
    """Set on the command line and changed by command; what is refused and what query-block shows."""
    real, ours = both(MACHINES, tmp_path, LIMITS)
    assert real == ours
