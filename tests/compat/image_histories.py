"""Random histories of images, lived twice: by the real programs in one folder, and by ours in another.

A history makes a chain of images with random options, and then gives both sides the same commands: reads and writes, snapshots,
resizes, rebases, commits, bitmaps, conversions, amendments, repairs. Both images must tell the same of themselves, as far as the
format determines it, and show the same; and each side goes on with the other's image every now and then.

As a program it looks for differences as long as it is told to::

    python tests/compat/image_histories.py --seed 0 --count 1000
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import attrs

from qblock.tools import img
from qblock.tools import io as io_tool

SECTOR = 512
CLUSTERS = (512, 512, 1024, 4096, 16384, 65536, 65536, 2 << 20)
BITMAPS = ("b0", "b1", "b2")
Output = tuple[int, str]


class Difference(AssertionError):
    """The two sides disagree."""


# --------------------------------------------------------------------------------------------------------------- sides


class Real:
    """The real programs."""

    def img(self, *words: str) -> Output:
        """Exit code and standard output of qemu-img."""
        return self._run("qemu-img", *words)

    def io(self, *words: str) -> Output:
        """Exit code and standard output of qemu-io."""
        return self._run("qemu-io", *words)

    @staticmethod
    def _run(*words: str) -> Output:
        done = subprocess.run(words, capture_output=True, check=False, stdin=subprocess.DEVNULL, timeout=120)
        assert done.returncode >= 0, (words, done)
        return done.returncode, done.stdout.decode("utf-8", "replace")


class Ours:
    """Ours, in this process."""

    def img(self, *words: str) -> Output:
        """Exit code and standard output of qblock-img."""
        return self._run(img.main, words)

    def io(self, *words: str) -> Output:
        """Exit code and standard output of qblock-io."""
        return self._run(io_tool.main, words)

    @staticmethod
    def _run(main: Callable[[list[str]], int], words: tuple[str, ...]) -> Output:
        out, complaints = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(complaints):
            code = main(list(words))
        assert "Traceback" not in complaints.getvalue(), complaints.getvalue()
        return code, out.getvalue()


@attrs.frozen
class Shape:
    """What is known of the image on top: whatever decides which commands make sense, and how far the sides must agree."""

    cluster: int
    version: int = 3
    extended: bool = False
    data_file: bool = False
    raw: bool = False
    narrow: bool = False
    """Refcounts that snapshots can overflow."""


def strict(report: Any) -> Any:
    """A report without what no two runs have in common; the extents of a map joined where they go on.

    Which data are known to be zeroes depends on whether the file's holes are looked for, which each program decides by itself.
    """
    if isinstance(report, dict):
        return {key: value for key, value in report.items() if key not in ("actual-size", "dirty-flag")}
    runs: list[dict[str, Any]] = []
    for extent in report:
        extent = extent | {"zero": extent["zero"] and not extent["data"]}
        last = runs[-1] if runs else extent
        place = last["offset"] + extent["start"] - last["start"] if "offset" in last else None
        alike = all(extent[key] == last[key] for key in ("depth", "present", "zero", "data"))
        if runs and alike and place == extent.get("offset"):
            last["length"] += extent["length"]
        else:
            runs.append(extent)
    return runs


class History:
    """One history. ``trail`` is what was done, for whoever has to look into it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = Random(seed)
        self.folder = folder
        self.ours, self.real = Ours(), Real()
        self.trail: list[str] = []
        self.shape = Shape(65536)
        self.chain: list[str] = []
        self.bitmaps = False
        self.large = False
        """Some image has clusters that may lie on holes of its file: large ones, those mapped early, zeroes of version 2."""
        self.shared_subclusters = False
        """Clusters with subclusters were shared with a snapshot: a write copies theirs that are zero as data, if 7.2 does it."""
        self.counter = 0
        for name in ("ours", "real"):
            (folder / name).mkdir()

    # ---------------------------------------------------------------------------------------------------- both sides

    @contextlib.contextmanager
    def at(self, side: str) -> Iterator[None]:
        """Be in the folder of one side."""
        before = Path.cwd()
        os.chdir(self.folder / side)
        try:
            yield
        finally:
            os.chdir(before)

    def both(self, program: str, *words: str, lenient: bool = False) -> tuple[Output, Output]:
        """The same command on both sides; exit codes must agree."""
        self.trail.append(f"{program} {' '.join(words)}")
        with self.at("real"):
            expected = getattr(self.real, program)(*words)
        with self.at("ours"):
            found = getattr(self.ours, program)(*words)
        if found[0] != expected[0] and not lenient:
            raise Difference(f"exit codes: ours {found[0]}, real {expected[0]}\n{found[1]}\n{expected[1]}")
        return found, expected

    @property
    def top(self) -> str:
        """The name of the image that commands are for."""
        return self.chain[-1]

    def length(self) -> int:
        """The size of its disk in bytes."""
        with self.at("real"):
            return int(json.loads(self.real.img("info", "--output=json", self.top)[1])["virtual-size"])

    # ------------------------------------------------------------------------------------------------------- creation

    def new_shape(self, *, overlay: bool) -> Shape:
        """Options for a new image."""
        random = self.random
        cluster = random.choice(CLUSTERS)
        version = 2 if random.random() < 0.2 else 3
        extended = version == 3 and cluster >= 16384 and random.random() < 0.4
        data_file = version == 3 and random.random() < 0.12
        return Shape(cluster, version, extended, data_file, data_file and not overlay and random.random() < 0.4,
                     version == 3 and random.random() < 0.2)  # fmt: skip

    def options(self, shape: Shape, name: str, *, overlay: bool) -> list[str]:
        """The -o options of a shape."""
        random = self.random
        words = [f"cluster_size={shape.cluster}", f"compat={'1.1' if shape.version == 3 else '0.10'}"]
        if shape.version == 3:
            bits = random.choice((1, 2)) if shape.narrow else random.choice((4, 8, 16, 16, 16, 32, 64))
            words += [f"refcount_bits={bits}"]
            words += random.choice(([], ["lazy_refcounts=on"]))
            words += random.choice(([], ["compression_type=zstd"]))
        if shape.extended:
            words += ["extended_l2=on"]
        if shape.data_file:
            words += [f"data_file={name}.data"] + (["data_file_raw=on"] if shape.raw else [])
        if not overlay and random.random() < 0.2:
            words += [f"preallocation={random.choice(('metadata', 'falloc', 'full', 'off'))}"]
        return words

    def size(self, cluster: int) -> int:
        """A size for a disk: clusters, and perhaps a part of one."""
        count = self.random.randrange(1, 400) if cluster < 4096 else self.random.randrange(1, max(2, (1 << 20) // cluster * 3))
        return max(SECTOR, cluster * count - self.random.choice((0, 0, 0, SECTOR)) * (cluster > SECTOR))

    def start(self) -> None:
        """Make the chain, with something in each image."""
        for depth in range(self.random.choice((1, 1, 2, 2, 3))):
            if depth == 0 and self.random.random() < 0.15:
                self.make_raw()
            else:
                self.add_image()
        if self.top == "raw0":
            self.add_image()

    def make_raw(self) -> None:
        """A raw image at the bottom, without holes: which of them a file gets is not the format's."""
        content = self.random.randbytes(self.size(4096))
        for side in ("ours", "real"):
            (self.folder / side / "raw0").write_bytes(content)
        self.chain.append("raw0")

    def add_image(self) -> None:
        """One more image on top of the chain."""
        name, below = f"image{self.counter}", self.chain[-1] if self.chain else None
        self.counter += 1
        self.shape = self.new_shape(overlay=below is not None)
        words = ["create", "-q", "-f", "qcow2", "-o", ",".join(self.options(self.shape, name, overlay=below is not None))]
        if below is not None:
            words += ["-b", below, "-F", "raw" if below == "raw0" else "qcow2"]
        words += [name]
        if below is None or self.random.random() < 0.6:
            words += [str(self.size(self.shape.cluster))]
        self.both("img", *words)
        self.chain.append(name)
        self.large |= self.shape.cluster > 1 << 20 or "preallocation=metadata" in words[5] or self.shape.version < 3
        self.bitmaps = False
        for _ in range(self.random.randrange(4)):
            self.write()

    # ----------------------------------------------------------------------------------------------------------- steps

    def step(self) -> None:
        """One random command."""
        kinds: list[Callable[[], None]] = [self.write] * 6 + [self.snapshot] * 3 + [self.bitmap] * 2
        kinds += [self.resize, self.rebase, self.commit, self.convert, self.amend, self.repair, self.add_image, self.swap]
        self.random.choice(kinds)()

    def write(self) -> None:
        """A few reads, writes, zeroes and discards, in one run of qemu-io."""
        length, random, fmt = self.length(), self.random, "raw" if self.top == "raw0" else "qcow2"
        words = []
        for _ in range(random.randrange(1, 5)):
            kind = random.choice(
                (f"write -P {random.randrange(1, 256)}",) * 4 + ("write -z", "write -z -u", "discard", "write -c -P 77", "read")
            )
            unit = random.choice((SECTOR, self.shape.cluster)) if kind != "write -c -P 77" else self.shape.cluster
            if kind == "discard":
                unit = self.shape.cluster
            a, b = sorted(random.randrange(-(-length // unit) + 1) * unit for _ in range(2))
            # How much of a compressed write that fails is done is nobody's business.
            b = min(b, length, a + (self.shape.cluster if "-c" in kind else 1 << 20))
            if a < b:
                words += ["-c", f"{kind} {a} {b - a}"]
        if words:
            discard = random.choice(([], ["-d", "unmap"]))
            found, expected = self.both("io", "-f", fmt, *discard, *words, self.top, lenient=True)
            if found[0] < expected[0] and any("-c -P" in word for word in words):
                # 7.2 may pack clusters into what has become a table meanwhile; it notices, and marks its image as corrupt.
                self.copy_all("ours", "real")
            elif found[0] != expected[0]:
                raise Difference(f"exit codes: ours {found[0]}, real {expected[0]}\n{found[1]}\n{expected[1]}")

    def snapshot(self) -> None:
        """Make, apply or delete an internal snapshot."""
        with self.at("real"):
            info = json.loads(self.real.img("info", "--output=json", self.top)[1])
        known = [one["id"] for one in info.get("snapshots", ())]
        kind = self.random.choice(("-c", "-c", "-a", "-d"))
        if kind != "-c" and not known:
            return
        name = f"s{self.random.randrange(5)}" if kind == "-c" else self.random.choice(known)
        self.shared_subclusters |= self.shape.extended and kind == "-c"
        self.equal_codes_or_narrow("snapshot", kind, name, self.top)

    def equal_codes_or_narrow(self, *words: str) -> None:
        """As `both`; where the real one runs out of refcounts earlier than ours, both go on with its image."""
        found, expected = self.both("img", *words, lenient=True)
        if expected[0] and self.shape.narrow:
            # It keeps clusters of what it could not do.
            if not self.can_be_repaired():
                self.copy_all("ours", "real")
                return
            with self.at("real"):
                self.real.img("check", "-q", "-r", "leaks", self.top)
        if found[0] == expected[0]:
            return
        if not self.shape.narrow:
            raise Difference(f"exit codes: ours {found[0]}, real {expected[0]}")
        with self.at("real"):
            self.real.img("check", "-q", "-r", "all", self.top)
        self.copy_all("real", "ours")

    def copy_all(self, source: str, target: str) -> None:
        """Give one side the files of the other."""
        for one, other in ((source, target), (target, source)):
            # Both get the same holes, which measure looks at.
            shutil.rmtree(self.folder / other)
            subprocess.run(["cp", "-r", "--sparse=always", self.folder / one, self.folder / other], check=True)

    def swap(self) -> None:
        """Each side goes on with the images of the other."""
        self.trail.append("(swap)")
        (self.folder / "ours").rename(self.folder / "other")
        (self.folder / "real").rename(self.folder / "ours")
        (self.folder / "other").rename(self.folder / "real")

    def bitmap(self) -> None:
        """A change to persistent bitmaps."""
        if self.shape.version < 3:
            return
        kind = self.random.choice(("--add", "--add", "--remove", "--clear", "--enable", "--disable", "--merge"))
        words = [kind, self.random.choice(BITMAPS)] if kind == "--merge" else [kind]
        if kind == "--add":
            words += ["-g", str(1 << self.random.randrange(9, 20)), *self.random.choice(([], ["--disable"]))]
        self.both("img", "bitmap", *words, self.top, self.random.choice(BITMAPS))

    def resize(self) -> None:
        """Another size; shrinking to whole clusters only, since 7.2 brings back what is cut off inside of one."""
        size, words = self.size(self.shape.cluster), ["--shrink"]
        if self.shape.version == 2 and len(self.chain) > 1:
            size = min(size, self.length())  # 7.2 cannot make it grow over a longer backing file
        if size < self.length():
            size = size // self.shape.cluster * self.shape.cluster
        elif self.random.random() < 0.3:
            words = [f"--preallocation={self.random.choice(('falloc', 'full'))}"]
        if size:
            self.both("img", "resize", "-q", *words, self.top, str(size))
        if len(self.chain) > 1 and words != ["--shrink"]:
            self.settle()  # what must hide a longer backing file is zeroed by us, and written by the real one

    def rebase(self) -> None:
        """Another backing file of the chain, or none."""
        below = self.chain[:-1]
        if not below or self.shape.raw:
            return
        base = self.random.choice(["", *below])
        fmt = ["-F", "raw" if base == "raw0" else "qcow2"] if base else []
        self.both("img", "rebase", "-q", "-b", base, *fmt, self.top)
        self.chain = ([*self.chain[: self.chain.index(base) + 1]] if base else []) + [self.top]
        self.settle()

    def commit(self) -> None:
        """The top moves into the image below, which is the top then, or stays."""
        if len(self.chain) < 2:
            return
        drop = self.random.random() < 0.5
        cannot_grow = self.cannot_grow(self.chain[-2])
        found, expected = self.both("img", "commit", "-q", *(["-d"] if drop else []), self.top, lenient=True)
        code = found[0]
        if (code, expected[0], cannot_grow) == (0, 1, True):
            self.copy_all("ours", "real")
        elif code != expected[0]:
            raise Difference(f"exit codes: ours {code}, real {expected[0]}")
        if not code and drop and len(self.chain) > 2 and self.random.random() < 0.5:
            self.chain.pop()
            self.look_at_top()
        self.settle()

    def cannot_grow(self, image: str) -> bool:
        """By 7.2: an image of version 2 over a backing file that may be longer, when the top is longer than the image."""
        with self.at("real"):
            info = json.loads(self.real.img("info", "--output=json", image)[1])
        version_2 = info.get("format-specific", {}).get("data", {}).get("compat") == "0.10"
        return version_2 and "backing-filename" in info and int(info["virtual-size"]) < self.length()

    def convert(self) -> None:
        """A copy takes the place of the chain."""
        random, name = self.random, f"image{self.counter}"
        self.counter += 1
        shape = self.new_shape(overlay=False)
        options = [word for word in self.options(shape, name, overlay=False) if "preallocation" not in word]
        words = random.choice(([], [], ["-c"], ["-S", "0"], ["-S", "4k"]))
        if words == ["-c"] and shape.data_file:
            words = []
        if self.bitmaps and shape.version == 3 and random.random() < 0.5:
            words = [*words, "--bitmaps"]
        found, _ = self.both("img", "convert", "-q", *words, "-O", "qcow2", "-o", ",".join(options), self.top, name)
        if not found[0]:
            self.chain, self.shape = [name], shape
            self.large = shape.cluster > 1 << 20 or shape.version < 3
        self.settle()

    def amend(self) -> None:
        """Another version, width of refcounts, size or flag."""
        if self.large or (self.shape.version == 2 and len(self.chain) > 1):
            return  # the real one takes minutes, or cannot make it grow
        option = self.random.choice(
            ("compat=0.10", "compat=1.1", "lazy_refcounts=on", "lazy_refcounts=off",
             f"refcount_bits={1 << self.random.randrange(7)}",
             f"size={self.length() + self.random.randrange(4) * self.shape.cluster}")
        )  # fmt: skip
        found, expected = self.both("img", "amend", "-q", "-o", option, self.top, lenient=True)
        if found[0] != expected[0] and (found[0], expected[0], option) != (1, 0, "compat=0.10"):
            raise Difference(f"exit codes: ours {found[0]}, real {expected[0]}")
        if found[0] != expected[0]:
            # We do not lower the version of what would lose something by it.
            self.copy_all("ours", "real")
        elif "compat" in option:
            self.settle()  # zero clusters become data, or nothing
        self.look_at_top()

    def look_at_top(self) -> None:
        """See what the top has become."""
        with self.at("real"):
            info = json.loads(self.real.img("info", "--output=json", self.top)[1])
        data = info.get("format-specific", {}).get("data", {})
        if info["format"] == "raw":
            self.add_image()
            return
        self.shape = Shape(
            info["cluster-size"], 2 if data["compat"] == "0.10" else 3, data.get("extended-l2", False), "data-file" in data,
            data.get("data-file-raw", False), data["refcount-bits"] < 4,
        )  # fmt: skip
        self.large |= self.shape.version < 3

    def repair(self) -> None:
        """There is nothing to be repaired. (7.2 loses the snapshots of an image with bitmaps by that.)"""
        if self.can_be_repaired():
            self.both("img", "check", "-q", "-r", self.random.choice(("leaks", "all")), self.top)

    def can_be_repaired(self) -> bool:
        """By 7.2, without harm."""
        with self.at("real"):
            info = json.loads(self.real.img("info", "--output=json", self.top)[1])
        return not ("snapshots" in info and "bitmaps" in info["format-specific"]["data"])

    # ------------------------------------------------------------------------------------------------------- verdicts

    def settle(self) -> None:
        """Copies were made, which the format does not say how to cut into pieces: both go on with those of one side."""
        self.compare_json("info", self.plain_info)
        self.compare_content()
        source, target = self.random.sample(("ours", "real"), 2)
        self.trail.append(f"(both go on with {source})")
        self.copy_all(source, target)

    def verify(self) -> None:
        """Both images are sound, tell the same and show the same, whoever looks at them."""
        self.compare_json("info", self.plain_info)
        self.compare_json("map", self.plain_map)
        self.compare_json("check", self.plain_check)
        if self.random.random() < 0.5 and not self.large and not self.has_holes():
            self.compare_json("measure", lambda report: report, "-O", "qcow2")
        self.compare_content()

    def has_holes(self) -> bool:
        """Does some file of the chain take less space than it is long?"""
        files = [self.folder / side / name for side in ("ours", "real") for name in self.chain]
        return any(file.stat().st_blocks * 512 < file.stat().st_size for file in files)

    def compare_json(self, command: str, plain: Callable[[Any], Any], *words: str) -> None:
        """What both programs say of each image is the same; and but for what is not ``plain`` they say it of both images."""
        reports = {}
        for side in ("real", "ours"):
            with self.at(side):
                told = [json.loads(self.told(who, command, "--output=json", *words, self.top)) for who in (self.real, self.ours)]
            if strict(told[0]) != strict(told[1]):
                raise Difference(f"{command} of the image of {side}, by real and ours:\n{told[0]}\n{told[1]}")
            reports[side] = plain(told[0])
        if reports["real"] != reports["ours"]:
            raise Difference(f"{command} of both images:\nreal {reports['real']}\nours {reports['ours']}")

    def told(self, who: Real | Ours, *words: str) -> str:
        """The output of a command that must not fail."""
        code, text = who.img(*words)
        if code:
            raise Difference(f"{words} by {type(who).__name__}: exit code {code}\n{text}")
        return text

    def plain_info(self, info: dict[str, Any]) -> dict[str, Any]:
        """Without what time and place make different."""
        info = {key: value for key, value in info.items() if key not in ("actual-size", "dirty-flag", "full-backing-filename")}
        for snapshot in info.get("snapshots", ()):
            for key in [key for key in snapshot if key.startswith("date")]:
                del snapshot[key]
        self.bitmaps = bool(info.get("format-specific", {}).get("data", {}).get("bitmaps"))
        return info

    def plain_map(self, extents: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        """Runs that are as long as can be, without places in the file, and without what the file system knows of its holes.

        Zeroes that nobody holds may be told of any layer.
        """
        runs: list[tuple[Any, ...]] = []
        for extent in extents:
            zero, data = extent["zero"] and not extent["data"], extent["data"]
            if self.chain[0] == "raw0" and extent["depth"] == len(self.chain) - 1:
                zero = data = False
            if extent["present"] and (self.shared_subclusters or self.copies_holes):
                zero = data = False
            kind = (extent["depth"] if extent["present"] else 0, extent["present"], zero, data)
            start = extent["start"]
            if runs and runs[-1][2:] == kind:
                start = runs.pop()[0]
            runs.append((start, extent["start"] + extent["length"], *kind))
        return runs

    @property
    def copies_holes(self) -> bool:
        """May zeroes below lie on a hole of one file only? Such are copied as zeroes, and others as data."""
        return self.large and len(self.chain) > 1

    def plain_check(self, report: dict[str, Any]) -> dict[str, Any]:
        """Without what depends on where clusters lie."""
        varying = {"image-end-offset", "fragmented-clusters"} | ({"allocated-clusters"} if self.copies_holes else set())
        return {key: value for key, value in report.items() if key not in varying}

    def compare_content(self) -> None:
        """The content by each program of each side's image, and of one snapshot."""
        with self.at("real"):
            info = json.loads(self.real.img("info", "--output=json", self.top)[1])
        snapshots = [one["id"] for one in info.get("snapshots", ())]
        choices = [[]] + ([["-l", f"snapshot.id={self.random.choice(snapshots)}"]] if snapshots else [])
        for words in choices:
            contents = {}
            for side in ("real", "ours"):
                with self.at(side):
                    for who in (self.real, self.ours):
                        code, text = who.img("convert", "-q", "-O", "raw", *words, self.top, "content")
                        if code:
                            raise Difference(f"cannot be read: {side} by {type(who).__name__} {words} {text}")
                        contents[side, type(who).__name__] = Path("content").read_bytes()
                        Path("content").unlink()
            first = contents["real", "Real"]
            for key, content in contents.items():
                if content != first:
                    at = next((i for i, (a, b) in enumerate(zip(first, content, strict=False)) if a != b), -1)
                    raise Difference(f"content {words}: {key} differs from {at:#x} on, lengths {len(first)} {len(content)}")


def live(seed: int, steps: int) -> str:
    """Live one history; what went wrong, with all that was done, or nothing."""
    with tempfile.TemporaryDirectory(prefix="qblock-history-") as folder:
        history = History(seed, Path(folder))
        try:
            history.start()
            for _ in range(steps):
                history.step()
                if history.random.random() < 0.6:
                    history.verify()
            history.verify()
        except Exception as error:
            detail = str(error) if isinstance(error, Difference) else traceback.format_exc()
            return "\n".join([f"history {seed}:", *history.trail, detail])
    return ""


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--steps", type=int, default=12)
    wanted = parser.parse_args()
    failures = 0
    for seed in range(wanted.seed, wanted.seed + wanted.count):
        if trouble := live(seed, wanted.steps):
            failures += 1
            sys.stdout.write(f"{trouble}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{wanted.count} histories from {wanted.seed} on, {failures} failures\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
