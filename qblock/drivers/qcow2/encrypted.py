"""The part of the qcow2 driver that has to do with encryption: unlocking when it opens, what it tells of it, key slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from qblock.driver import Driver, Json
from qblock.drivers.qcow2.options import EncryptionAmend, Qcow2AmendOptions
from qblock.errors import CommandError, InvalidParameter
from qblock.options import DriverOptions, visit

if TYPE_CHECKING:
    from qblock.drivers.qcow2.encryption import GuestCipher, ImageEncryption
    from qblock.drivers.qcow2.header import Header
    from qblock.drivers.qcow2.options import Qcow2Options
    from qblock.drivers.qcow2.storage import ImageFile
    from qblock.node import BdrvChild


class EncryptedDriver(Driver):
    """What `driver.Qcow2Driver` is made of, as far as encryption is concerned."""

    options: Qcow2Options
    _file: ImageFile
    _inactive: bool
    _encryption: ImageEncryption | None = None

    async def _activate(self) -> None:
        """Begin writing."""
        raise AssertionError("provided by the driver")

    async def _unlock(self, edge: BdrvChild, header: Header) -> None:
        """Make ready to read and write guest clusters, once per open image. Raises as `encryption.open_encryption`."""
        if header.crypt_method:
            from qblock.drivers.qcow2.encryption import open_encryption  # noqa: PLC0415 - few images need it

            self._encryption = await open_encryption(
                edge, header, self.options.encrypt, self.env, describe_only=self.node.describe_only
            )
            self.encrypted = True
        elif self.options.encrypt is not None:
            raise InvalidParameter("encrypt", "cannot be given: the image is not encrypted")

    @property
    def _guest_cipher(self) -> GuestCipher | None:
        return self._encryption.cipher if self._encryption is not None else None

    amend_options_class: ClassVar[type[DriverOptions]] = Qcow2AmendOptions

    async def amend_open(self, options: Qcow2AmendOptions, *, force: bool) -> None:
        """See `SupportsOpenAmend`."""
        if options.encrypt is None:
            return
        wanted = options.encrypt.for_luks()
        if wanted is None:
            raise CommandError("only key slots of LUKS can change: the format of the encryption stays")
        await self._change_key_slots(wanted, force=force)

    async def change_key_slots(self, options: Mapping[str, Json], *, force: bool = False) -> None:
        """See `SupportsKeySlots`."""
        await self._change_key_slots(visit(EncryptionAmend, options, path="encrypt", strings=True), force=force)

    async def _change_key_slots(self, wanted: EncryptionAmend, *, force: bool) -> None:
        if self._encryption is None:
            raise CommandError("the image is not encrypted: there are no key slots to change")
        if self._encryption.luks is None:
            raise CommandError("the image is encrypted with the legacy AES; only LUKS has key slots that can change")
        if self._inactive:
            await self._activate()
        self._file.check_writable()
        from qblock.drivers.qcow2.keyslots import change_key_slots  # noqa: PLC0415 - few images need it

        await change_key_slots(self._file, self._encryption, wanted, force=force)

    def _encryption_info(self) -> Mapping[str, Json]:
        """The member ``encrypt`` of ``ImageInfoSpecificQCow2``, if there is one."""
        return {} if self._encryption is None else {"encrypt": self._encryption.info()}
