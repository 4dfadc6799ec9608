"""How ranks that torchrun has started again meet each other, and not the ranks before them.

torchrun keeps one key-value store for all restarts of a job (https://github.com/pytorch/pytorch/issues/135712): a rank
would find the address of a dead one under its peer's name, and wait for it. TORCHELASTIC_RESTART_COUNT does not tell
the starts apart: a node that only follows another's restart does not count it (pytorch/pytorch#108158).
"""

import json
import time
import uuid

from torch.distributed import Store

PROPOSED = "meeting"
SECONDS_BETWEEN_LOOKS = 0.1


def meet(store: Store, rank: int, world_size: int) -> str:
    """A name on which the ranks of this start agree, and of which no rank of another start knows.

    Rank 0 proposes it. Each other rank answers with a word of its own, and rank 0 confirms all words: what an earlier
    rank 0 has proposed was never confirmed with a word of now, however far that start came.

    Raises:
        RuntimeError: (torch's DistStoreError) a rank does not come within the store's timeout.
    """
    word = uuid.uuid4().hex
    if rank == 0:
        store.set(PROPOSED, word)
        words = [store.get(f"{word}/{other}").decode() for other in range(1, world_size)]
        store.set(f"{word}/all", json.dumps(words))
        return word
    deadline = time.monotonic() + store.timeout.total_seconds()
    while time.monotonic() < deadline:
        name = store.get(PROPOSED).decode()
        store.set(f"{name}/{rank}", word)
        if store.check([f"{name}/all"]) and word in json.loads(store.get(f"{name}/all")):
            return name
        time.sleep(SECONDS_BETWEEN_LOOKS)
    raise RuntimeError(f"rank {rank}: rank 0 has not met all ranks within {store.timeout.total_seconds():g} s")
