"""Programs that tests start warm are those that a user starts cold: output, exit code, signals, environment."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.support.programs import Program, run
from tests.support.warm import ROOT

SEEN = """
import atexit, json, os, signal, sys, threading
atexit.register(print, "at the end")
state = {
    "main": __name__, "argv": sys.argv, "folder": os.getcwd(), "threads": threading.active_count(),
    "variables": {name: value for name, value in os.environ.items() if name.startswith("OF_THE_TEST")},
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "terminate": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    "numbers of threads": [torch.get_num_threads() for torch in [__import__("torch")]],
}
print(json.dumps(state))
print("an error", file=sys.stderr)
sys.exit(3)
"""
WAITING = "print('waits', flush=True)\nimport time\ntime.sleep(600)"


def test_what_a_program_meets_is_what_a_cold_one_meets(monkeypatch, tmp_path):
    """In the background, too, where SIGINT is ignored."""
    monkeypatch.setenv("OF_THE_TEST", "1")
    warm = run("-c", SEEN, "an argument", environment={"OF_THE_TEST_TOO": "2"})
    command = [sys.executable, "-c", SEEN, "an argument"]
    cold = subprocess.run(command, env={**os.environ, "OF_THE_TEST_TOO": "2"}, cwd=ROOT, capture_output=True, text=True)
    assert warm.stdout == cold.stdout and "at the end" in warm.stdout
    assert (warm.returncode, warm.stderr) == (cold.returncode, cold.stderr) == (3, "an error\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM)])
def test_signals_arrive(number, code):
    with Program("-c", WAITING) as program:
        while not program.stdout:
            time.sleep(0.01)
        program.send_signal(number)
        assert program.wait(30) == code
        assert ("KeyboardInterrupt" in program.stderr) == (number == signal.SIGINT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, processes are spawned")
def test_imports_are_done():
    loaded = run("-c", "import sys; print(*sorted(sys.modules), sep='\\n')").stdout.split()
    assert {"torch", "megatron.core.optimizer", "megatron_ext.train.loop", "tokenizer_train.vision.step"} <= {*loaded}


def test_torchrun_forks_its_ranks(tmp_path):
    """Which then are what it starts: in sessions of their own, its children, with its signals' default."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal, sys\n"
        "is_session, is_default = os.getsid(0) == os.getpid(), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL\n"
        "print(os.environ['RANK'], sys.argv[1:], 'torch' in sys.modules, is_session, is_default, flush=True)\n"
        "sys.exit(5 * int(os.environ['RANK']))\n"
    )
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), "x")
    assert sorted(done.stdout.splitlines()) == [f"{rank} ['x'] True True True" for rank in (0, 1)], done.stderr
    assert done.returncode == 1 and "exitcode  : 5" in done.stderr


def test_a_program_ends_with_its_block():
    with Program("-c", WAITING) as program:
        assert program.poll() is None
    with pytest.raises(ProcessLookupError):
        os.kill(program.pid, 0)


def test_a_program_that_does_not_end_tells_what_it_said():
    with Program("-c", WAITING) as program:
        while not program.stdout:
            time.sleep(0.01)
        with pytest.raises(TimeoutError, match="waits"):
            program.wait(0.01)
