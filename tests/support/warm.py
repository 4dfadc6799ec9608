"""Processes that begin with the imports of the project done: torch and megatron-core cost an interpreter 4 to 8 s of
processor time, which is more than most tests take."""

import contextlib
import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PRELOADED = "tests.support.preloaded"


def context() -> ForkServerContext | SpawnContext:
    """Of processes forked from one that has imported `PRELOADED` and done nothing else: they share nothing with this
    one, as spawned processes do not.

    Their environment is that of the first call; what matters to a process is handed to it. Where there is a GPU they
    are spawned: a library of the imports may have touched it, and a process that has is not to be forked.
    """
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload([PRELOADED])
    with contextlib.chdir(ROOT):  # where the server looks for what it is to import, and says nothing if it is not there
        forkserver.ensure_running()
    return made
