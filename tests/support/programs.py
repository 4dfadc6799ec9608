"""Programs of the project as a user starts them, without the wait for their imports (tests/support/warm.py).

Each has signals, environment, streams and an exit code of its own, and runs as Python runs a script; torchrun forks its
ranks. /proc shows the command and environment of the process that all come from. What only a cold interpreter can show
is seen where tests start one, by `subprocess` with `sys.executable`.
"""

import atexit
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from tests.support.warm import ROOT, context

PATIENCE_S = 200


class Program:
    """A running program; killed where its `with` block ends."""

    def __init__(self, *command: str, environment: Mapping[str, str] | None = None) -> None:
        """`command` is what follows `python`: a script, `-m` and a module, or `-c` and code; run in the project's
        folder, with `environment` added to that of the tests."""
        self._folder = tempfile.TemporaryDirectory(prefix="program-")
        self._streams = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        everything = {**os.environ, **(environment or {})}
        self._process = context().Process(target=_become, args=(command, everything, *map(str, self._streams)))
        self._process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()
        self._folder.cleanup()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, minus a signal's number; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """The exit code. Raises TimeoutError, with what the program has said."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise TimeoutError(f"not ended after {timeout_s} s:\n{self.stdout}{self.stderr}")
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Where it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        """So far."""
        return self._said(0)

    @property
    def stderr(self) -> str:
        """So far."""
        return self._said(1)

    def _said(self, stream: int) -> str:
        path = self._streams[stream]
        return path.read_text() if path.exists() else ""


class Finished:
    """What is left of a program that has ended."""

    def __init__(self, program: Program) -> None:
        self.returncode, self.stdout, self.stderr = program.wait(), program.stdout, program.stderr


def run(*command: str, environment: Mapping[str, str] | None = None) -> Finished:
    """A program from its start to its end; `Program` says what `command` is."""
    with Program(*command, environment=environment) as program:
        return Finished(program)


def _become(command: tuple[str, ...], environment: dict[str, str], *streams: str) -> None:
    """Be the program, in a process that multiprocessing has just started."""
    for number, path in enumerate(streams, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    # As a shell in the foreground starts it: job control in the background, and many CI runners, ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    execute(command, environment)


def execute(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """What `python *command` does, up to its end, which is that of this process."""
    code = 0
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(ROOT)
        _run(*command)
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        traceback.print_exc()
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _run(first: str, *rest: str) -> None:
    if first == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        if module == "torch.distributed.run":
            subprocess_handler.Popen = _ForkedRank
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


class _ForkedRank(subprocess.Popen):
    """What torchrun's agent starts and watches, forked from the agent, which is as warm as this process."""

    def _execute_child(self, args: Sequence[str], *how: Any) -> None:
        _, _, _, _, _, environment, *_ = how
        self.pid = os.fork()
        self._child_created = True
        if self.pid:
            return
        os.setsid()
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):  # the agent's own
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        python, unbuffered, *command = args
        assert (python, unbuffered) == (sys.executable, "-u"), "this is how torchrun starts a Python program"
        sys.stdout.reconfigure(write_through=True)
        execute(command, environment)
