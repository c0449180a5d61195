"""``qblock-img rebase``: let an overlay stand on another backing file, or on none (``-b ""``).

Command line and exit codes of qemu-img 7.2. Without ``-u`` what the guest sees stays the same.
"""

from __future__ import annotations

from qblock.rebasing import RebaseOrder, rebase_image
from qblock.tools.arguments import Arguments, UsageError, is_writethrough
from qblock.tools.console import Progress
from qblock.tools.images import ImageArguments, ImageSession, Watch, cache_flags, run_session, with_secrets

LONG = {"object=": "object", "image-opts": "image-opts", "force-share": "U"}


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    arguments = Arguments(args, "f:F:b:upt:T:qU", LONG)
    if len(arguments.words) != 1:
        raise UsageError("Expecting one image file name")
    unsafe, backing, cache = "u" in arguments, arguments.get("b"), arguments.get("t")
    if backing is None and not unsafe:
        raise UsageError("Must specify backing file (-b) or use unsafe mode (-u)")
    watch = with_secrets(arguments, watch)
    arguments.check_image_opts()
    cache_flags(cache)
    order = RebaseOrder(
        backing=backing or None,
        fmt=arguments.get("F"),
        unsafe=unsafe,
        flags=cache_flags(arguments.get("T"), "source cache option"),
        force_share="U" in arguments,
        writethrough=is_writethrough(cache),
    )
    progress = Progress("p" in arguments and "q" not in arguments)
    with progress.line(from_start=True):
        run_session(lambda session: _rebase(session, arguments, order, progress), watch)
    return 0


async def _rebase(session: ImageSession, arguments: Arguments, order: RebaseOrder, progress: Progress) -> None:
    overlay = await session.open(
        ImageArguments(
            arguments.words[0],
            fmt=arguments.get("f"),
            image_opts="image-opts" in arguments,
            writable=True,
            backing=not order.unsafe,
            flags=cache_flags(arguments.get("t")),
        )
    )
    assert overlay.root is not None
    await rebase_image(session.opener, overlay.root, order, progress.show)
