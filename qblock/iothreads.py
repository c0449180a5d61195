"""I/O threads: what nodes and guest devices can be assigned to, with the settings of each.

Models the object ``iothread`` of QEMU 7.2. Differs from QEMU in that all requests are served by one loop, whatever they are
assigned to, so that the settings, which are about polling and threads, have no effect. What is assigned to which thread still
decides what may be put together: see `homes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs

from qblock.errors import CommandError, InvalidParameter
from qblock.options import dump, option, visit

MAX_POOL: Final = (1 << 31) - 1
"""The most worker threads that can be asked for."""


@attrs.frozen(slots=False)
class IOThreadSettings:
    """The properties of an ``iothread``. Without slots, since the options of the object have these and others."""

    thread_pool_min: int = option(0, doc="worker threads that are kept", since="7.1")
    aio_max_batch: int = option(0, doc="requests that go to the kernel at once; 0: as many as there are", since="6.1")
    thread_pool_max: int = option(64, doc="worker threads that there may be", since="7.1")
    poll_max_ns: int = option(32768, doc="how long to poll at most, in nanoseconds; 0: not at all", since="2.9")
    poll_grow: int = option(0, doc="what the time to poll is multiplied by; 0: by two", since="2.9")
    poll_shrink: int = option(0, doc="what the time to poll is divided by; 0: it begins anew", since="2.9")


@attrs.define(eq=False)
class IOThread:
    """One I/O thread; ``settings`` can be changed at any time."""

    name: str
    settings: IOThreadSettings = attrs.field(factory=IOThreadSettings)

    def change(self, members: Mapping[str, Any]) -> None:
        """Replace some of the settings (JSON); raises `InvalidParameter` and `CommandError`, and then nothing has changed."""
        settings: IOThreadSettings = visit(IOThreadSettings, {**dump(self.settings), **members})
        check_settings(settings)
        self.settings = settings


def check_settings(settings: IOThreadSettings) -> None:
    """Raise `InvalidParameter` for a negative number, and `CommandError` for an impossible number of worker threads."""
    for name, value in dump(settings).items():
        if value < 0:
            raise InvalidParameter(name, f"cannot be negative ({value})")
    least, most = settings.thread_pool_min, settings.thread_pool_max
    if not max(1, least) <= most <= MAX_POOL:
        raise CommandError(
            f"There cannot be from {least} ('thread-pool-min') to {most} ('thread-pool-max') worker threads: the second number "
            f"must be from 1 to {MAX_POOL}, and not below the first"
        )


def describe(thread: IOThread | None) -> str:
    """How messages call it; None stands for what is assigned to no thread."""
    return "the main loop" if thread is None else f"the I/O thread '{thread.name}'"
