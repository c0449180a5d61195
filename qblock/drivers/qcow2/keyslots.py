"""Adding and erasing the passphrases of an image that is encrypted with LUKS: its key slots.

Models image-formats.md section 9 (amend). Order of effects: a slot becomes active by the write of one word, when all that it
says and the key material are durable; it is made inactive first when it is to be erased, and its key material is overwritten
many times after that. So a crash leaves the old slots or the new ones, but for a slot that is replaced by force: that one is
empty meanwhile.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import attrs

from qblock.crypto import luks
from qblock.drivers.qcow2.encrypting import checked_iter_time
from qblock.drivers.qcow2.encryption import ImageEncryption, in_thread, matching_slots, passphrase_of
from qblock.errors import CommandError, InvalidParameter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qblock.drivers.qcow2.options import EncryptionAmend
    from qblock.drivers.qcow2.storage import ImageFile

ERASURES: Final = 40
"""How often the key material of an erased slot is overwritten with noise."""


async def change_key_slots(
    file: ImageFile, encryption: ImageEncryption, options: EncryptionAmend, *, force: bool
) -> None:
    """Do what the options ask for; durable on return. ``force`` allows to lose the last slot, or what a slot holds.

    Raises `CommandError` when it cannot be done (nothing has changed then) and `BlockIOError`.
    """
    changes = KeySlots(file, encryption)
    if options.keyslot is not None and not 0 <= options.keyslot < luks.SLOTS:
        raise InvalidParameter("encrypt.keyslot", f"must be from 0 to {luks.SLOTS - 1}, not {options.keyslot}")
    if options.state == "active":
        await changes.add(options, force=force)
    else:
        await changes.erase(options, force=force)


class KeySlots:
    """The key slots of an image that is open for writing."""

    def __init__(self, file: ImageFile, encryption: ImageEncryption) -> None:
        self.file = file
        self.encryption = encryption

    @property
    def header(self) -> luks.LuksHeader:
        """What the file says, durably."""
        assert self.encryption.luks is not None
        return self.encryption.luks

    @property
    def _secrets(self) -> Mapping[str, bytes]:
        return self.file.env.secrets

    async def add(self, options: EncryptionAmend, *, force: bool) -> None:
        """Make the key available under one more passphrase."""
        if options.new_secret is None:
            raise InvalidParameter("encrypt.new-secret", "is missing: the passphrase for the key slot")
        if options.old_secret is not None:
            raise InvalidParameter("encrypt.old-secret", "is for erasing key slots")
        index = options.keyslot if options.keyslot is not None else self._free_slot()
        if self.header.slots[index].active and not force:
            raise CommandError(f"key slot {index} is in use: erase it first, or use force")
        passphrase, iter_time = passphrase_of(self._secrets, options.new_secret), checked_iter_time(options.iter_time)
        header, key = self.header, self.encryption.key
        assert key is not None, "the image was opened with its key"
        filled, material = await in_thread(
            self.file.env, lambda: luks.fill_slot(header, index, key, passphrase, iter_time)
        )
        slot = filled.slots[index]
        if header.slots[index].active:
            await self._write_slot(index, attrs.evolve(header.slots[index], active=False))
        await self._write(slot.offset, material)
        await self._write_slot(index, attrs.evolve(slot, active=False))
        await self._write_slot(index, slot)

    def _free_slot(self) -> int:
        free = next((index for index, slot in enumerate(self.header.slots) if not slot.active), None)
        if free is None:
            raise CommandError("all key slots are in use: erase one first, or give keyslot and use force")
        return free

    async def erase(self, options: EncryptionAmend, *, force: bool) -> None:
        """Take passphrases away."""
        if options.new_secret is not None:
            raise InvalidParameter("encrypt.new-secret", "is for adding key slots")
        if options.iter_time is not None:
            raise InvalidParameter("encrypt.iter-time", "is for adding key slots")
        if options.keyslot is None and options.old_secret is None:
            raise CommandError("tell which key slots are to be erased: by encrypt.keyslot, encrypt.old-secret, or both")
        slots = await self._slots_to_erase(options, force=force)
        if not force and len(slots) >= len(self.header.active_slots):
            raise CommandError("no key slot would be left, and all data in the image would be lost; use force to do that")
        for index in slots:
            await self._erase_slot(index)

    async def _slots_to_erase(self, options: EncryptionAmend, *, force: bool) -> list[int]:
        index = options.keyslot
        if index is not None and not self.header.slots[index].active and (not force or options.old_secret is not None):
            raise CommandError(f"key slot {index} is erased already")
        if options.old_secret is None:
            assert index is not None
            return [index]
        passphrase = passphrase_of(self._secrets, options.old_secret)
        found = matching_slots(self.file.edge, self.encryption, passphrase, self.file.env)
        slots = [match async for match, _ in found if index is None or match == index]
        if not slots:
            where = "no key slot" if index is None else f"key slot {index} does not"
            raise CommandError(f"{where} {'has' if index is None else 'have'} the passphrase of '{options.old_secret}'")
        return slots

    async def _erase_slot(self, index: int) -> None:
        slot = self.header.slots[index]
        await self._write_slot(index, attrs.evolve(slot, active=False))
        for _ in range(ERASURES):
            await self._write(slot.offset, os.urandom(self.header.material_length))
        await self._write_slot(index, attrs.evolve(slot, active=False, iterations=0, salt=bytes(len(slot.salt))))

    async def _write(self, offset: int, data: bytes) -> None:
        await self.file.write_metadata(self.encryption.offset + offset, memoryview(data))
        await self.file.barrier()

    async def _write_slot(self, index: int, slot: luks.KeySlot) -> None:
        header = self.header.with_slot(index, slot)
        await self._write(0, luks.encode_header(header))
        self.encryption.luks = header
