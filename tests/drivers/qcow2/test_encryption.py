"""Encrypted images: any operations against a bytearray, keys that come and go, crashes between, and headers that lie."""

from __future__ import annotations

import asyncio
import errno
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qblock.backend import BlockBackend
from qblock.crypto import luks
from qblock.drivers.memory import MemoryDriver, MemoryOptions
from qblock.drivers.qcow2.driver import Qcow2Driver
from qblock.drivers.qcow2.header import EXT_ENCRYPTION, parse_header
from qblock.drivers.qcow2.options import Encryption, EncryptionCreate
from qblock.errors import BlockIOError, CommandError, ImageError, InvalidParameter, QBlockError
from qblock.extents import Data, Unallocated, Zero
from qblock.monitor.nodeinfo import NodeReports
from qblock.node import BlockDriverState
from qblock.system import BlockSystem
from qblock.testing.formats import FormatBench, is_refused
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB, MiB

SECTOR = 512
SECRETS = {"one": b"first passphrase", "two": b"second", "bad": b"guessed", "binary": b"\xff\xfe"}
METHODS: dict[str, dict[str, Any]] = {
    "luks": {"format": "luks"},
    "luks, aes-128": {"format": "luks", "cipher_alg": "aes-128", "hash_alg": "sha512"},
    "luks, cbc": {"format": "luks", "cipher_mode": "cbc", "ivgen_alg": "essiv"},
    "aes": {"format": "qcow"},
}


async def made(method: str = "luks", **options: Any) -> FormatBench:
    bench = FormatBench(Qcow2Driver)
    bench.secrets = SECRETS
    bench.always = {"encrypt": Encryption(key_secret="one")}
    quick = {"iter_time": 0} if METHODS[method]["format"] == "luks" else {}
    given = EncryptionCreate(key_secret="one", **METHODS[method], **quick)
    await bench.create(**{"size": MiB, "encrypt": given, **options})
    return bench


async def clean(bench: FormatBench) -> None:
    result = await bench.check()
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.findings


def area_of(image: bytes) -> tuple[int, int]:
    """Offset and length of the LUKS header."""
    return parse_header(image[:65536], "image").encryption_area


# ----------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("seed", range(24))
def test_an_encrypted_disk_behaves_like_a_bytearray(seed: int) -> None:
    """At any geometry, over a backing node or a data file or none; nothing that was written is to be seen in the file."""
    run(lambda: _model(Random(seed)), Seeded(seed))


async def _model(random: Random) -> None:
    method = random.choice(list(METHODS))
    bits, version = random.choice([9, 12, 14, 16]), random.choice(["v3", "v3", "v2"])
    beside, backed = version == "v3" and random.random() < 0.25, random.random() < 0.5
    options: dict[str, Any] = {"cluster_size": 1 << bits, "version": version, "data_file": "data"} if beside else {
        "cluster_size": 1 << bits, "version": version, "extended_l2": version == "v3" and bits >= 14 and random.random() < 0.5}
    if version == "v3" and not backed and random.random() < 0.4:
        options["preallocation"] = random.choice(["metadata", "full"])
    size = random.randrange(1, 600) * SECTOR
    bench = await made(method, size=size, **options)
    backing, model = await _backing(bench, size) if backed else (None, bytearray(size))
    disk = await bench.open(backing=backing)
    for step in range(40):
        await _operate(disk, model, random, step)
        if random.random() < 0.1:
            await bench.close()
            await clean(bench)
            disk = await bench.open(backing=backing)
        assert await disk.read(0, len(model)) == model
    await bench.close()
    await clean(bench)
    for marker in (b"secret text", b"first passphrase"):
        assert marker not in bench.content + (bench.data_content or b"")


async def _backing(bench: FormatBench, size: int) -> tuple[BlockDriverState, bytearray]:
    length = size * 2 // 3 // SECTOR * SECTOR or SECTOR
    node = await bench.bench.add(MemoryDriver, MemoryOptions(size=length))
    content = Random(size).randbytes(length)
    await node.driver.write_from(0, memoryview(content))
    return node, bytearray(content).ljust(size, b"\0")


async def _operate(disk: BlockBackend, model: bytearray, random: Random, step: int) -> None:
    a, b = sorted(random.randrange(len(model) + 1) for _ in range(2))
    kind = random.random()
    if kind < 0.6:
        model[a:b] = (b"secret text %d " % step * (b - a))[: b - a]
        await disk.write(a, bytes(model[a:b]))
    elif kind < 0.75:
        await disk.write_zeroes(a, b - a, may_unmap=random.random() < 0.5)
        model[a:b] = bytes(b - a)
    elif kind < 0.85:
        await disk.flush()
    elif len(model) < 2 * MiB:
        grown = len(model) + random.randrange(1, 200) * SECTOR
        await disk.truncate(grown)
        model.extend(bytes(grown - len(model)))
    else:
        await disk.truncate(len(model) // 2 // SECTOR * SECTOR)
        del model[len(model) // 2 // SECTOR * SECTOR :]


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("extended", [False, True])
def test_preallocated_clusters_read_as_zeroes(mode: str, extended: bool) -> None:
    """Zeroes in the file would be noise on the disk: at creation and when the disk grows, the entries say it."""

    async def main() -> None:
        bench = await made(preallocation=mode, extended_l2=extended)
        disk = await bench.open()
        assert await disk.read(0, MiB) == bytes(MiB)
        await disk.truncate(2 * MiB, preallocation=mode)
        await disk.write(MiB + 1000, b"x")
        assert await disk.read(0, 2 * MiB) == bytes(MiB + 1000) + b"x" + bytes(MiB - 1001)
        await bench.close()
        await clean(bench)

    run(main)


def test_status_tells_no_place_and_no_copy_is_made_in_the_storage() -> None:
    """Whoever read the file there would find something else."""

    async def main() -> None:
        bench = await made()
        disk = await bench.open()
        await disk.write(0, b"x" * 65536)
        await disk.write_zeroes(65536, 65536)
        driver = bench.node.driver
        assert await driver.block_status(0, MiB) == Data(65536, None)
        assert await driver.block_status(65536, MiB) == Zero(65536, None)
        assert isinstance(await driver.block_status(131072, MiB - 131072), Unallocated)
        edge = disk.root
        assert edge is not None
        for copy in (driver.copy_range(0, edge, 131072, 65536), driver.receive_range(131072, edge, 0, 65536)):
            with pytest.raises(BlockIOError) as caught:
                await copy
            assert caught.value.errno == errno.ENOTSUP
        with pytest.raises(BlockIOError):
            await driver.write_compressed(131072, memoryview(bytes(65536)))

    run(main)


@pytest.mark.parametrize("method", ["luks", "aes"])
def test_equal_sectors_do_not_look_alike(method: str) -> None:
    """Each has a vector of its own."""

    async def main() -> None:
        bench = await made(method)
        disk = await bench.open()
        await disk.write(0, bytes(range(256)) * 512)
        await bench.close()
        sectors = [bench.content[at : at + SECTOR] for at in range(len(bench.content) - 128 * KiB, len(bench.content), SECTOR)]
        assert len(set(sectors)) == len(sectors)

    run(main)


# ---------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("method", ["luks", "aes"])
def test_without_its_key_an_image_only_says_what_it_is(method: str) -> None:
    """It is opened for that without any; every request for content fails."""

    async def main() -> None:
        bench = await made(method)
        bench.always = {}
        assert "key-secret" in await is_refused(bench.open())
        disk = await bench.open(flags={"describe_only": True, "read_only": True})
        info = bench.node.driver.specific_info()
        assert info is not None and info["data"]["encrypt"]["format"] == METHODS[method]["format"].replace("qcow", "aes")
        assert bench.node.driver.encrypted
        assert await disk.read(0, 512) == bytes(512)  # not there, so nothing to be decrypted

    run(main)


def test_content_cannot_be_read_without_the_key() -> None:
    """Not even by whoever opened it to be asked."""

    async def main() -> None:
        bench = await made()
        disk = await bench.open()
        await disk.write(0, b"x" * 512)
        await bench.close()
        bench.always = {}
        disk = await bench.open(flags={"describe_only": True, "read_only": True})
        with pytest.raises(BlockIOError) as caught:
            await disk.read(0, 512)
        assert caught.value.errno == errno.EACCES

    run(main)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"key_secret": "bad"}, "passphrase is wrong"),
        ({"key_secret": "nobody"}, "no secret 'nobody'"),
        ({"key_secret": "binary"}, "UTF-8"),
        ({"key_secret": "one", "format": "aes"}, "encrypted with 'luks'"),
        ({"format": "luks"}, "key-secret"),
    ],
)
def test_a_wrong_key_is_refused(options: dict[str, Any], words: str) -> None:
    """With a reason."""

    async def main() -> None:
        bench = await made()
        assert words in await is_refused(bench.open(encrypt=Encryption(**options)))

    run(main)


def test_a_key_for_an_image_that_is_not_encrypted_is_refused() -> None:
    """Somebody believes that it is."""

    async def main() -> None:
        bench = FormatBench(Qcow2Driver)
        await bench.create(size=MiB)
        bench.secrets = SECRETS
        assert "not encrypted" in await is_refused(bench.open(encrypt=Encryption(key_secret="one")))

    run(main)


@pytest.mark.parametrize(
    "options",
    [
        {"format": "luks", "cipher_alg": "serpent-256"},
        {"format": "luks", "cipher_mode": "ecb"},
        {"format": "luks", "ivgen_alg": "lmk"},
        {"format": "luks", "hash_alg": "md5"},
        {"format": "luks", "ivgen_hash_alg": "sha256"},
        {"format": "luks", "cipher_alg": "aes-192", "cipher_mode": "cbc"},
        {"format": "luks", "ivgen_alg": "essiv", "ivgen_hash_alg": "sha1"},
        {"format": "luks", "iter_time": -1},
        {"format": "luks", "key_secret": "nobody"},
        {"format": "luks", "key_secret": None},
        {"format": "qcow", "hash_alg": "sha256"},
    ],
    ids=str,
)
def test_creation_refuses_what_is_not_offered(options: dict[str, Any]) -> None:
    """Before the file is touched."""

    async def main() -> None:
        bench = FormatBench(Qcow2Driver)
        bench.secrets = SECRETS
        with pytest.raises(CommandError):
            await bench.create(size=MiB, encrypt=EncryptionCreate(**({"key_secret": "one"} | options)))
        assert not hasattr(bench, "storage")

    run(main)


@pytest.mark.parametrize(
    "options", [{"data_file": "data", "data_file_raw": True}, {"version": "v2", "preallocation": "metadata"}], ids=str
)
def test_what_encryption_would_make_untrue_is_refused(options: dict[str, Any]) -> None:
    """A raw data file is not raw then; version 2 cannot say that preallocated clusters are zero."""
    with pytest.raises(InvalidParameter):
        run(lambda: made(**options))


async def amend(bench: FormatBench, *, force: bool = False, **options: Any) -> None:
    driver = bench.node.driver
    assert isinstance(driver, Qcow2Driver)
    await driver.change_key_slots({name.replace("_", "-"): value for name, value in options.items()}, force=force)


async def opens(image: bytes, secret: str, expected: bytes) -> bool:
    """Whether the passphrase opens the image; then its content must be the expected one, and its metadata whole."""
    other = FormatBench(Qcow2Driver)
    other.secrets, other.content = SECRETS, image
    other.always = {"encrypt": Encryption(key_secret=secret)}
    try:
        disk = await other.open(flags={"read_only": True})
    except CommandError:
        return False
    assert await disk.read(0, len(expected)) == expected
    await clean(other)
    return True


CONTENT = b"what must not be lost " * 100


async def opened(**changes: Any) -> FormatBench:
    """An image with content, open, whose passphrase is ``one``."""
    bench = await made(**changes)
    disk = await bench.open()
    await disk.write(0, CONTENT)
    await disk.flush()
    return bench


def test_passphrases_are_added_and_erased() -> None:
    """By slot, by passphrase, or by both; the content stays the same under each."""

    async def main() -> None:
        bench = await opened()
        await amend(bench, state="active", new_secret="two", iter_time=0)
        await amend(bench, state="active", new_secret="two", iter_time=0, keyslot=7)
        live = bench.storage.live
        assert await opens(bytes(live), "one", CONTENT) and await opens(bytes(live), "two", CONTENT)
        await amend(bench, state="inactive", old_secret="two", keyslot=1)
        assert await opens(bytes(live), "two", CONTENT)
        await amend(bench, state="inactive", old_secret="two")
        assert not await opens(bytes(live), "two", CONTENT) and await opens(bytes(live), "one", CONTENT)
        await amend(bench, state="active", new_secret="two", iter_time=0, keyslot=0, force=True)
        assert await opens(bytes(live), "two", CONTENT) and not await opens(bytes(live), "one", CONTENT)
        await amend(bench, state="inactive", keyslot=0, force=True)
        assert not await opens(bytes(live), "two", CONTENT)

    run(main)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state": "gone"},
        {"state": "active"},
        {"state": "active", "new-secret": "nobody"},
        {"state": "active", "new-secret": "two", "keyslot": 0},
        {"state": "active", "new-secret": "two", "keyslot": 8},
        {"state": "active", "new-secret": "two", "old-secret": "one"},
        {"state": "active", "new-secret": "two", "iter-time": -1},
        {"state": "inactive"},
        {"state": "inactive", "keyslot": 0},
        {"state": "inactive", "keyslot": 3},
        {"state": "inactive", "old-secret": "one"},
        {"state": "inactive", "old-secret": "bad"},
        {"state": "inactive", "keyslot": 0, "new-secret": "two"},
        {"state": "inactive", "keyslot": 0, "iter-time": 10},
    ],
    ids=str,
)
def test_changes_of_keys_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    """And nothing has changed then."""

    async def main() -> None:
        bench = await opened()
        before = len(bench.storage.effects)
        with pytest.raises(CommandError):
            await amend(bench, **options)
        assert len(bench.storage.effects) == before

    run(main)


def test_a_ninth_passphrase_has_no_slot() -> None:
    """It is refused instead of taking the place of another."""

    async def main() -> None:
        bench = await opened()
        for _ in range(7):
            await amend(bench, state="active", new_secret="two", iter_time=0)
        with pytest.raises(CommandError, match="in use"):
            await amend(bench, state="active", new_secret="two", iter_time=0)

    run(main)


@pytest.mark.parametrize("method", ["aes", None])
def test_only_luks_has_key_slots(method: str | None) -> None:
    """The passphrase of the legacy AES is the key."""

    async def main() -> None:
        bench = FormatBench(Qcow2Driver)
        if method is None:
            await bench.create(size=MiB)
        else:
            bench = await made(method)
        await bench.open()
        with pytest.raises(CommandError):
            await amend(bench, state="active", new_secret="two")

    run(main)


@pytest.mark.parametrize("keyslot", [1, 6])
def test_power_cuts_while_a_key_is_added_leave_the_old_keys_and_perhaps_the_new_one(keyslot: int) -> None:
    """At any moment, with any of the sectors that were not flushed: slot 6 lies on both sides of a sector's end."""

    async def main() -> None:
        bench = await opened(cluster_size=4096)
        start = len(bench.storage.effects)
        await amend(bench, state="active", new_secret="two", iter_time=0, keyslot=keyslot)
        found = []
        for moment in range(start, len(bench.storage.effects) + 1):
            for seed in range(5):
                image = bench.storage.after_power_cut(moment, Random(seed))
                assert await opens(image, "one", CONTENT)
                found.append(await opens(image, "two", CONTENT))
                offset, length = area_of(image)
                header = luks.parse_header(image[offset : offset + luks.HEADER_LENGTH], length, "image")
                assert header.slots[keyslot].active is found[-1]  # what is called active is whole
        assert found[0] is False and found[-1] is True

    run(main)


def test_power_cuts_while_a_key_is_erased_leave_the_others() -> None:
    """The slot is inactive before its material is wiped."""

    async def main() -> None:
        bench = await opened(cluster_size=4096)
        await amend(bench, state="active", new_secret="two", iter_time=0)
        start = len(bench.storage.effects)
        await amend(bench, state="inactive", old_secret="two")
        end = len(bench.storage.effects)
        for moment in (*range(start, start + 6), *range(end - 4, end + 1)):
            image = bench.storage.after_power_cut(moment, Random(moment))
            assert await opens(image, "one", CONTENT)
        assert not await opens(bytes(bench.storage.live), "two", CONTENT)

    run(main)


# ------------------------------------------------------------------------------------------------------------- hostile


def pointer_at(image: bytes) -> int:
    return image.index(struct.pack(">II", EXT_ENCRYPTION, 16)) + 8


BAD_POINTERS: dict[str, Any] = {
    "not at a cluster": lambda at, length: (at + 512, length),
    "on the header": lambda at, length: (0, length),
    "on the refcount table": lambda at, length: (65536, length),
    "behind the file": lambda at, length: (1 << 40, length),
    "behind everything": lambda at, length: ((1 << 64) - 65536, length),
    "too long for the file": lambda at, length: (at, 32 * MiB),
    "too long for any": lambda at, length: (at, (1 << 64) - 1),
    "empty": lambda at, length: (at, 0),
    "too short for its slots": lambda at, length: (at, 4096),
}


@pytest.mark.parametrize("name", BAD_POINTERS)
def test_a_pointer_that_leads_nowhere_is_refused(name: str) -> None:
    """Before anything is read by it."""

    async def main() -> None:
        bench = await made()
        image = bytearray(bench.content)
        struct.pack_into(">QQ", image, pointer_at(bench.content), *BAD_POINTERS[name](*area_of(bench.content)))
        with pytest.raises(ImageError):
            await bench.open(content=bytes(image))

    run(main)


@pytest.mark.parametrize("length", [0, 8, 24])
def test_a_pointer_of_another_length_is_refused(length: int) -> None:
    """An extension without content is no pointer either."""

    async def main() -> None:
        bench = await made()
        image = bytearray(bench.content)
        at = pointer_at(bench.content)
        struct.pack_into(">I", image, at - 4, length)
        image[at : at + 24] = bytes(24)
        with pytest.raises(ImageError):
            await bench.open(content=bytes(image))

    run(main)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_encryption_headers_raise_errors_of_ours_only(seed: int) -> None:
    """Flipped bits in header and key material, and files that end early."""

    async def main() -> None:
        random = Random(seed)
        bench = await made()
        at, _ = area_of(bench.content)
        for _ in range(20):
            image = bytearray(bench.content)
            for _ in range(3):
                place = random.choice([random.randrange(592), 4096 + random.randrange(256000)])
                image[at + place] ^= 1 << random.randrange(8)
            if random.random() < 0.2:
                del image[at + random.randrange(300000) :]
            try:
                await bench.open(content=bytes(image))
            except QBlockError:
                pass

    run(main)


def test_a_system_opens_an_image_with_a_secret_of_its_own(tmp_path: Path) -> None:
    """As over QMP: object-add, blockdev-create, blockdev-add; the secret may go when the image is open."""

    async def main() -> None:
        async with BlockSystem.create() as system:
            await system.add_object({"qom-type": "secret", "id": "sec0", "data": "pass"})
            file = {"driver": "file", "filename": str(tmp_path / "image")}
            encrypt = {"format": "luks", "key-secret": "sec0"}
            await system.opener.create_image("file", {"filename": file["filename"], "size": 0})
            made = {"file": file, "size": MiB, "encrypt": {**encrypt, "iter-time": 0}}
            await system.opener.create_image("qcow2", made)
            given = {"driver": "qcow2", "node-name": "disk", "file": file, "encrypt": encrypt}
            node = await system.opener.open_blockdev(given)
            node.monitor_owned = True
            assert NodeReports().device(node, backend=None, flat=True).encrypted
            system.objects.delete("sec0")
            with pytest.raises(CommandError, match="sec0"):
                await system.opener.open_blockdev({**given, "node-name": "again", "force-share": True, "read-only": True})

    asyncio.run(main())
