"""The media of a run: one index for all ranks, the same media at every resume, and what is bad in them named."""

from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from megatron_ext.config import InputError
from megatron_ext.files import read_json_lines
from megatron_ext.media import MediaIndex, readable_name
from megatron_ext.observe import Run
from megatron_ext.observe.run import EVENTS
from megatron_ext.runtime import Topology
from tokenizer_train.vision.config_media import MediaConfig
from tokenizer_train.vision.data import TrainingMedia, read_inputs

SIGN_OF_LIFE_S = 5.0
"""Seconds after which ranks that wait for the index hear that it is still being read: collectives give up in time."""

BAD_SAMPLE = "bad_sample"
"""The event of one."""


def shared_index(config: MediaConfig, topology: Topology) -> MediaIndex:
    """The index that rank 0 reads, on every rank: others neither read the inputs nor can find anything else in them.

    Raises:
        InputError: as `read_inputs`, on every rank.
    """
    if topology.world_size == 1:
        return read_inputs(config.inputs, config.index_dir)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_inputs, config.inputs, config.index_dir) if topology.is_main else None
        while not topology.broadcast(reading is not None and bool(wait([reading], SIGN_OF_LIFE_S).done)):
            pass
    topology.from_main(lambda: len(reading.result()))
    return topology.broadcast_large(reading.result() if reading else None)


def check_same_media(media: TrainingMedia, before: dict[str, Any] | None, folder: str) -> dict[str, Any] | None:
    """What event `media_changed` says, where the media are others than `before`, those of the checkpoint `folder`.

    None where they are the same, or where the checkpoint is too old to say.

    Raises:
        InputError: they are others, without media.allow_change.
    """
    now, config = media.identity, media.config
    if before is None or before["digest"] == now["digest"]:
        return None
    if not config.allow_change:
        told = [f"{each['samples']:,} samples, {each['unreadable']:,} of them unreadable" for each in (now, before)]
        raise InputError(
            f"media.inputs = {config.inputs} hold {told[0]}, but {folder} was made with others (by name, size or "
            f"shape), {told[1]}: put those back, set media.allow_change true to go on in the order of these, or choose "
            "another observe.run_dir"
        )
    return {"before": before, "now": now}


class BadMedia:
    """Tells of all ranks' unusable media, where the ranks meet anyway."""

    def __init__(self, media: TrainingMedia, run: Run, topology: Topology) -> None:
        self._media = media
        self._run = run
        self._topology = topology
        events = read_json_lines(run.folder / EVENTS) if topology.is_main else []
        self._named = {(event["source"], event["reason"]) for event in events if event["event"] == BAD_SAMPLE}
        """What earlier starts of the run have named."""

    @property
    def count(self) -> int:
        """Unusable media met in this start: by this rank until now, by the others until they last met."""
        return len(self._media.bad.samples)

    def meet(self, step: int) -> None:
        """Exchange what ranks found since they last met, and log an event for each that is new to the run. Every rank
        calls it, after `step` steps.

        Raises:
            InputError: all ranks' together are more than media.max_bad_fraction allows; on every rank.
        """
        gathered = self._topology.gather(self._media.newly_bad()) or []
        told = [(rank, sample, reason) for rank, found in enumerate(gathered) for sample, reason in found]
        told = self._topology.broadcast(told)
        for rank, sample, reason in told:
            named = (readable_name(sample.source), reason)
            if self._topology.is_main and named not in self._named:
                self._named.add(named)
                self._run.log_event(BAD_SAMPLE, step=step, source=named[0], reason=reason, rank=rank)
        self._media.learn_bad((sample, reason) for _, sample, reason in told)
