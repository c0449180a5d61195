"""Guest devices as far as the block layer sees them: models, buses, the tree of a machine, drives, media, statistics.

Models what qemu-system-x86_64 7.2 makes of ``-drive`` and ``-device``. Differs from QEMU in that a device has no registers: guest
requests come from a program of ours (`qblock.guest`) or from a person (``qemu-io``).
"""
