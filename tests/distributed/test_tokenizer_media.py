"""Media of a vision tokenizer's training on two ranks: one index for both, and what is bad in them told by both."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_ext.config import InputError
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.files import read_json_lines
from megatron_ext.media import MediaIndex
from megatron_ext.observe import Run
from megatron_ext.runtime import Topology
from megatron_ext.runtime import topology as topology_module
from tests.support.distributed import Ranks, use_next_store
from tokenizer_train.vision import run_media
from tokenizer_train.vision.config_media import MediaConfig
from tokenizer_train.vision.data import TrainingMedia
from tokenizer_train.vision.order import BatchOrder
from tokenizer_train.vision.run_media import BadMedia, shared_index

PICTURES = 20
DAMAGED = (3, 8, 13, 18)
"""Behind their headers."""

TIMEOUT_S = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    random = np.random.default_rng(1)
    (folder / "media").mkdir()
    for number in range(PICTURES):
        path = folder / f"media/{number:02}.png"
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
        if number in DAMAGED:
            path.write_bytes(path.read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def walked(ranks: Ranks, folder) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    return ranks.run(walk, 2, folder)


def walk(folder: Path) -> dict[str, Any]:
    config = MediaConfig(
        inputs=[str(folder / "media")], size=16, batch_size=10, augmented_share=0, max_bad_fraction=1.0,
        prefetch_batches=0, workers=1,
    )  # fmt: skip
    impatient = RuntimeConfig(device="cpu", num_threads=1, distributed_timeout_s=TIMEOUT_S)
    with Topology.start(impatient, ParallelConfig()) as topology:
        index = slowly_shared(config, topology)
    use_next_store()
    patient = RuntimeConfig(device="cpu", num_threads=1)
    with Topology.start(patient, ParallelConfig()) as topology, pytest.MonkeyPatch.context() as patched:
        return {
            "large": large_array(topology, patched),
            "index": [index.digest, [index[number].media for number in range(len(index))], draws(index, config)],
            "missing": missing(config, topology),
            "bad": bad_media(config, topology, index, folder),
            "limit": too_much_together(config, topology, index, folder),
        }


def large_array(topology: Topology, patched: pytest.MonkeyPatch) -> dict[str, Any]:
    patched.setattr(topology_module, "BROADCAST_BYTES", 1000)
    rows = np.arange(1234, dtype=np.int64)
    return topology.broadcast_large(
        {"rows": rows, "same": rows, "none": rows[:0], "text": "a"} if topology.is_main else None
    )


def slowly_shared(config: MediaConfig, topology: Topology) -> MediaIndex:
    """Reading takes longer than a collective waits, and rank 1 does not see the files."""
    read = run_media.read_inputs

    def slow(*sources: Any) -> MediaIndex:
        time.sleep(1.4 * TIMEOUT_S)
        return read(*sources)

    with pytest.MonkeyPatch.context() as slowed:
        slowed.setattr(run_media, "SIGN_OF_LIFE_S", 0.3)
        slowed.setattr(run_media, "read_inputs", slow)
        return shared_index(replace(config, inputs=config.inputs if topology.is_main else ["nowhere"]), topology)


def draws(index: MediaIndex, config: MediaConfig) -> list[Any]:
    order = BatchOrder(index, config, seed=1, chunk_frames=4, spatial_factor=2)
    return [order.draw(slot) for number in range(4) for slot in order.slots(number)]


def missing(config: MediaConfig, topology: Topology) -> str:
    with pytest.raises(InputError) as refused:
        shared_index(replace(config, inputs=["nowhere"] if topology.is_main else config.inputs), topology)
    return str(refused.value)


def opened(config: MediaConfig, topology: Topology, index: MediaIndex) -> contextlib.closing[TrainingMedia]:
    places = {"rank": topology.data_parallel_rank, "ranks": topology.data_parallel_size}
    return contextlib.closing(TrainingMedia(config, seed=1, chunk_frames=4, index=index, **places))


@contextlib.contextmanager
def seen(
    config: MediaConfig, topology: Topology, index: MediaIndex, run_dir: Path
) -> Iterator[tuple[TrainingMedia, BadMedia]]:
    """A start of a run that has seen an epoch, and whose ranks have not met since."""
    with (
        Run.open(ObserveConfig(run_dir=str(run_dir), tensorboard=False), topology.is_main, "{}") as run,
        opened(config, topology, index) as media,
    ):
        bad = BadMedia(media, run, topology)
        for step in (1, 2):
            media.batch(step)
        yield media, bad


def bad_media(config: MediaConfig, topology: Topology, index: MediaIndex, folder: Path) -> dict[str, Any]:
    """Two starts of a run."""
    found = {}
    for start in ("first", "second"):
        with seen(config, topology, index, folder / "run") as (media, bad):
            own = sorted(source for source, _ in media.bad.samples)
            bad.meet(2)
            told = sorted(source for source, _ in media.bad.samples)
            bad.meet(2)
            found[start] = {"own": own, "told": told, "count": bad.count}
    return found


def too_much_together(config: MediaConfig, topology: Topology, index: MediaIndex, folder: Path) -> str:
    """Each rank's own are few enough."""
    allowed = replace(config, max_bad_fraction=(len(DAMAGED) - 1) / PICTURES)
    with seen(allowed, topology, index, folder / "other") as (_, bad), pytest.raises(InputError) as refused:
        bad.meet(2)
    return str(refused.value)


def test_arrays_arrive_in_pieces(walked):
    for rank in walked:
        assert np.array_equal(rank["large"]["rows"], np.arange(1234)) and rank["large"]["text"] == "a"
        assert rank["large"]["same"] is rank["large"]["rows"] and not len(rank["large"]["none"])


def test_all_ranks_have_the_index_that_the_first_reads(walked):
    first, second = (rank["index"] for rank in walked)
    assert first == second and len(first[1]) == PICTURES and len(first[2]) == 40


def test_what_the_first_rank_cannot_read_ends_all(walked):
    assert walked[0]["missing"] == walked[1]["missing"] and "'nowhere' is missing" in walked[0]["missing"]


def test_bad_media_of_all_ranks_are_named_by_the_first(walked, folder):
    damaged = [str(folder / f"media/{number:02}.png") for number in DAMAGED]
    first, second = (rank["bad"]["first"] for rank in walked)
    assert set(first["own"]) < set(damaged) and set(second["own"]) < set(damaged)
    assert sorted({*first["own"], *second["own"]}) == damaged, "each has found some"
    for rank in walked:
        for start in ("first", "second"):
            assert rank["bad"][start]["told"] == damaged and rank["bad"][start]["count"] == len(DAMAGED)
    events = [event for event in read_json_lines(folder / "run/events.jsonl") if event["event"] == "bad_sample"]
    assert sorted(event["source"] for event in events) == damaged
    assert {event["rank"] for event in events} == {0, 1} and {event["step"] for event in events} == {2}


def test_the_limit_holds_for_all_ranks_together(walked, folder):
    for rank in walked:
        assert rank["limit"].startswith("4 of 20 samples cannot be used, more than media.max_bad_fraction 0.15")
    events = [event for event in read_json_lines(folder / "other/events.jsonl") if event["event"] == "bad_sample"]
    assert len(events) == len(DAMAGED), "named before the end"
