"""Items through other processes: order, faults, deaths."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_ext.media import MediaError
from megatron_ext.media.workers import ATTEMPTS, WorkerPool
from tests.support.processes import is_running


@dataclass(frozen=True)
class Square:
    """Squares; a negative number is unusable, 13 a bug, 7 kills the process each time, 5 the first time only, 60 takes
    a minute."""

    folder: Path

    def __call__(self, number: int) -> tuple[int, int]:
        if number < 0:
            raise MediaError("negative")
        if number == 13:
            raise KeyError("thirteen")
        deaths = self.folder / str(number)
        if number == 7 or (number == 5 and not deaths.exists()):
            with deaths.open("a") as file:
                file.write("died ")
            os.kill(os.getpid(), signal.SIGKILL)
        print("not a result")  # as libraries do
        time.sleep(60 if number == 60 else 0.01 * (number % 3))
        return number * number, os.getpid()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_are_in_order(tmp_path, count, capfd):
    with WorkerPool(Square(tmp_path), count) as pool:
        results = list(pool.map(iter([4, 3, -1, 2, 1, 0])))
        assert str(results.pop(2)) == "negative"
        assert [square for square, _ in results] == [16, 9, 4, 1, 0]
        processes = {process for _, process in results}
        assert processes <= (set(pool.process_ids) or {os.getpid()})


def test_a_process_that_dies_is_replaced_and_what_kills_each_is_given_up(tmp_path):
    with WorkerPool(Square(tmp_path), 2) as pool:
        before = set(pool.process_ids)
        first, second, third, fourth = pool.map([3, 5, 7, 4])
        assert (first[0], second[0], fourth[0]) == (9, 25, 16)
        assert isinstance(third, MediaError) and str(third) == f"{ATTEMPTS} processes died over it (signal SIGKILL)"
        assert (tmp_path / "5").read_text() == "died " and (tmp_path / "7").read_text() == "died " * ATTEMPTS
        assert len(before & set(pool.process_ids)) <= 1
        pids = pool.process_ids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_what_a_process_hangs_over_is_given_up(tmp_path):
    with WorkerPool(Square(tmp_path), 2, timeout_s=3.0) as pool:
        before, began = set(pool.process_ids), time.monotonic()
        first, second, third = pool.map([3, 60, 4])
        assert time.monotonic() - began < 30
        assert (first[0], third[0]) == (9, 16)
        assert isinstance(second, MediaError) and str(second) == "a process was not done with it after 3 s"
        (gone,) = before - set(pool.process_ids)
        assert not Path(f"/proc/{gone}").exists()


class LoadedSlowly:
    """Takes a process longer to load than its items may take, as imports from a busy file system do."""

    def __reduce__(self):
        return _loaded_slowly, ()

    def __call__(self, number: int) -> int:
        return number


def _loaded_slowly() -> LoadedSlowly:
    time.sleep(3)
    return LoadedSlowly()


def test_the_start_of_a_process_is_no_item_s_time():
    with WorkerPool(LoadedSlowly(), 2, timeout_s=2.0) as pool:
        assert list(pool.map([1, 2, 3])) == [1, 2, 3]


def hang(file: Path) -> None:
    """Say in `file` which process hangs; where it is named `again` this kills the first process, and the next hangs."""
    if file.name == "again" and not file.exists():
        file.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    file.write_text(f"{os.getpid()} ")
    time.sleep(600)


def test_a_process_that_hangs_ends_with_its_program(tmp_path):
    """One that was started with the pool, and one that took another's place."""
    files = [tmp_path / "once", tmp_path / "again"]
    program = os.fork()
    if not program:
        with WorkerPool(hang, 2) as pool:
            list(pool.map(files))
        os._exit(0)
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    hanging = [int(file.read_text()) for file in files]
    assert all(map(is_running, hanging))
    os.kill(program, signal.SIGKILL)
    os.waitpid(program, 0)
    deadline = time.monotonic() + 20
    while any(map(is_running, hanging)):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.02)


def test_processes_outlive_the_thread_that_made_their_pool(tmp_path):
    """The kernel's word of a parent's end is that of its thread."""

    def used() -> WorkerPool:
        pool = WorkerPool(Square(tmp_path), 1)
        assert [square for square, _ in pool.map([2])] == [4]
        return pool

    with ThreadPoolExecutor(1) as threads:
        pool = threads.submit(used).result()
    with pool:
        (process,) = pool.process_ids
        assert list(pool.map([3])) == [(9, process)]


def test_a_bug_is_no_unusable_item(tmp_path):
    with (
        WorkerPool(Square(tmp_path), 1) as pool,
        pytest.raises(RuntimeError, match=r"(?s)worker process.*KeyError: 'thirteen'"),
    ):
        list(pool.map([1, 13]))


def test_a_function_of_the_program_itself_is_refused(monkeypatch):
    monkeypatch.setattr(Square, "__module__", "__main__")
    with pytest.raises(ValueError, match="move it into a module"):
        WorkerPool(Square(Path()), 1)
