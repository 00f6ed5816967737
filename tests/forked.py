"""Python commands in processes forked from a server that has imported torch: as in a fresh process, without its start.

    done = forked.run(["extract_refusal_direction.py", "--model_id", "demo"], cwd=ROOT)
    done.returncode, done.stdout, done.stderr

Arguments are those of the interpreter: a script, `-m module` or `-c program`, and what follows. The process has its own
streams, environment and working directory, and ends as any interpreter does. Where there is no fork it is a fresh process.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import IO, Any

__all__ = ["Process", "run", "start"]

ROOT = Path(__file__).parent.parent
_IMPORTED = "torch transformers refusal_direction.cli refusal_direction.pipeline"
_TOO_LONG = 240.0
"""Seconds after which a process hangs, and is ended."""

File = int | IO[Any]


class Process:
    """A running process; its exit code is negative where a signal ended it."""

    def __init__(self, pid: int, reply: IO[str]) -> None:
        self.pid = pid
        self._reply = reply
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self._code is None and select.select([self._reply], [], [], 0)[0]:
            self._code = int(self._reply.readline())
            self._reply.close()
        return self._code

    def wait(self, timeout: float = _TOO_LONG) -> int:
        """The exit code, once it has ended."""
        if self._code is None and not select.select([self._reply], [], [], timeout)[0]:
            self.kill()
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        code = self.poll()
        assert code is not None
        return code

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def start(
    arguments: Sequence[str],
    *,
    stdout: File = subprocess.DEVNULL,
    stderr: File = subprocess.DEVNULL,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> Process | subprocess.Popen[str]:
    """A process that runs Python with these arguments and writes into these files."""
    environment = dict(os.environ if env is None else env)
    if not hasattr(os, "fork"):
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, stdout=stdout, stderr=stderr, cwd=cwd, env=environment, text=True)
    with open(os.devnull, "r+") as devnull:
        reader, writer = os.pipe()
        files = [devnull if file == subprocess.DEVNULL else file for file in (subprocess.DEVNULL, stdout, stderr)]
        numbers = [file if isinstance(file, int) else file.fileno() for file in files]
        wanted = json.dumps({"arguments": list(arguments), "cwd": str(cwd), "environment": environment}) + "\n"
        control = _server()
        sent = socket.send_fds(control, [wanted.encode()], [*numbers, writer])
        control.sendall(wanted.encode()[sent:])
        os.close(writer)
    reply = os.fdopen(reader, buffering=1)
    return Process(int(reply.readline()), reply)


def run(
    arguments: Sequence[str],
    *,
    stdout: File | None = None,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """What a process prints, and its exit code. `stdout`: where its output goes instead."""
    import tempfile

    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        code = start(arguments, stdout=out if stdout is None else stdout, stderr=err, cwd=cwd, env=env).wait()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(list(arguments), code, out.read(), err.read())


@cache
def _server() -> socket.socket:
    """Starts the server; it ends with this process, whose end of the pair it reads."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tests.forked", str(theirs.fileno())]
    server = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    atexit.register(server.wait)  # after the other end is closed
    atexit.register(ours.close)
    return ours


# In the server

_codes = [1]
"""The exit code, last: 1 until the command has ended otherwise than by an exception."""


def _leave() -> None:
    """Skip the interpreter's taking apart of every module, which takes longer than most commands."""
    with contextlib.suppress(OSError, ValueError):  # then the interpreter itself says so
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_codes[-1])


def _serve(control: socket.socket) -> None:
    """Fork for each request. Returns in the process that is to become the command, and in the server at its end."""
    atexit.register(_leave)  # first, so that it is called last
    for name in _IMPORTED.split():
        __import__(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for the commands
    while True:
        message, files, _, _ = socket.recv_fds(control, 1 << 16, 4)
        if not message:
            os._exit(0)
        while not message.endswith(b"\n"):
            message += control.recv(1 << 16)
        if os.fork() == 0:
            control.close()
            if _attend(files.pop()):
                _become(files, **json.loads(message))
                return
        for file in files:
            os.close(file)


def _attend(reply: int) -> bool:
    """Fork the command and report its number and exit code. True in the command itself."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        os.close(reply)
        return True
    os.write(reply, f"{child}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        os.write(reply, f"{code}\n".encode())
    os._exit(0)


def _become(files: Sequence[int], *, arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Take the place of a fresh interpreter."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    encoding, _, errors = environment.get("PYTHONIOENCODING", "utf-8").partition(":")
    for name, number in (("stdout", 1), ("stderr", 2)):
        binary = io.BufferedWriter(io.FileIO(number, "w"))
        said = "backslashreplace" if name == "stderr" else errors or "strict"
        stream = io.TextIOWrapper(binary, encoding, said, line_buffering=name == "stderr")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.setsid()
    sys.argv = ["-c", *arguments]


def _run(kind: str, *arguments: str) -> None:
    """What the interpreter does with its arguments."""
    if kind == "-m":
        sys.argv = list(arguments)
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *arguments[1:]]
        sys.path[0] = ""
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(arguments[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = [kind, *arguments]
        sys.path[0] = str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
    try:
        _run(*sys.argv[1:])
        _codes.append(0)
    except SystemExit as ended:
        _codes.append(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
        raise
