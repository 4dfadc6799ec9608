"""A process ends with its parent, whether that dies after or before the kernel was asked to tell of it."""

import os
import signal
import time

import pytest

from megatron_ext.processes import end_with_parent


@pytest.mark.parametrize("parent_dies", ["after the call", "before the call"])
def test_the_child_of_a_killed_process_ends(parent_dies):
    lives, child_holds = os.pipe()  # its reading end sees the end of the file once no process holds the other
    asked, child_asks = os.pipe()
    parent = os.fork()
    if not parent:
        own_pid = os.getpid()
        if not os.fork():
            while parent_dies == "before the call" and os.getppid() == own_pid:
                time.sleep(0.001)
            end_with_parent(own_pid)
            os.write(child_asks, b"x")
            time.sleep(60)
            os._exit(0)
        if parent_dies == "before the call":
            os.kill(own_pid, signal.SIGKILL)
        time.sleep(60)
        os._exit(0)
    os.close(child_holds)
    os.close(child_asks)
    said = os.read(asked, 1)
    if parent_dies == "after the call":
        os.kill(parent, signal.SIGKILL)
    assert os.waitpid(parent, 0)[1] == signal.SIGKILL
    start = time.monotonic()
    assert not os.read(lives, 1) and time.monotonic() - start < 30
    assert bool(said) == (parent_dies == "after the call")
    os.close(lives)
    os.close(asked)
