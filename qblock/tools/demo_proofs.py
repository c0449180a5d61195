"""What the demo proves at the end, from the files alone: the machine is closed by then.

Our own check is always made; where the real qemu-img is installed, its check and its compare are reported beside it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from qblock.errors import QBlockError
from qblock.guest import UNKNOWN, ContentMap, GuestMismatch, expected_bytes
from qblock.image import Image
from qblock.tools.demo_show import Proof
from qblock.units import MiB, format_size

EXPECTED: Final = "expected.raw"
"""What the disk must hold, as a raw image for qemu-img compare."""
_QEMU_TIMEOUT: Final = 600


def collect_proofs(directory: Path, *, copy: str, layers: Sequence[str], content: ContentMap) -> list[Proof]:
    """Verify the images in ``directory`` against ``content``, which the guest has kept; never raises for what is
    wrong.
    """
    path = directory / copy
    proofs = [
        _proof("the new image stands alone: it has no backing file", lambda: _no_backing_file(path)),
        _proof("it holds what the guest has written, byte for byte", lambda: _same_content(path, content)),
        _proof("it checks clean", lambda: _checks_clean(path)),
        *(_proof(f"{name}, which was left behind, checks clean", partial(_checks_clean, directory / name)) for name in layers),
    ]  # fmt: skip
    if shutil.which("qemu-img"):
        proofs += [
            _proof("qemu-img check finds nothing either", lambda: _qemu_img("check", "-f", "qcow2", str(path)), extra=True),
            _proof("qemu-img compare: identical with what the guest has written",
                   lambda: _qemu_compare(directory, path, content), extra=True),
        ]  # fmt: skip
    return proofs


class _Refuted(Exception):
    """The claim does not hold; the text says what was seen."""


def _proof(claim: str, look: Callable[[], str], *, extra: bool = False) -> Proof:
    try:
        return Proof(claim, True, look(), extra)
    except (_Refuted, QBlockError, OSError, subprocess.SubprocessError) as error:
        return Proof(claim, False, str(error), extra)


def _no_backing_file(path: Path) -> str:
    with Image(path, fmt="qcow2") as image:
        info = image.info()
    if info.backing_filename is not None:
        raise _Refuted(f"its header names {info.backing_filename}")
    return f"{info.format}, {format_size(info.length)}, clusters of {format_size(info.cluster_size)}"


def _same_content(path: Path, content: ContentMap) -> str:
    compared = 0
    with Image(path, fmt="qcow2") as image, memoryview(bytearray(MiB)) as view:
        if image.length != content.size:
            raise _Refuted(f"it has {image.length} bytes, the disk had {content.size}")
        for run, tag in content.runs():
            if tag == UNKNOWN:
                raise _Refuted(f"what the guest wrote at {run} is not known")
            for offset in range(run.offset, run.end, MiB):
                piece = view[: min(MiB, run.end - offset)]
                image.readinto(offset, piece)
                try:
                    content.check(offset, piece, "the new image")
                except GuestMismatch as error:
                    raise _Refuted(str(error)) from None
                compared += len(piece)
    return f"{compared} bytes compared"


def _checks_clean(path: Path) -> str:
    with Image(path, fmt="qcow2", backing=True) as image:
        result = image.check()
    if result.corruptions or result.leaks or result.check_errors:
        raise _Refuted(f"{result.corruptions} corruptions, {result.leaks} leaks, {result.check_errors} errors")
    return f"{result.allocated_clusters} of {result.total_clusters} clusters are in use, no corruption, no leak"


def _qemu_img(*arguments: str) -> str:
    done = subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, timeout=_QEMU_TIMEOUT, check=False)
    said = (done.stdout + done.stderr).strip().splitlines() or ["(nothing)"]
    if done.returncode:
        raise _Refuted(f"exit code {done.returncode}: {said[0]}")
    return said[0]


def _qemu_compare(directory: Path, path: Path, content: ContentMap) -> str:
    expected = directory / EXPECTED
    try:
        with expected.open("wb") as file:
            file.truncate(content.size)
            for run, tag in content.runs():
                for offset in range(run.offset, run.end if tag else run.offset, MiB):
                    file.seek(offset)
                    file.write(expected_bytes(tag, offset, min(MiB, run.end - offset)))
        return _qemu_img("compare", "-f", "raw", "-F", "qcow2", str(expected), str(path))
    finally:
        expected.unlink(missing_ok=True)
