"""The monitor: QMP for programs, HMP for people, both over the same typed commands, and the machine they steer.

Models QEMU's monitors (semantics.md section 1, hmp-block.md). `qmp` and `jsonstream` know no sockets, `server` and `client` are
the sockets, `commands` is what can be asked for. Nothing here touches a driver: it sees the `BlockSystem` and values.
"""
