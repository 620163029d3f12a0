"""``dart-llm`` and ``python`` for many shell commands, without importing torch for each of them.

``python warm_cli.py serve SOCKET [MODULE]`` calls ``MODULE.prepare``, which imports what is slow,
and waits.  ``python -S warm_cli.py run SOCKET PROGRAM ARGUMENTS...`` hands its arguments, folder,
environment and standard streams over; a forked child becomes that command, and its exit code comes
back.  A signal that the client gets reaches the child, and the child ends with its client.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys

BACKLOG = 8
MOST = 1 << 20
"""Bytes of one request: arguments and environment."""
LOST = 125
"""Exit code of a client whose server went away."""


def run(address: str, arguments: list[str]) -> int:
    """Become a client: the exit code of the command."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address)
    request = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
    body = json.dumps(request).encode()
    socket.send_fds(connection, [len(body).to_bytes(4, "big")], [0, 1, 2])
    connection.sendall(body)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, frame: connection.sendall(bytes([got])))
    answer = connection.recv(1)
    return answer[0] if answer else LOST


def serve(address: str, module: str | None) -> None:
    """Fork a child for every client, until this process is terminated."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if module:
        importlib.import_module(module).prepare()
    ours, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno())
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    clients: dict[int, socket.socket] = {}
    listening.bind(address)
    listening.listen(BACKLOG)
    while True:
        ready, _, _ = select.select([listening, ours], [], [])
        if ours in ready:
            ours.recv(4096)
            _reap(clients)
        if listening in ready:
            connection, _ = listening.accept()
            child = os.fork()
            if child == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for one in (listening, ours, wakes, *clients.values()):
                    one.close()
                _become(connection)
            clients[child] = connection


def _reap(clients: dict[int, socket.socket]) -> None:
    while clients:
        child, status = os.waitpid(-1, os.WNOHANG)
        if not child:
            return
        connection = clients.pop(child)
        code = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(OSError):  # the client may be gone
            connection.sendall(bytes([code if code >= 0 else 128 - code]))
        connection.close()


def _become(connection: socket.socket) -> None:
    """The command of one client, in this process, to its end."""
    import threading

    head, streams, _, _ = socket.recv_fds(connection, 4, 3)
    size, body = int.from_bytes(head, "big"), b""
    assert size < MOST
    while len(body) < size:
        body += connection.recv(size - len(body))
    request = json.loads(body)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", closefd=False)
    threading.Thread(target=_watch, args=(connection,), daemon=True).start()
    code = 1
    try:
        _execute(request["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


def _watch(connection: socket.socket) -> None:
    """Pass the client's signals on; end with it."""
    while True:
        found = connection.recv(1)
        if not found:
            os._exit(LOST)
        os.kill(os.getpid(), found[0])


def _execute(arguments: list[str]) -> None:
    import runpy

    program, *rest = arguments
    if program == "dart-llm":
        from dart_llm.__main__ import main

        sys.argv = arguments
        main()
    elif rest[:1] == ["-m"]:
        sys.argv = rest[1:]
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = rest
        sys.path.insert(0, os.path.dirname(os.path.abspath(rest[0])))
        runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
    else:
        raise SystemExit(run(sys.argv[2], sys.argv[3:]))
