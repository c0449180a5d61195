"""The prompt: commands, time, completion, help as you type; piped lines and a (simulated) terminal."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from qblock.clock import LoopClock
from qblock.guest import GuestMismatch
from qblock.monitor.completion import ReplCompleter
from qblock.monitor.console import Console
from qblock.monitor.loopthread import LoopThread
from qblock.monitor.machine import Machine, MachineOptions
from qblock.monitor.repl import Repl, side_by_side, toolbar_parts
from qblock.monitor.repl_commands import LEARNING_COMMANDS, hex_dump
from qblock.testing.images import make_chain, make_image
from qblock.testing.machines import drive_text
from qblock.testing.simloop import SimLoop

KiB, MiB = 1 << 10, 1 << 20


class Bench:
    """A machine with one disk on virtual time, and a prompt whose output is kept."""

    def __init__(self, thread: LoopThread, directory: Path) -> None:
        self.directory = directory
        self.thread = thread
        self.written = io.StringIO()
        options = MachineOptions(drives=[drive_text(directory / "top.qcow2", "virtio0", "qcow2")], seed=1)
        self.machine = thread.call(self._open(options))
        self.repl = Repl(thread, Console(self.machine), self.written.write)

    async def _open(self, options: MachineOptions) -> Machine:
        loop = self.thread.loop
        assert isinstance(loop, SimLoop)
        return await Machine.open(options, clock=LoopClock(), virtual_time=loop)

    def run(self, *lines: str) -> list[str]:
        """Execute lines and return what they print."""
        self.written.truncate(0)
        self.written.seek(0)
        for line in lines:
            self.repl.execute(line)
        return self.written.getvalue().splitlines()

    def mirror(self) -> str:
        """The line that starts a mirror to a new image."""
        return f"drive_mirror -f virtio0 {self.directory / 'copy.qcow2'} qcow2"

    def words(self, typed: str) -> list[str]:
        """What could come next."""
        return [item.word for item in self.repl.suggestions(typed)]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """See `Bench`."""
    with bench_in(tmp_path, contextlib.nullcontext()) as made:
        yield made


@contextlib.contextmanager
def bench_in(directory: Path, closing: contextlib.AbstractContextManager[object]) -> Iterator[Bench]:
    """See `Bench`; the machine is closed at the end, which happens within ``closing``."""
    make_chain(directory, 4 * MiB, [("base.qcow2", {0: b"b" * MiB}), ("top.qcow2", {MiB: b"t" * MiB})])
    with LoopThread(lambda: SimLoop(manual=True)) as thread:
        made = Bench(thread, directory)
        yield made
        with closing:
            thread.call(made.machine.close())


# ---------------------------------------------------------------------------------------------------------- commands


def test_graph_draws_who_uses_what(bench: Bench) -> None:
    """Before, during and after a mirror the picture tells what the monitor's JSON tells."""
    before = bench.run("graph")
    assert before[0] == "block device 'virtio0'"
    assert "(top.qcow2)" in before[1]
    assert "read-only (base.qcow2)" in before[2]
    during = bench.run(bench.mirror(), "graph")
    assert any("mirror_top" in line for line in during)
    assert any(line.startswith("mirror job 'virtio0'") for line in during)
    assert any("target" in line and "(copy.qcow2)" in line for line in during)
    after = bench.run("block_job_complete virtio0", "run until COMPLETED", "graph")
    assert len(after) == 3
    assert "(copy.qcow2)" in after[2]


def test_graph_can_show_files_and_permissions(bench: Bench) -> None:
    """For those who want to know why something is refused."""
    lines = bench.run("graph -v -p")
    assert sum(": file," in line for line in lines) == 2
    assert any("(cw)" in line for line in lines)
    assert bench.run("graph -x")[0].startswith("Error: graph does not know -x")


def test_step_moves_virtual_time_and_clock_tells_it(bench: Bench) -> None:
    """Time stands still at the prompt."""
    assert bench.run("clock")[0].startswith("virtual time, it moves only with")
    assert bench.run("step 100ms") == ["the time is 100ms"]
    assert bench.run("run 2s") == ["the time is 2.1s"]
    assert bench.run("clock")[1].startswith("2.1s since the start, 13342752")
    assert bench.run("step soon")[0].startswith("Error: 'soon' is not a duration")
    assert bench.run("step")[0] == "Error: usage: step DURATION"


def test_run_until_lets_time_pass_up_to_an_event(bench: Bench) -> None:
    """A slow mirror takes its seconds, and the person none; an event that came already counts once."""
    started = bench.run(bench.mirror(), "block_job_set_speed virtio0 1M", "run until READY virtio0")
    assert started[-1].startswith("BLOCK_JOB_READY virtio0; the time is ")
    assert bench.run("run until ready within 3s")[0].startswith("BLOCK_JOB_READY has not come in 3s; the time is ")
    assert bench.run("run until BLOCK_JOB_PENDING virtio0 within 1s")[0].startswith("BLOCK_JOB_PENDING has not come")
    assert bench.run("run until NONSENSE")[0].startswith("Error: no event is called NONSENSE")
    assert bench.run("run until 500ms")[0].startswith("the time is ")
    assert bench.run("run until a b c")[0].startswith("Error: usage: run")


def test_the_guest_can_be_played(bench: Bench) -> None:
    """Single requests, a pattern that is compared, and a workload that goes on while time passes."""
    assert bench.run("guest write virtio0 0 64k 7") == ["64 KiB written at 0, pattern 0x07"]
    assert bench.run("guest read virtio0 0 512 7") == ["512 B at 0 are all 0x07"]
    assert bench.run("guest read virtio0 0 512 8") == ["Error: the byte at 0 is 0x07, not 0x08"]
    shown = bench.run("guest read virtio0 65536 1k")
    assert shown[0].startswith("00010000  62 62 62")
    assert shown[-1] == "... 768 bytes more"
    assert bench.run("guest flush virtio0") == ["virtio0 is flushed"]
    assert bench.run("guest start virtio0 100") == ["the guest writes to virtio0, 100 times a second"]
    assert bench.run("guest start virtio0") == ["Error: the guest is at work on virtio0 already"]
    assert bench.run("step 1s", "guest")[1].startswith("virtio0  at work: ")
    assert bench.run("guest stop virtio0")[0].startswith("the guest has stopped; it has written ")
    assert bench.run("guest stop virtio0") == ["Error: the guest does nothing on virtio0"]
    assert bench.run("guest")[0].startswith("virtio0  idle: ")
    assert bench.run("guest write nodisk 0 512") == ["Error: There is no device 'nodisk'"]


@pytest.mark.parametrize(
    "line",
    ["guest fly virtio0", "guest write virtio0 0", "guest start virtio0 1 2", "guest read virtio0 0 x", "guest stop",
     "guest write virtio0 0 512 red", "guest start virtio0 0", "guest flush virtio0 now", "watch maybe", "clock x"],
)  # fmt: skip
def test_wrong_use_is_an_error_not_a_guess(bench: Bench, line: str) -> None:
    """Each of them says what was expected."""
    answer = bench.thread.call(bench.repl.console.execute(line))
    assert answer.failed
    assert answer.text.startswith("Error: ")


def test_a_stopped_machine_stops_its_guest(bench: Bench) -> None:
    """HMP's stop and cont hold it up and let it go on."""
    bench.run("guest start virtio0 100", "step 1s", "stop")
    held = bench.run("guest")
    assert held[0].startswith("virtio0  held up: ")
    assert bench.run("step 5s", "guest")[1] == held[0]
    assert bench.run("cont", "step 1s", "guest")[1].startswith("virtio0  at work: ")


def test_a_guest_that_misses_a_write_does_not_keep_the_others_from_being_stopped(tmp_path: Path) -> None:
    """It is told when that guest is stopped or the machine closed, not lost in the machine."""
    for name in ("stale.qcow2", "second.qcow2"):
        make_image(tmp_path / name, "4M", {})
    with bench_in(tmp_path, pytest.raises(GuestMismatch)) as bench:
        bench.run(f"drive_add 0 file={tmp_path}/second.qcow2,format=qcow2,id=second,if=none")
        assert "no device has it" in "".join(bench.run("guest start second 100"))
        bench.run("device_add virtio-blk-pci,drive=second")
        bench.run("guest start virtio0 200", "guest start second 100", "step 1s")
        bench.run(f"drive_reopen virtio0 {tmp_path}/stale.qcow2", "step 2s", "stop")
        held = bench.run("guest")
        assert ["held up" in line for line in held] == [True, True]
        assert bench.run("step 1s", "guest")[1:] == held
        answer = bench.thread.call(bench.repl.console.execute("guest stop virtio0"))
        assert "differs from what the guest wrote" in answer.text


def test_every_learning_command_has_its_help(bench: Bench) -> None:
    """`help` lists it in one line, `help NAME` explains it."""
    listed = "\n".join(bench.run("help"))
    for name, command in LEARNING_COMMANDS.items():
        assert f"{name} {command.usage}".strip() in listed
        assert bench.run(f"help {name}")[1:] == command.details.splitlines()
        assert bench.repl.console.usage(f"{name} ").startswith(name)


def test_hex_dumps_are_aligned() -> None:
    """The last line may be short."""
    assert hex_dump(b"A" * 16 + b"\0z", 16).splitlines() == [
        "00000010  " + "41 " * 16 + " " + "A" * 16,
        "00000020  00 7a" + " " * 42 + "  .z",
    ]


# ---------------------------------------------------------------------------------------------------------- completion


def test_commands_nodes_disks_jobs_and_files_are_completed(bench: Bench) -> None:
    """Whatever the place in the line asks for."""
    bench.run(bench.mirror())
    assert {"graph", "guest", "drive_mirror", "info"} <= set(bench.words(""))
    assert bench.words("block_job_c") == ["block_job_cancel", "block_job_complete"]
    assert {"block", "block-jobs"} <= set(bench.words("info "))
    assert "virtio0" in bench.words("block_job_cancel ")
    assert bench.words("block_job_cancel -f vir") == bench.words("block_resize vir") == ["virtio0"]
    assert bench.words("drive_mirror -") == ["-n", "-f"]
    assert bench.words(f"drive_mirror virtio0 {bench.directory}/b") == [f"{bench.directory}/base.qcow2"]
    assert bench.words("guest ") == ["start", "stop", "write", "read", "flush", "lock"]
    assert bench.words("guest start ") == ["virtio0"]
    assert "READY" in bench.words("run until ")
    assert {"within", "virtio0"} <= set(bench.words("run until READY "))
    assert bench.words("help gra") == ["graph"]
    assert bench.words("nonsense ") == bench.words("clock x ") == bench.words("block_job_cancel a b ") == []


def test_completions_replace_the_unfinished_word(bench: Bench) -> None:
    """prompt_toolkit wants to know where the word begins."""
    completer = ReplCompleter(bench.repl.suggestions)
    (found,) = completer.get_completions(Document("info block-"), CompleteEvent())
    assert (found.text, found.start_position) == ("block-jobs", -6)


def test_the_toolbar_shows_the_clock_and_the_jobs(bench: Bench) -> None:
    """And, above it, how the command being typed is used."""
    assert bench.thread.ask(lambda: toolbar_parts(bench.repl.console), timeout=5) == ["virtual time 0s", "no jobs"]
    bench.run(bench.mirror(), "step 1500ms")
    shown = bench.repl.toolbar("block_job_cancel vir").splitlines()
    assert shown[0].startswith("block_job_cancel [-f] device")
    assert shown[-1].startswith("virtual time 1.5s  |  mirror virtio0 ready [")
    assert bench.repl.toolbar("nonsense") == shown[-1]


def test_the_toolbar_takes_the_lines_it_needs() -> None:
    """Two jobs do not fit into 80 columns; many are counted instead of pushing the prompt off the screen."""
    jobs = [f"job {number}" for number in range(9)]
    assert side_by_side(jobs[:2], 20) == ["job 0  |  job 1"]
    assert side_by_side(jobs[:3], 20) == ["job 0  |  job 1", "job 2"]
    assert side_by_side(jobs, 10) == [*jobs[:5], "and 4 more"]


# ---------------------------------------------------------------------------------------------------- lines and prompt


def test_piped_lines_print_answers_and_events_and_fail_if_one_does(bench: Bench) -> None:
    """A script on standard input: comments are skipped, nothing is executed after ``quit``."""
    script = io.StringIO(f"# mirror it\n\nwatch on\n{bench.mirror()}\nnonsense\nclock\nquit\nclock\n")
    assert bench.repl.run_lines(script) == 1
    lines = bench.written.getvalue().splitlines()
    assert lines[0] == "events are printed as they happen"
    assert "[event] BLOCK_JOB_READY virtio0" in lines
    assert "unknown command: 'nonsense'" in lines
    assert sum(line.startswith("virtual time") for line in lines) == 1  # nothing is executed after quit
    assert lines[-1] == "[event] JOB_STATUS_CHANGE virtio0: null"


@pytest.mark.parametrize(
    "line",
    ['qemu-io virtio0 "read -P 9 0 512"', "drive_add 0 if=none,id=x,file=/no/such/file", "drive_del nothing", "help nosuch"],
)
def test_piped_lines_fail_whatever_their_output_looks_like(bench: Bench, line: str) -> None:
    """A failed qemu-io command prints elsewhere, and some commands do not say ``Error:``."""
    assert bench.repl.run_lines(io.StringIO(f"{line}\nclock\n")) == 1


def test_events_stand_before_the_answer_in_a_pipe_as_at_a_terminal(bench: Bench) -> None:
    """The pages of the documentation are checked through a pipe, and read at a terminal."""
    lines = f"watch on\n{bench.mirror()}\nrun until READY\nquit\n"
    assert bench.repl.run_lines(io.StringIO(lines)) == 0
    piped = bench.written.getvalue().splitlines()
    made, first, last = (index_of(piped, start) for start in ("Formatting", "[event] JOB_ST", "[event] BLOCK_JOB_READY"))
    assert made < first < last < index_of(piped, "BLOCK_JOB_READY virtio0; the time is")
    assert "[event] SHUTDOWN" in piped[last:]


def index_of(lines: list[str], start: str) -> int:
    """Where the first line is that begins so."""
    return next(index for index, line in enumerate(lines) if line.startswith(start))


def test_what_is_made_and_what_is_warned_of_is_shown_with_the_line_that_caused_it(bench: Bench) -> None:
    """The same text that QEMU prints; what comes after the last line is shown too."""
    snapshot = bench.run(f"snapshot_blkdev virtio0 {bench.directory}/no/such/directory/s.qcow2")
    assert snapshot[0].startswith(f"Formatting '{bench.directory}/no/such/directory/s.qcow2', fmt=qcow2")
    assert snapshot[1].startswith("Error: ")
    (shown,) = bench.run(bench.mirror())
    assert shown == (
        f"Formatting '{bench.directory}/copy.qcow2', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib "
        f"size={4 * MiB} lazy_refcounts=off refcount_bits=16"
    )
    bench.machine.reports.warn("late")
    assert bench.repl.run_lines(io.StringIO("")) == 0
    assert bench.written.getvalue().splitlines()[-1] == "warning: late"


def test_a_resized_disk_is_the_guests_to_use(bench: Bench) -> None:
    """Growing gives it zeroes, shrinking and growing again too."""
    assert bench.run("guest write virtio0 3M 1M 7", "block_resize virtio0 3", "block_resize virtio0 8") == [
        "1 MiB written at 3145728, pattern 0x07"
    ]
    assert bench.run("guest read virtio0 3M 1M 0", "guest write virtio0 7M 1M 5", "guest read virtio0 7M 64k 5") == [
        "1 MiB at 3145728 are all 0x00",
        "1 MiB written at 7340032, pattern 0x05",
        "64 KiB at 7340032 are all 0x05",
    ]


def test_piped_lines_that_all_work_end_well(bench: Bench) -> None:
    """The exit code is what a shell script looks at."""
    assert bench.repl.run_lines(io.StringIO("clock\ninfo block\n")) == 0


def prompt(bench: Bench, typed: str) -> list[str]:
    """Type at a terminal and return what is printed."""
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text(typed)
        assert bench.repl.run_prompt(bench.repl.make_session(InMemoryHistory())) == 0
    return bench.written.getvalue().splitlines()


def test_a_prompt_executes_lines_until_quit(bench: Bench) -> None:
    """Also with words that are completed by the tab key, and an interrupted line."""
    shown = prompt(bench, "watch on\nnot this\x03step 1s\nstop\nquit\n")
    assert shown[:2] == ["events are printed as they happen", "the time is 1s"]
    assert "[event] STOP" in shown


def test_help_is_wrapped_between_words_at_a_terminal(bench: Bench) -> None:
    """Piped output keeps its lines."""
    bench.repl.execute("help block_job_cancel", columns=40)
    assert bench.written.getvalue().splitlines() == [
        "block_job_cancel [-f] device -- stop a",
        "    block job (-f: at once, even if it",
        "    is ready or paused)",
    ]
    assert len(bench.run("help block_job_cancel")) == 1


def test_a_prompt_ends_with_control_d(bench: Bench) -> None:
    """As every prompt does."""
    assert prompt(bench, "clock\n\x04")[0].startswith("virtual time")


def test_history_is_kept_between_sessions(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's state directory; without one the prompt works all the same."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("clock\n\x04")
        bench.repl.run_prompt(bench.repl.make_session())
    assert "clock" in (tmp_path / "state" / "qblock" / "history").read_text()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        assert isinstance(bench.repl.make_session().history, InMemoryHistory)
