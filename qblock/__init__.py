"""qblock: QEMU's block layer in Python."""
