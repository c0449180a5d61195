"""Messages to whoever reads them, or to nobody."""

from __future__ import annotations

import io
import os

from qblock.streams import tell


def test_messages_are_written_at_once() -> None:
    """Somebody may be waiting for them."""
    stream = io.StringIO()
    tell("one\n", stream)
    tell("two\n", stream)
    assert stream.getvalue() == "one\ntwo\n"


def test_a_pipe_that_nobody_reads_any_more_takes_everything() -> None:
    """Neither this message nor a later one, of whoever it may be, is anybody's trouble."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        tell("lost\n", stream)
        tell("lost too\n", stream)
        stream.write("as well")
        stream.flush()


def test_what_a_full_disk_does_not_take_is_dropped() -> None:
    """As is everything for a program that was started without the stream."""
    with open("/dev/full", "w", buffering=1) as stream:
        tell("lost\n", stream)
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    tell("lost\n", None)
