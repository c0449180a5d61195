"""Secrets that management software hands over encrypted by a master key, as libvirt does with every passphrase."""

from __future__ import annotations

import base64
from typing import Any

import pytest

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from qblock.errors import CommandError
from qblock.system import BlockSystem
from qblock.testing.simloop import run

KEY, VECTOR = bytes(range(32)), bytes(range(16))


def encrypted(plain: bytes, key: bytes = KEY) -> str:
    """In base64, as ``openssl enc -aes-256-cbc -a`` makes it."""
    padding = 16 - len(plain) % 16
    return _base64(Cipher(algorithms.AES(key), modes.CBC(VECTOR)).encryptor().update(plain + bytes([padding]) * padding))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def secret_of(**members: Any) -> bytes:
    """What a secret says that is encrypted by the secret ``master``."""
    found = bytearray()

    async def main() -> None:
        async with BlockSystem.create() as system:
            await system.add_object({"qom-type": "secret", "id": "master", "format": "base64", "data": _base64(KEY)})
            await system.add_object({"qom-type": "secret", "id": "s", "format": "base64", **members})
            found.extend(system.env.secrets["s"])

    run(main)
    return bytes(found)


@pytest.mark.parametrize("plain", [b"", b"secret", b"sixteen bytes!!!", bytes(range(256))], ids=len)
def test_an_encrypted_secret_is_read_by_its_master_key(plain: bytes) -> None:
    """AES-256-CBC with padding, as the documentation of QEMU's secrets has it."""
    assert secret_of(data=encrypted(plain), keyid="master", iv=_base64(VECTOR)) == plain


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"keyid": "nosuch"}, "'nosuch', which is not there"),
        ({"iv": None}, "needs an 'iv'"),
        ({"iv": "AAAA"}, "has 16 bytes, and this one has 3"),
        ({"iv": "?"}, "not valid base64"),
        ({"data": "AAAA"}, "multiple of 16"),
        ({"data": ""}, "multiple of 16"),
        ({"data": encrypted(b"x", key=bytes(32))}, "another master key"),
        ({"keyid": "s"}, "'s', which is not there"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_secret_that_cannot_be_read_is_refused(members: dict[str, Any], reason: str) -> None:
    """With the reason; nothing is guessed."""
    given = {"data": encrypted(b"x"), "keyid": "master", "iv": _base64(VECTOR)} | members
    with pytest.raises(CommandError, match=reason):
        secret_of(**{key: value for key, value in given.items() if value is not None})


def test_a_master_key_of_another_length_is_refused() -> None:
    """Only AES-256 is there."""

    async def main() -> None:
        async with BlockSystem.create() as system:
            await system.add_object({"qom-type": "secret", "id": "short", "data": "0123"})
            members = {"data": encrypted(b"x"), "format": "base64", "keyid": "short", "iv": _base64(VECTOR)}
            with pytest.raises(CommandError, match="has 32 bytes, and this one has 4"):
                await system.add_object({"qom-type": "secret", "id": "s", **members})

    run(main)
