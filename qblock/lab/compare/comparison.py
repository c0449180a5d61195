"""A whole comparison: carry out the strategies one after another, ask what is allowed meanwhile, and leave the files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from qblock.lab.compare.probing import SIZE, ask_everything
from qblock.lab.compare.report import save_probes, save_settings
from qblock.lab.compare.running import CONTROL, Settings, make_start, perform
from qblock.lab.compare.strategies import Strategy


def compare(
    settings: Settings, strategies: Sequence[Strategy], directory: Path, *, progress: Callable[[str], None]
) -> None:
    """Carry out everything in ``directory``, which exists and is empty; ``progress`` is told what is begun.

    `report.examine` tells what came of it.
    """
    directory = directory.resolve()
    save_settings(directory, settings, [strategy.name for strategy in strategies])
    make_start(settings, directory)
    small = directory / "probes"
    make_start(attrs.evolve(settings, size=SIZE), small)
    end_ns = 0
    for strategy in strategies:
        progress(strategy.title)
        run = directory / strategy.name
        end_ns = max(end_ns, perform(strategy, settings, run))
        save_probes(run, ask_everything(strategy, settings, small))
        for place in small.iterdir():
            if place.name != "start":
                shutil.rmtree(place)
    progress("the guest alone")
    perform(None, settings, directory / CONTROL, until_ns=end_ns)
    shutil.rmtree(small)
