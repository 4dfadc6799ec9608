"""Two starts never write to one run folder, and nothing has to be cleaned up after a killed one."""

import subprocess
import sys

import pytest

from megatron_ext.config import InputError
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.files import alone_in
from megatron_ext.observe import Run

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of events.jsonl."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "events.jsonl")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_folder_in_use_is_refused_in_time(tmp_path, holder):
    told = []
    with pytest.raises(InputError, match=f"observe.run_dir '{tmp_path}' is in use"):
        with alone_in(tmp_path / "events.jsonl", told.append, patience_s=0.2):
            pytest.fail("it is not ours")
    assert told == [f"waiting up to 0.2 s for another start in {tmp_path} to end"]


def test_the_lock_of_a_killed_start_is_free(tmp_path, holder):
    holder.kill()
    with Run.open(ObserveConfig(run_dir=str(tmp_path), tensorboard=False), True, "{}\n") as run:
        run.log_event("save", step=1)
        with pytest.raises(InputError, match="is in use"):
            with alone_in(tmp_path / "events.jsonl", print, patience_s=0):
                pytest.fail("it is the run's")
    with alone_in(tmp_path / "events.jsonl", print, patience_s=0):
        pass
