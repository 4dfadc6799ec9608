"""A process ends with its parent, killed or not: it asks the kernel for a signal."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded before any fork: the loader has a lock, which a fork may find taken


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have this process sent signal `number` when process `parent`, which started it, is gone; now, if it is already.

    The kernel tells only of a death to come (prctl(2), PR_SET_PDEATHSIG). A parent that died between its fork and this
    call would leave a process that nobody ever ends.
    """
    _LIBC.prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def stop_with_launcher() -> None:
    """Have this rank sent SIGTERM when torchrun's agent is gone: in training it saves and stops, before it ends.

    The agent starts ranks in sessions of their own (torch, subprocess_handler.py, `start_new_session`) and ends them
    itself. Killed by SIGKILL, as by the system when memory runs out, it cannot: its ranks would train on, unseen,
    beside the ranks of the next start. Without torchrun nothing is done.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid(), signal.SIGTERM)  # an agent that is gone by now took the ranks' store with it
