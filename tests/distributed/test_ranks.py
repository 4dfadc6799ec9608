"""The ranks of the tests: what fails on one of them is told, and the next test gets new ones."""

import os

import pytest

from tests.support.distributed import Ranks


def place():
    return os.environ["RANK"], os.environ["WORLD_SIZE"], os.getpid()


def fail_on_rank_1():
    if os.environ["RANK"] == "1":
        raise ValueError("this rank only")


def die():
    os._exit(3)


def test_processes_stay_and_a_failure_ends_them():
    ranks = Ranks()
    try:
        first, second = ranks.run(place, 2)
        assert (first[:2], second[:2]) == (("0", "2"), ("1", "2"))
        assert ranks.run(place, 1) == [("0", "1", first[2])]
        with pytest.raises(AssertionError, match=r"(?s)rank 1.*ValueError: this rank only"):
            ranks.run(fail_on_rank_1, 2)
        assert ranks.run(place, 1)[0][2] != first[2]
        with pytest.raises(AssertionError, match="ended without a word"):
            ranks.run(die, 1)
    finally:
        ranks.close()
