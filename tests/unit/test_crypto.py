"""Sector ciphers and LUKS headers: held against the library's own modes, and against headers that lie."""

from __future__ import annotations

import hashlib
import struct
import sys
from random import Random
from typing import Any

import attrs
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from qblock.crypto import luks
from qblock.crypto.sectors import KEY_SIZES, PIECE, SECTOR, CipherSpec, MissingLibrary, SectorCipher
from qblock.errors import CommandError, CorruptImage, ImageError, UnsupportedFeature

SPEC = CipherSpec("aes-256", "xts", "plain64")


def one_sector(spec: CipherSpec, key: bytes, number: int, plain: bytes) -> bytes:
    """A sector by the library's own XTS and CBC."""
    vector = (number & 0xFFFFFFFF if spec.vectors == "plain" else number).to_bytes(16, "little")
    if spec.vectors == "essiv":
        assert spec.vector_hash is not None
        inner = Cipher(algorithms.AES(hashlib.new(spec.vector_hash, key).digest()), modes.ECB())
        vector = inner.encryptor().update(vector)
    mode = modes.XTS(vector) if spec.mode == "xts" else modes.CBC(vector)
    return Cipher(algorithms.AES(key), mode).encryptor().update(plain)


@pytest.mark.parametrize("algorithm", KEY_SIZES)
@pytest.mark.parametrize("mode", ["xts", "cbc"])
@pytest.mark.parametrize("vectors", ["plain", "plain64", "essiv"])
def test_many_sectors_at_once_are_what_each_of_them_is_alone(algorithm: str, mode: Any, vectors: Any) -> None:
    """Around the places where a sector number needs more than 32 bits, and where a piece of work ends."""
    spec = CipherSpec(algorithm, mode, vectors, "sha256" if vectors == "essiv" else None)
    random = Random(f"{algorithm} {mode} {vectors}")
    key, count = random.randbytes(spec.key_length), PIECE // SECTOR + 3
    plain = random.randbytes(count * SECTOR)
    cipher = SectorCipher(spec, key)
    for first in (0, 1, (1 << 32) - 2, (1 << 47) - 7):
        secret = cipher.encrypt(first, plain)
        if (algorithm, mode) != ("aes-192", "xts"):  # the library has no such XTS
            for i in (0, 1, 2, count - 3, count - 1):
                part = slice(i * SECTOR, (i + 1) * SECTOR)
                assert secret[part] == one_sector(spec, key, first + i, plain[part])
        cipher.decrypt(first, memoryview(secret))
        assert secret == plain


def test_a_key_of_the_wrong_length_is_refused() -> None:
    """It would be cut in halves wrongly."""
    with pytest.raises(ValueError, match="64 bytes"):
        SectorCipher(SPEC, bytes(32))


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an optional extra."""
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(MissingLibrary, match=r"pip install 'qblock\[crypto\]'"):
        SectorCipher(SPEC, bytes(64))


@pytest.mark.parametrize("hash_name", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("length", [16, 48, 64])
def test_a_key_comes_back_from_all_of_its_stripes_and_from_no_fewer(hash_name: str, length: int) -> None:
    """One flipped bit in any stripe destroys it: that is what makes it possible to wipe it."""
    key = Random(length).randbytes(length)
    stripes = bytearray(luks.split(key, hash_name))
    assert len(stripes) == length * luks.STRIPES
    assert luks.merge(stripes, length, hash_name) == key
    for at in (0, len(stripes) // 2, len(stripes) - 1):
        stripes[at] ^= 1
        assert luks.merge(stripes, length, hash_name) != key
        stripes[at] ^= 1


def made() -> tuple[luks.LuksHeader, bytes, bytes]:
    """A header with one active slot, its key, and the slot's material."""
    header, key = luks.new_header(SPEC, "sha256", 0)
    header, material = luks.fill_slot(header, 0, key, b"secret", 0)
    return header, key, material


def test_a_slot_opens_with_its_passphrase_only() -> None:
    """The digest in the header tells the right key from any other."""
    header, key, material = made()
    assert header.slots[0].iterations == header.digest_iterations == luks.MIN_ITERATIONS
    assert luks.open_slot(header, 0, bytearray(material), b"secret") == key
    assert luks.open_slot(header, 0, bytearray(material), b"Secret") is None
    damaged = bytearray(material)
    damaged[1000] ^= 4
    assert luks.open_slot(header, 0, damaged, b"secret") is None


def test_a_header_is_read_as_it_was_written() -> None:
    """Also one with vectors that need a hash."""
    header, _, _ = made()
    other = attrs.evolve(header, spec=CipherSpec("aes-128", "cbc", "essiv", "sha256"), hash_name="sha512")
    for one in (header, other):
        raw = luks.encode_header(one)
        assert len(raw) == luks.HEADER_LENGTH
        assert luks.parse_header(raw, one.payload_offset, "image") == one


def test_more_time_means_more_iterations_up_to_a_limit() -> None:
    """What nobody could unlock here is not made here either."""
    assert luks.measure_iterations("sha256", 64, 0) == luks.MIN_ITERATIONS
    with pytest.raises(CommandError, match="iterations"):
        luks.measure_iterations("sha256", 64, 10_000_000)


SLOT_1 = 208 + 48
BAD_HEADERS: dict[str, tuple[int, str, tuple[Any, ...], type[ImageError]]] = {
    "magic": (0, ">6s", (b"LUKS\xba\xbf",), CorruptImage),
    "version 2": (6, ">H", (2,), UnsupportedFeature),
    "another cipher": (8, ">32s", (b"serpent",), UnsupportedFeature),
    "another mode": (40, ">32s", (b"ctr-plain64",), UnsupportedFeature),
    "no vectors": (40, ">32s", (b"ecb",), UnsupportedFeature),
    "essiv without a hash": (40, ">32s", (b"xts-essiv",), UnsupportedFeature),
    "essiv with a short hash": (40, ">32s", (b"xts-essiv:sha1",), UnsupportedFeature),
    "bytes that are no text": (40, ">32s", (b"\xff" * 32,), UnsupportedFeature),
    "another hash": (72, ">32s", (b"whirlpool",), UnsupportedFeature),
    "a hash with shake in its name": (72, ">32s", (b"shake_128",), UnsupportedFeature),
    "no key": (108, ">I", (0,), UnsupportedFeature),
    "a key of an odd length": (108, ">I", (33,), UnsupportedFeature),
    "an endless key": (108, ">I", (0xFFFFFFFF,), UnsupportedFeature),
    "no digest iterations": (164, ">I", (0,), CorruptImage),
    "endless digest iterations": (164, ">I", (0xFFFFFFFF,), UnsupportedFeature),
    "no slot iterations": (212, ">I", (0,), CorruptImage),
    "endless slot iterations": (212, ">I", (0xFFFFFFFF,), UnsupportedFeature),
    "a slot in no state": (SLOT_1, ">I", (7,), CorruptImage),
    "a slot on the header": (SLOT_1 + 40, ">I", (0,), CorruptImage),
    "a slot on another": (SLOT_1 + 40, ">I", (9,), CorruptImage),
    "a slot behind the area": (SLOT_1 + 40, ">I", (0xFFFFFFFF,), CorruptImage),
    "few stripes": (SLOT_1 + 44, ">I", (1,), CorruptImage),
    "many stripes": (SLOT_1 + 44, ">I", (0xFFFFFFFF,), CorruptImage),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_header_that_lies_is_refused(name: str) -> None:
    """By its values alone: before a passphrase is tried, and before anything is read by them."""
    header, _, _ = made()
    raw = bytearray(luks.encode_header(header))
    offset, code, values, kind = BAD_HEADERS[name]
    struct.pack_into(code, raw, offset, *values)
    with pytest.raises(kind):
        luks.parse_header(bytes(raw), header.payload_offset, "image")


@pytest.mark.parametrize("length", [0, 6, 591])
def test_a_header_cut_short_is_refused(length: int) -> None:
    """The file may end anywhere."""
    header, _, _ = made()
    with pytest.raises(CorruptImage):
        luks.parse_header(luks.encode_header(header)[:length], header.payload_offset, "image")


@pytest.mark.parametrize("seed", range(10))
def test_flipped_bits_in_a_header_raise_image_errors_only(seed: int) -> None:
    """Or are harmless."""
    random = Random(seed)
    header, _, _ = made()
    for _ in range(100):
        raw = bytearray(luks.encode_header(header))
        for _ in range(random.randrange(1, 4)):
            raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
        try:
            luks.parse_header(bytes(raw), header.payload_offset, "image")
        except ImageError:
            pass
