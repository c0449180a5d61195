"""One QMP conversation: negotiation, envelopes, order of replies and events, bugs, out-of-band requests."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from qblock.monitor.client import QmpClient, QmpConnectionLost, QmpError
from qblock.monitor.command import CommandContext, CommandTable, NoArguments, command
from qblock.monitor.hub import MonitorHub
from qblock.monitor.qmp import TRANSITIONS, Phase, QmpFault, QmpRequest, QmpSession
from qblock.system import BlockSystem
from qblock.testing.simloop import run


def ask(session: QmpSession, **envelope: Any) -> QmpRequest | QmpFault:
    """The one item that comes of an envelope."""
    (item,) = session.receive(json.dumps(envelope).encode())
    return item


@pytest.mark.parametrize(
    "envelope",
    [
        {}, {"execute": 5}, {"execute": "x", "foo": 1}, {"execute": "x", "arguments": []}, {"execute": "x", "exec-oob": "x"},
        {"arguments": {}}, {"execute": None},
    ],
)  # fmt: skip
@pytest.mark.parametrize("request_id", [None, 1, "a", [1, {"b": None}], {"c": 2.5}])
def test_a_bad_envelope_is_answered_with_its_id(envelope: dict[str, Any], request_id: Any) -> None:
    """A client that pipelines requests must know which one was wrong."""
    session = QmpSession("test")
    fault = ask(session, **envelope, id=request_id)
    assert isinstance(fault, QmpFault)
    reply = json.loads(session.failure(fault, fault.error))
    assert reply["id"] == request_id
    assert reply["error"]["class"] == "GenericError"


@pytest.mark.parametrize("text", [b"[1]", b'"x"', b"5 ", b"null "])
def test_a_value_that_is_no_object_is_an_error_without_id(text: bytes) -> None:
    """There is nowhere to take an id from."""
    session = QmpSession("test")
    (fault,) = session.receive(text)
    assert isinstance(fault, QmpFault)
    assert set(json.loads(session.failure(fault, fault.error))) == {"error"}


def test_the_phases_form_a_line() -> None:
    """A session is negotiated once, and ends."""
    assert set(TRANSITIONS) == set(Phase)
    assert Phase.NEGOTIATION not in {phase for following in TRANSITIONS.values() for phase in following}


async def _in_process(*, enable: tuple[str, ...] = ()) -> tuple[BlockSystem, MonitorHub, QmpClient]:
    system = BlockSystem.create()
    hub = MonitorHub(system)
    hub.open()
    return system, hub, await QmpClient.in_process(hub, enable=enable)


@command("test-fail", since="0")
async def fail(ctx: CommandContext, args: NoArguments) -> None:
    """Is a bug."""
    raise AssertionError("a bug")


@command("test-wait", since="0")
async def wait(ctx: CommandContext, args: NoArguments) -> None:
    """Waits for test-go."""
    waiting: asyncio.Event = ctx.hub.test_event  # type: ignore[attr-defined]
    await waiting.wait()
    ctx.system.emit("TEST", {"x": 1})


@command("test-go", since="0", oob=True)
async def go(ctx: CommandContext, args: NoArguments) -> None:
    """Lets test-wait go on."""
    ctx.hub.test_event.set()  # type: ignore[attr-defined]


class _Hub(MonitorHub):
    """A hub with an event to wait for."""

    test_event: asyncio.Event


def test_before_negotiation_only_qmp_capabilities_exists_and_afterwards_it_does_not() -> None:
    """Both are answered with CommandNotFound, so that clients see that it is not the arguments."""

    async def main() -> None:
        system, hub, client = await _in_process()
        async with system:
            with pytest.raises(QmpError) as refused:
                await client.execute("qmp_capabilities")
            assert refused.value.error_class == "CommandNotFound"
            with pytest.raises(QmpError, match="test") as refused:
                await client.execute("test", {"bogus": 1})
            assert refused.value.error_class == "CommandNotFound"
            await client.close()
            await hub.close()
        session = QmpSession("test")
        with pytest.raises(Exception, match="begins with") as early:
            session.check_available(QmpRequest("query-version"))
        assert early.value.qmp_class == "CommandNotFound"  # type: ignore[attr-defined]

    run(main)


def test_events_of_a_command_come_before_its_reply() -> None:
    """A job is seen as created before the command that made it has answered."""

    async def main() -> None:
        system, hub, client = await _in_process()
        async with system:
            await client.execute("stop")
            assert [event.name for event in client.events] == ["STOP"]
            await client.execute("stop")
            await client.execute("cont")
            assert [event.name for event in client.events] == ["STOP", "RESUME"]
            await client.close()
            await hub.close()

    run(main)


def test_a_bug_in_a_command_is_answered_and_reported() -> None:
    """A client must not wait for ever because of us, and the person at the console must learn of it."""

    async def main() -> None:
        system, hub, client = await _in_process()
        reports: list[str] = []
        hub.report = reports.append
        hub.commands = CommandTable(hub.dialect, [*hub.commands.values(), fail])
        async with system:
            with pytest.raises(QmpError, match="bug"):
                await client.execute("test-fail")
            assert "AssertionError" in reports[0]
            await client.close()
            await hub.close()

    run(main)


def test_an_out_of_band_command_overtakes_the_one_that_waits() -> None:
    """What the capability ``oob`` is for; commands that are not made for it are refused."""

    async def main() -> None:
        system = BlockSystem.create()
        hub = _Hub(system)
        hub.open()
        hub.test_event = asyncio.Event()
        hub.commands = CommandTable(hub.dialect, [*hub.commands.values(), wait, go])
        async with system:
            client = await QmpClient.in_process(hub, enable=["oob"])
            async with asyncio.TaskGroup() as tasks:
                waiting = tasks.create_task(client.execute("test-wait"))
                with pytest.raises(QmpError, match="out of band"):
                    await client.execute_oob("query-version")
                assert not waiting.done()
                await client.execute_oob("test-go")
            await client.wait_event("TEST", x=1)
            await client.close()
            await hub.close()

    run(main)


def test_without_the_capability_exec_oob_is_no_member_of_a_request() -> None:
    """As with QEMU, which knows the member only when it was asked to."""

    async def main() -> None:
        system, hub, client = await _in_process()
        async with system:
            with pytest.raises(QmpError, match="exec-oob"):
                await client.execute_oob("query-version")
            await client.close()
            await hub.close()

    run(main)


def test_arguments_nested_too_deeply_are_an_error_and_no_crash() -> None:
    """512 levels of file-in-file are JSON, but no chain of nodes."""

    async def main() -> None:
        system, hub, client = await _in_process()
        async with system:
            tree: dict[str, Any] = {"driver": "null-co"}
            for _ in range(400):
                tree = {"driver": "raw", "file": tree}
            with pytest.raises(QmpError, match="deep"):
                await client.execute("blockdev-add", tree | {"node-name": "n"})
            assert await client.execute("query-named-block-nodes") == []
            await client.close()
            await hub.close()

    run(main)


def test_after_quit_the_connection_ends_and_waiting_commands_are_lost() -> None:
    """The reply of quit is the last one."""

    async def main() -> None:
        system, hub, client = await _in_process()
        async with system:
            async with asyncio.TaskGroup() as tasks:
                ended = tasks.create_task(client.execute("quit"))
                late = tasks.create_task(_lost(client))
            assert ended.result() == {}
            assert late.result()
            assert (await client.wait_event("SHUTDOWN")).data == {"guest": False, "reason": "host-qmp-quit"}
            await hub.wait_quit()
            await client.close()
            await hub.close()

    async def _lost(client: QmpClient) -> bool:
        await asyncio.sleep(0)
        with pytest.raises(QmpConnectionLost):
            await client.execute("query-version")
        return True

    run(main)
