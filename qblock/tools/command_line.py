"""Command lines with long options after one dash or two, as QEMU's own; and how the programs that have them end.

``-name value``, ``--name value`` and ``--name=value`` are the same; options and words may come in any order. Nothing heavy is
imported here: ``--version`` answers before a machine is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import attrs

from qblock.errors import QBlockError
from qblock.tools.arguments import UsageError
from qblock.tools.console import complain, ending_quietly


@attrs.frozen
class CommandLine:
    """What was given: option values by name, in their order, and the words that are no options."""

    values: Mapping[str, Sequence[str]]
    words: Sequence[str]

    def last(self, name: str, default: str) -> str:
        """The value of an option; the last one wins."""
        return self.values[name][-1] if self.values.get(name) else default

    def has(self, name: str) -> bool:
        """Whether an option was given."""
        return name in self.values

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """The value of an option that is one of ``choices``, of which the first is the default."""
        value = self.last(name, choices[0])
        if value not in choices:
            raise UsageError(f"--{name} takes {' or '.join(choices)}, not '{value}'")
        return value

    def number(self, name: str) -> int | None:
        """The value of an option that is a number."""
        if name not in self.values:
            return None
        text = self.last(name, "")
        try:
            return int(text, 0)
        except ValueError:
            raise UsageError(f"--{name} takes a number, not '{text}'") from None


HELP_FLAGS: Final = frozenset({"h", "help"})


def parse_command_line(argv: Sequence[str], *, valued: frozenset[str], flags: frozenset[str]) -> CommandLine:
    """Take ``argv`` apart; ``valued`` options have a value, ``flags`` have none. Raises `UsageError`."""
    values: dict[str, list[str]] = {}
    words: list[str] = []
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            words += rest
            break
        if not arg.startswith("-") or arg == "-":
            words.append(arg)
            continue
        name, equals, value = arg.lstrip("-").partition("=")
        if name in flags and not equals:
            values.setdefault(name, []).append("")
        elif name in valued:
            if not equals and not rest:
                raise UsageError(f"the option {arg} needs a value")
            values.setdefault(name, []).append(value if equals else rest.pop(0))
        else:
            raise _unknown(arg, valued | flags)
    return CommandLine(values, words)


def _unknown(arg: str, known: frozenset[str]) -> UsageError:
    import difflib

    name = arg.lstrip("-").partition("=")[0]
    close = difflib.get_close_matches(name, known, n=1)
    return UsageError(f"there is no option {arg}" + (f"; did you mean --{close[0]}?" if close else ""))


def run_program(program: str, body: Callable[[], int], *, misused: int = 2, help_option: str = "--help") -> int:
    """Run a program's body: `ending_quietly`, and with a message for what goes wrong on purpose.

    Returns the body's exit code, ``misused`` after `UsageError`, and 1 when something else has failed.
    """

    def run() -> int:
        try:
            return body()
        except UsageError as error:
            complain(program, f"{error}\nTry '{program} {help_option}' for more information")
            return misused
        except BrokenPipeError:  # whoever reads us has had enough
            raise
        except (QBlockError, OSError) as error:
            complain(program, str(error))
            return 1

    return ending_quietly(run)
