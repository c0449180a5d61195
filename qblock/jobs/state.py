"""The life of a job as tables: statuses, allowed transitions, which verb is accepted where, and error policies.

Models QEMU's ``JobStatus`` and ``JobVerb`` (semantics.md sections 3.1, 3.2 and 6). Nothing here acts: `runner.py` walks
the tables, the documents draw their diagrams from them.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Mapping
from typing import Final


class JobStatus(enum.Enum):
    """Where a job is in its life; the values are the wire names."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class JobVerb(enum.Enum):
    """What a person can tell a job; the values are the words that errors use."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"


_S = JobStatus

TRANSITIONS: Final[Mapping[JobStatus, frozenset[JobStatus]]] = {
    _S.UNDEFINED: frozenset({_S.CREATED}),
    _S.CREATED: frozenset({_S.RUNNING, _S.ABORTING, _S.NULL}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING}),
    _S.PAUSED: frozenset({_S.RUNNING}),
    _S.READY: frozenset({_S.STANDBY, _S.WAITING, _S.ABORTING}),
    _S.STANDBY: frozenset({_S.READY}),
    _S.WAITING: frozenset({_S.PENDING, _S.ABORTING}),
    _S.PENDING: frozenset({_S.ABORTING, _S.CONCLUDED}),
    _S.ABORTING: frozenset({_S.ABORTING, _S.CONCLUDED}),
    _S.CONCLUDED: frozenset({_S.NULL}),
    _S.NULL: frozenset(),
}
"""From each status to those that may follow it."""

ACTIVE: Final = frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY})
"""The statuses of a job that has work before it."""

VERBS: Final[Mapping[JobVerb, frozenset[JobStatus]]] = {
    JobVerb.CANCEL: ACTIVE | {_S.WAITING, _S.PENDING},
    JobVerb.PAUSE: ACTIVE,
    JobVerb.RESUME: ACTIVE,
    JobVerb.SET_SPEED: ACTIVE,
    JobVerb.COMPLETE: frozenset({_S.READY, _S.STANDBY}),
    JobVerb.FINALIZE: frozenset({_S.PENDING}),
    JobVerb.DISMISS: frozenset({_S.CONCLUDED}),
}
"""The statuses in which each verb is accepted."""

PAUSED_FORM: Final[Mapping[JobStatus, JobStatus]] = {_S.RUNNING: _S.PAUSED, _S.READY: _S.STANDBY}
"""What a running job is called while it pauses."""
GOING_ON: Final[Mapping[JobStatus, JobStatus]] = {paused: running for running, paused in PAUSED_FORM.items()}
"""What a paused job is called again when it goes on."""


class OnError(enum.Enum):
    """A job's policy for failed requests; the values are the wire names."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"


class ErrorAction(enum.Enum):
    """What is done about one failed request, as BLOCK_JOB_ERROR tells it."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"


class IoStatus(enum.Enum):
    """How the last stop came about, as ``query-block-jobs`` shows it."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


def error_action(policy: OnError, error: int | None) -> ErrorAction:
    """What ``policy`` says to a request that failed with errno ``error``."""
    match policy:
        case OnError.REPORT:
            return ErrorAction.REPORT
        case OnError.IGNORE:
            return ErrorAction.IGNORE
        case OnError.STOP:
            return ErrorAction.STOP
        case OnError.ENOSPC | OnError.AUTO:
            return ErrorAction.STOP if error == errno.ENOSPC else ErrorAction.REPORT
