"""Experiments with the block layer: what a protocol survives, how its forerunners compare.

Each experiment drives real machines on virtual time over real image files, and leaves files from which its verdicts can be
computed again. `witness` kills a machine, its management or both at every step of drive-reopen's protocol. Their command
lines are in `qblock.tools.lab`.
"""
