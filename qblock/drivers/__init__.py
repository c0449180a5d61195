"""The drivers: one module or package for each, found by name through `qblock.registry`.

Models QEMU's block drivers. A driver imports what lies below (the border, options, extents) and never another driver; what a
few of them share has a room of its own there (`qblock.filtering`, `qblock.zeroes`).
"""
