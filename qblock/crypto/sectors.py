"""Ciphers over 512-byte sectors: AES in XTS and CBC mode, with the initialisation vectors that QEMU and dm-crypt know.

Models image-formats.md sections 1.12 and 9 (plain, plain64, essiv). The package ``cryptography`` (the extra ``qblock[crypto]``)
does AES itself and is imported when the first cipher is made. Its contexts for XTS and CBC stand for one sector each, and making
one takes longer than the sector; therefore all blocks of a request go through AES at once (ECB), and what XTS and CBC add to
that is done here, on integers as long as the request: exclusive or with the tweaks, and their doubling in GF(2^128), which is one
shift for all sectors together. Encrypting in CBC mode is serial inside a sector, so there the contexts are used.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import attrs

from qblock.errors import CommandError
from qblock.units import KiB

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import CipherContext

SECTOR: Final = 512
BLOCK: Final = 16
PIECE: Final = 128 * KiB
"""Requests are worked on in pieces of this many bytes, which stay in the processor's cache."""
_BLOCKS: Final = SECTOR // BLOCK
_WORDS: Final = SECTOR // 8
_U32: Final = (1 << 32) - 1
_BIG_ENDIAN: Final = sys.byteorder == "big"

Mode: TypeAlias = Literal["xts", "cbc"]
VectorKind: TypeAlias = Literal["plain", "plain64", "essiv"]
KEY_SIZES: Final = {"aes-128": 16, "aes-192": 24, "aes-256": 32}
"""Bytes of an AES key by the name of the algorithm; XTS takes two of them."""
HASHES: Final = ("sha1", "sha224", "sha256", "sha384", "sha512")


class MissingLibrary(CommandError):
    """Encryption was asked for, and the package that does it is not installed."""

    def __init__(self) -> None:
        super().__init__("encrypted images need the package 'cryptography': install it with  pip install 'qblock[crypto]'")


@attrs.frozen
class CipherSpec:
    """How sectors are encrypted: ``algorithm`` (aes-128, ...), mode and vectors; ``vector_hash`` is for essiv only."""

    algorithm: str
    mode: Mode
    vectors: VectorKind
    vector_hash: str | None = None

    @property
    def key_length(self) -> int:
        """Bytes of a key."""
        return KEY_SIZES[self.algorithm] * (2 if self.mode == "xts" else 1)


def require_library() -> None:
    """Raise `MissingLibrary` when ``cryptography`` is not installed."""
    try:
        import cryptography.hazmat.primitives.ciphers  # noqa: F401, PLC0415 - optional, and 40 ms
    except ImportError:
        raise MissingLibrary from None


def _aes(key: bytes, *, decrypt: bool = False) -> CipherContext:
    """AES over any number of blocks. A context of its own for each piece of work: threads must not share one."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # noqa: PLC0415 - see require_library

    cipher = Cipher(algorithms.AES(key), modes.ECB())
    return cipher.decryptor() if decrypt else cipher.encryptor()


@lru_cache(maxsize=8)
def _lowest_bits(lanes: int) -> int:
    """An integer with bit 0 of each of ``lanes`` blocks set."""
    return int.from_bytes((b"\1" + bytes(BLOCK - 1)) * lanes, "little")


class SectorCipher:
    """Encrypts and decrypts runs of sectors under one key. Sector numbers count in 512 bytes. May be used from any thread."""

    def __init__(self, spec: CipherSpec, key: bytes) -> None:
        if len(key) != spec.key_length:
            raise ValueError(f"{spec.algorithm} in mode {spec.mode} takes a key of {spec.key_length} bytes, not {len(key)}")
        require_library()
        self.spec = spec
        size = KEY_SIZES[spec.algorithm]
        self._key, self._tweak_key = key[:size], key[size:]
        self._vector_key = hashlib.new(spec.vector_hash, key).digest() if spec.vector_hash is not None else b""
        if spec.vectors == "essiv" and len(self._vector_key) not in KEY_SIZES.values():
            raise ValueError(f"essiv needs a hash that is as long as an AES key, not {spec.vector_hash}")

    def encrypt(self, sector: int, plain: bytes | bytearray | memoryview) -> bytearray:
        """The encrypted form of whole sectors, of which the first one has the number ``sector``."""
        source = memoryview(plain)
        done = bytearray(len(source))
        self._work(self._encrypt_xts if self.spec.mode == "xts" else self._encrypt_cbc, sector, source, memoryview(done))
        return done

    def decrypt(self, sector: int, view: memoryview) -> None:
        """Decrypt whole sectors where they are."""
        self._work(self._decrypt_xts if self.spec.mode == "xts" else self._decrypt_cbc, sector, view, view)

    def _work(
        self, piece: Callable[[int, memoryview], bytes], sector: int, source: memoryview, target: memoryview
    ) -> None:
        assert len(source) % SECTOR == 0, "whole sectors only"
        for at in range(0, len(source), PIECE):
            target[at : at + PIECE] = piece(sector + at // SECTOR, source[at : at + PIECE])

    # ---------------------------------------------------------------------------------------------------- vectors

    def _vectors(self, sector: int, count: int) -> bytes:
        """The initialisation vectors of ``count`` sectors, one after the other."""
        numbers = range(sector, sector + count)
        words = array("Q", bytes(BLOCK * count))
        words[::2] = array("Q", [n & _U32 for n in numbers] if self.spec.vectors == "plain" else numbers)
        if _BIG_ENDIAN:
            words.byteswap()
        raw = words.tobytes()
        return _aes(self._vector_key).update(raw) if self.spec.vectors == "essiv" else raw

    def _tweaks(self, sector: int, count: int) -> int:
        """What XTS combines with the blocks of ``count`` sectors, before and after AES: a tweak for each block."""
        lanes = int.from_bytes(_aes(self._tweak_key).update(self._vectors(sector, count)), "little")
        ones, length = _lowest_bits(count), BLOCK * count
        mask = memoryview(bytearray(SECTOR * count)).cast("Q")
        for block in range(_BLOCKS):
            words = memoryview(lanes.to_bytes(length, "little")).cast("Q")
            mask[2 * block :: _WORDS] = words[::2]
            mask[2 * block + 1 :: _WORDS] = words[1::2]
            carries = lanes >> 127 & ones
            lanes = (lanes ^ carries << 127) << 1 ^ carries * 0x87
        return int.from_bytes(mask.cast("B"), "little")

    # ------------------------------------------------------------------------------------------------------ modes

    def _encrypt_xts(self, sector: int, plain: memoryview) -> bytes:
        return self._xts(_aes(self._key), sector, plain)

    def _decrypt_xts(self, sector: int, secret: memoryview) -> bytes:
        return self._xts(_aes(self._key, decrypt=True), sector, secret)

    def _xts(self, aes: CipherContext, sector: int, source: memoryview) -> bytes:
        length = len(source)
        mask = self._tweaks(sector, length // SECTOR)
        blocks = aes.update((int.from_bytes(source, "little") ^ mask).to_bytes(length, "little"))
        return (int.from_bytes(blocks, "little") ^ mask).to_bytes(length, "little")

    def _decrypt_cbc(self, sector: int, secret: memoryview) -> bytes:
        length = len(secret)
        vectors = memoryview(self._vectors(sector, length // SECTOR)).cast("Q")
        before = memoryview(bytes(BLOCK) + secret[:-BLOCK].tobytes()) if length else memoryview(b"")
        chain = memoryview(bytearray(before)).cast("Q")
        chain[::_WORDS] = vectors[::2]
        chain[1::_WORDS] = vectors[1::2]
        blocks = _aes(self._key, decrypt=True).update(secret)
        return (int.from_bytes(blocks, "little") ^ int.from_bytes(chain.cast("B"), "little")).to_bytes(length, "little")

    def _encrypt_cbc(self, sector: int, plain: memoryview) -> bytes:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # noqa: PLC0415 - see require_library

        algorithm = algorithms.AES(self._key)
        vectors = self._vectors(sector, len(plain) // SECTOR)
        done = []
        for at in range(0, len(plain), SECTOR):
            vector = vectors[at // _BLOCKS : at // _BLOCKS + BLOCK]
            done.append(Cipher(algorithm, modes.CBC(vector)).encryptor().update(plain[at : at + SECTOR]))
        return b"".join(done)
