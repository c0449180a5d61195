"""The pytest plugin that comes with qblock: machines, monitors and images for other people's tests.

Registered under the entry point group ``pytest11``, so it is there wherever qblock is installed. It imports nothing of qblock
before a fixture is used. Fixtures: `qblock_machine`, `qblock_qmp`, `qblock_served`, `qblock_image`, `qblock_chain`, and
`qblock_dialect` to override. The option ``--qblock-schedule TOKEN`` repeats a run with the schedule that a failure has printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qblock.monitor.machine import MachineOptions
    from qblock.testing.machines import LocalMachine, LocalQmp, ServedMachine
    from qblock.testing.schedules import Schedule


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add our option."""
    group = parser.getgroup("qblock")
    group.addoption("--qblock-schedule", metavar="TOKEN", help="run machines by this schedule (fifo, seed:N, path:N,N)")


@pytest.fixture
def qblock_schedule(pytestconfig: pytest.Config) -> Schedule:
    """The order in which a machine's tasks run: first come, first served, unless ``--qblock-schedule`` says otherwise."""
    from qblock.testing.schedules import from_token  # noqa: PLC0415 - only when the fixture is used

    return from_token(pytestconfig.getoption("--qblock-schedule") or "fifo")


@pytest.fixture
def qblock_dialect() -> str:
    """Whose commands the machines have, as ``--dialect`` calls it; to be overridden by a fixture of the same name."""
    return "7.2"


@pytest.fixture
def qblock_options(qblock_dialect: str) -> MachineOptions:
    """What the machines begin with: a seed of 0, the dialect, no disks."""
    from qblock.monitor.dialects import dialect_named  # noqa: PLC0415 - only when the fixture is used
    from qblock.monitor.machine import MachineOptions  # noqa: PLC0415 - only when the fixture is used

    return MachineOptions(seed=0, dialect=dialect_named(qblock_dialect))


@pytest.fixture
def qblock_machine(qblock_schedule: Schedule, qblock_options: MachineOptions) -> Iterator[LocalMachine]:
    """A machine on virtual time in the test's own thread; time passes when the test says so."""
    from qblock.testing.machines import LocalMachine  # noqa: PLC0415 - only when the fixture is used

    with LocalMachine(qblock_schedule, qblock_options) as machine:
        yield machine


@pytest.fixture
def qblock_qmp(qblock_machine: LocalMachine) -> LocalQmp:
    """A QMP client of `qblock_machine`, without a socket."""
    return qblock_machine.qmp


@pytest.fixture
def qblock_served(tmp_path: Path, qblock_options: MachineOptions) -> Iterator[ServedMachine]:
    """A machine on virtual time in a thread, with a QMP server on a unix socket, for code that wants a real one."""
    from qblock.testing.machines import ServedMachine  # noqa: PLC0415 - only when the fixture is used

    with ServedMachine(tmp_path / "qmp.sock", qblock_options) as machine:
        yield machine


@pytest.fixture
def qblock_image(tmp_path: Path) -> Callable[..., Path]:
    """A function ``(name, size, data=None, *, fmt="qcow2", backing=None, **options)`` that makes an image, gives its path."""
    from qblock.testing.images import make_image  # noqa: PLC0415 - only when the fixture is used

    def make(name: str, size: int | str, data: Any = None, **options: Any) -> Path:
        return make_image(tmp_path / name, size, data, **options)

    return make


@pytest.fixture
def qblock_chain(tmp_path: Path) -> Callable[..., list[Path]]:
    """A function ``(size, layers)`` that makes a qcow2 chain of ``(name, data)`` pairs, base first, and gives the paths."""
    from qblock.testing.images import make_chain  # noqa: PLC0415 - only when the fixture is used

    def make(size: int | str, layers: Any) -> list[Path]:
        return make_chain(tmp_path, size, layers)

    return make
