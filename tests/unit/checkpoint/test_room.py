"""The disk is looked at before the first step."""

import pytest

from megatron_ext.checkpoint.room import check_room
from megatron_ext.checkpoint.store import CheckpointStore
from megatron_ext.config import InputError

TOO_MUCH = 1 << 60


def test_a_disk_without_room_is_refused_with_both_numbers_and_the_fix(tmp_path):
    root = tmp_path / "new" / "checkpoints"
    with pytest.raises(InputError) as refusal:
        check_room(root, TOO_MUCH, keep=2)
    message = str(refusal.value)
    assert message.startswith(f"{root} needs {3 * TOO_MUCH:,} bytes for 3 more checkpoints of {TOO_MUCH:,} ")
    assert " free: free some, lower checkpoint.keep, or move observe.run_dir" in message and "\n" not in message
    check_room(root, 1 << 10, keep=2)
    assert not root.exists()


def test_checkpoints_that_are_there_count(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step, more in ((1, 2), (2, 1), (3, 1)):
        store.write(step, lambda folder: None, {})
        with pytest.raises(InputError, match=f"for {more} more checkpoints"):
            check_room(tmp_path, TOO_MUCH, keep=2)
