"""The house rules as tests: which room may import which, how long things get, what is named and documented how."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qblock"

LAYERS = (
    # Each room may import those on lines above it; rooms on one line do not import each other.
    "errors units streams",
    "extents ranges zeroes filenames policy",
    "findings",
    "breakpoints clock options transaction formatting tracing witness runstate fdsets threads",
    "crypto.* iothreads throttle_limits",
    "dirty snapshots throttling timed_stats",
    "accounting",
    "device_dirty",
    "permissions environment",
    "driver",
    "node registry",
    "chain blockers homes",
    "graph",
    "drain serialising",
    "bitmaps",
    "status alignment",
    "copying_up rewriting",
    "requests",
    "filtering backend nodespec",
    "children copying_down copying_aside naming",
    "creating reopening",
    "opening",
    "blueprint",
    "drivers.*",
    "jobs.state",
    "jobs.job jobs.copying",
    "jobs.txn",
    "jobs.runner",
    "jobs.*",
    "imagebitmaps",
    "objects image imageinfo offline",
    "inspecting",
    "resizing rebasing committing",
    "iocmd.* devices.* guest",
    "system",
    "drive_reopen",
    "actions.*",
    "monitor.*",
    "testing.*",
    "lab.*",
    "tools.*",
    "library",
    "__init__ __main__",
)
"""Imports go down only. A package with ``.*`` is one room: inside it modules import each other freely, but without cycles."""

LONERS = ("drivers.*",)
"""Rooms whose members do not import each other: a driver never imports a driver (qcow2's own modules are one driver)."""

LAZY_PACKAGES = {"zstandard", "cryptography", "zlib", "prompt_toolkit", "pyroaring", "qemu", "importlib", "pickle", "readline"}
"""Heavy or optional packages that may be imported inside a function, for the sake of start-up time."""

LAZY_MODULES = {
    "qblock.monitor.completion", "qblock.drivers.qcow2.bitmaps", "qblock.drivers.qcow2.check", "qblock.drivers.qcow2.owners",
    "qblock.drivers.qcow2.amending", "qblock.drivers.qcow2.shadow",
    "qblock.drivers.qcow2.snapshotting", "qblock.drivers.qcow2.encryption", "qblock.drivers.qcow2.encrypting",
    "qblock.drivers.qcow2.keyslots", "qblock.throttling", "qblock.creating", "qblock.reopening", "qblock.drivers.file.holders",
    "qblock.crypto.secrets",
}  # fmt: skip
"""Our own modules around such a package, and what most commands of the image tools do without."""

LAZY_ROOMS = ("__init__", "__main__", "tools.", "testing.plugin", "registry")
"""Modules that dispatch: they import our own modules inside functions, when these are asked for."""

MAX_FUNCTION, MAX_FILE, MAX_POSITIONAL = 50, 600, 5
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


class Module(NamedTuple):
    """One source file: its dotted name inside the package (`drivers.qcow2.driver`) and its tree."""

    name: str
    path: Path
    tree: ast.Module


@cache
def modules() -> tuple[Module, ...]:
    """Every module of the package, parsed."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        found.append(Module(".".join(parts), path, ast.parse(path.read_text(), str(path))))
    return tuple(found)


def each_module() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)


def room_of(name: str) -> tuple[int, str]:
    """Rank and room of a module; the exact name wins over a starred one."""
    table = {room: rank for rank, line in enumerate(LAYERS) for room in line.split()}
    if name in table:
        return table[name], name
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        starred = ".".join(parts[:count]) + ".*"
        if starred in table:
            return table[starred], starred
    if parts[0] in table:
        return table[parts[0]], parts[0]
    raise AssertionError(f"qblock.{name} stands in no layer: give it a place in LAYERS (and in docs/architecture.md)")


def type_checking_lines(tree: ast.Module) -> set[int]:
    """Lines under ``if TYPE_CHECKING:``."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for inner in node.body:
                lines.update(range(inner.lineno, (inner.end_lineno or inner.lineno) + 1))
    return lines


def imported_names(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Absolute dotted names that the statement imports modules of."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0, "absolute imports only"
    names = {module.name for module in modules()}
    for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        yield inner if inner.removeprefix("qblock.") in names else str(node.module)


def imports(module: Module) -> Iterator[tuple[str, ast.stmt]]:
    """Run-time imports of a module, those inside functions included."""
    skipped = type_checking_lines(module.tree)
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and node.lineno not in skipped:
            for name in imported_names(node):
                yield name, node


def own_imports(module: Module) -> Iterator[tuple[str, ast.stmt]]:
    """The imports of our own modules, without the ``qblock.``."""
    for name, node in imports(module):
        if name == "qblock":
            yield "__init__", node
        elif name.startswith("qblock."):
            yield name.removeprefix("qblock."), node


def driver_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


@each_module()
def test_imports_go_down_only(module: Module) -> None:
    """A type that is needed upwards is in the wrong room."""
    rank, room = room_of(module.name)
    for target, node in own_imports(module):
        target_rank, target_room = room_of(target)
        where = f"{module.path}:{node.lineno}: qblock.{module.name} imports qblock.{target}"
        if room == target_room and room.endswith(".*"):
            assert room not in LONERS or driver_of(module.name) == driver_of(target) or target.count(".") == 0, where
        else:
            assert target_rank < rank, f"{where}, which is not below it"


def test_there_are_no_import_cycles() -> None:
    """Inside a room modules may import each other, but never in a circle."""
    edges = {
        module.name: {
            target for target, node in own_imports(module) if node in module.tree.body and target != module.name
        }
        for module in modules()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(edges.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


@each_module()
def test_imports_inside_functions_are_for_heavy_packages_and_dispatch(module: Module) -> None:
    """An import hidden in a function hides an arrow; only what costs start-up time may hide."""
    for function in functions(module.tree):
        for node in ast.walk(function):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for name in imported_names(node):
                    heavy = name.split(".")[0] in LAZY_PACKAGES or name in LAZY_MODULES
                    allowed = heavy or module.name.startswith(LAZY_ROOMS)
                    assert allowed, f"{module.path}:{node.lineno}: {name} imported inside {function.name}"


# ------------------------------------------------------------------------------------------------------------- sizes


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        total -= (first.end_lineno or first.lineno) - first.lineno + 1
    return total


@each_module()
def test_functions_and_files_stay_short(module: Module) -> None:
    """50 lines a function, 600 a file, 5 positional parameters: what fits on a page can be understood."""
    lines = len(module.path.read_text().splitlines())
    assert lines <= MAX_FILE, f"{module.path} has {lines} lines"
    for function in functions(module.tree):
        where = f"{module.path}:{function.lineno} {function.name}"
        assert code_lines(function) <= MAX_FUNCTION, f"{where} has {code_lines(function)} lines"
        names = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args)]
        positional = [name for name in names if name not in ("self", "cls")]
        assert len(positional) <= MAX_POSITIONAL, f"{where} takes {len(positional)} positional parameters"


# --------------------------------------------------------------------------------------------- names and docstrings


@each_module()
def test_every_module_says_what_it_is(module: Module) -> None:
    """A module opens with what it is; and no module is a drawer for odd things."""
    assert ast.get_docstring(module.tree), f"{module.path} has no docstring"
    assert not set(module.name.split(".")) & FORBIDDEN_NAMES, f"{module.path}: name it for what it holds"


@cache
def class_table() -> dict[str, ast.ClassDef]:
    """All classes of the package by plain name (used to find what an override overrides)."""
    return {
        node.name: node for module in modules() for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)
    }


def base_names(node: ast.ClassDef) -> list[str]:
    return [re.split(r"[.\[]", ast.unparse(base))[0 if "[" in ast.unparse(base) else -1] for base in node.bases]


def inherits_docstring(owner: ast.ClassDef, method: str, seen: frozenset[str] = frozenset()) -> bool:
    """True when a base class says what the method does (classes from outside the package count as documented)."""
    for base in base_names(owner):
        found = class_table().get(base)
        if found is None or base in seen:
            continue
        for node in found.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == method:
                return True
        if inherits_docstring(found, method, seen | {base}):
            return True
    return False


UNDOCUMENTED_DECORATORS = (".setter", "overload", ".validator", ".default", ".register")


def undocumented(body: list[ast.stmt], owner: ast.ClassDef | None) -> Iterator[ast.stmt]:
    """Public classes, functions and methods without a docstring of their own or an inherited one."""
    protocol = owner is not None and "Protocol" in base_names(owner)
    for node in body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, node)
        else:
            decorators = [ast.unparse(item) for item in node.decorator_list]
            if any(item.endswith(UNDOCUMENTED_DECORATORS) for item in decorators):
                continue
            if protocol or (owner is not None and inherits_docstring(owner, node.name)):
                continue
        if not ast.get_docstring(node):
            yield node


@each_module()
def test_every_public_name_has_a_docstring(module: Module) -> None:
    """Units, errors and source belong beside the name; an override inherits what its base says."""
    missing = [(node.lineno, getattr(node, "name", "")) for node in undocumented(module.tree.body, None)]
    assert not missing, f"{module.path}: {missing}"


@each_module()
def test_nothing_is_left_unfinished(module: Module) -> None:
    """No TODO, no stub that raises, no `global`: what is not supported is refused by name."""
    for number, line in enumerate(module.path.read_text().splitlines(), 1):
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line), f"{module.path}:{number}: {line.strip()}"
    for node in ast.walk(module.tree):
        assert not isinstance(node, ast.Global), f"{module.path}:{node.lineno}: no module-level state"
        assert not (isinstance(node, ast.Name) and node.id == "NotImplementedError"), f"{module.path}:{node.lineno}"


TIMERS = {"call_later", "call_at"}
TIMER_ROOMS = ("clock", "testing.")


@each_module()
def test_only_the_clock_knows_time(module: Module) -> None:
    """One sleep door: otherwise virtual time would have a hole in it."""
    if module.name.startswith(TIMER_ROOMS):
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            assert node.attr not in TIMERS, f"{module.path}:{node.lineno}: {text} outside qblock/clock.py"
            assert text not in ("time.sleep", "time.time"), f"{module.path}:{node.lineno}: {text}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "asyncio.sleep":
            assert ast.unparse(node.args[0]) == "0", f"{module.path}:{node.lineno}: use clock.sleep_ns"


# ---------------------------------------------------------------------------------------------------- written documents


def test_architecture_shows_every_room() -> None:
    """The picture in docs/architecture.md names each module of the top level."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    for module in modules():
        top = module.name.split(".")[0]
        assert re.search(rf"`?\b{re.escape(top)}\b", text), f"docs/architecture.md does not mention {top}"


def glossary() -> list[tuple[str, str]]:
    """Rows of the glossary: QEMU's name and ours (`module:Name.attribute`)."""
    rows = re.findall(r"^\| `([^`]+)` \| `(qblock[^`]*)` \|", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert len(rows) >= 20
    return rows


@pytest.mark.parametrize(("theirs", "ours"), glossary())
def test_glossary_names_things_that_exist(theirs: str, ours: str) -> None:
    """Who knows QEMU's name of a thing finds ours; a renamed thing must be renamed there too."""
    module, _, path = ours.partition(":")
    found: object = importlib.import_module(module)
    for part in filter(None, path.split(".")):
        fields = {attribute.name for attribute in getattr(found, "__attrs_attrs__", ())}
        if part in fields or part in getattr(found, "__annotations__", {}):
            return
        found = getattr(found, part)


BENCHMARKS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmarks_can_be_started(path: Path) -> None:
    """They are run by hand, and rarely: nothing else tells that one has been forgotten."""
    asked = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=False)
    assert asked.returncode == 0 and "usage:" in asked.stdout, asked.stderr
