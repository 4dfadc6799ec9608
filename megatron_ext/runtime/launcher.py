"""What a rank owes the torchrun that started it: not to live on without it."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def stop_with_launcher() -> None:
    """Have this rank sent SIGTERM when torchrun's agent is gone: in training it saves and stops, before it ends.

    The agent starts ranks in sessions of their own (torch, subprocess_handler.py, `start_new_session`) and ends them
    itself. Killed by SIGKILL, as by the system when memory runs out, it cannot: its ranks would train on, unseen,
    beside the ranks of the next start. Without torchrun nothing is done.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
