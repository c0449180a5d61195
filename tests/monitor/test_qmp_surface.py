"""Whatever is said to a monitor is answered, and nothing is left of it. More: `qmp_surface.py`."""

from __future__ import annotations

import pytest

from qblock.monitor.client import QmpClient
from qblock.monitor.dialects import Dialect
from qblock.system import BlockSystem
from qblock.testing.simloop import run
from qmp_surface import live
from qmp_words import Schema, Unfit


@pytest.mark.parametrize("seed", range(30))
def test_commands_at_random_are_answered_and_leave_nothing_behind(seed: int) -> None:
    """Sensible ones, senseless ones, several at once, from clients who stay or leave: on a machine and in a storage daemon."""
    assert live(seed).accepted


@pytest.mark.parametrize("dialect", [Dialect.SYSTEM, Dialect.STORAGE_DAEMON])
def test_introspection_is_what_it_says_of_itself(dialect: Dialect) -> None:
    """Client libraries are generated from it; each kind of entry has members of its own."""

    async def main() -> None:
        async with BlockSystem.create() as system, await QmpClient.in_process(system, dialect=dialect) as client:
            entries = await client.execute("query-qmp-schema")
        schema = Schema(entries)
        kind = schema.commands["query-qmp-schema"]["ret-type"]
        schema.check(entries, kind, "the schema")
        with pytest.raises(Unfit, match=r"unknown {'members'}"):
            schema.check([{"name": "x", "meta-type": "array", "element-type": "str", "members": []}], kind, "the schema")

    run(main)
