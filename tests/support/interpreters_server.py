"""A nursery of interpreters (see interpreters.py), and what is forked from it. Standard library only.

python interpreters_server.py SOCKET
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import sys
import threading
import traceback
from typing import Any, NoReturn

#: What libraries read at import; processes in which these differ have different zygotes.
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH", "PYTHON", "OMP_", "XDG_", "HOME", "CUDA_")
#: Of these what is read when it is needed, or set in each process.
SET_LATER = ("HF_TOKEN", "HF_MODULES_CACHE")
MOST = 4  # zygotes at a time; each holds some 100 MB


def nursery(path: str) -> None:
    listener = listening(path)
    zygotes: dict[str, tuple[int, str]] = {}
    print("open", flush=True)
    while 0 not in (ready := select.select([listener, 0], [], [])[0]):
        assert ready
        with accepted(listener) as (connection, request, _):
            key = json.dumps([request["imports"], import_environment(request["environment"])])
            if key not in zygotes:
                import torch._dynamo  # noqa: F401 (half of the time that importing transformers takes)

                if len(zygotes) == MOST:
                    dismiss(*zygotes.pop(next(iter(zygotes))))
                zygotes[key] = fork_zygote(f"{path}-{random.randbytes(8).hex()}", request, listener)
            zygotes[key] = zygotes.pop(key)  # behind those that were not used lately
            connection.sendall(zygotes[key][1].encode() + b"\n")
            reap()
    for pid, _ in zygotes.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def dismiss(pid: int, path: str) -> None:
    """A zygote that ends when those that have found it are served; others will not."""
    os.unlink(path)
    os.kill(pid, signal.SIGTERM)


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def import_environment(environment: dict[str, str]) -> list[tuple[str, str]]:
    return sorted((k, v) for k, v in environment.items() if k.startswith(READ_AT_IMPORT) and k not in SET_LATER)


def fork_zygote(path: str, request: dict[str, Any], above: socket.socket) -> tuple[int, str]:
    listener = listening(path)
    pid = fork()
    if not pid:
        above.close()
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        zygote(listener, request)
    listener.close()
    return pid, path


def zygote(listener: socket.socket, first: dict[str, Any]) -> NoReturn:
    parent, dismissed = os.getppid(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: dismissed.set())
    put_environment({k: v for k, v in first["environment"].items() if k not in SET_LATER})
    if not sys.flags.isolated:
        ours = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [os.path.abspath(folder) for folder in ours if folder]
    exec(first["imports"], {"__name__": "imports"})
    while os.getppid() == parent:
        if not select.select([listener], [], [], 2)[0]:
            if dismissed.is_set():
                break
        else:
            with accepted(listener) as (connection, request, streams):
                if not fork():
                    listener.close()
                    supervise(connection, request, streams)
                for stream in streams:
                    os.close(stream)
        reap()
    os._exit(0)


def supervise(connection: socket.socket, request: dict[str, Any], streams: list[int]) -> NoReturn:
    """The process runs, and the client is told how it ended; when the client is killed, so is the process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    pid = fork()
    if not pid:
        connection.close()
        run(request, streams)
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    process = os.pidfd_open(pid)
    if process not in select.select([connection, process], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(struct.pack("i", code))
    os._exit(0)


def run(request: dict[str, Any], streams: list[int]) -> NoReturn:
    for stream, target in zip(streams, range(3), strict=True):
        os.dup2(stream, target)
        os.close(stream)
    os.chdir(request["folder"])
    put_environment(request["environment"])
    seed()
    code = 1
    try:
        execute(*request["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 0xFF)


def seed() -> None:
    """As at import: of every process another."""
    import numpy as np
    import torch

    random.seed()
    np.random.seed()
    torch.default_generator.seed()


def execute(what: str, *arguments: str) -> None:
    """As `python what *arguments` does."""
    if what == "-m":
        sys.argv = ["-m", *arguments[1:]]
        search(os.getcwd())
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *arguments[1:]]
        search("")
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(arguments[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = [what, *arguments]
        search(os.path.dirname(os.path.abspath(what)))
        runpy.run_path(what, run_name="__main__")


def search(folder: str) -> None:
    if not sys.flags.isolated:
        sys.path.insert(0, folder)


def put_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    cache = environment.get("HF_MODULES_CACHE")
    for name, module in list(sys.modules.items()):
        if cache and name.startswith("transformers") and "HF_MODULES_CACHE" in vars(module):
            module.HF_MODULES_CACHE = cache


def fork() -> int:
    """Of a process without threads: locks of others would stay locked for ever."""
    assert len(os.listdir("/proc/self/task")) == 1
    return os.fork()


def listening(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    return listener


@contextlib.contextmanager
def accepted(listener: socket.socket) -> Any:
    connection, _ = listener.accept()
    with connection:
        head, streams, _, _ = socket.recv_fds(connection, 4, 3)
        (length,) = struct.unpack("I", head)
        yield connection, json.loads(connection.makefile("rb").read(length)), streams


if __name__ == "__main__":
    if not sys.flags.isolated:
        del sys.path[0]
        theirs = {os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p}
        sys.path[:] = [p for p in sys.path if p not in theirs]
    nursery(sys.argv[1])
