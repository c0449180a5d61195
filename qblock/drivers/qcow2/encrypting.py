"""New encrypted images: their options checked, and the LUKS header with its first key slot made.

Models ``QCryptoBlockCreateOptions`` as far as `crypto.sectors` and `crypto.luks` go; other ciphers and hashes are refused by
name. Finding out how many PBKDF2 iterations take ``iter-time`` is work for a thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast, get_args

import attrs

from qblock.crypto import luks
from qblock.crypto.sectors import HASHES, KEY_SIZES, CipherSpec, Mode, VectorKind, require_library
from qblock.drivers.qcow2 import header as head
from qblock.drivers.qcow2.encryption import in_thread, passphrase_of
from qblock.errors import CommandError, InvalidParameter
from qblock.units import align_up

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qblock.drivers.qcow2.options import EncryptionCreate
    from qblock.environment import Environment

_LUKS_ONLY: Final = ("cipher_alg", "cipher_mode", "ivgen_alg", "ivgen_hash_alg", "hash_alg", "iter_time")
DEFAULT_HASH: Final = "sha256"


@attrs.frozen
class NewEncryption:
    """What the header of a new image has to say of its encryption; ``area`` is the LUKS header with its key slots, or empty."""

    method: int
    area: bytes = attrs.field(repr=False, default=b"")

    def extension(self, offset: int) -> head.Extension:
        """The pointer to the area, which lies at ``offset``."""
        return head.Extension(head.EXT_ENCRYPTION, offset.to_bytes(8, "big") + len(self.area).to_bytes(8, "big"))


async def new_encryption(options: EncryptionCreate | None, env: Environment) -> NewEncryption | None:
    """Check the options and make what they ask for. Raises `CommandError`."""
    if options is None:
        return None
    passphrase = _passphrase(options, env.secrets)
    if options.format == "qcow":
        return NewEncryption(head.CRYPT_AES)
    spec, hash_name = luks_spec(options), options.hash_alg or DEFAULT_HASH
    iter_time = checked_iter_time(options.iter_time)

    def make() -> bytes:
        header, key = luks.new_header(spec, hash_name, iter_time)
        header, material = luks.fill_slot(header, 0, key, passphrase, iter_time)
        area = bytearray(header.payload_offset)
        area[: luks.HEADER_LENGTH] = luks.encode_header(header)
        area[header.slots[0].offset : header.slots[0].offset + len(material)] = material
        return bytes(area)

    return NewEncryption(head.CRYPT_LUKS, await in_thread(env, make))


def encryption_overhead(options: EncryptionCreate, cluster: int) -> int:
    """Bytes that encryption adds to an image with clusters of ``cluster`` bytes; raises `CommandError` as creating would."""
    if options.key_secret is None:
        raise InvalidParameter("encrypt.key-secret", "is missing: the id of a secret object with the passphrase")
    return align_up(luks.area_length(luks_spec(options)), cluster) if options.format == "luks" else 0


def _passphrase(options: EncryptionCreate, secrets: Mapping[str, bytes]) -> bytes:
    if options.key_secret is None:
        raise InvalidParameter("encrypt.key-secret", "is missing: the id of a secret object with the passphrase")
    if options.format == "qcow":
        for name in _LUKS_ONLY:
            if getattr(options, name) is not None:
                raise InvalidParameter(f"encrypt.{name.replace('_', '-')}", "is for LUKS only")
    passphrase = passphrase_of(secrets, options.key_secret)
    require_library()
    return passphrase


def luks_spec(options: EncryptionCreate) -> CipherSpec:
    """The cipher that the options name, with defaults filled in; `InvalidParameter` for one that is not offered."""
    algorithm, mode = options.cipher_alg or "aes-256", options.cipher_mode or "xts"
    vectors, vector_hash = options.ivgen_alg or "plain64", options.ivgen_hash_alg
    if vectors == "essiv" and vector_hash is None:
        vector_hash = DEFAULT_HASH
    offered = (
        ("cipher-alg", algorithm, tuple(KEY_SIZES)),
        ("cipher-mode", mode, get_args(Mode)),
        ("ivgen-alg", vectors, get_args(VectorKind)),
        ("ivgen-hash-alg", vector_hash, (None, *HASHES)),
        ("hash-alg", options.hash_alg, (None, *HASHES)),
    )
    for name, value, values in offered:
        if value not in values:
            shown = ", ".join(known for known in values if known is not None)
            raise InvalidParameter(f"encrypt.{name}", f"cannot be '{value}': these are offered: {shown}")
    spec = CipherSpec(algorithm, cast(Mode, mode), cast(VectorKind, vectors), vector_hash)
    if (problem := luks.problem_of(spec)) is not None:
        raise CommandError(f"there is no LUKS encryption with {algorithm}, {mode} and {vectors}: {problem}")
    return spec


def checked_iter_time(milliseconds: int | None) -> int:
    """The time that unlocking is to take, or the default; with 0 it takes as few iterations as are allowed."""
    if milliseconds is None:
        return luks.DEFAULT_ITER_TIME
    if milliseconds < 0:
        raise InvalidParameter("encrypt.iter-time", "must not be negative")
    return milliseconds
