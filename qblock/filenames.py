"""File names of images: what a relative backing name is relative to.

Models QEMU's rules (semantics.md section 10.1): a relative name in a header is resolved against the directory of the image
that holds it; a name with a protocol prefix (``json:``, ``nbd:``) stands for itself.
"""

from __future__ import annotations

import os.path
import re
from typing import Final

_PROTOCOL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")


def has_protocol(filename: str) -> bool:
    """Whether ``filename`` begins with a protocol (``json:…``, ``nbd://…``) and is no path."""
    match = _PROTOCOL.match(filename)
    return match is not None and "/" not in filename[: match.end()]


def combine_filename(image: str, name: str) -> str:
    """``name`` as it is meant in the header of the file ``image``: a path relative to that file's directory."""
    if has_protocol(name) or os.path.isabs(name):
        return name
    path = image.removeprefix("file:") if image.startswith("file:") else image
    directory = os.path.dirname(path)
    return os.path.join(directory, name) if directory else name
