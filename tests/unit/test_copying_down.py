"""The plan of what moves down a chain: every byte that a layer holds, and nothing else."""

from __future__ import annotations

from random import Random

import pytest

from qblock.copying_down import CHUNK, pieces_above
from qblock.drivers.memory import MemoryDriver, MemoryOptions
from qblock.drivers.qcow2.driver import Qcow2Driver
from qblock.node import BlockDriverState
from qblock.status import chain_status
from qblock.testing.formats import FormatBench
from qblock.testing.nodes import NodeBench
from qblock.testing.simloop import run
from qblock.units import KiB, MiB


async def layer(rng: Random, below: BlockDriverState, size: int, bench: NodeBench) -> BlockDriverState:
    """A qcow2 overlay with data, zeroes and packed clusters here and there, on ``below``."""
    overlay = FormatBench(Qcow2Driver)
    overlay.bench = bench
    cluster = rng.choice([512, 4096])
    await overlay.create(size=size, cluster_size=cluster)
    disk = await overlay.open(backing=below)
    for _ in range(rng.randrange(60)):
        at = rng.randrange(size // cluster) * cluster
        length = min(rng.choice([1, 1, 1, 2, 5, 40]) * cluster, size - at)
        match rng.randrange(8):
            case 0:
                await disk.write_zeroes(at, length)
            case 1:
                await disk.discard(at, length)
            case _:
                await disk.write(at, b"x" * length)
    disk.close()
    return overlay.node


@pytest.mark.parametrize("seed", range(12))
def test_the_plan_names_what_the_layers_above_the_base_hold(seed: int) -> None:
    """One layer or several, shorter ones among them: pieces come in order, leave nothing out, and say what a look at each sector
    says.
    """

    async def main() -> None:
        rng = Random(seed)
        bench, size = NodeBench(), rng.choice([64 * KiB, 300 * KiB + 512, MiB])
        base = node = await bench.add(MemoryDriver, MemoryOptions(size=size))
        for _ in range(rng.choice([1, 1, 2, 3])):
            node = await layer(rng, node, rng.choice([size, size, size // 2 & -512]), bench)
        planned = []
        at = 0
        async for piece in pieces_above(node, base, end=node.length):
            assert piece.offset == at
            assert piece.length > 0
            assert piece.length <= CHUNK or piece.zero or not piece.work
            planned += [(piece.work, piece.zero)] * -(-piece.length // 512)
            at += piece.length
        assert at == node.length
        extents = [await chain_status(node, at, 512, base=base) for at in range(0, node.length, 512)]
        assert planned == [(extent.present, extent.present and extent.zero) for extent in extents]

    run(main)
