"""The programs: `qblock` (prompt, demo, replay, labs), `qblock-img`, `qblock-io`, `qblock-storage-daemon`, `qblock-system`.

Command lines, layouts and exit codes are those of QEMU 7.2's programs of the same names. Thin on purpose: arguments in, the
rooms below, text out.
"""
