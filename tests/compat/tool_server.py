"""Runs qblock-img and qblock-io for scripts without starting an interpreter each time: a forking server.

A request has the number of its words, the process id of the caller, its directory, the name of the program, and its arguments,
each ended by a zero byte; the answer is the exit code. The program gets the caller's standard streams;
its output is the caller's descriptor 8.
"""

from __future__ import annotations

import os
import signal
import socket
import sys


def _receive(connection: socket.socket) -> list[str]:
    received = b""
    while received.count(b"\0") < 1 or received.count(b"\0") <= int(received.split(b"\0")[0]):
        received += connection.recv(65536)
    return received.decode().split("\0")[1:-1]


def _perform(pid: str, folder: str, name: str, args: list[str]) -> int:
    from qblock.tools import img, io

    for theirs, flags, ours in ((0, os.O_RDONLY, 0), (8, os.O_WRONLY, 1), (2, os.O_WRONLY, 2)):
        os.dup2(os.open(f"/proc/{pid}/fd/{theirs}", flags), ours)
    os.chdir(folder)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))
    code = (img if name == "qemu-img" else io).main(args)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _serve(connection: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid, folder, name, *args = _receive(connection)
    child = os.fork()
    if not child:
        connection.close()
        os._exit(_perform(pid, folder, name, args))
    status = os.waitpid(child, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    connection.sendall(f"{code if code >= 0 else 128 - code}\n".encode())


def main() -> None:
    """Print the port and serve until killed."""
    from qblock.tools import (  # noqa: F401 - so that no child has to import them
        img_amend,
        img_bench,
        img_bitmap,
        img_check,
        img_commit,
        img_compare,
        img_convert,
        img_create,
        img_dd,
        img_info,
        img_map,
        img_measure,
        img_rebase,
        img_resize,
        img_snapshot,
        io,
    )

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.create_server(("127.0.0.1", 0)) as server:
        os.write(1, b"%d\n" % server.getsockname()[1])
        while True:
            connection = server.accept()[0]
            if not os.fork():
                server.close()
                _serve(connection)
                os._exit(0)
            connection.close()


if __name__ == "__main__":
    main()
