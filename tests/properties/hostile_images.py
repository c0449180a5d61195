"""Images that somebody has tampered with: a corpus of every kind of qcow2 image, mutations that know the format, and all that the
programs can be asked to do with such an image, each run in a process with limits.

As a program it looks for trouble as long as it is told to::

    python tests/properties/hostile_images.py --seed 0 --count 10000

A mutation is found again by its number: ``--seed N --count 1``.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

from qblock.tools import img
from qblock.tools import io as io_tool

MEMORY = 768 << 20
"""Bytes of address space that one image may cost, beyond what the interpreter has already."""
SECONDS = 30
"""Of processor time, for all commands on one image."""
DISK = 64 << 20
"""Bytes that an image may take on the disk afterwards."""
SIZE = 160 << 10
SECRET = ["--object", "secret,id=key,data=open sesame"]

KINDS: dict[str, str] = {
    "plain": "cluster_size=512",
    "large-clusters": "cluster_size=64k",
    "version-2": "cluster_size=512,compat=0.10",
    "narrow": "cluster_size=512,refcount_bits=1",
    "wide": "cluster_size=1k,refcount_bits=64,lazy_refcounts=on",
    "subclusters": "cluster_size=16k,extended_l2=on",
    "packed": "cluster_size=1k",
    "packed-zstd": "cluster_size=4k,compression_type=zstd",
    "snapshots": "cluster_size=512",
    "bitmaps": "cluster_size=512",
    "overlay": "cluster_size=1k,backing_file=base.qcow2,backing_fmt=qcow2",
    "data-file": "cluster_size=4k,data_file=data.raw",
    "raw-data-file": "cluster_size=4k,data_file=rawdata.raw,data_file_raw=on",
    "luks": "cluster_size=4k,encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=0",
    "preallocated": "cluster_size=1k,preallocation=metadata",
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- corpus


def quietly(run: Callable[[list[str]], int], *words: str) -> int:
    """The exit code of a program of ours, whose output goes nowhere."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return run(list(words))


def make_corpus(folder: Path) -> None:
    """One image of each kind, and the files that they refer to, in ``folder``, which is the working directory."""
    assert quietly(img.main, "create", "-f", "qcow2", "-o", "cluster_size=512", "base.qcow2", str(SIZE)) == 0
    assert quietly(io_tool.main, "-f", "qcow2", "-c", f"write -P 9 0 {SIZE // 2}", "base.qcow2") == 0
    for kind, options in KINDS.items():
        secret = SECRET if "encrypt" in options else []
        assert quietly(img.main, "create", *secret, "-f", "qcow2", "-o", options, kind, str(SIZE)) == 0, kind
        write = ["write -P 1 0 9k", "write -P 2 40k 20k", "write -z 44k 4k", "discard 50k 4k", "write -P 3 150k 1k"]
        if "packed" in kind:
            write = ["write -c -P 4 0 16k", "write -P 5 64k 12k", "write -c -P 6 100k 20k"]
        fill(kind, *write)
        if kind in ("snapshots", "narrow", "subclusters"):
            for name in ("first", "second"):
                quietly(img.main, "snapshot", "-c", name, kind)
                fill(kind, "write -P 7 42k 3k")
        if kind in ("bitmaps", "data-file"):
            for name in ("b0", "b1"):
                assert quietly(img.main, "bitmap", "--add", "-g", "512", kind, name) == 0
            fill(kind, "write -P 8 20k 10k")


def fill(kind: str, *commands: str) -> None:
    """Run commands of qblock-io on an image of the corpus."""
    words = [word for command in commands for word in ("-c", command)]
    assert quietly(io_tool.main, *words, *named(kind, Path(kind), io=True)) == 0, kind


def named(kind: str, image: Path, *, io: bool = False) -> list[str]:
    """The words that name an image on a command line."""
    if kind == "luks":
        return [*SECRET, "--image-opts", f"driver=qcow2,file.filename={image},encrypt.key-secret=key"]
    return ["-f", "qcow2", str(image)] if io else [str(image)]


# ----------------------------------------------------------------------------------------------------------- mutations

HEADER = ((4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8), (72, 8),
          (80, 8), (88, 8), (96, 4), (100, 4), (104, 1))  # fmt: skip
"""Places and lengths of the fields of a header."""
OFFSETS = 0x00FFFFFFFFFFFE00
EXTENSIONS = (0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441, 0x12345678, 0)


class Mutation:
    """The bytes of an image while they are changed at random."""

    def __init__(self, raw: bytes, random: Random) -> None:
        self.raw, self.random = bytearray(raw), random
        self.sound = bytes(raw)
        self.cluster = 1 << self.get(20, 4)

    def get(self, at: int, size: int = 8) -> int:
        """A number of the image as it was."""
        return int.from_bytes(self.sound[at : at + size], "big")

    def put(self, at: int, value: int, size: int = 8) -> None:
        """Change one; behind the end of the file nothing happens."""
        if at + size <= len(self.raw):
            self.raw[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "big")

    # ------------------------------------------------------------------------------------------------------- places

    def extensions(self) -> Iterator[tuple[int, int, int]]:
        """Place, type and length of the header extensions."""
        at = self.get(100, 4) if self.get(4, 4) > 2 else 72
        while at + 8 <= min(self.cluster, len(self.sound)):
            kind, length = self.get(at, 4), self.get(at + 4, 4)
            yield at, kind, length
            if not kind:
                return
            at += 8 + -(-length // 8) * 8

    def extension(self, wanted: int) -> int:
        """Where the content of an extension begins; 0 when there is none."""
        return next((at + 8 for at, kind, _ in self.extensions() if kind == wanted), 0)

    def tables(self) -> list[tuple[int, int]]:
        """Place and length of all tables that the header leads to."""
        found = [(self.get(40), self.get(36, 4) * 8), (self.get(48), self.get(56, 4) * self.cluster)]
        for index in range(self.get(36, 4)):
            if offset := self.get(self.get(40) + 8 * index) & OFFSETS:
                found.append((offset, self.cluster))
        for index in range(self.get(56, 4) * self.cluster // 8):
            if offset := self.get(self.get(48) + 8 * index):
                found.append((offset, self.cluster))
        found += [(self.get(64), 200)] * 2 if self.get(60, 4) else []
        if bitmaps := self.extension(0x23852875):
            directory, length = self.get(bitmaps + 16), self.get(bitmaps + 8)
            found += [(directory, length), (directory, length), (self.get(directory), 16)]
        if self.get(32, 4) == 2:
            area = self.get(self.extension(0x0537BE77))
            found += [(area, 592), (area, 592), (area, 208)]
        return [(at, min(length, len(self.sound) - at)) for at, length in found if at < len(self.sound) and length > 0]

    def value(self, size: int) -> int:
        """A number that is likely to make trouble."""
        random, end = self.random, len(self.sound)
        places = [at for at, _ in self.tables()]
        return random.choice(
            (
                0, 1, 2, 3, 7, 8, 9, 511, 512, 65535, 65536, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 55,
                (1 << 56) - 512, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 512, end, end - 1,
                end - self.cluster, end // self.cluster * self.cluster, end + 512, end + 1024 * self.cluster, self.cluster,
                2 * self.cluster, random.choice(places), random.choice(places) | 1 << 63, random.choice(places) | 1 << 62,
                random.choice(places) | 1, random.choice(places) + 512, random.getrandbits(8 * size),
                1 << random.randrange(8 * size), random.randrange(end), random.randrange(end) // self.cluster * self.cluster,
            )
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------- mutations

    def step(self) -> None:
        """Change something."""
        kinds = [self.field] * 2 + [self.entry] * 3 + [self.bits, self.noise, self.extend, self.copy, self.cut]
        self.random.choice(kinds)()

    def field(self) -> None:
        """A field of the header gets another value, or nearly the one that it has."""
        at, size = self.random.choice(HEADER)
        near = self.get(at, size) + self.random.choice((-512, -8, -1, 1, 8, 512))
        self.put(at, self.random.choice((near, self.value(size), self.value(size))), size)

    def entry(self) -> None:
        """A number in some table, of any width."""
        at, length = self.random.choice(self.tables())
        size = self.random.choice((8, 8, 8, 4, 2, 1))
        place = at + self.random.randrange(max(length // size, 1)) * size
        if self.random.random() < 0.5 and length >= 64:
            # Tables are mostly empty: what is at their beginning, or is something, is more likely to matter.
            used = [i for i in range(at, at + length - size + 1, size) if self.get(i, size)]
            place = self.random.choice(used) if used else place
        near = self.get(place, size) + self.random.choice((-1, 1, self.cluster, -self.cluster, 1 << 62, 1 << 63))
        self.put(place, self.random.choice((near, self.value(size), self.value(size))), size)

    def bits(self) -> None:
        """A few bits, mostly of metadata."""
        for _ in range(self.random.randrange(1, 8)):
            at, length = self.random.choice([(0, 600), (0, len(self.sound)), *self.tables()])
            place = at + self.random.randrange(length)
            if place < len(self.raw):
                self.raw[place] ^= 1 << self.random.randrange(8)

    def noise(self) -> None:
        """A part of a table."""
        at, length = self.random.choice([(72, 200), *self.tables()])
        start = at + self.random.randrange(length)
        data = self.random.randbytes(self.random.choice((4, 16, 64, 512)))
        self.raw[start : start + len(data)] = data if self.random.random() < 0.7 else bytes(len(data))

    def extend(self) -> None:
        """A header extension more, or another type or length for one that is there."""
        places = list(self.extensions())
        at, kind, length = self.random.choice(places)
        choice = self.random.randrange(3)
        if choice == 0:
            self.put(at, self.random.choice(EXTENSIONS), 4)
        elif choice == 1:
            self.put(at + 4, self.random.choice((0, 1, 7, 8, 16, 24, 48, length + 1, length - 1, self.cluster, self.value(4))), 4)
        else:
            data = self.random.randbytes(self.random.choice((0, 1, 8, 16, 24, 40, 200)))
            kind = self.random.choice(EXTENSIONS)
            body = kind.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data + bytes(-len(data) % 8)
            room = self.cluster - at - len(body)
            if room > 0:
                self.raw[at : self.cluster] = body + self.raw[at : at + room]

    def copy(self) -> None:
        """A table becomes that of another one."""
        (source, length), (target, _) = self.random.choice(self.tables()), self.random.choice(self.tables())
        data = self.sound[source : source + min(length, self.cluster)]
        self.raw[target : target + len(data)] = data

    def cut(self) -> None:
        """The file ends early."""
        del self.raw[self.random.randrange(len(self.raw)) if self.random.random() < 0.5 else -self.random.randrange(1, 3000) :]


def mutated(raw: bytes, random: Random) -> bytes:
    """An image with one or a few changes."""
    mutation = Mutation(raw, random)
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        mutation.step()
        if len(mutation.raw) < 8:
            break
    return bytes(mutation.raw)


# ------------------------------------------------------------------------------------------------------------ commands

READING: tuple[tuple[str, ...], ...] = (
    ("info",), ("info", "--output=json", "--backing-chain"), ("check", "--output=json"), ("check", "--explain"),
    ("map", "--output=json"), ("map",), ("measure", "-O", "qcow2"), ("snapshot", "-l"),
    ("io", "-r", "read 0 100k", "map", "alloc 0 1M"), ("convert",), ("compare",),
)  # fmt: skip
CHANGING: tuple[tuple[str, ...], ...] = (
    ("check", "-r", "leaks"), ("check", "-r", "all"), ("check", "-r", "all", "--explain"),
    ("io", "write -P 1 3k 30k", "write -P 2 155k 5k", "flush"), ("io", "write -z 0 70k", "write -z -u 30k 60k"),
    ("io", "discard 0 96k", "write 1k 7k"), ("io", "write -c 128k 4k", "write 0 512"), ("io", "truncate 1M", "write 900k 100k"),
    ("bitmap", "--add", "b2"), ("bitmap", "--remove", "b0"), ("bitmap", "--clear", "b1"), ("bitmap", "--merge", "b0", "b1"),
    ("snapshot", "-c", "third"), ("snapshot", "-d", "first"), ("snapshot", "-a", "second"),
    ("amend", "-o", "compat=0.10"), ("amend", "-o", "compat=1.1"), ("amend", "-o", "refcount_bits=64"),
    ("amend", "-o", "refcount_bits=1"), ("amend", "-o", "lazy_refcounts=off"), ("amend", "-o", "size=1M"),
    ("amend", "--force", "-o", "encrypt.state=inactive,encrypt.keyslot=0"),
    ("amend", "-o", "encrypt.state=active,encrypt.new-secret=key,encrypt.iter-time=0"),
    ("resize", "1M"), ("resize", "--preallocation=full", "400k"), ("resize", "--shrink", "20k"),
    ("rebase", "-u", "-b", "base.qcow2", "-F", "qcow2"), ("rebase", "-b", ""), ("commit", "-d"), ("commit",),
)  # fmt: skip


def arrange(command: Sequence[str], kind: str, image: Path) -> tuple[Callable[[list[str]], int], list[str]]:
    """The program and the words for a command on an image."""
    name, *words = command
    if name == "io":
        flags = [word for word in words if word.startswith("-")]
        scripts = [part for word in words if not word.startswith("-") for part in ("-c", word)]
        return io_tool.main, ["-d", "unmap", *flags, *scripts, *named(kind, image, io=True)]
    where = named(kind, image)
    if name == "convert":
        return img.main, [name, "-O", "qcow2", "-S", "4k", *where, f"{image}.copy"]
    if name == "compare":
        return img.main, [name, "-s", *where, where[-1]]
    if name == "resize":
        return img.main, [name, *words[:-1], *where, words[-1]]
    if name == "bitmap":
        return img.main, [name, *words[:-1], *where, words[-1]]
    return img.main, [name, *words, *where]


def try_commands(kind: str, image: Path, random: Random) -> str:
    """Run some commands on an image; what went wrong, or nothing. An image without errors must have none afterwards."""
    clean = state_of(kind, image) == "sound"
    for command in [*random.sample(READING, 4), *random.sample(CHANGING, 5)]:
        run, words = arrange(command, kind, image)
        before = image.stat().st_mtime_ns, image.stat().st_size
        complaints = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(complaints):
            try:
                code = run(words)
            except BaseException:
                return f"{words}: {traceback.format_exc()}"
        if "Traceback" in complaints.getvalue() or "never " in complaints.getvalue():
            return f"{words}: {complaints.getvalue()}"
        if command in READING and (image.stat().st_mtime_ns, image.stat().st_size) != before:
            return f"{words}: the image was changed by reading"
        # Without its last key nobody can look at it any more.
        clean = clean and "encrypt.state=inactive,encrypt.keyslot=0" not in command
        sound = state_of(kind, image) == "sound"
        if clean and not sound:
            return f"{words}: the image was sound, and is not any more"
        if command[:3] == ("check", "-r", "all") and code == 0 and not sound:
            return f"{words}: said to be repaired, and is not"
        if (used := sum(one.stat().st_blocks * 512 for one in image.parent.iterdir())) > DISK:
            return f"{words}: takes {used} bytes"
    return ""


def state_of(kind: str, image: Path) -> str:
    """Is it refused, or ``damaged``, or ``sound``: does a check find nothing but leaks?"""
    run, words = arrange(("check",), kind, image)
    return {0: "sound", 2: "damaged", 3: "sound"}.get(quietly(run, *words), "refused")


# ------------------------------------------------------------------------------------------------------------ processes


def try_image(kind: str, image: Path, random: Random) -> tuple[str, str]:
    """As `try_commands`, in a process of its own with limits; before it the image was in the state which comes first."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        state = verdict = "it ended without a word"
        try:
            limit_resources(writing)
            state = state_of(kind, image)
            verdict = try_commands(kind, image, random)
        except BaseException:
            verdict = traceback.format_exc()
        finally:
            os.write(writing, f"{state}\n".encode() + verdict.encode("utf-8", "replace")[-30000:])
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        state, _, verdict = pipe.read().decode().partition("\n")
    _, status = os.waitpid(child, 0)
    return state, verdict if not status else f"{verdict}\nended with status {status}"


def limit_resources(trace_to: int) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.register(signal.SIGXCPU, file=trace_to, all_threads=True, chain=True)
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, spent + SECONDS + 5))


def try_seed(seed: int, corpus: Path, work: Path) -> tuple[str, str]:
    """Make the mutation with this number, and try it; its state at first, and what went wrong, or nothing."""
    random = Random(seed)
    kind = random.choice(list(KINDS))
    image = work / "image"
    for name in ("base.qcow2", "data.raw", "rawdata.raw"):
        shutil.copy(corpus / name, work / name)
    image.write_bytes(mutated((corpus / kind).read_bytes(), random))
    keep = image.read_bytes()
    state, verdict = try_image(kind, image, random)
    for leftover in work.iterdir():
        leftover.unlink()
    if verdict:
        Path(tempfile.gettempdir(), f"hostile-{seed}").write_bytes(keep)
        return state, f"mutation {seed} of {kind}: {verdict}"
    return state, ""


@contextlib.contextmanager
def desk() -> Iterator[tuple[Path, Path]]:
    """Folders for the corpus, which is made, and for working in, which is the current one."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="qblock-hostile-") as folder:
        corpus, work = Path(folder, "corpus"), Path(folder, "work")
        corpus.mkdir()
        work.mkdir()
        try:
            os.chdir(corpus)
            make_corpus(corpus)
            os.chdir(work)
            yield corpus, work
        finally:
            os.chdir(before)


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    wanted = parser.parse_args()
    failures, states = 0, Counter[str]()
    with desk() as (corpus, work):
        for seed in range(wanted.seed, wanted.seed + wanted.count):
            state, verdict = try_seed(seed, corpus, work)
            states[state] += 1
            if verdict:
                failures += 1
                sys.stdout.write(f"{verdict}\n")
                sys.stdout.flush()
    shown = ", ".join(f"{count} {state}" for state, count in states.most_common())
    sys.stdout.write(f"{wanted.count} images from {wanted.seed} on ({shown}), {failures} failures\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
