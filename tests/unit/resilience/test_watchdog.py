"""What ends a process that hangs, and what may take its time."""

import time

from megatron_ext.config.resilience import ResilienceConfig
from megatron_ext.resilience import Watchdog
from megatron_ext.resilience.watchdog import EXIT_CODE
from tests.support.programs import run

HANGING = """
import sys, time
from pathlib import Path
from megatron_ext.config.resilience import ResilienceConfig
from megatron_ext.resilience import Watchdog, watchdog
watchdog.GRACE_S = 0.5
def tell(activity, seconds):
    print(activity, flush=True)
    if sys.argv[2] == "blocks":
        time.sleep(600)
    raise OSError(28, "No space left on device")
with Watchdog(ResilienceConfig(hang_timeout_s=0.5), Path(sys.argv[1]), 3, tell).watching():
    time.sleep(600)
"""


def test_a_disk_that_is_full_or_hangs_does_not_keep_a_hung_rank_alive(tmp_path):
    for disk in ("is full", "blocks"):
        done = run("-c", HANGING, str(tmp_path), disk)
        assert done.returncode == EXIT_CODE
        assert done.stdout == "the start\n" and "rank 3: the start has taken" in done.stderr
        assert 'File "<string>", line' in (tmp_path / "rank_00003.txt").read_text()


def test_what_may_take_longer_does(tmp_path):
    """A wait for a save is no hang, and takes nothing from the median of the steps."""
    told = []
    watchdog = Watchdog(ResilienceConfig(hang_timeout_s=0.5), tmp_path, 0, lambda *hang: told.append(hang))
    with watchdog.watching():
        for number in range(3):
            watchdog.alive(f"step {number}", is_step=True)
            time.sleep(0.01)
        watchdog.alive("a wait for the last save", more_s=60.0)
        time.sleep(1.2)
    assert told == [] and 0.01 <= watchdog.step_seconds < 0.4
