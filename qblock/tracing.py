"""Trace events: what the block layer can tell of its work, step by step, and what costs nothing while nobody listens.

Models QEMU's trace events. Their names and the order of what their lines show are those of QEMU 7.2 where such an event
exists; the others are ours. `Trace` is the table: one attribute per event, which is None while the event is off, so that a
call site pays for one attribute and one comparison::

    if (hit := self.env.trace.mirror_one_iteration) is not None:
        hit(job=self.id, offset=offset, length=length)

Differs from QEMU: where its lines have addresses of structures, ours have names (of nodes, jobs, drives); there is no
process-wide state, each block system has its own `Trace`; and besides the log (`Trace.switch`, which the programs' ``--trace``
and the monitor's trace-event-set-state use) any number of sinks may listen, each to what it wants (`Trace.listen`).
"""

from __future__ import annotations

import fnmatch
import string
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import attrs

from qblock.streams import tell

Sink: TypeAlias = Callable[[str, Mapping[str, object]], None]
"""Gets an event's name and its members. Must not raise."""


@attrs.frozen
class TraceEvent:
    """The declaration of one event. ``line`` is the text of its line in a log, with its members in braces."""

    name: str
    doc: str
    line: str

    @property
    def members(self) -> tuple[str, ...]:
        """The names of what a call site passes."""
        return tuple(dict.fromkeys(field for _, field, _, _ in string.Formatter().parse(self.line) if field is not None))

    def format(self, members: Mapping[str, object]) -> str:
        """The event as a line of a log, without a time stamp."""
        return f"{self.name} {self.line.format_map(members)}".rstrip()


@attrs.define(eq=False)
class Hit:
    """An event that is on: calling it with the event's members tells all who listen."""

    name: str
    sinks: tuple[Sink, ...]

    def __call__(self, **members: object) -> None:
        for sink in self.sinks:
            sink(self.name, members)


def event(doc: str, line: str) -> Any:
    """Declare an event of `Trace`; see `TraceEvent`."""
    return _Declaration(doc, line)


class _Declaration(NamedTuple):
    doc: str
    line: str


class Trace:
    """All events of one block system. Each attribute below is one event; those of ``extra`` are declared at run time.

    ``log`` gets the events that `switch` has switched on; by default (None) their lines go to standard error.
    """

    # ------------------------------------------------------------------------------------------------------------- jobs

    job_state_transition: Hit | None = event(
        "A job goes from one state to another", "job {job} (ret: {ret}) attempting allowed transition ({old}-->{new})"
    )
    job_apply_verb: Hit | None = event(
        "Somebody asks something of a job; `allowed` is 'allowed' or 'prohibited'",
        "job {job} in state {status}; applying verb {verb} ({allowed})",
    )
    job_completed: Hit | None = event("A job's run has ended, well (0) or not", "job {job} ret {ret}")
    qmp_job_cancel: Hit | None = event("job-cancel has found its job", "job {job}")
    qmp_job_pause: Hit | None = event("job-pause has found its job", "job {job}")
    qmp_job_resume: Hit | None = event("job-resume has found its job", "job {job}")
    qmp_job_complete: Hit | None = event("job-complete has found its job", "job {job}")
    qmp_job_finalize: Hit | None = event("job-finalize has found its job", "job {job}")
    qmp_job_dismiss: Hit | None = event("job-dismiss has found its job", "job {job}")
    qmp_block_job_cancel: Hit | None = event("block-job-cancel has found its job", "job {job}")
    qmp_block_job_pause: Hit | None = event("block-job-pause has found its job", "job {job}")
    qmp_block_job_resume: Hit | None = event("block-job-resume has found its job", "job {job}")
    qmp_block_job_complete: Hit | None = event("block-job-complete has found its job", "job {job}")
    qmp_block_job_finalize: Hit | None = event("block-job-finalize has found its job", "job {job}")
    qmp_block_job_dismiss: Hit | None = event("block-job-dismiss has found its job", "job {job}")
    co_sleep_begin: Hit | None = event("A job goes to sleep", "job {job} delay {delay_ns}ns")
    co_sleep_woken: Hit | None = event("A sleeping job was woken before its time", "job {job}")
    job_cancel_sync_begin: Hit | None = event("Somebody cancels a job and waits for its end", "job {job} force {force}")
    job_cancel_sync_end: Hit | None = event(
        "The wait is over; `outcome` is 'completed', 'cancelled' or the job's error", "job {job} outcome {outcome}"
    )

    # ----------------------------------------------------------------------------------------------------------- mirror

    mirror_start: Hit | None = event("A mirror begins", "bs {node} s {job}")
    mirror_restart_iter: Hit | None = event("The walk over what is dirty begins anew", "s {job} dirty count {dirty}")
    mirror_before_flush: Hit | None = event("Nothing is dirty: the target is flushed", "s {job}")
    mirror_before_drain: Hit | None = event("The source is drained to finish", "s {job} dirty count {dirty}")
    mirror_before_sleep: Hit | None = event(
        "A mirror sleeps; `synced` is 1 once it was ready", "s {job} dirty count {dirty} synced {synced:d} delay {delay_ns}ns"
    )
    mirror_one_iteration: Hit | None = event("A run of dirty bytes is copied", "s {job} offset {offset} bytes {length}")
    mirror_iteration_done: Hit | None = event(
        "A copy has ended; `ret` is 0 or a negative errno", "s {job} offset {offset} bytes {length} ret {ret}"
    )
    mirror_yield: Hit | None = event(
        "A mirror waits for a copy to end", "s {job} dirty count {dirty} free buffers {free} in_flight {in_flight}"
    )
    mirror_yield_in_flight: Hit | None = event(
        "A mirror waits because another copy covers the same bytes", "s {job} offset {offset} in_flight {in_flight}"
    )
    mirror_flush_generation: Hit | None = event(
        "A guest's flush waits until the target has all writes up to a generation", "s {job} generation {generation}"
    )

    # ---------------------------------------------------------------------------------------------------------- streaming

    stream_start: Hit | None = event("A stream job begins", "bs {node} base {base} s {job}")
    stream_one_iteration: Hit | None = event(
        "A stream job has asked for the next part; `allocated` is 1 when it has to be copied",
        "s {job} offset {offset} bytes {length} is_allocated {allocated:d}",
    )
    qmp_block_stream: Hit | None = event("block-stream has started its job", "bs {node}")
    stream_through_start: Hit | None = event("A stream through a filter begins", "bs {node} s {job}")
    stream_through_one_iteration: Hit | None = event(
        "A part is read and written again, through the filter", "s {job} offset {offset} bytes {length}"
    )
    stream_through_done: Hit | None = event("A stream through a filter has written everything", "s {job}")

    # --------------------------------------------------------------------------------------------------------- committing

    commit_start: Hit | None = event("A commit job begins", "bs {node} base {base} s {job}")
    commit_one_iteration: Hit | None = event(
        "A commit job has asked for the next part; `allocated` is 1 when it has to be copied",
        "s {job} offset {offset} bytes {length} is_allocated {allocated:d}",
    )
    qmp_block_commit: Hit | None = event("block-commit has started its job", "bs {node}")

    # ------------------------------------------------------------------------------------------- drive-reopen, the witness

    drive_reopen_begin: Hit | None = event("drive-reopen has found its drive", 'device {device} filename "{filename}"')
    drive_reopen_job_cancelled: Hit | None = event(
        "The drive's job has ended: `outcome` is 'completed', 'cancelled' or its error",
        "device {device} job {job} outcome {outcome}",
    )
    drive_reopen_drained: Hit | None = event("No request is under way any more", "device {device}")
    drive_reopen_flushed: Hit | None = event("The old image is flushed", "device {device}")
    drive_reopen_closed: Hit | None = event("The old image is closed", "device {device}")
    drive_reopen_opened: Hit | None = event("The new image is open", 'device {device} filename "{filename}"')
    drive_reopen_witness_written: Hit | None = event("The byte is in the witness file", "device {device} witness {witness}")
    drive_reopen_witness_synced: Hit | None = event("The byte is durable", "device {device} witness {witness}")
    drive_reopen_done: Hit | None = event("The drive has its new image", 'device {device} filename "{filename}"')
    drive_reopen_rollback: Hit | None = event(
        "A step failed: the old image is opened again", 'device {device} filename "{filename}" error {error}'
    )
    drive_reopen_lost: Hit | None = event(
        "The old image cannot be opened again either: the drive is empty", 'device {device} filename "{filename}" error {error}'
    )
    witness_closed: Hit | None = event("The descriptor of a witness is given back", "witness {witness}")

    # ----------------------------------------------------------------------------- what mirroring was compared with in 2012

    blkmirror_install: Hit | None = event("A blkmirror is put over a drive's image", "device {device} bs {node} target {target}")
    blkmirror_remove: Hit | None = event("A blkmirror is closed", "bs {node}")
    blkmirror_write: Hit | None = event("A write goes to both sides", "bs {node} offset {offset} bytes {length}")
    blkmirror_write_zeroes: Hit | None = event("Zeroes go to both sides", "bs {node} offset {offset} bytes {length}")
    blkmirror_discard: Hit | None = event("A discard goes to both sides", "bs {node} offset {offset} bytes {length}")
    blkmirror_flush: Hit | None = event("A flush goes to the source, and only there", "bs {node}")
    blkmirror_error: Hit | None = event(
        "One side failed; `side` is 'source' or 'target'", "bs {node} side {side} offset {offset} bytes {length} error {error}"
    )
    block_copy_start: Hit | None = event(
        "A live block copy begins", 'job {job} bs {node} filename "{filename}" incremental {incremental:d}'
    )
    block_copy_iteration: Hit | None = event("A live block copy copies a run", "job {job} offset {offset} bytes {length}")
    block_copy_dirty: Hit | None = event("A pass over the disk is over", "job {job} dirty count {dirty}")
    block_copy_switch: Hit | None = event("The drive is switched to the copy", 'job {job} filename "{filename}"')

    # -------------------------------------------------------------------------------------------------------- transactions

    transaction_prepare: Hit | None = event("An action of a transaction is prepared", "action {action} index {index}")
    transaction_commit: Hit | None = event("An action takes effect", "action {action} index {index}")
    transaction_abort: Hit | None = event("An action is taken back", "action {action} index {index}")
    transaction_clean: Hit | None = event("An action gives its resources back", "action {action} index {index}")

    # -------------------------------------------------------------------------------------------------- images, the monitor

    bdrv_open_common: Hit | None = event("An image is opened", 'bs {node} filename "{filename}" format_name "{driver}"')
    handle_hmp_command: Hit | None = event("A line of the human monitor is executed", "cmdline: {line}")

    # ------------------------------------------------------------------------------------------------------------------ all

    def __init__(self, log: Sink | None = None) -> None:
        """Everything is off."""
        self.__dict__.update(dict.fromkeys(DECLARED))
        self.extra: dict[str, Hit] = {}
        """Events declared with `declare` that are on, by name."""
        self.log = log
        self._declared: dict[str, TraceEvent] = {}
        self._switched_on: set[str] = set()
        self._listeners: list[tuple[str, Sink]] = []

    # -------------------------------------------------------------------------------------------------------- declarations

    def declare(self, name: str, doc: str, line: str) -> None:
        """Add an event under ``extra``, unless it is there already; who listens to such names hears it at once."""
        if name not in self._declared and name not in DECLARED:
            self._declared[name] = TraceEvent(name, doc, line)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern, _ in self._listeners):
                self._refresh(name)

    def find(self, name: str) -> TraceEvent | None:
        """The declaration of the event ``name``."""
        return DECLARED.get(name) or self._declared.get(name)

    def matching(self, pattern: str = "*") -> Iterator[TraceEvent]:
        """The events whose names match ``pattern`` (of `fnmatch`), newest declaration first, as QEMU lists them."""
        for declared in (*reversed(self._declared.values()), *reversed(DECLARED.values())):
            if fnmatch.fnmatchcase(declared.name, pattern):
                yield declared

    # ------------------------------------------------------------------------------------------------------------- listening

    def listen(self, pattern: str, sink: Sink) -> Callable[[], None]:
        """Call ``sink`` for every event that matches ``pattern``, those declared later too; call the result to end that."""
        entry = (pattern, sink)
        self._listeners.append(entry)
        self._refresh(pattern)

        def undo() -> None:
            for index, known in enumerate(self._listeners):
                if known is entry:
                    del self._listeners[index]
                    self._refresh(pattern)
                    break

        return undo

    def switch(self, pattern: str, *, on: bool) -> None:
        """Let the events that match ``pattern`` be logged or not; those declared later are off."""
        names = [declared.name for declared in self.matching(pattern)]
        if on:
            self._switched_on.update(names)
        else:
            self._switched_on.difference_update(names)
        self._refresh(pattern)

    def line(self, name: str, members: Mapping[str, object]) -> str:
        """An event as a line of a log, without a time stamp and without its end."""
        declared = self.find(name)
        assert declared is not None, name
        return declared.format(members)

    def is_logged(self, name: str) -> bool:
        """Whether the event is switched on; those who only listen do not count."""
        return name in self._switched_on

    def _refresh(self, pattern: str) -> None:
        for declared in self.matching(pattern):
            name = declared.name
            sinks = [sink for wanted, sink in self._listeners if fnmatch.fnmatchcase(name, wanted)]
            if name in self._switched_on:
                sinks.insert(0, self._to_log)
            hit = Hit(name, tuple(sinks)) if sinks else None
            if name in DECLARED:
                setattr(self, name, hit)
            elif hit is not None:
                self.extra[name] = hit
            else:
                self.extra.pop(name, None)

    def _to_log(self, name: str, members: Mapping[str, object]) -> None:
        if self.log is not None:
            self.log(name, members)
            return
        tell(f"{self.line(name, members)}\n", sys.stderr)


DECLARED: Final[dict[str, TraceEvent]] = {
    name: TraceEvent(name, *declared) for name, declared in vars(Trace).items() if isinstance(declared, _Declaration)
}
"""The events that every `Trace` has, by name."""
