"""Histories of dirty bitmaps lived by QEMU and by us: the same replies, events, bitmaps and images, step by step.

A history has a few lives. In each the programs do the same: commands on bitmaps, alone and in transactions (with failures at any
place), writes, resizes, switches to read-only and back, backups by bitmaps that succeed or are cancelled while they are pending.
A life ends well or by SIGKILL; then all images are checked, and sometimes each program goes on with those of the other one.

Left out is what QEMU 7.2 dies of: a transaction that fails and enables or disables a bitmap that it cannot.

    python tests/compat/bitmap_histories.py --seed 0 --count 100
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import attrs

from qmp_pair import SYSTEMS, Json, comparable, do, io, together, transcript, wait

KiB, MiB = 1 << 10, 1 << 20
NAMES = ("a", "b", "c", "d")
IMAGES = ("n0", "n1")
LIVES, STEPS = 3, 14
NODES = do("query-named-block-nodes", flat=True)


def image(name: str, **members: Any) -> dict[str, Any]:
    """blockdev-add of an image, whose file is a node with a name, too."""
    return do("blockdev-add", arguments(name), **members)


def arguments(name: str) -> dict[str, Any]:
    """The options of an image."""
    storage = {"driver": "file", "filename": f"{name}.qcow2", "node-name": f"{name}-file"}
    return {"driver": "qcow2", "node-name": name, "file": storage}


def target(number: int) -> dict[str, Any]:
    """A node for a backup, of the size that n0 has then."""
    return do("blockdev-add", driver="null-co", node_name=f"t{number}", size=4 * MiB, read_zeroes=True)


@attrs.define(eq=False)
class History:
    """Makes the scripts of one history. ``made`` counts what needs a name of its own."""

    random: Random
    made: int = 0

    def life(self) -> list[Json]:
        """A script. Of the node n0 the size stays as it is, since backups of it are made; ``k`` is always there and usable."""
        keep = [do("block-dirty-bitmap-remove", node="n0", name="k"), do("block-dirty-bitmap-add", node="n0", name="k")]
        script = [image("n0"), image("n1"), do("blockdev-add", driver="raw", node_name="r", file="n1"), NODES, *keep]
        for _ in range(STEPS):
            script += self.step()
            if self.random.random() < 0.6:
                script += [NODES, *self.hashes()]
        return [*script, NODES, *self.hashes()]

    def hashes(self) -> list[Json]:
        """What is dirty where; errors where there is no such bitmap."""
        return [do("x-debug-block-dirty-bitmap-sha256", node=node, name=name) for node in IMAGES for name in NAMES]

    def step(self) -> list[Json]:
        """One command, or a few that belong together."""
        random = self.random
        kinds = {"verb": 10, "write": 6, "transaction": 5, "backup": 3, "read-only": 2, "resize": 1}
        (kind,) = random.choices(list(kinds), list(kinds.values()))
        match kind:
            case "verb":
                return [do(*self.verb())]
            case "write":
                return [self.write()]
            case "transaction":
                return [self.transaction()]
            case "backup":
                return self.backup()
            case "read-only":
                options = arguments("n1") | {"file": "n1-file", "read-only": random.random() < 0.5}
                return [do("blockdev-reopen", options=[options])]
        return [do("block_resize", node_name="n1", size=random.choice((3 * MiB, 4 * MiB, 5 * MiB + 512)))]

    def node(self) -> str:
        return self.random.choice(("n0", "n0", "n1", "n1", "r", "nope"))

    def verb(self) -> tuple[str, dict[str, Any]]:
        """A command on a bitmap, and its arguments."""
        random = self.random
        verb = random.choice(("add", "add", "add", "remove", "clear", "enable", "disable", "merge", "merge"))
        given: dict[str, Any] = {"node": self.node(), "name": random.choice(NAMES)}
        if verb == "add":
            given |= {"persistent": random.random() < 0.6, "disabled": random.random() < 0.2}
            if random.random() < 0.7:
                given["granularity"] = random.choice((512, 4 * KiB, 64 * KiB, MiB, 1000, 256, 1 << 31))
        if verb == "merge":
            given["target"] = given.pop("name")
            sources = [random.choice(NAMES) for _ in range(random.choice((1, 2, 3)))]
            given["bitmaps"] = [random.choice((name, {"node": self.node(), "name": name})) for name in sources]
        return f"block-dirty-bitmap-{verb}", given

    def write(self) -> Json:
        """A change of some disk."""
        random = self.random
        verb = random.choice(("write", "write", "write -z", "discard"))
        offset, length = random.randrange(0, 3 * MiB, 512), random.choice((512, 4 * KiB, 64 * KiB, 50 * KiB))
        return io(random.choice(("n0", "n1", "r")), f"{verb} {offset} {length}")

    def transaction(self) -> Json:
        """Some commands on bitmaps, all or nothing; switching is for ``k``, which can be switched."""
        actions = []
        for _ in range(self.random.choice((1, 2, 2, 3, 4))):
            kind, given = self.verb()
            if kind.endswith(("enable", "disable")):
                given = {"node": "n0", "name": "k"}
            actions.append((kind, given))
        if self.random.random() < 0.3:
            actions.insert(self.random.randrange(len(actions) + 1), ("abort", {}))
        return together(*actions)

    def backup(self) -> list[Json]:
        """A backup by a new bitmap, which waits; meanwhile everything is tried; then it succeeds or is cancelled."""
        random = self.random
        self.made += 1
        name, job = f"x{self.made}", f"j{self.made}"
        mode = random.choice(("on-success", "always", "never"))
        meanwhile = [random.choice((do(*self.verb()), self.write())) for _ in range(random.randrange(4))]
        meanwhile.append(do(f"block-dirty-bitmap-{random.choice(('clear', 'remove'))}", node="n0", name=name))
        sha = do("x-debug-block-dirty-bitmap-sha256", node="n0", name=name)
        return [
            do("block-dirty-bitmap-add", node="n0", name=name, persistent=random.random() < 0.5),
            self.write(), target(self.made),
            do("blockdev-backup", job_id=job, device="n0", target=f"t{self.made}", sync="bitmap", bitmap=name, bitmap_mode=mode,
               auto_finalize=False),
            wait("BLOCK_JOB_PENDING", id=job), *meanwhile, sha,
            do(random.choice(("job-finalize", "job-cancel")), id=job), wait("JOB_STATUS_CHANGE", status="null", id=job),
            sha, NODES, do("blockdev-del", node_name=f"t{self.made}"),
            do("block-dirty-bitmap-remove", node="n0", name=name),
        ]  # fmt: skip


def shown(value: Json) -> Json:
    """Without what each does in its own way: texts of the human monitor, when bitmaps are noted in the file, their order."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key != "bitmaps" and not _is_length_of_file(key, value)}
        return {key: by_name(item) if key == "dirty-bitmaps" else shown(item) for key, item in kept.items()}
    if isinstance(value, list):
        return [shown(item) for item in value]
    return "said" if isinstance(value, str) and value.endswith("\r\n") else value


def by_name(bitmaps: Json) -> Json:
    """A transaction that fails may change their order in QEMU's files: those that it was to remove have left them meanwhile."""
    return sorted(bitmaps, key=lambda bitmap: str(bitmap.get("name")))


def _is_length_of_file(key: str, members: Json) -> bool:
    return key == "virtual-size" and members.get("format") == "file"


def stored(path: Path) -> Json:
    """What the real qemu-img finds in an image, which must be sound but for clusters that nobody uses."""
    argv = ["qemu-img", "check", "-q", "-r", "leaks", str(path)]
    assert subprocess.run(argv, check=False, stdout=subprocess.DEVNULL).returncode == 0, path
    done = subprocess.run(["qemu-img", "info", "--output=json", str(path)], capture_output=True, check=True)
    data = json.loads(done.stdout)
    return data["virtual-size"], by_name(data["format-specific"]["data"].get("bitmaps", []))


def live(seed: int, directory: Path) -> None:
    """Let both live through the history ``seed``; raises `AssertionError` where they differ."""
    random = Random(seed)
    history = History(random)
    places = {"real": directory / "real", "ours": directory / "ours"}
    cluster = random.choice(("512", "4k", "64k", "2M"))
    for place in places.values():
        place.mkdir()
        for name in IMAGES:
            argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", f"{name}.qcow2", "4M"]
            subprocess.run(argv, cwd=place, check=True)
    for number in range(LIVES):
        script, killed = history.life(), random.random() < 0.3
        told = [
            comparable(transcript(argv, places[who], script, killed=killed), places[who])
            for who, argv in (("real", SYSTEMS.real), ("ours", SYSTEMS.ours))
        ]
        for step, (expected, got) in enumerate(zip(*told, strict=True)):
            assert shown(got) == shown(expected), f"seed {seed}, life {number}, step {step}:\n{expected}\n{got}"
        for name in IMAGES:
            found = [stored(place / f"{name}.qcow2") for place in places.values()]
            assert found[0] == found[1], f"seed {seed}, image {name} after life {number} (killed: {killed}): {found}"
        if random.random() < 0.4:
            places = {"real": places["ours"], "ours": places["real"]}


def main() -> int:
    """Live through histories for as long as they are alike."""
    parser = argparse.ArgumentParser(description="Histories of dirty bitmaps beside the real QEMU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    given = parser.parse_args()
    for seed in range(given.seed, given.seed + given.count):
        with tempfile.TemporaryDirectory() as directory:
            live(seed, Path(directory))
    sys.stdout.write(f"{given.count} histories from seed {given.seed} on are the same\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
