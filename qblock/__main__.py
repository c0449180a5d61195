"""The `qblock` program: a machine with a prompt, or one of the sub-commands ``demo``, ``replay`` and ``lab``."""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (default: those of the process); returns the exit code."""
    args = sys.argv[1:] if argv is None else argv
    if args[:1] == ["demo"]:
        from qblock.tools import demo  # noqa: PLC0415 - only when asked for

        return demo.main(args[1:])
    if args[:1] == ["replay"]:
        from qblock.tools import replay  # noqa: PLC0415 - only when asked for

        return replay.main(args[1:])
    if args[:1] == ["lab"]:
        from qblock.tools import lab  # noqa: PLC0415 - only when asked for

        return lab.main(args[1:])
    from qblock.tools import repl  # noqa: PLC0415 - only when asked for

    return repl.main(args)


if __name__ == "__main__":
    sys.exit(main())
