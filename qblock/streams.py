"""Messages on the standard streams of a program that runs for long, and may outlive whoever reads them.

Models what QEMU does: that nobody reads its standard output or error any more is nothing to it.
"""

from __future__ import annotations

import os
from typing import TextIO


def tell(text: str, stream: TextIO | None) -> None:
    """Write ``text`` at once. What cannot be written is dropped; None is a stream that the program was started without."""
    if stream is None:
        return
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        # What is buffered would be tried again by the next one who writes.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except OSError:
        pass
