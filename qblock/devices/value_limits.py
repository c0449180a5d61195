"""Values of properties that a device cannot be made with, although their kinds have them.

Models what virtio-blk, virtio-scsi, nvme, IDE disks and floppy drives of QEMU 7.2 refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from qblock.devices.properties import Value
from qblock.errors import InvalidParameter

_Accepts: TypeAlias = Callable[[int], bool]
_Limit: TypeAlias = tuple[str, _Accepts]

_MAX_VIRTIO_QUEUE: Final = 1024
_MAX_SCSI_QUEUES: Final = 1022
_MAX_SECTORS: Final = 4194303
_MAX_MSIX: Final = 2048
_UNSET_16: Final = (1 << 16) - 1
_UNSET_32: Final = (1 << 32) - 1


def _between(low: int, high: int, *unset: int) -> _Limit:
    """From ``low`` to ``high``, or one of the values that stand for none."""
    return f"must be from {low} to {high}", lambda value: low <= value <= high or value in unset


_VIRTIO_QUEUE: Final[_Limit] = (
    f"must be a power of two from 4 to {_MAX_VIRTIO_QUEUE}",
    lambda value: 2 < value <= _MAX_VIRTIO_QUEUE and not value & (value - 1),
)
_FLOPPY_BLOCK: Final[_Limit] = ("can only be 512 on a floppy disk", lambda value: value in (0, 512))
_IDE_DISCARD: Final[_Limit] = ("can only be 512 on an IDE bus", lambda value: value in (0, 512, _UNSET_32))

_IDE: Final = {"discard_granularity": _IDE_DISCARD}
_LIMITS: Final[Mapping[str, Mapping[str, _Limit]]] = {
    "virtio-blk": {
        "num-queues": _between(1, _MAX_VIRTIO_QUEUE, _UNSET_16),
        "queue-size": _VIRTIO_QUEUE,
        "max-discard-sectors": _between(1, _MAX_SECTORS),
        "max-write-zeroes-sectors": _between(1, _MAX_SECTORS),
    },
    "virtio-scsi": {
        "num_queues": _between(1, _MAX_SCSI_QUEUES, _UNSET_32),
        "virtqueue_size": _between(3, _MAX_VIRTIO_QUEUE),
    },
    "nvme": {
        "num_queues": ("must be at least 2, one of which is for the administrator", lambda value: value != 1),
        "max_ioqpairs": _between(1, _UNSET_16),
        "msix_qsize": _between(1, _MAX_MSIX),
    },
    "ide-hd": _IDE,
    "ide-cd": _IDE,
    "floppy": dict.fromkeys(("logical_block_size", "physical_block_size"), _FLOPPY_BLOCK),
}


def check_limits(model: str, values: Mapping[str, Value]) -> None:
    """Raise `InvalidParameter` for a value with which there is no device of that model."""
    family = model.partition("-pci")[0] if model.startswith("virtio-") else model
    for name, (says, accepts) in _LIMITS.get(family, {}).items():
        value = values.get(name)
        if isinstance(value, int) and not accepts(value):
            raise InvalidParameter(f"{model}.{name}", f"{says}, not {value}")
