"""x-blockdev-amend on the real storage daemon and on qblock: the same replies, events and passphrases afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qmp_pair import DAEMONS, add, both, do, wait

pytest.importorskip("cryptography")

LUKS = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10"
IMAGES = [
    # By ours: the real one refuses to measure how fast it is on a busy machine.
    [sys.executable, "-m", "qblock.tools.img", "create", "-q", "--object", "secret,id=s0,data=first", "-f", "qcow2", "-o", LUKS,
     "luks.qcow2", "4M"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "plain.qcow2", "4M"],
]
OPENED = [
    do("object-add", qom_type="secret", id="s0", data="first"), do("object-add", qom_type="secret", id="s1", data="second"),
    add("luks", "luks.qcow2", encrypt={"format": "luks", "key-secret": "s0"}), add("plain", "plain.qcow2"),
]  # fmt: skip


def amend(node: str = "luks", **members: Any) -> dict[str, Any]:
    """x-blockdev-amend of an image, with LUKS options unless others are given."""
    usual = {"options": {"driver": "qcow2", "encrypt": {"format": "luks", **members.pop("luks", {})}}, "job_id": "a"}
    return do("x-blockdev-amend", node_name=node, **(usual | members))


def done(command: dict[str, Any]) -> list[dict[str, Any]]:
    """The command, and what follows it to the job's end."""
    return [command, wait("JOB_STATUS_CHANGE", status="concluded"), do("query-jobs"), do("job-dismiss", id="a")]


FIRST, SECOND = {"state": "inactive", "old-secret": "s0"}, {"state": "inactive", "old-secret": "s1"}
NEW = {"state": "active", "new-secret": "s1", "iter-time": 10}
REFUSED: tuple[dict[str, Any], ...] = (
    {"node": "nope"}, {"luks": {}}, {"luks": {"state": "x"}}, {"luks": {"state": "active", "bogus": 1}},
    {"job_id": "9", "luks": NEW},
    *({"options": options} for options in (
        {}, {"driver": "nope"}, {"driver": "raw"}, {"driver": "file"}, {"driver": "qcow2", "size": 3},
        {"driver": "qcow2", "encrypt": {}}, {"driver": "qcow2", "encrypt": {"format": "x"}},
        {"driver": "qcow2", "encrypt": {"format": "qcow", "state": "active"}},
    )),
)  # fmt: skip
SCRIPTS = {
    "a passphrase is added, and the first one erased": [*done(amend(luks=NEW)), *done(amend(luks=FIRST))],
    "the last passphrase": [*done(amend(luks=FIRST)), *done(amend(luks={"state": "inactive", "keyslot": 0}))],
    "the last passphrase by force": done(amend(luks=FIRST, force=True)),
    "failures": [
        *done(amend(luks={"state": "inactive", "old-secret": "nope"})), *done(amend("plain", luks=NEW)),
        *done(amend(luks=SECOND)),
        *done(amend(options={"driver": "qcow2", "encrypt": {"format": "qcow"}})),
    ],
    "nothing to do": [*done(amend(options={"driver": "qcow2"})), *done(amend("plain", options={"driver": "qcow2"}))],
    "verbs": [
        *done(amend(luks=NEW))[:-1],
        *[do(f"job-{verb}", id="a") for verb in ("pause", "resume", "cancel", "complete", "finalize")],
        do("block-job-dismiss", id="a"), amend(luks=NEW), do("job-dismiss", id="a"),
    ],
    "refused": [*(amend(**members) for members in REFUSED), do("query-jobs")],
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_both_amend_the_same(name: str, tmp_path: Path) -> None:
    """Who rotates passphrases of running machines must be able to rely on the outcome."""
    real, ours = both(DAEMONS, tmp_path, [*OPENED, *SCRIPTS[name]], IMAGES)
    for expected, got in zip(real, ours, strict=True):
        assert got == expected
    for passphrase in ("first", "second"):
        opens = [
            subprocess.run(
                ["qemu-io", "--object", f"secret,id=s,data={passphrase}", "--image-opts", "-c", "read -q 0 512",
                 f"driver=qcow2,file.filename={tmp_path / who / 'luks.qcow2'},encrypt.key-secret=s"],
                capture_output=True, check=False,
            ).returncode
            for who in ("real", "ours")
        ]  # fmt: skip
        assert opens[1] == opens[0]
