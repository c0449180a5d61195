"""The ``file`` driver: driver.py serves requests, locks.py keeps other programs away, space.py finds and makes holes."""

from qblock.drivers.file.driver import FileCreateOptions, FileDriver, FileOptions

__all__ = ["FileCreateOptions", "FileDriver", "FileOptions"]
