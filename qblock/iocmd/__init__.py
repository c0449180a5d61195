"""The command language of qemu-io, on any backend: what ``qblock-io`` and the monitor's ``qemu-io`` run.

Models semantics.md section 20: layouts and exit codes are those of qemu-io 7.2, explanations of errors are our own. Differs from
QEMU in that a request is never larger than 2 GiB - 512 bytes unless it carries no buffer.
"""
