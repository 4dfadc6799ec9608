"""The process that writes: a snapshot of its parent, deaf to signals, gone when its parent is, and never waited for."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from megatron_ext.checkpoint.writer import WriteError, Writer


def wait(writer: Writer) -> None:
    deadline = time.monotonic() + 30
    while not writer.finished():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_it_sees_what_was_there_when_it_began(tmp_path):
    tensor, go = torch.zeros(1000), tmp_path / "go"

    def write():
        while not go.exists():
            time.sleep(0.005)
        return tensor.sum().item(), os.getpid()

    writer = Writer(write)
    assert not writer.finished()
    tensor.fill_(1)
    go.touch()
    wait(writer)
    assert writer.result() == (0, writer.pid) and writer.pid != os.getpid()


def test_it_has_one_thread_and_none_of_its_parents_files():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(300, 300) @ torch.ones(300, 300)  # the pool of threads that a forked process must not wait for
        reader, _ = os.pipe()
        writer = Writer(lambda: (torch.get_num_threads(), (torch.ones(300, 300) * 2).sum().item(), is_open(reader)))
        wait(writer)
        assert writer.result() == (1, 180000.0, False)
    finally:
        torch.set_num_threads(threads)


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_a_failure_is_told_with_its_reason():
    def write():
        raise FileNotFoundError("no such folder")

    writer = Writer(write)
    wait(writer)
    with pytest.raises(WriteError, match="FileNotFoundError: no such folder"):
        writer.result()


def test_a_killed_one_is_noticed():
    writer = Writer(lambda: time.sleep(60))
    os.kill(writer.pid, signal.SIGKILL)
    wait(writer)
    with pytest.raises(WriteError, match="SIGKILL"):
        writer.result()


def test_kill_ends_even_a_stopped_one(tmp_path):
    ready = tmp_path / "ready"

    def write():
        ready.touch()
        time.sleep(60)

    writer = Writer(write)
    while not ready.exists():
        time.sleep(0.005)
    os.kill(writer.pid, signal.SIGSTOP)
    assert not writer.finished()
    writer.kill()
    wait(writer)


def test_the_signal_that_asks_for_a_last_checkpoint_does_not_end_it(tmp_path):
    ready, go = tmp_path / "ready", tmp_path / "go"

    def write():
        ready.touch()
        while not go.exists():
            time.sleep(0.005)
        return "written"

    writer = Writer(write)
    while not ready.exists():
        time.sleep(0.005)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(writer.pid, number)
    go.touch()
    wait(writer)
    assert writer.result() == "written"


def test_it_does_not_outlive_its_parent(tmp_path):
    """kill -9 of a run: nothing of it writes beside the run that is started again."""
    program = textwrap.dedent(
        """
        import os, signal, sys, time
        from megatron_ext.checkpoint.writer import Writer

        def write():
            with open(sys.argv[1], "wb", buffering=0) as file:
                while True:
                    file.write(b"x")
                    time.sleep(0.001)

        writer = Writer(write)
        while not (os.path.exists(sys.argv[1]) and os.path.getsize(sys.argv[1])):
            time.sleep(0.001)
        print(writer.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    file = tmp_path / "orphan"
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    # `run` returned because the pipe of stdout is closed: the orphan, which shares it, is gone.
    size = file.stat().st_size
    time.sleep(0.1)
    assert file.stat().st_size == size
