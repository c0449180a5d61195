"""Encrypted images: what lies between guest buffers and guest clusters, and the LUKS header inside an image.

Models image-formats.md section 1.12. Guest clusters are encrypted, metadata and compressed clusters are not. With LUKS the
vectors go by the place in the file (host sectors), so that a cluster which is moved is encrypted anew; with the legacy AES-CBC,
whose key is the passphrase itself, they go by the place on the disk.

The key is needed for content only: an image that was opened to be asked what it is (``NodeFlags.describe_only``) may go without.
Unlocking takes as long as whoever set the passphrase wanted, so it is done in a thread; so is the work on large requests.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import attrs

from qblock import requests
from qblock.crypto import luks
from qblock.crypto.sectors import SECTOR, CipherSpec, SectorCipher, require_library
from qblock.drivers.qcow2 import header as head
from qblock.errors import BlockIOError, CommandError, InvalidParameter
from qblock.units import KiB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qblock.driver import Json
    from qblock.drivers.qcow2.header import Header
    from qblock.drivers.qcow2.options import Encryption
    from qblock.environment import Environment
    from qblock.node import BdrvChild

T = TypeVar("T")

AES_LEGACY: Final = CipherSpec("aes-128", "cbc", "plain64")
_AES_KEY: Final = 16
_IN_THREADS_FROM: Final = 64 * KiB
"""Requests from this size on do not keep the loop's thread."""


class GuestCipher:
    """Encrypts what is written to guest clusters, and decrypts what is read from them; whole sectors only."""

    def __init__(self, cipher: SectorCipher, env: Environment, *, by_guest: bool) -> None:
        self._cipher = cipher
        self._env = env
        self._by_guest = by_guest

    def _sector(self, host: int, guest: int) -> int:
        return (guest if self._by_guest else host) // SECTOR

    async def read(self, edge: BdrvChild, host: int, guest: int, view: memoryview) -> None:
        """Fill ``view`` with what lies at ``host`` of the data edge, which is shown at ``guest`` of the disk."""
        await requests.read_into(edge, host, view)
        sector = self._sector(host, guest)
        if len(view) < _IN_THREADS_FROM or not self._env.loop_is_shared:
            self._cipher.decrypt(sector, view)
        else:
            await in_thread(self._env, lambda: self._cipher.decrypt(sector, view))

    async def encrypted(self, host: int, guest: int, plain: memoryview) -> memoryview:
        """What is to be written at ``host`` of the data edge so that ``plain`` is shown at ``guest`` of the disk."""
        sector = self._sector(host, guest)
        if len(plain) < _IN_THREADS_FROM or not self._env.loop_is_shared:
            return memoryview(self._cipher.encrypt(sector, plain))
        return memoryview(await in_thread(self._env, lambda: self._cipher.encrypt(sector, plain)))


class NoKey(GuestCipher):
    """Stands for the key of an image that was opened without."""

    def __init__(self, image: str) -> None:
        self._image = image

    def _refusal(self) -> BlockIOError:
        return BlockIOError(errno.EACCES, f"'{self._image}' is encrypted, and was opened without its key")

    async def read(self, edge: BdrvChild, host: int, guest: int, view: memoryview) -> None:
        """Raises."""
        raise self._refusal()

    async def encrypted(self, host: int, guest: int, plain: memoryview) -> memoryview:
        """Raises."""
        raise self._refusal()


async def in_thread(env: Environment, work: Callable[[], T]) -> T:
    """Do what takes long, but waits for nothing, in another thread."""
    return await asyncio.get_running_loop().run_in_executor(env.executor, work)


@attrs.define(eq=False)
class ImageEncryption:
    """The encryption of one open image. ``offset`` and ``length`` (bytes) are the place of its LUKS header, if it has one."""

    format: Literal["aes", "luks"]
    cipher: GuestCipher
    luks: luks.LuksHeader | None = None
    offset: int = 0
    length: int = 0
    key: bytes | None = attrs.field(default=None, repr=False)
    """The master key, when LUKS was unlocked."""

    def info(self) -> dict[str, Json]:
        """``ImageInfoSpecificQCow2Encryption``."""
        header = self.luks
        if header is None:
            return {"format": self.format}
        data: dict[str, Json] = {
            "ivgen-alg": header.spec.vectors,
            "hash-alg": header.hash_name,
            "cipher-alg": header.spec.algorithm,
            "uuid": header.uuid,
        }
        if header.spec.vector_hash is not None:
            data["ivgen-hash-alg"] = header.spec.vector_hash
        return data | {
            "format": self.format,
            "cipher-mode": header.spec.mode,
            "slots": [_slot_info(slot) for slot in header.slots],
            "payload-offset": header.payload_offset,
            "master-key-iters": header.digest_iterations,
        }


def _slot_info(slot: luks.KeySlot) -> dict[str, Json]:
    if not slot.active:
        return {"active": False, "key-offset": slot.offset}
    return {"active": True, "iters": slot.iterations, "key-offset": slot.offset, "stripes": slot.stripes}


# ------------------------------------------------------------------------------------------------------------- opening


async def open_encryption(
    edge: BdrvChild, header: Header, options: Encryption | None, env: Environment, *, describe_only: bool
) -> ImageEncryption:
    """The encryption of an encrypted image, unlocked by the key that ``options`` name.

    Raises `CommandError` without a key or with the wrong one, `ImageError` for damage and for ciphers that are not offered.
    """
    image = edge.node.driver.filename() or edge.node.node_name
    found: Literal["aes", "luks"] = "aes" if header.crypt_method == head.CRYPT_AES else "luks"
    given = options.format if options is not None else None
    if given not in (None, found):
        raise InvalidParameter("encrypt.format", f"is '{given}', but the image is encrypted with '{found}'")
    encryption = ImageEncryption(found, NoKey(image))
    if found == "luks":
        encryption.offset, encryption.length = header.encryption_area
        raw = await _read(edge, encryption.offset, luks.HEADER_LENGTH)
        encryption.luks = luks.parse_header(bytes(raw), encryption.length, image)
    if options is None or options.key_secret is None:
        if describe_only:
            return encryption
        raise CommandError(f"'{image}' is encrypted: give its key by encrypt.key-secret, the id of a secret object")
    passphrase = passphrase_of(env.secrets, options.key_secret)
    require_library()
    if encryption.luks is None:
        cipher = SectorCipher(AES_LEGACY, passphrase[:_AES_KEY].ljust(_AES_KEY, b"\0"))
    else:
        encryption.key = await master_key(edge, encryption, passphrase, env)
        cipher = SectorCipher(encryption.luks.spec, encryption.key)
    encryption.cipher = GuestCipher(cipher, env, by_guest=found == "aes")
    return encryption


def passphrase_of(secrets: Mapping[str, bytes], name: str) -> bytes:
    """The value of the secret object ``name``, which must be text; raises `CommandError`."""
    value = secrets.get(name)
    if value is None:
        raise CommandError(f"there is no secret '{name}': make it first (--object secret,id={name},...)")
    try:
        value.decode()
    except UnicodeDecodeError:
        raise CommandError(f"the secret '{name}' is not valid UTF-8, so it cannot be a passphrase") from None
    return value


async def _read(edge: BdrvChild, offset: int, length: int) -> bytearray:
    raw = bytearray(length)
    await requests.read_into(edge, offset, memoryview(raw))
    return raw


async def matching_slots(
    edge: BdrvChild, encryption: ImageEncryption, passphrase: bytes, env: Environment
) -> AsyncIterator[tuple[int, bytes]]:
    """Numbers of the key slots that a passphrase opens, with the master key."""
    header = encryption.luks
    assert header is not None
    for index in header.active_slots:
        material = await _read(edge, encryption.offset + header.slots[index].offset, header.material_length)
        key = await in_thread(env, partial(luks.open_slot, header, index, material, passphrase))
        if key is not None:
            yield index, key


async def master_key(edge: BdrvChild, encryption: ImageEncryption, passphrase: bytes, env: Environment) -> bytes:
    """The key of the disk; `CommandError` when the passphrase opens no slot."""
    async for _, key in matching_slots(edge, encryption, passphrase, env):
        return key
    raise CommandError("the passphrase is wrong: it opens none of the image's key slots")
