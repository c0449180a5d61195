"""qblock: QEMU's block layer in Python. Disk images, live chains of them, block jobs, and the monitor that drives them.

The public names below are imported when first used (PEP 562), so that ``import qblock`` costs next to nothing. For plain
scripts: ``qblock.open(path)``. For those who drive graphs and jobs: `BlockSystem`. Everything else is found in the modules
that `docs/architecture.md` describes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qblock.clock import CoSleep, LoopClock, RealClock
    from qblock.committing import commit
    from qblock.device_dirty import DeviceDirty
    from qblock.errors import (
        BlockIOError,
        CommandError,
        ImageError,
        JobCancelled,
        OpenDenied,
        QBlockError,
    )
    from qblock.image import Image, ImageFile, MapExtent, create
    from qblock.image import open_image as open
    from qblock.jobs.job import Job
    from qblock.library import amend, check, compare, convert, info, layers, map, measure
    from qblock.monitor.client import QmpClient
    from qblock.monitor.dialects import Dialect
    from qblock.policy import OpenPolicy
    from qblock.rebasing import rebase
    from qblock.resizing import resize
    from qblock.system import BlockSystem

__version__: Final = "0.1.0"

__all__ = [
    "BlockIOError",
    "BlockSystem",
    "CoSleep",
    "CommandError",
    "DeviceDirty",
    "Dialect",
    "Image",
    "ImageError",
    "ImageFile",
    "Job",
    "JobCancelled",
    "LoopClock",
    "MapExtent",
    "OpenDenied",
    "OpenPolicy",
    "QBlockError",
    "QmpClient",
    "RealClock",
    "amend",
    "check",
    "commit",
    "compare",
    "convert",
    "create",
    "info",
    "layers",
    "map",
    "measure",
    "open",
    "rebase",
    "resize",
]

_HOMES: Final[Mapping[str, str]] = {
    "BlockIOError": "qblock.errors:BlockIOError",
    "BlockSystem": "qblock.system:BlockSystem",
    "CoSleep": "qblock.clock:CoSleep",
    "CommandError": "qblock.errors:CommandError",
    "DeviceDirty": "qblock.device_dirty:DeviceDirty",
    "Dialect": "qblock.monitor.dialects:Dialect",
    "Image": "qblock.image:Image",
    "ImageError": "qblock.errors:ImageError",
    "ImageFile": "qblock.image:ImageFile",
    "Job": "qblock.jobs.job:Job",
    "JobCancelled": "qblock.errors:JobCancelled",
    "LoopClock": "qblock.clock:LoopClock",
    "MapExtent": "qblock.image:MapExtent",
    "OpenDenied": "qblock.errors:OpenDenied",
    "OpenPolicy": "qblock.policy:OpenPolicy",
    "QBlockError": "qblock.errors:QBlockError",
    "QmpClient": "qblock.monitor.client:QmpClient",
    "RealClock": "qblock.clock:RealClock",
    "commit": "qblock.committing:commit",
    "create": "qblock.image:create",
    "amend": "qblock.library:amend",
    "check": "qblock.library:check",
    "compare": "qblock.library:compare",
    "convert": "qblock.library:convert",
    "info": "qblock.library:info",
    "layers": "qblock.library:layers",
    "map": "qblock.library:map",
    "measure": "qblock.library:measure",
    "open": "qblock.image:open_image",
    "rebase": "qblock.rebasing:rebase",
    "resize": "qblock.resizing:resize",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'qblock' has no attribute {name!r}")
    import importlib  # noqa: PLC0415 - only when a public name is used for the first time

    module, _, attribute = home.partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
