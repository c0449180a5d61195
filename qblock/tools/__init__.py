"""The programs: `qblock` with its demo, replay and prompt, `qblock-img`, `qblock-io` and `qblock-storage-daemon`.

Command lines, layouts and exit codes are those of QEMU 7.2's programs of the same names. Thin on purpose: arguments in, the
rooms below, text out.
"""
