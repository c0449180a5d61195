"""qemu-img commit and rebase beside qblock-img: overlays of a qcow2 and a raw base, full, scattered, and moved in three ways.

python benchmarks/commit_rebase.py [--size MIB] [--rounds N] [--only TEXT] [--json FILE]
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Sequence

from harness import BULK, MiB, Table, main, qemu
from images import fill


def compare_all(table: Table) -> None:
    """Make the images, compare."""
    gallery = Gallery(table)
    gallery.compare("commit half a disk to qcow2", ("commit",), "full", "base.qcow2")
    gallery.compare("commit half a disk to raw", ("commit",), "full-on-raw", "base.raw")
    gallery.compare("commit 64 KiB here and there", ("commit",), "scattered", "base.qcow2")
    gallery.compare("commit -d, half a disk", ("commit", "-d"), "full", "base.qcow2")
    gallery.compare("rebase onto nothing", ("rebase", "-b", ""), "thin")
    gallery.compare("rebase down the chain", ("rebase", "-b", "base.qcow2", "-F", "qcow2"), "top")
    gallery.compare("rebase onto an equal image", ("rebase", "-b", "other.qcow2", "-F", "qcow2"), "thin")


class Gallery:
    """The images, as they are before each run."""

    def __init__(self, table: Table) -> None:
        self.table, self.folder = table, table.folder / "gallery"
        self.folder.mkdir()
        size = table.size
        for name in ("base.qcow2", "other.qcow2"):
            fill(self.folder / "base.raw", size * MiB)
            qemu("convert", "-f", "raw", "-O", "qcow2", self.folder / "base.raw", self.folder / name)
        half = [f"write -q -P 5 {at}M {min(1024, size // 2 - at)}M" for at in range(0, size // 2, 1024)]
        self.overlay("full", "base.qcow2", "qcow2", [*half, f"write -q -z {size // 2}M {size // 8}M"])
        self.overlay("full-on-raw", "base.raw", "raw", half)
        rng = random.Random(1)
        spots = sorted(rng.sample(range(size * 16), size * 2))
        self.overlay("scattered", "base.qcow2", "qcow2", [f"write -q -P 6 {spot * 64}k 64k" for spot in spots])
        self.overlay("top", "full", "qcow2", ["write -q -P 7 0 1M"])
        self.overlay("thin", "base.qcow2", "qcow2", ["write -q -P 7 0 1M"])

    def overlay(self, name: str, below: str, fmt: str, commands: Sequence[str]) -> None:
        """An overlay with what the commands of qemu-io write."""
        qemu("create", "-q", "-f", "qcow2", "-b", self.folder / below, "-F", fmt, self.folder / name)
        qemu("rebase", "-u", "-b", below, "-F", fmt, self.folder / name)
        script = "\n".join(commands).encode()
        subprocess.run(["qemu-io", "-f", "qcow2", self.folder / name], input=script, check=True, stdout=subprocess.DEVNULL)

    def compare(self, title: str, words: Sequence[str], top: str, changed: str | None = None) -> None:
        """One line of the table; ``changed`` is the base that the command writes to."""
        names = [name for name in (top, changed) if name is not None]
        if not self.table.wants(title):
            return
        for name in names:
            shutil.copyfile(self.folder / name, self.folder / f"{name}.kept")

        def renew() -> None:
            for name in names:
                shutil.copyfile(self.folder / f"{name}.kept", self.folder / name)

        self.table.compare_tool(title, [*words, self.folder / top], required=BULK, before=renew)
        for name in names:
            (self.folder / f"{name}.kept").replace(self.folder / name)


if __name__ == "__main__":
    main(__doc__, compare_all)
