"""Secrets that travel encrypted by another secret: AES-256 in CBC mode, padded to whole blocks (PKCS #7).

Models ``keyid`` and ``iv`` of QEMU's secret objects, by which management software hands passphrases over on a command line that
anybody can read.
"""

from __future__ import annotations

from typing import Final

from qblock.crypto.sectors import BLOCK, require_library
from qblock.errors import CommandError

KEY_LENGTH: Final = 32


def decrypt_secret(data: bytes, *, key: bytes, vector: bytes) -> bytes:
    """What ``data`` says, by the master ``key`` of 32 bytes and the initialisation ``vector`` of 16.

    Raises `CommandError`: also for a key that is not the right one, if the padding tells.
    """
    if len(key) != KEY_LENGTH:
        raise CommandError(f"A master key has {KEY_LENGTH} bytes, and this one has {len(key)}")
    if len(vector) != BLOCK:
        raise CommandError(f"An initialisation vector has {BLOCK} bytes, and this one has {len(vector)}")
    if not data or len(data) % BLOCK:
        raise CommandError(f"An encrypted secret is a multiple of {BLOCK} bytes, and this one has {len(data)}")
    require_library()
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # noqa: PLC0415 - see require_library

    plain = Cipher(algorithms.AES(key), modes.CBC(vector)).decryptor().update(data)
    padding = plain[-1]
    if not 1 <= padding <= BLOCK or plain[-padding:] != bytes([padding]) * padding:
        raise CommandError("The secret does not end in padding: it was encrypted by another master key, or is damaged")
    return plain[:-padding]
