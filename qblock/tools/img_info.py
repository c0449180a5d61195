"""``qblock-img info``: what an image says of itself, or the whole chain, for a person or as JSON.

Of ours is ``--chain``: the chain as a tree, with what opening each image would open besides, who uses it, and what is unsafe.
At a terminal plain ``info`` ends with what the image would make one open.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from qblock.chain import cow_node, skip_filters
from qblock.errors import CommandError
from qblock.imageinfo import human_lines, image_info, json_text
from qblock.inspecting import Layer, inspect_chain, mentions_of
from qblock.node import BlockDriverState
from qblock.policy import Mention
from qblock.tools.arguments import Arguments, UsageError
from qblock.tools.console import Style
from qblock.tools.images import ImageArguments, ImageSession, Watch, run_session, with_secrets
from qblock.units import format_size


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    arguments = Arguments(
        args, "f:U", {"output=": "output", "backing-chain": "backing-chain", "force-share": "U",
                      "image-opts": "image-opts", "object=": "object", "chain": "chain"}
    )  # fmt: skip
    fmt = arguments.output_format()
    if len(arguments.words) != 1:
        raise UsageError("Expecting one image file name")
    watch = with_secrets(arguments, watch)
    arguments.check_image_opts()
    if "chain" in arguments:
        return _run_chain(arguments, watch, as_json=fmt == "json")
    wanted = ImageArguments.of(arguments, arguments.words[0], backing="backing-chain" in arguments, data_file=False)
    infos, mentions = run_session(lambda session: _collect(session, wanted), watch)
    if fmt == "json":
        print(json_text(infos if wanted.backing else infos[0]))
        return 0
    print("\n\n".join("\n".join(human_lines(info)) for info in infos))
    if sys.stdout.isatty() and mentions and not wanted.backing:
        print("\n".join(opening_lines(mentions, Style.of_terminal())))
    return 0


async def _collect(session: ImageSession, wanted: ImageArguments) -> tuple[list[dict[str, Any]], list[Mention]]:
    node: BlockDriverState | None = (await session.open(wanted)).node
    infos: list[dict[str, Any]] = []
    mentions: list[Mention] = []
    while node is not None:
        infos.append(image_info(node))
        mentions += mentions_of(skip_filters(node).driver, infos[-1])
        node = cow_node(node) if wanted.backing else None
    return infos, mentions


def opening_lines(mentions: Iterable[Mention], style: Style) -> Iterator[str]:
    """What an image would make one open."""
    yield style.bold("Opening it opens also:")
    for one in mentions:
        fmt = one.format or style.warning("a format that is guessed from its content")
        yield f"    {one.filename} ({one.what}, {fmt})"


# ------------------------------------------------------------------------------------------------------------- --chain


def _run_chain(arguments: Arguments, watch: Watch | None, *, as_json: bool) -> int:
    if "image-opts" in arguments or "backing-chain" in arguments:
        raise CommandError("--chain takes a file name, and cannot be used with --image-opts or --backing-chain")
    filename = arguments.words[0]

    async def inspect(session: ImageSession) -> list[Layer]:
        async def open_alone(name: str, fmt: str | None) -> BlockDriverState:
            wanted = ImageArguments(name, fmt=fmt, force_share=True, backing=False, data_file=False)
            return (await session.open(wanted)).node

        return await inspect_chain(open_alone, filename, arguments.get("f"))

    layers = run_session(inspect, watch)
    if as_json:
        print(json_text([_members(layer) for layer in layers]))
    else:
        print("\n".join(chain_lines(layers, Style.of_terminal())))
    return 0 if layers[0].failure is None else 1


def _members(layer: Layer) -> dict[str, Any]:
    """A layer with the names of our JSON; the members of ``ImageInfo`` come first."""
    return {
        **(layer.info or {"filename": layer.filename, "failure": layer.failure}),
        "opens": [{"filename": one.filename, "what": one.what, "format": one.format} for one in layer.mentions],
        "holders": [
            {"pid": one.pid, "program": one.program, "uses": list(one.uses), "forbids": list(one.forbids)}
            for one in layer.holders
        ],
        "unsafe": list(layer.unsafe),
    }


def chain_lines(layers: list[Layer], style: Style) -> Iterator[str]:
    """The chain as a tree, the top image first."""
    mention: Mention | None = None
    for depth, layer in enumerate(layers):
        indent = "   " * (depth - 1)
        lead = f"{indent}└─ backing " if depth else ""
        below = "   " * depth
        last = depth == len(layers) - 1
        bar = below + ("   " if last else "│  ")
        yield lead + style.bold(layer.filename) + (f": {', '.join(_facts(layer))}" if layer.info else "")
        if mention is not None and mention.format is None:
            yield bar + style.dim("format guessed from its content")
        for one in layer.mentions:
            if one.what != "backing file":
                yield f"{bar}{one.what} {style.bold(one.filename)}, {one.format}"
        for holder in layer.holders:
            doing = "writes to it" if holder.writes else "reads it"
            forbids = f", lets nobody else {_doing(holder.forbids)}" if holder.forbids else ""
            yield f"{bar}in use: {holder} {doing}{forbids}"
        for text in layer.unsafe:
            yield bar + style.warning(f"unsafe: {text}")
        mention = next((one for one in layer.mentions if one.what == "backing file"), None)


def _doing(permissions: Iterable[str]) -> str:
    verbs = {"consistent-read": "read", "write": "write", "write-unchanged": "rewrite", "resize": "resize"}
    return ", ".join(verbs[name] for name in permissions)


def _facts(layer: Layer) -> Iterator[str]:
    info = layer.info
    assert info is not None
    yield info["format"]
    yield format_size(info["virtual-size"])
    if "actual-size" in info:
        yield f"{format_size(info['actual-size'])} on disk"
    if info.get("encrypted"):
        yield "encrypted"
    if snapshots := info.get("snapshots"):
        yield f"{len(snapshots)} snapshot{'s' if len(snapshots) > 1 else ''}"
    if bitmaps := info.get("format-specific", {}).get("data", {}).get("bitmaps"):
        yield f"{len(bitmaps)} bitmap{'s' if len(bitmaps) > 1 else ''}"
