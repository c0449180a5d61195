"""What queries say of nodes that drives and -blockdev have opened: names, options as text or as values, order."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmp_pair import both, do
from test_filters_vs_qemu import machine

pytestmark = pytest.mark.qemu

IMAGES = [
    ["truncate", "-s", "1M", "r.raw"], ["qemu-img", "create", "-q", "-f", "qcow2", "i.qcow2", "1M"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "i.qcow2", "-F", "qcow2", "top.qcow2"],
]  # fmt: skip
DRIVES = (
    "driver=null-co,size=1M", "driver=raw,file.driver=null-co,file.size=1M,offset=512,size=1024",
    "driver=raw,file.driver=null-co,file.read-zeroes=on", "file=r.raw,format=raw,offset=512",
    'file=json:{{"driver":"raw",,"size":1024,,"file":{{"driver":"file",,"filename":"r.raw"}}}}',
    "file=blkdebug::i.qcow2,format=qcow2", "file=blkverify:r.raw:r.raw,format=raw", "file=top.qcow2,backing=",
    "driver=quorum,vote-threshold=1,children.0.file.filename=r.raw,children.0.driver=raw,read-pattern=fifo",
    "driver=blklogwrites,file.driver=null-co,log.driver=null-co,log-sector-size=4096,log-append=off",
    "driver=compress,file.driver=qcow2,file.file.filename=i.qcow2", "file=i.qcow2,format=qcow2,lazy-refcounts=on",
    "file=top.qcow2,backing.driver=qcow2,backing.file.driver=file,backing.file.filename=i.qcow2",
)  # fmt: skip
BLOCKDEVS = (
    "driver=raw,node-name=n,file.driver=null-co,file.size=1048576,offset=512,size=1024",
    '{{"driver":"raw","node-name":"n","size":1024,"file":{{"driver":"file","filename":"r.raw"}}}}',
    "driver=quorum,node-name=n,vote-threshold=1,children.0.driver=null-co,children.0.size=512",
)
QUERIES = [do("query-block"), do("query-named-block-nodes"), do("x-debug-query-block-graph")]


@pytest.mark.parametrize(
    "arguments", [("-drive", f"if=none,id=d,{drive}") for drive in DRIVES] + [("-blockdev", text) for text in BLOCKDEVS],
    ids=lambda arguments: arguments[1],
)  # fmt: skip
def test_names_and_order_of_nodes(arguments: tuple[str, str], tmp_path: Path) -> None:
    """A drive's options are shown as they were written, those of -blockdev as values."""
    real, ours = both(machine(*arguments), tmp_path, QUERIES, IMAGES)
    assert real == ours
