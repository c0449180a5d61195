"""Clients that others wrote, against our storage daemon on a real socket: the PyPI package ``qemu.qmp`` and its shell."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qemu.qmp")

from qemu.qmp import EventListener, ExecuteError, QMPClient


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[str]:
    """The path of the monitor's socket of a running daemon, which holds a node of 8 MiB."""
    path = str(tmp_path / "qmp")
    argv = [
        sys.executable, "-m", "qblock.tools.storage_daemon",
        "--blockdev", "driver=null-co,node-name=source,size=8M,read-zeroes=on",
        "--blockdev", "driver=memory,node-name=target,size=8M",
        "--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "chardev=c",
        "--pidfile", str(tmp_path / "pid"),
    ]  # fmt: skip
    with subprocess.Popen(argv) as process:
        while not os.path.exists(tmp_path / "pid"):
            assert process.poll() is None
        yield path
        process.terminate()
        assert process.wait(30) == 0


def test_qmp_client_mirrors_a_node(daemon: str) -> None:
    """Negotiation, commands, errors and events as that package expects them."""

    async def main() -> None:
        client = QMPClient("test")
        await client.connect(daemon)
        version: dict[str, Any] = await client.execute("query-version")  # type: ignore[assignment]
        assert version["qemu"]["major"] == 7
        with pytest.raises(ExecuteError) as refused:
            await client.execute("block-job-cancel", {"device": "nosuch"})
        assert refused.value.error_class == "DeviceNotActive"
        ready, done = EventListener("BLOCK_JOB_READY"), EventListener("BLOCK_JOB_COMPLETED")
        with client.listen(ready, done):
            await client.execute(
                "blockdev-mirror", {"job-id": "j", "device": "source", "target": "target", "sync": "full"}
            )
            assert (await ready.get())["data"]["type"] == "mirror"
            await client.execute("block-job-complete", {"device": "j"})
            assert "error" not in (await done.get())["data"]
        await client.disconnect()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_qmp_shell_executes_lines(daemon: str) -> None:
    """People type into it: key=value arguments, dotted keys, Python literals."""
    shell = Path(sys.executable).parent / "qmp-shell"
    if not shell.exists():
        pytest.skip("qmp-shell is not installed beside this Python")
    lines = "query-version\nblockdev-add driver=null-co node-name=n size=1048576\nquery-named-block-nodes flat=true\nnosuch\n"
    done = subprocess.run([shell, daemon], input=lines, capture_output=True, text=True, timeout=60, check=True)
    replies = [line for line in done.stdout.splitlines() if '"return"' in line or '"error"' in line]
    assert len(replies) == 4, done.stdout + done.stderr
    assert '"node-name": "n"' in replies[2]
    assert "CommandNotFound" in replies[3]
