"""The public kit for tests, our own and other people's: virtual time, chosen schedules, machines, image shapes, a pytest plugin.

`simloop` and `schedules` run asyncio code on virtual time in a chosen order; `machines` are block systems that a test holds in
its hand; `images` makes files of a given shape; `plugin` brings all that to pytest. Nothing below this room imports it. QEMU has
no counterpart: its tests start the whole program.
"""
