"""``qblock-img commit``: move what an overlay holds into its backing file.

Command line, exit codes and the printed line of qemu-img 7.2: without ``-b`` or ``-d`` the overlay is empty afterwards.
"""

from __future__ import annotations

from qblock.committing import CommitOrder, commit_image
from qblock.tools.arguments import Arguments, UsageError, is_writethrough
from qblock.tools.console import Progress
from qblock.tools.images import ImageArguments, ImageSession, Watch, cache_flags, run_session, with_secrets


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    arguments = Arguments(args, "f:t:b:dpqr:", {"object=": "object", "image-opts": "image-opts"})
    if len(arguments.words) != 1:
        raise UsageError("Expecting one image file name")
    watch = with_secrets(arguments, watch)
    arguments.check_image_opts()
    base, cache = arguments.get("b"), arguments.get("t") or "writeback"
    order = CommitOrder(
        base=base,
        empty=base is None and "d" not in arguments,
        speed=arguments.size("r", "rate limit") or 0,
        writethrough=is_writethrough(cache),
    )
    progress = Progress("p" in arguments and "q" not in arguments)
    run_session(lambda session: _commit(session, arguments, order, progress), watch)
    if "q" not in arguments:
        print("Image committed.")
    return 0


async def _commit(session: ImageSession, arguments: Arguments, order: CommitOrder, progress: Progress) -> None:
    overlay = await session.open(
        ImageArguments.of(
            arguments,
            arguments.words[0],
            writable=True,
            flags=cache_flags(arguments.get("t"), discard=True),
        )
    )
    assert overlay.root is not None
    with progress.line(from_start=True):
        await commit_image(session.opener, overlay.root, order, progress.show)
