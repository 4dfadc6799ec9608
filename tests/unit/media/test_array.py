"""The shard of a job: options, Slurm's array variables, neither."""

import pytest

from megatron_ext.config import InputError
from megatron_ext.media.array import ShardConfig, shard_of_job


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch):
    """Sets the variables of an array task; none are left over from the surroundings."""
    names = ("ID", "MIN", "COUNT", "STEP")
    for name in names:
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)

    def set_task(*values: object) -> None:
        for name, value in zip(names, values, strict=False):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))

    return set_task


def test_one_shard_where_nothing_is_said(slurm) -> None:
    assert shard_of_job(None, None) == (0, 1)


@pytest.mark.parametrize(
    ("task", "shard"),
    [((0, 0, 4), (0, 4)), ((3, 0, 4), (3, 4)), ((7, 5, 3), (2, 3)), ((11, 3, 3, 4), (2, 3)), ((5, 5, 1, 1), (0, 1))],
)
def test_tasks_of_an_array(slurm, task: tuple[int, ...], shard: tuple[int, int]) -> None:
    slurm(*task)
    assert shard_of_job(None, None) == shard


def test_options_go_before_the_array(slurm) -> None:
    slurm(3, 0, 4)
    assert shard_of_job(1, 2) == (1, 2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((0, None), "num_shards"),
        ((None, 4), "shard_index"),
        ((4, 4), "shard_index 4 with num_shards 4"),
        ((-1, 4), "shard_index -1"),
        ((0, 0), "num_shards 0"),
    ],
)
def test_options_that_name_no_shard(options: tuple[int | None, int | None], named: str) -> None:
    with pytest.raises(InputError, match=named):
        ShardConfig(shard_index=options[0], num_shards=options[1])


@pytest.mark.parametrize("task", [(6, 1, 3), (5, 3, 3, 4), (5,), (5, 1, "many")])
def test_an_array_that_does_not_say_which_shard(slurm, task: tuple[object, ...]) -> None:
    """--array=1,5,6; an id between the steps; a scheduler that sets the id alone."""
    slurm(*task)
    with pytest.raises(InputError, match="SLURM_ARRAY_TASK_ID"):
        shard_of_job(None, None)
