"""The filters over QMP on the real programs and on qblock: options, graphs, file names, sizes, what requests do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from qmp_pair import _QMP, DAEMONS, Pair, both
from test_qmp_replies import do

pytestmark = pytest.mark.qemu

IMAGES = [
    ["qemu-img", "create", "-q", "-f", "qcow2", "i.qcow2", "8M"],
    ["qemu-img", "create", "-q", "-f", "raw", "r.raw", "1M"],
]
NULL = {"driver": "null-co"}


def add(driver: str, name: str, **members: Any) -> dict[str, Any]:
    """blockdev-add; names of members have ``_`` for ``-``."""
    return do("blockdev-add", driver=driver, node_name=name, **members)


def file(name: str) -> dict[str, Any]:
    return {"driver": "file", "filename": name}


LOOK = [do("query-named-block-nodes"), do("query-named-block-nodes", flat=True), do("x-debug-query-block-graph")]
STORING = [
    add("qcow2", "q", file=file("i.qcow2")), add("compress", "c", file="q"), *LOOK, add("compress", "d", file="c"),
    add("compress", "d", file=NULL), add("compress", "d"), do("blockdev-del", node_name="c"), do("blockdev-del", node_name="q"),
    add("preallocate", "d", file=NULL, prealloc_align=100), add("preallocate", "d", file=NULL, prealloc_align=-512),
    add("preallocate", "d", file=NULL, prealloc_size=-1), add("preallocate", "d", file=NULL, prealloc_size="1"),
    add("preallocate", "p0", file=NULL, prealloc_size=0, prealloc_align=1024), add("preallocate", "p", file=file("i.qcow2")),
    *LOOK, add("qcow2", "q", file="p"), *LOOK, add("preallocate", "p2", file=NULL, read_only=True),
    add("null-aio", "n", size=1000, read_zeroes=True), add("null-co", "n2", latency_ns=5, read_zeroes=False), *LOOK,
]  # fmt: skip


def test_compress_preallocate_and_null(tmp_path: Path) -> None:
    """Added, looked at, refused, removed."""
    real, ours = both(DAEMONS, tmp_path, STORING, IMAGES)
    assert real == ours


def machine(*arguments: str) -> Pair:
    """A machine without anything but the block layer."""
    return Pair(
        real=("qemu-system-x86_64", "-S", "-M", "none", "-display", "none", "-nodefaults", *_QMP, *arguments),
        ours=(sys.executable, "-m", "qblock", "-monitor", "none", *_QMP, *arguments),
    )


def io(node: str, line: str) -> dict[str, Any]:
    """A qemu-io command through the human monitor; what it prints goes to the program's standard output."""
    return do("human-monitor-command", {"command-line": f'qemu-io {node} "{line}"'})


GROWING = [
    item
    for line in ("write 0 64k", "write 64k 64k", "write 128k 704k", "write 1M 2M", "flush", "write -z 6M 1M", "truncate 9M")
    for item in (io("q", line), do("query-named-block-nodes", flat=True))
] + [do("blockdev-del", node_name="q"), do("query-named-block-nodes", flat=True)]  # fmt: skip
PREALLOCATING = machine(
    "-blockdev", "driver=file,node-name=f,filename=i.qcow2",
    "-blockdev", "driver=preallocate,node-name=p,file=f,prealloc-size=1048576,prealloc-align=131072",
    "-blockdev", "driver=qcow2,node-name=q,file=p",
)  # fmt: skip


def test_preallocate_makes_files_as_long_as_qemu_does(tmp_path: Path) -> None:
    """After every step, and when the format is gone: the lengths of all nodes."""
    real, ours = both(PREALLOCATING, tmp_path, GROWING, IMAGES)
    assert real == ours


CHAIN = [
    ["qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "8M"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "other.qcow2", "8M"],
]
NAMED = [
    add("qcow2", "t", file={"driver": "preallocate", "node-name": "p", "file": file("top.qcow2")}), *LOOK,
    do("blockdev-del", node_name="t"), add("qcow2", "t", file={"driver": "preallocate", "file": file("top.qcow2")}, backing=None),
    do("query-named-block-nodes"), do("blockdev-del", node_name="t"), add("qcow2", "o", file=file("other.qcow2")),
    add("qcow2", "t", file={"driver": "preallocate", "file": file("top.qcow2")}, backing="o"), do("query-named-block-nodes"),
    add("copy-on-read", "cor", file="t", bottom="o"), do("query-named-block-nodes"),
]  # fmt: skip


def test_names_of_images_tell_the_backing_image_only_when_it_is_not_that_of_the_header(tmp_path: Path) -> None:
    """Management software opens images by these names again."""
    real, ours = both(DAEMONS, tmp_path, NAMED, CHAIN)
    assert real == ours
