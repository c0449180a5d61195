"""The human monitor: its grammar, its complaints and its output, as QEMU 7.2 prints them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qblock.monitor.client import QmpClient
from qblock.monitor.command import CommandContext
from qblock.monitor.hmp_grammar import HmpSyntaxError, parse_arguments, parse_signature
from qblock.monitor.hub import MonitorHub
from qblock.permissions import Perm
from qblock.policy import OpenPolicy
from qblock.system import BlockSystem
from qblock.testing.simloop import run

Body = Callable[[QmpClient, BlockSystem], Awaitable[None]]


def with_client(body: Body, *, output: Callable[[str], None] = lambda text: None) -> None:
    """Run ``body`` on virtual time with an in-process client."""

    async def main() -> None:
        async with BlockSystem.create(policy=OpenPolicy.follow()) as system:
            hub = MonitorHub(system, output=output)
            hub.open()
            async with await QmpClient.in_process(hub) as client:
                await body(client, system)
            await hub.close()

    run(main)


@pytest.mark.parametrize(
    ("signature", "line", "expected"),
    [
        ("device:B", "d0", {"device": "d0"}),
        ("device:B", '"a b"', {"device": "a b"}),
        ("device:B", r'"a\"\\\n"', {"device": 'a"\\\n'}),
        ("reuse:-n,full:-f,device:B", "-n -f d", {"reuse": True, "full": True, "device": "d"}),
        ("reuse:-n,full:-f,device:B", "-f -n", {"full": True, "device": "-n"}),
        ("reuse:-n,device:B", "-nf", {"reuse": True, "device": "f"}),
        ("device:B,speed:o?,base:s?", "d", {"device": "d"}),
        ("device:B,speed:o?,base:s?", "d 1 b", {"device": "d", "speed": 1 << 20, "base": "b"}),
        ("size:o", "1.5", {"size": 3 << 19}),
        ("size:o", "0x10", {"size": 16 << 20}),
        ("size:o", "2k", {"size": 2048}),
        ("size:o", "7b", {"size": 7}),
        ("value:l", "1+2*3", {"value": 7}),
        ("value:l", "-(1|6)/2", {"value": -3}),
        ("value:i", "~0", {"value": -1}),
        ("value:b", "on", {"value": True}),
        ("words:S?", "a b  c", {"words": "a b  c"}),
    ],
)
def test_arguments_are_taken_by_type(signature: str, line: str, expected: dict[str, Any]) -> None:
    """Observed on qemu-system-x86_64 7.2 (hmp-block.md section 0)."""
    assert parse_arguments(parse_signature(signature), line, name="cmd") == expected


@pytest.mark.parametrize(
    ("signature", "line", "complaint"),
    [
        ("device:B", "", "cmd: block device name expected"),
        ("device:B", '"abc', "cmd: block device name expected"),
        ("device:B", r'"a\q"', "cmd: block device name expected"),
        ("file:F", "", "cmd: filename expected"),
        ("word:s", "", "cmd: string expected"),
        ("device:B", "'a b'", "cmd: extraneous characters at the end of line"),
        ("size:o", "1x", "cmd: extraneous characters at the end of line"),
        ("size:o", "x", "invalid size"),
        ("size:o", "-1", "invalid size"),
        ("size:o", "99999999999999999999E", "invalid size"),
        ("reuse:-n,full:-f,device:B", "-q d", "cmd: unsupported option -q"),
        ("value:l", "1/0", "division by zero"),
        ("value:l", "(1", "')' expected"),
        ("value:l", "09", "invalid char in expression"),
        ("value:i", "4294967296", "'cmd' has failed: integer is for 32-bit values"),
    ],
)
def test_what_does_not_fit_is_complained_about(signature: str, line: str, complaint: str) -> None:
    """The texts of the grammar are QEMU's: people and scripts know them."""
    with pytest.raises(HmpSyntaxError) as refused:
        parse_arguments(parse_signature(signature), line, name="cmd")
    assert str(refused.value) == complaint


@given(st.text(max_size=30))
def test_no_line_breaks_the_grammar(line: str) -> None:
    """A line is taken or complained about."""
    for kind in "BFsSoilb":
        try:
            parse_arguments(parse_signature(f"flag:-n,value:{kind}"), line, name="cmd")
        except HmpSyntaxError:
            pass


@pytest.mark.parametrize(
    ("line", "output"),
    [
        ("", ""),
        ("   ", ""),
        ("nosuch 1", "unknown command: 'nosuch'\n"),
        ("info nosuch", "unknown command: 'info nosuch'\n"),
        ("help nosuch", "unknown command: 'nosuch'\n"),
        (
            "info block x y",
            'block: extraneous characters at the end of line\nTry "help info block" for more information\n',
        ),
        ("stop x", 'stop|s: extraneous characters at the end of line\nTry "help stop" for more information\n'),
        ("info block-jobs", "No active jobs\n"),
        ("info block", ""),
        ("info block nosuch", ""),
        ("info status", "VM status: running\n"),
        ("drive_add -n 0 driver=null-co", "'node-name' needs to be specified\n"),
        ("help help", "help|? [cmd] -- show the help\n"),
    ],
)
def test_lines_are_answered_as_qemu_answers_them(line: str, output: str) -> None:
    """Unknown commands, grammar and empty answers, observed on qemu-system-x86_64 7.2."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        assert await client.hmp(line) == output

    with_client(body)


@pytest.mark.parametrize(
    "line",
    [
        "block_resize d 1", "block_job_cancel d", "block_job_complete d", "block_job_pause d", "block_job_set_speed d 1",
        "block_stream d", "drive_mirror d /nosuch/t", "snapshot_blkdev d", "snapshot_blkdev d f", "qemu-io d length",
        "qemu-io -d d length", "closefd x", "getfd x",
    ],
)  # fmt: skip
def test_failures_of_commands_begin_with_error(line: str) -> None:
    """The QMP command around the line succeeds; the text says that the line did not."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        output = await client.hmp(line)
        assert output.startswith("Error: ")
        assert output.count("\n") == 1

    with_client(body)


def test_info_block_shows_drives_and_nodes_to_the_letter(tmp_path: Path) -> None:
    """Labels, widths, empty lines: hmp-block.md section 2."""
    image = tmp_path / "c.raw"
    image.write_bytes(bytes(1 << 20))

    async def body(client: QmpClient, system: BlockSystem) -> None:
        assert await client.hmp(f"drive_add 0 if=none,id=lone,file={image},format=raw,readonly=on") == "OK\n"
        assert await client.hmp("drive_add 0 if=none,id=empty") == "OK\n"
        assert await client.hmp("drive_add -n 0 driver=null-co,node-name=nn,size=1M,read-zeroes=on") == ""
        node = (await client.execute("query-block"))[0]["inserted"]["node-name"]
        assert await client.hmp("info block") == (
            f"lone ({node}): {image} (raw, read-only)\n"
            "    Removable device: not locked, tray closed\n"
            "    Cache mode:       writeback\n"
            "\n"
            "empty: [not inserted]\n"
            "    Removable device: not locked, tray closed\n"
        )
        assert (
            await client.hmp("info block empty")
            == "\nempty: [not inserted]\n    Removable device: not locked, tray closed\n"
        )
        assert await client.hmp("info block -n nn") == (
            'nn: json:{"read-zeroes": true, "driver": "null-co", "size": 1048576} (null-co)\n'
            "    Cache mode:       writeback\n"
        )
        assert await client.hmp("drive_del lone") == ""
        assert await client.hmp("drive_del nn") == ""
        assert await client.hmp("drive_del nn") == "There is no device 'nn'\n"
        assert await client.execute("query-named-block-nodes") == []

    with_client(body)


def test_qemu_io_prints_to_the_programs_output(tmp_path: Path) -> None:
    """The reply is empty, as in QEMU; the drive keeps the permission that the command has taken. What is refused is the reply."""
    image = tmp_path / "c.raw"
    image.write_bytes(bytes(1 << 20))
    printed: list[str] = []

    async def body(client: QmpClient, system: BlockSystem) -> None:
        await client.hmp(f"drive_add 0 if=none,id=d,file={image},format=raw")
        assert await client.hmp('qemu-io d "write -P 7 0 512"') == ""
        assert printed[0].startswith("wrote 512/512 bytes at offset 0")
        assert system.graph.find_backend("d").perm == Perm.CONSISTENT_READ | Perm.WRITE
        assert await client.hmp('qemu-io d "reopen -r"') == ""
        assert system.graph.find_backend("d").perm == Perm.CONSISTENT_READ
        assert "read-only" in await client.hmp('qemu-io d "write -P 7 0 512"')

    with_client(body, output=printed.append)
    assert image.read_bytes()[:513] == b"\7" * 512 + b"\0"


def test_commands_can_be_added_and_are_found_by_help() -> None:
    """The REPL adds commands for learning."""
    from qblock.monitor.hmp import HmpCall, hmp_command

    @hmp_command("learn|l", "n:l", "n", "says the number")
    async def learn(call: HmpCall) -> None:
        call.say(f"{call.number('n')}")

    async def main() -> None:
        async with BlockSystem.create() as system:
            hub = MonitorHub(system)
            hub.hmp.register(learn)
            async with await QmpClient.in_process(hub) as client:
                assert await client.hmp("l 6*7") == "42\n"
                assert await client.hmp("help learn") == "learn|l n -- says the number\n"
                assert "learn|l" in await client.hmp("help")
                assert "info block " in await client.hmp("info")

    run(main)


# ------------------------------------------------------------------------------------------------------ what has failed


@pytest.mark.parametrize(
    ("line", "failed"),
    [
        ("info block", False),
        ("help info block", False),
        ("", False),
        ("nosuch", True),
        ("help nosuch", True),
        ("info block -x", True),
        ("block_job_pause nojob", True),
        ("drive_del nothing", True),
        ("drive_add 0 if=none,id=bad!", True),
        ('qemu-io disk "read 0 512"', False),
        ('qemu-io disk "read 1G 512"', True),
        ('qemu-io disk "read -P 9 0 512"', True),
        ('qemu-io disk "nosuch"', True),
    ],
)
def test_failures_are_told_apart_by_more_than_their_text(line: str, failed: bool) -> None:
    """Whoever runs lines knows which have failed, also those whose output does not begin with ``Error:``."""

    async def main() -> None:
        async with BlockSystem.create() as system:
            hub = MonitorHub(system, output=lambda text: None)
            context = CommandContext(hub)
            added = await hub.hmp.run(context, "drive_add -n 0 driver=null-co,node-name=disk,size=1M,read-zeroes=on")
            assert not added.failed
            assert (await hub.hmp.run(context, line)).failed is failed

    run(main)
