"""``qblock-img snapshot``: list, create, apply and delete internal snapshots.

Command line, exit codes and the layout of the list as qemu-img 7.2's: -a takes an id or a name, -d a name only;
without any of them the image is opened, and that is all.
"""

from __future__ import annotations

from typing import Final

from qblock.driver import SupportsSnapshots
from qblock.errors import BlockIOError, CommandError, ImageError
from qblock.snapshots import find_by_id_or_name, find_snapshot, list_lines
from qblock.tools.arguments import Arguments, UsageError
from qblock.tools.images import ImageArguments, ImageSession, Watch, run_session, with_secrets

_DOING: Final = {"c": "create", "a": "apply", "d": "delete"}


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    long = {"image-opts": "image-opts", "force-share": "U", "object=": "object"}
    arguments = Arguments(args, "a:c:d:lqU", long)
    actions = [(option, value) for option, value in arguments.given if option in "acdl"]
    if len(actions) > 1:
        raise UsageError("Only one of '-l', '-a', '-c' and '-d' can be done at a time")
    if len(arguments.words) != 1:
        raise UsageError("Expecting one image file name")
    watch = with_secrets(arguments, watch)
    action, name = actions[0] if actions else (None, "")
    wanted = ImageArguments.of(arguments, arguments.words[0], writable=action != "l")
    run_session(lambda session: _perform(session, wanted, action, name), watch)
    return 0


async def _perform(session: ImageSession, wanted: ImageArguments, action: str | None, name: str) -> None:
    driver = (await session.open(wanted)).node.driver
    if action is None:
        return
    if action == "l":
        if isinstance(driver, SupportsSnapshots) and (lines := list_lines(driver.snapshots())):
            print("\n".join(lines))
        return
    try:
        await _change(driver, action, name)
    except (CommandError, BlockIOError, ImageError) as error:
        raise CommandError(f"Could not {_DOING[action]} snapshot '{name}': {error}") from error


async def _change(driver: object, action: str, name: str) -> None:
    if not isinstance(driver, SupportsSnapshots):
        raise CommandError("the format of the image has no snapshots")
    if action == "c":
        await driver.create_snapshot(name, icount=0)
        return
    find = find_by_id_or_name(driver.snapshots(), name) if action == "a" else find_snapshot(driver.snapshots(), name=name)
    if find is None:
        raise CommandError("there is no snapshot of that name")
    if action == "a":
        await driver.apply_snapshot(find)
    else:
        await driver.delete_snapshot(find)
