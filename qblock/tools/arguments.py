"""Command lines of the programs: long and short options anywhere in the line, as GNU getopt takes them.

Models how qemu-img 7.2 reads its arguments (semantics.md section 19): unknown options and bad values end with status 1 and
a line on stderr that starts with the program's name. ``argparse`` is not used: its usage errors end with status 2, and it
costs more start-up time than the work of ``qblock-img info``.
"""

from __future__ import annotations

import getopt
from collections.abc import Mapping
from typing import Final

from qblock.errors import CommandError
from qblock.units import parse_offset

AIO_MODES: Final = ("threads", "native", "io_uring")
CACHE_MODES: Final = ("none", "writeback", "writethrough", "directsync", "unsafe", "off")


class UsageError(CommandError):
    """The command line cannot be understood; the program adds where to find help."""


class Arguments:
    """What one command line said: every option in order, and the words that are no options."""

    def __init__(self, args: list[str], short: str, long: Mapping[str, str] | tuple[str, ...] = ()) -> None:
        """``short`` as getopt's; ``long`` maps long names (``name`` or ``name=``) to the short letter they stand for."""
        names = dict(long) if isinstance(long, Mapping) else dict.fromkeys(long, "")
        try:
            given, self.words = getopt.gnu_getopt(args, short, list(names))
        except getopt.GetoptError as error:
            raise UsageError(f"the command line is not understood: {error.msg}") from None
        canonical = {"--" + name.rstrip("="): letter for name, letter in names.items()}
        self.given: list[tuple[str, str]] = []
        for option, value in given:
            letter = canonical.get(option)
            self.given.append((letter or option.lstrip("-"), value))

    def __contains__(self, name: str) -> bool:
        return any(option == name for option, _ in self.given)

    def get(self, name: str, default: str | None = None) -> str | None:
        """The last value given for an option (by its letter, or by its long name when it has none)."""
        values = self.all(name)
        return values[-1] if values else default

    def all(self, name: str) -> list[str]:
        """All values given for an option, in order."""
        return [value for option, value in self.given if option == name]

    def size(self, name: str, what: str) -> int | None:
        """The option's value in bytes, or None when it was not given."""
        text = self.get(name)
        return None if text is None else size_of(text, what)

    def output_format(self) -> str:
        """``human`` or ``json``, from --output."""
        fmt = self.get("output", "human")
        if fmt not in ("human", "json"):
            raise CommandError("--output must be 'human' or 'json'")
        return fmt

    def check_image_opts(self, fmt: str = "f", *, opts: str = "image-opts") -> None:
        """Raise when a name is said to be options (``--image-opts``) and a format is given beside it."""
        if opts in self and fmt in self:
            raise CommandError(f"--{opts} and -{fmt} cannot be used together: give driver=... in the options")

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Refuse options by name that QEMU has and qblock does not."""
        for name, reason in reasons.items():
            if name in self:
                dashes = "-" if len(name) == 1 else "--"
                raise CommandError(f"{dashes}{name} is not supported: {reason}")


def size_of(text: str, what: str) -> int:
    """Bytes from the text of a size; ``what`` names it in the error."""
    try:
        return parse_offset(text)
    except ValueError as error:
        raise CommandError(f"Invalid {what}: {error}") from None


def aio_mode(arguments: Arguments, native: str) -> str:
    """How files run their requests, from -i and from the option ``native`` that is short for ``-i native``."""
    mode = arguments.get("i", "threads")
    if mode not in AIO_MODES:
        raise CommandError(f"Invalid aio mode: '{mode}' (choose from {', '.join(AIO_MODES)})")
    return "native" if native in arguments else mode


def is_writethrough(mode: str | None) -> bool:
    """True for the modes in which every write is durable when it completes."""
    return mode in ("writethrough", "directsync")
