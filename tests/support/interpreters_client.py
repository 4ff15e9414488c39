"""Run by `interpreters.python`: has a zygote run its arguments, and ends as they do.

python interpreters_client.py FLAG IMPORTS (-c CODE | -m MODULE | FILE) ARGUMENT...
"""

import json
import os
import signal
import socket
import struct
import sys


def main(flag, imports, *arguments):
    place = os.environ.get("SHIFTDC_TEST_INTERPRETERS")
    if place is None:
        os.execv(sys.executable, [sys.executable, *([flag] if flag else []), *arguments])
    request = {"imports": imports, "arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    while True:
        with ask(f"{place}/nursery{flag}", request, []) as nursery:
            path = nursery.makefile().readline().strip()
        try:
            zygote = ask(path, request, [0, 1, 2])
        except OSError:  # it has made room for others since
            continue
        return ended(zygote.recv(4))


def ask(path, request, streams):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    message = json.dumps(request).encode()
    socket.send_fds(connection, [struct.pack("I", len(message))], streams)
    connection.sendall(message)
    return connection


def ended(status):
    (code,) = struct.unpack("i", status)
    if code < 0:  # by a signal
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    os._exit(main(*sys.argv[1:]))
