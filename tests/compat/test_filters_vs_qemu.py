"""The filters over QMP on the real programs and on qblock: options, graphs, file names, sizes, what requests do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qmp_pair import DAEMONS, QMP, Pair, both, do, io

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
    add("preallocate", "d", file={"driver": "blkdebug", "image": NULL, "align": 4096}, prealloc_align=2048),
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
        real=("qemu-system-x86_64", "-S", "-M", "none", "-display", "none", "-nodefaults", *QMP, *arguments),
        ours=(sys.executable, "-m", "qblock", "-monitor", "none", *QMP, *arguments),
    )


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


COMPARING = [
    add("blkverify", "v", test={"driver": "raw", "file": file("r.raw")}, raw=NULL), *LOOK, do("blockdev-del", node_name="v"),
    add("blkverify", "v", test=file("r.raw"), raw=file("s.raw")), *LOOK, do("blockdev-del", node_name="v"),
    add("blkverify", "v", test=file("r.raw")), add("blkverify", "v", raw=NULL, test="nope"),
    add("blklogwrites", "l", file={"driver": "raw", "file": file("r.raw")}, log=file("log")), *LOOK,
    do("blockdev-del", node_name="l"), add("blklogwrites", "l", file=NULL, log=NULL, log_sector_size=511),
    add("blklogwrites", "l", file=NULL, log=NULL, log_sector_size=16),
    add("blklogwrites", "l", file=NULL, log=NULL, log_sector_size=1 << 24),
    add("blklogwrites", "l", file=NULL, log=NULL, log_append=True, log_sector_size=512),
    add("blklogwrites", "l", file=NULL, log=file("s.raw"), log_append=True),
    add("blklogwrites", "l", file=NULL, log=NULL, log_super_update_interval=0),
    add("blklogwrites", "l", file=file("r.raw"), log=file("log"), log_append=True), *LOOK, do("blockdev-del", node_name="l"),
    add("blklogwrites", "l", file=file("r.raw"), log=file("log"), log_sector_size=4096, log_super_update_interval=1), *LOOK,
    add("blklogwrites", "m", file="l", log=NULL, read_only=True), *LOOK,
]  # fmt: skip


def test_blkverify_and_blklogwrites(tmp_path: Path) -> None:
    """Added, looked at, refused, removed."""
    real, ours = both(DAEMONS, tmp_path, COMPARING, [*IMAGES, ["truncate", "-s", "1M", "s.raw"], ["touch", "log"]])
    assert real == ours


LOGGED = (
    ("write -P 1 1k 512", "flush", "flush", "write -z 8k 4k", "discard 16k 8k", "read 0 4k", "write -P 3 512k 64k"),
    ("write -P 9 0 1k", "write -P 8 1k 512", "write -z 4k 512"),
)


@pytest.mark.parametrize("sector_size", [512, 64])
def test_logs_are_the_same_byte_for_byte(sector_size: int, tmp_path: Path) -> None:
    """Of a run, and of a second one that goes on; the superblock is rewritten after every second entry."""
    logs = []
    for name, program in (("real", ["qemu-io"]), ("ours", [sys.executable, "-m", "qblock.tools.io"])):
        place = tmp_path / name
        place.mkdir()
        for number, lines in enumerate(LOGGED):
            for path, size in (("disk", 1 << 20), ("log", None)):
                with open(place / path, "ab") as opened:
                    opened.truncate(size)
            how = "log-append=on" if number else f"log-sector-size={sector_size},log-super-update-interval=2"
            image = f"driver=blklogwrites,file.driver=file,file.filename=disk,log.driver=file,log.filename=log,{how}"
            commands = [part for line in lines for part in ("-c", line)]
            command = [*program, "-t", "writeback", "--image-opts", *commands, image]
            subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
        logs.append((place / "log").read_bytes())
    assert logs[0] == logs[1] and len(logs[0]) > 64 << 10


def test_what_no_layer_holds_is_kept_as_zeroes_by_copy_on_read(tmp_path: Path) -> None:
    """Also in an image without a backing file, once it is read through the filter."""
    layouts = []
    for name, program in (("real", ["qemu-io"]), ("ours", [sys.executable, "-m", "qblock.tools.io"])):
        image = tmp_path / f"{name}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
        spec = f"driver=copy-on-read,file.driver=qcow2,file.file.driver=file,file.file.filename={image}"
        subprocess.run([*program, "--image-opts", "-c", "read -q 500k 100k", spec], check=True)
        layouts.append(json.loads(subprocess.check_output(["qemu-img", "map", "--output=json", image])))
    assert layouts[0] == layouts[1] and any(run["present"] for run in layouts[0])


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


LOG_BELOW = (
    "driver=blkdebug,discard=unmap,image.driver=blklogwrites,image.discard=unmap,image.file.driver=file,image.file.filename=disk,"
    "image.file.discard=unmap,image.log.driver=file,image.log.filename=log"
)
RAGGED = (
    "write -P 9 0 1M", "write -P 1 1000 100k", "write -P 2 5000 100", "write -P 3 8191 2", "discard 0 1M", "discard 512 512",
    "discard 65 300000", "discard 1000 100", "write -z 100 100", "write -z -u 65 300000", "write -z -n 65536 65536",
    "write -z -n 100 100", "writev -P 6 100000 511 513", "flush", "read -v 1000 300",
)  # fmt: skip


@pytest.mark.parametrize(
    "limits",
    [
        "align=512,opt-discard=512", "align=4096,opt-discard=16384,max-discard=32768",
        "align=4096,opt-discard=4096,max-transfer=4096",
        "align=512,opt-discard=2048,opt-write-zero=2048,max-write-zero=4096",
    ],
)  # fmt: skip
def test_requests_come_in_the_same_pieces(limits: str, tmp_path: Path) -> None:
    """What lies below writes the same log: each piece of each request, in its order, with its content."""
    results = []
    for name, program in (("real", ["qemu-io"]), ("ours", [sys.executable, "-m", "qblock.tools.io"])):
        place = tmp_path / name
        place.mkdir()
        (place / "disk").write_bytes(bytes(1 << 20))
        (place / "log").touch()
        commands = [part for line in RAGGED for part in ("-c", line)]
        command = [*program, "-t", "writeback", "-d", "unmap", "--image-opts", *commands, f"{LOG_BELOW},{limits}"]
        done = subprocess.run(command, cwd=place, check=False, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if " ops; " not in line]
        results.append((lines, (place / "disk").read_bytes(), (place / "log").read_bytes()))
    assert results[0] == results[1]
    assert "write failed: Operation not supported" in results[0][0]


QUORUM_INSIDE = {
    "driver": "quorum", "node-name": "in", "vote-threshold": 1,
    "children": [{"driver": "raw", "file": file("r.raw"), "node-name": "a"}, {"driver": "null-co", "size": 1 << 20}],
}  # fmt: skip
REOPENED = [
    do("object-add", qom_type="throttle-group", id="g"), add("throttle", "t", throttle_group="g", file=QUORUM_INSIDE),
    do("blockdev-reopen", options=[{"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "in"}]),
    do("blockdev-reopen", options=[{"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "a"}]),
    do("blockdev-reopen", options=[{"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "in"}]),
    add("file", "f", filename="s.raw"), add("copy-before-write", "c", file="f", target={**NULL, "size": 1 << 20}),
    do("blockdev-reopen", options=[{"driver": "copy-before-write", "node-name": "c", "file": "f", "target": "f"}]),
    add("snapshot-access", "s", file="c"),
    do("blockdev-reopen", options=[{"driver": "snapshot-access", "node-name": "s", "file": "c"}]), do("query-named-block-nodes"),
]  # fmt: skip


def test_filters_that_cannot_be_reopened(tmp_path: Path) -> None:
    """Neither themselves nor with the node that they were opened for."""
    real, ours = both(DAEMONS, tmp_path, REOPENED, [*IMAGES, ["truncate", "-s", "1M", "s.raw"]])
    assert real == ours


def test_a_raw_window_on_an_image_tells_what_the_image_lacks(tmp_path: Path) -> None:
    """As not held and zero: copying it need not read it."""
    for make in IMAGES:
        subprocess.run(make, cwd=tmp_path, check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q 1M 64k", "i.qcow2"], cwd=tmp_path, check=True)
    name = "driver=raw,offset=65536,size=4M,file.driver=qcow2,file.file.driver=file,file.file.filename=i.qcow2"
    maps = []
    for program in (["qemu-img"], [sys.executable, "-m", "qblock.tools.img"]):
        line = [*program, "map", "--output=json", "--image-opts", name]
        done = subprocess.run(line, cwd=tmp_path, check=True, capture_output=True, text=True)
        maps.append([{key: value for key, value in part.items() if key != "offset"} for part in json.loads(done.stdout)])
    assert maps[0] == maps[1]
    assert [part["present"] for part in maps[0]] == [False, True, False]
