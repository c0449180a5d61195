"""Trace events: the table, who listens, what is logged, and that call sites and table agree."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import pytest

from qblock.tracing import DECLARED, Trace, TraceEvent

PACKAGE = Path(__file__).parent.parent.parent / "qblock"


@attrs.define
class Diary:
    """A sink that remembers what it was told."""

    lines: list[str] = attrs.field(factory=list)

    def __call__(self, name: str, members: Mapping[str, object]) -> None:
        self.lines.append(f"{name} {dict(members)}")


def flush_twice(trace: Trace) -> None:
    """A call site, as it is written in the product."""
    for job in ("a", "b"):
        if (hit := trace.mirror_before_flush) is not None:
            hit(job=job)


def test_an_event_that_is_off_is_none() -> None:
    """That is why it costs nothing."""
    trace = Trace()
    assert all(getattr(trace, name) is None for name in DECLARED)
    assert trace.extra == {}


def test_every_sink_hears_what_it_listens_to_until_it_stops() -> None:
    """Three listeners with patterns that overlap; ending one leaves the others, and ending twice does nothing."""
    trace, all_of_it, mirrors, jobs = Trace(), Diary(), Diary(), Diary()
    end_all = trace.listen("*", all_of_it)
    end_mirrors = trace.listen("mirror_*", mirrors)
    end_jobs = trace.listen("job_*", jobs)
    flush_twice(trace)
    end_mirrors()
    end_mirrors()
    flush_twice(trace)
    end_all()
    end_jobs()
    flush_twice(trace)
    one = ["mirror_before_flush {'job': 'a'}", "mirror_before_flush {'job': 'b'}"]
    assert (all_of_it.lines, mirrors.lines, jobs.lines) == (one * 2, one, [])
    assert trace.mirror_before_flush is None


def test_the_same_sink_may_listen_twice() -> None:
    """Each `listen` is ended by its own undo."""
    trace, diary = Trace(), Diary()
    first, second = trace.listen("mirror_*", diary), trace.listen("mirror_*", diary)
    second()
    flush_twice(trace)
    assert len(diary.lines) == 2
    first()
    assert trace.mirror_before_flush is None


def test_a_sink_may_stop_listening_while_it_is_told() -> None:
    """The others still hear that event."""
    trace, diary = Trace(), Diary()
    undo = trace.listen("mirror_*", lambda name, members: undo())
    trace.listen("mirror_*", diary)
    flush_twice(trace)
    assert len(diary.lines) == 2


def test_what_is_switched_on_goes_to_the_log_and_listening_does_not_switch() -> None:
    """The monitor shows the log's state; a lab that listens does not change it."""
    log, diary = Diary(), Diary()
    trace = Trace(log)
    trace.listen("mirror_before_*", diary)
    assert not trace.is_logged("mirror_before_flush")
    trace.switch("mirror_*", on=True)
    trace.switch("mirror_before_s*", on=False)
    assert trace.is_logged("mirror_before_flush")
    assert not trace.is_logged("mirror_before_sleep")
    flush_twice(trace)
    assert log.lines == diary.lines
    trace.switch("mirror_before_flush", on=False)
    flush_twice(trace)
    assert (len(log.lines), len(diary.lines)) == (2, 4)


def test_without_a_log_lines_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """As the log backend of QEMU writes them."""
    trace = Trace()
    trace.switch("mirror_before_sleep", on=True)
    assert trace.mirror_before_sleep is not None
    trace.mirror_before_sleep(job="j", dirty=65536, synced=True, delay_ns=100)
    assert capsys.readouterr().err == "mirror_before_sleep s j dirty count 65536 synced 1 delay 100ns\n"


def test_events_declared_later_are_heard_by_who_listens_to_such_names() -> None:
    """The monitor's events are known only when its dialect is."""
    trace, diary = Trace(), Diary()
    undo = trace.listen("qmp_enter_*", diary)
    trace.declare("qmp_enter_stop", "The command stop is executed", "{arguments}")
    trace.declare("qmp_exit_stop", "It has ended", "{result}")
    trace.declare("qmp_enter_stop", "again", "{other}")
    assert set(trace.extra) == {"qmp_enter_stop"}
    trace.extra["qmp_enter_stop"](arguments="{}")
    assert diary.lines == ["qmp_enter_stop {'arguments': '{}'}"]
    assert trace.find("qmp_enter_stop") == TraceEvent("qmp_enter_stop", "The command stop is executed", "{arguments}")
    undo()
    assert trace.extra == {}


def test_a_table_is_one_systems_own() -> None:
    """Two systems in one process do not hear each other."""
    one, other, diary = Trace(), Trace(), Diary()
    one.listen("*", diary)
    one.declare("mine", "only here", "")
    flush_twice(other)
    assert diary.lines == []
    assert other.find("mine") is None


@pytest.mark.parametrize("event", DECLARED.values(), ids=lambda event: event.name)
def test_every_event_is_documented_and_its_line_can_be_written(event: TraceEvent) -> None:
    """Members are named in the line, once each at least."""
    assert event.doc
    assert event.format(dict.fromkeys(event.members, 1)).startswith(event.name)
    assert all(member.isidentifier() for member in event.members)


def call_sites() -> Iterator[tuple[str, str, frozenset[str]]]:
    """Where (file:line), which event, which members: each ``if (hit := ….NAME) is not None: hit(…)`` of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.If):
                continue
            for named in (part for part in ast.walk(node.test) if isinstance(part, ast.NamedExpr)):
                if not isinstance(named.value, ast.Attribute) or named.value.attr not in DECLARED:
                    continue
                for call in (part for inner in node.body for part in ast.walk(inner) if isinstance(part, ast.Call)):
                    if isinstance(call.func, ast.Name) and call.func.id == named.target.id:
                        members = frozenset(keyword.arg or "**" for keyword in call.keywords)
                        yield f"{path.relative_to(PACKAGE)}:{call.lineno}", named.value.attr, members


SITES = list(call_sites())


@pytest.mark.parametrize(("place", "name", "members"), SITES, ids=[f"{place} {name}" for place, name, _ in SITES])
def test_call_sites_pass_what_the_table_declares(place: str, name: str, members: frozenset[str]) -> None:
    """Else the first person who switches the event on would break the job."""
    assert members == set(DECLARED[name].members), place


def test_every_declared_event_has_a_call_site() -> None:
    """A name that never comes would have people wait for it."""
    assert set(DECLARED) - {name for _, name, _ in SITES} == set()
