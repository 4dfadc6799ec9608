"""A fault that stops many ranks is told once, by the lowest rank that saw it.

The ranks meet in the key-value store of torchrun's agent: it is there before they join and after they part.
"""

import functools
import os
import signal
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from megatron_ext.config.errors import InputError

SETTLE_S = 3.0
"""Seconds that a rank waits for lower ones: ranks come to the same fault at different times."""

CONNECT_S = 10.0
"""Seconds to find the store: its machine may be busy with the end of many ranks."""

LOWEST = "lowest"
TOLD = "told"


@functools.cache
def is_told_here(error: Exception) -> bool:
    """Whether this rank reports the exception that ends it.

    Of the ranks with an InputError one does. Any other exception is reported, unless a rank has an InputError: then it
    is an echo, such as a connection that the failed rank closed. Without torchrun every rank reports its own. Asked
    again about the same exception, the answer is the same.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    # torchrun ends all ranks when the first one exits, and that may not be the one that tells.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        store = _agent_store()
        return _wins(store, int(os.environ["RANK"])) if isinstance(error, InputError) else not _is_echo(store)
    except RuntimeError:  # torch's DistError: the agent is gone, and nobody else will speak
        return True


def _agent_store() -> Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_S))
    return PrefixStore(f"faults/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _wins(store: Store, rank: int) -> bool:
    """Whether `rank` is the lowest that came here in time; exactly one rank gets True."""
    # The store goes with the agent of the first node: there even rank 0 waits, until others have found it.
    hurries = rank == 0 and int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1
    deadline = time.monotonic() + (0 if hurries else SETTLE_S)
    while (lowest := _lower(store, rank)) == rank and time.monotonic() < deadline:
        time.sleep(0.05)
    return lowest == rank and store.add(TOLD, 1) == 1  # a lower rank may come after all, when this one has spoken


def _lower(store: Store, rank: int) -> int:
    """The lowest rank that called this, `rank` included."""
    lowest = store.compare_set(LOWEST, "", str(rank))
    while int(lowest) > rank:
        lowest = store.compare_set(LOWEST, lowest.decode(), str(rank))
    return int(lowest)


def _is_echo(store: Store) -> bool:
    """Whether some rank has an InputError, or gets one in time."""
    deadline = time.monotonic() + SETTLE_S
    while not (found := store.check([LOWEST])) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found
