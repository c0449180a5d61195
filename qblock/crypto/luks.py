"""LUKS version 1: the header, and how a passphrase leads to the master key by way of one of eight key slots.

Models image-formats.md section 9. A slot holds the master key, split into 4000 stripes all of which are needed to get it back
(so that it can be wiped), and encrypted with what PBKDF2 makes of a passphrase; a digest in the header tells the right key.

Differs from QEMU in what is refused: ciphers other than AES, modes other than XTS and CBC (`sectors.py`), and headers that
ask for more than `MAX_ITERATIONS` rounds of PBKDF2, which would keep a processor busy for as long as the image's maker likes.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
import time
import uuid
from collections.abc import Callable
from typing import Final, cast, get_args

import attrs

from qblock.crypto.sectors import HASHES, KEY_SIZES, SECTOR, CipherSpec, Mode, SectorCipher, VectorKind
from qblock.errors import CommandError, CorruptImage, UnsupportedFeature
from qblock.units import KiB, align_up

MAGIC: Final = b"LUKS\xba\xbe"
HEADER_LENGTH: Final = 592
SLOTS: Final = 8
STRIPES: Final = 4000
MIN_ITERATIONS: Final = 1000
MAX_ITERATIONS: Final = 1 << 26
"""Rounds of PBKDF2 that a header may ask for: seven times what QEMU finds for two seconds on a machine of 2024."""
DEFAULT_ITER_TIME: Final = 2000
"""Milliseconds that unlocking a new slot should take."""

_AREA_UNIT: Final = 4 * KiB
_ACTIVE: Final = 0x00AC71F3
_INACTIVE: Final = 0x0000DEAD
_SALT: Final = 32
_DIGEST: Final = 20
_FIELDS: Final = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT: Final = struct.Struct(">II32sII")
_PROBE_ROUNDS: Final = 1 << 13
_PROBE_NS: Final = 50_000_000
_MODES: Final = get_args(Mode)
_VECTORS: Final = get_args(VectorKind)


@attrs.frozen
class KeySlot:
    """One slot. ``offset`` is where its key material lies, in bytes from the header's beginning."""

    active: bool
    iterations: int
    salt: bytes
    offset: int
    stripes: int = STRIPES


@attrs.frozen(kw_only=True)
class LuksHeader:
    """A parsed header. ``payload_offset`` is in bytes; in a qcow2 image it tells the length of the header's area only."""

    spec: CipherSpec
    hash_name: str
    payload_offset: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]

    @property
    def material_length(self) -> int:
        """Bytes of key material in a slot."""
        return self.spec.key_length * STRIPES

    def with_slot(self, index: int, slot: KeySlot) -> LuksHeader:
        """The same header with one slot changed."""
        return attrs.evolve(self, slots=(*self.slots[:index], slot, *self.slots[index + 1 :]))

    @property
    def active_slots(self) -> list[int]:
        """Numbers of the slots that hold the key."""
        return [index for index, slot in enumerate(self.slots) if slot.active]


# -------------------------------------------------------------------------------------------------------- header, bytes


def parse_header(raw: bytes, area_length: int, image: str) -> LuksHeader:
    """The header in the first bytes of an area of ``area_length`` bytes, checked whole; raises `ImageError`."""
    if len(raw) < HEADER_LENGTH or raw[:6] != MAGIC:
        raise CorruptImage(image, "its LUKS header does not begin with the LUKS magic")
    (_, version, name, mode, hash_name, payload, key_length, digest, salt, rounds, ident) = _FIELDS.unpack_from(raw)
    if version != 1:
        raise UnsupportedFeature(image, f"LUKS version {version}")
    spec = _spec(_text(name), _text(mode), key_length, image)
    if _text(hash_name) not in HASHES:
        raise UnsupportedFeature(image, f"LUKS with the hash '{_text(hash_name)}'")
    slots = []
    for index in range(SLOTS):
        state, iterations, slot_salt, sector, stripes = _SLOT.unpack_from(raw, _FIELDS.size + index * _SLOT.size)
        if state not in (_ACTIVE, _INACTIVE):
            raise CorruptImage(image, f"key slot {index} of its LUKS header is in the unknown state {state:#x}")
        slots.append(KeySlot(state == _ACTIVE, iterations, slot_salt, sector * SECTOR, stripes))
    header = LuksHeader(
        spec=spec, hash_name=_text(hash_name), payload_offset=payload * SECTOR, digest=digest, digest_salt=salt,
        digest_iterations=rounds, uuid=_text(ident), slots=tuple(slots),
    )  # fmt: skip
    _validate(header, area_length, image)
    return header


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("ascii", "backslashreplace")


def _spec(name: str, mode: str, key_length: int, image: str) -> CipherSpec:
    """The cipher that a header's texts mean; `UnsupportedFeature` for one that is not offered here."""
    shown = f"LUKS with the cipher '{name}-{mode}'"
    mode_name, _, vectors = mode.partition("-")
    vector_name, _, vector_hash = vectors.partition(":")
    if name != "aes" or mode_name not in _MODES or vector_name not in _VECTORS:
        raise UnsupportedFeature(image, shown)
    aes_length = key_length // 2 if mode_name == "xts" else key_length
    algorithm = next((alg for alg, size in KEY_SIZES.items() if size == aes_length), None)
    if algorithm is None or (mode_name == "xts" and key_length % 2):
        raise UnsupportedFeature(image, f"{shown} and a key of {key_length} bytes")
    spec = CipherSpec(algorithm, cast(Mode, mode_name), cast(VectorKind, vector_name), vector_hash or None)
    if (problem := problem_of(spec)) is not None:
        raise UnsupportedFeature(image, f"{shown}: {problem}")
    return spec


def problem_of(spec: CipherSpec) -> str | None:
    """Why there is no LUKS with this cipher; None when there is."""
    if spec.vectors != "essiv":
        if spec.vector_hash is not None:
            return f"vectors of the kind {spec.vectors} are made without a hash"
    elif spec.vector_hash not in HASHES or hashlib.new(spec.vector_hash).digest_size not in KEY_SIZES.values():
        return f"essiv needs a hash as long as an AES key, not {spec.vector_hash or 'none'}"
    if spec.key_length * STRIPES % SECTOR:
        return f"a key of {spec.key_length} bytes does not fill sectors"
    return None


def _validate(header: LuksHeader, area_length: int, image: str) -> None:
    areas = [(0, HEADER_LENGTH, "the header")]
    counts = {"the digest": header.digest_iterations}
    for index, slot in enumerate(header.slots):
        name = f"key slot {index}"
        if slot.active:
            counts[name] = slot.iterations
        if slot.stripes != STRIPES:
            raise CorruptImage(image, f"{name} of its LUKS header has {slot.stripes} stripes instead of {STRIPES}")
        areas.append((slot.offset, slot.offset + header.material_length, name))
    for name, count in counts.items():
        if count == 0:
            raise CorruptImage(image, f"{name} of its LUKS header asks for no PBKDF2 iterations at all")
        if count > MAX_ITERATIONS:
            raise UnsupportedFeature(image, f"{count} PBKDF2 iterations for {name} of LUKS (at most {MAX_ITERATIONS})")
    areas.sort()
    for (_, end, name), (start, _, other) in itertools.pairwise(areas):
        if start < end:
            raise CorruptImage(image, f"{name} and {other} of its LUKS header overlap")
    if areas[-1][1] > area_length:
        raise CorruptImage(image, f"{areas[-1][2]} of its LUKS header lies behind the end of the header's area")


def encode_header(header: LuksHeader) -> bytes:
    """The first 592 bytes of the area."""
    spec = header.spec
    vectors = spec.vectors if spec.vector_hash is None else f"{spec.vectors}:{spec.vector_hash}"
    out = _FIELDS.pack(
        MAGIC, 1, b"aes", f"{spec.mode}-{vectors}".encode(), header.hash_name.encode(), header.payload_offset // SECTOR,
        spec.key_length, header.digest, header.digest_salt, header.digest_iterations, header.uuid.encode(),
    )  # fmt: skip
    return out + b"".join(
        _SLOT.pack(
            _ACTIVE if slot.active else _INACTIVE, slot.iterations, slot.salt, slot.offset // SECTOR, slot.stripes
        )
        for slot in header.slots
    )


def area_length(spec: CipherSpec) -> int:
    """Bytes of header and key slots together, as they are laid out in new images."""
    return _AREA_UNIT + SLOTS * align_up(spec.key_length * STRIPES, _AREA_UNIT)


# ------------------------------------------------------------------------------------------------------------- new ones


def new_header(spec: CipherSpec, hash_name: str, iter_time: int) -> tuple[LuksHeader, bytes]:
    """A header without an active slot, and its master key, which is new. Takes a while (see `measure_iterations`)."""
    key = os.urandom(spec.key_length)
    rounds = max(measure_iterations(hash_name, _DIGEST, iter_time) // 8, MIN_ITERATIONS)
    salt = os.urandom(_SALT)
    step = align_up(spec.key_length * STRIPES, _AREA_UNIT)
    empty = tuple(KeySlot(False, 0, bytes(_SALT), _AREA_UNIT + index * step) for index in range(SLOTS))
    header = LuksHeader(
        spec=spec, hash_name=hash_name, payload_offset=area_length(spec), digest_salt=salt, digest_iterations=rounds,
        digest=hashlib.pbkdf2_hmac(hash_name, key, salt, rounds, _DIGEST), uuid=str(uuid.uuid4()), slots=empty,
    )  # fmt: skip
    return header, key


def measure_iterations(hash_name: str, length: int, milliseconds: int) -> int:
    """Rounds of PBKDF2 that this machine does in that time for a key of ``length`` bytes, by the processor's clock."""
    if milliseconds == 0:
        return MIN_ITERATIONS
    rounds = _PROBE_ROUNDS
    while True:
        begin = time.thread_time_ns()
        hashlib.pbkdf2_hmac(hash_name, b"password", bytes(_SALT), rounds, length)
        took = time.thread_time_ns() - begin
        if took >= _PROBE_NS:
            break
        rounds *= 2
    wanted = max(rounds * milliseconds * 1_000_000 // took, MIN_ITERATIONS)
    if wanted > MAX_ITERATIONS:
        raise CommandError(f"an iter-time of {milliseconds} ms means {wanted} PBKDF2 iterations; {MAX_ITERATIONS} are allowed")
    return wanted


def fill_slot(header: LuksHeader, index: int, key: bytes, passphrase: bytes, iter_time: int) -> tuple[LuksHeader, bytes]:
    """The header with the master key in slot ``index`` under a passphrase, and the slot's key material. Takes a while."""
    rounds = measure_iterations(header.hash_name, len(key), iter_time)
    slot = attrs.evolve(header.slots[index], active=True, iterations=rounds, salt=os.urandom(_SALT))
    derived = hashlib.pbkdf2_hmac(header.hash_name, passphrase, slot.salt, rounds, len(key))
    material = SectorCipher(header.spec, derived).encrypt(0, split(key, header.hash_name))
    return header.with_slot(index, slot), bytes(material)


# ----------------------------------------------------------------------------------------------------------- unlocking


def open_slot(header: LuksHeader, index: int, material: bytearray, passphrase: bytes) -> bytes | None:
    """The master key, when the passphrase is the one of slot ``index``; ``material`` is used up. Takes a while."""
    slot, length = header.slots[index], header.spec.key_length
    derived = hashlib.pbkdf2_hmac(header.hash_name, passphrase, slot.salt, slot.iterations, length)
    SectorCipher(header.spec, derived).decrypt(0, memoryview(material))
    key = merge(material, length, header.hash_name)
    digest = hashlib.pbkdf2_hmac(header.hash_name, key, header.digest_salt, header.digest_iterations, _DIGEST)
    return key if digest == header.digest else None


def split(key: bytes, hash_name: str) -> bytes:
    """The key as `STRIPES` stripes of its length that are random, each taken alone or with any others but all."""
    length = len(key)
    stripes = os.urandom(length * (STRIPES - 1))
    return stripes + _exclusive_or(key, _fold(stripes, length, hash_name))


def merge(stripes: bytes | bytearray, length: int, hash_name: str) -> bytes:
    """The key that was split into these stripes."""
    last = (STRIPES - 1) * length
    return _exclusive_or(bytes(stripes[last : last + length]), _fold(stripes[:last], length, hash_name))


def _fold(stripes: bytes | bytearray, length: int, hash_name: str) -> bytes:
    make: Callable[[bytes], hashlib._Hash] = getattr(hashlib, hash_name)
    size = make(b"").digest_size
    pieces = [(struct.pack(">I", number), start) for number, start in enumerate(range(0, length, size))]
    folded = bytes(length)
    for at in range(0, len(stripes), length):
        mixed = _exclusive_or(folded, stripes[at : at + length])
        hashed = [make(number + mixed[start : start + size]).digest() for number, start in pieces]
        folded = b"".join(hashed[:-1]) + hashed[-1][: length - pieces[-1][1]]
    return folded


def _exclusive_or(one: bytes, other: bytes | bytearray) -> bytes:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")
