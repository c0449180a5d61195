"""``qblock-img info``: what an image says of itself, or the whole chain, for a person or as JSON."""

from __future__ import annotations

from typing import Any

from qblock.chain import cow_node
from qblock.imageinfo import human_lines, image_info, json_text
from qblock.node import BlockDriverState
from qblock.tools.arguments import Arguments, UsageError
from qblock.tools.images import ImageArguments, ImageSession, Watch, run_session, with_secrets


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    arguments = Arguments(
        args, "f:U", {"output=": "output", "backing-chain": "backing-chain", "force-share": "U",
                      "image-opts": "image-opts", "object=": "object"}
    )  # fmt: skip
    fmt = arguments.output_format()
    if len(arguments.words) != 1:
        raise UsageError("Expecting one image file name")
    watch = with_secrets(arguments, watch)
    wanted = ImageArguments(
        arguments.words[0],
        fmt=arguments.get("f"),
        image_opts="image-opts" in arguments,
        force_share="U" in arguments,
        backing="backing-chain" in arguments,
        data_file=False,
    )
    arguments.check_image_opts()
    infos = run_session(lambda session: _collect(session, wanted), watch)
    if fmt == "json":
        print(json_text(infos if wanted.backing else infos[0]))
    else:
        print("\n\n".join("\n".join(human_lines(info)) for info in infos))
    return 0


async def _collect(session: ImageSession, wanted: ImageArguments) -> list[dict[str, Any]]:
    node: BlockDriverState | None = (await session.open(wanted)).node
    infos = []
    while node is not None:
        infos.append(image_info(node))
        node = cow_node(node) if wanted.backing else None
    return infos
