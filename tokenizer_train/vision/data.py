"""Training batches of pictures and of clips, decoded ahead in the background.

A batch is a function of (seed, its number), see order.py: a resumed run sees the same ones, and the ranks' parts put
together are the batch of one rank.

Shapes: B batch, T frames, C colour channels, H W pixels.
"""

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from megatron_ext.config import BadSamples, InputError
from megatron_ext.data.order import derive_key
from megatron_ext.media import MediaError, MediaIndex, ResizeConfig, Sample, build_index, decode_clip, decode_picture
from megatron_ext.media import resize as resize_picture
from megatron_ext.media.samples import Extent
from megatron_ext.observe.progress import progress
from megatron_ext.runtime.device import keep_to_one_core
from megatron_ext.vision import from_uint8
from tokenizer_train.vision.config_media import MediaConfig
from tokenizer_train.vision.loader import choose_loader
from tokenizer_train.vision.order import BatchOrder, Slot

SHOWN_FROM = 2000
"""Samples or inputs from which on reading them shows its progress: less takes a second or two."""


class Samples(Sequence[Sample]):
    """Some samples of an index, made when they are looked at."""

    def __init__(self, index: MediaIndex, numbers: np.ndarray) -> None:
        self._index = index
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return Samples(self._index, self._numbers[place])
        return self._index[int(self._numbers[place])]


class TrainingMedia:
    """The pictures and clips of a training, decoded ahead of their need."""

    def __init__(
        self,
        config: MediaConfig,
        *,
        seed: int,
        chunk_frames: int,
        spatial_factor: int = 1,
        rank: int = 0,
        ranks: int = 1,
        accumulation_steps: int = 1,
        device: torch.device | None = None,
        index: MediaIndex | None = None,
    ) -> None:
        """`chunk_frames` and `spatial_factor` are the tokenizer's; `rank` of `ranks` takes its part of every batch; a
        step has `accumulation_steps` batches; DALI decodes on `device`. `index` is that of the inputs, which all ranks
        must share (`run_media.shared_index`); None reads them here.

        Raises:
            InputError: there is nothing to train on, too much of it is unusable, or a batch does not divide by `ranks`.
        """
        self.config = config
        self._chunk_frames = chunk_frames
        self._rank, self._ranks, self._accumulation_steps = rank, ranks, accumulation_steps
        self._index = read_inputs(config.inputs, config.index_dir) if index is None else index
        self._order = BatchOrder(
            self._index, config, seed=seed, chunk_frames=chunk_frames, spatial_factor=spatial_factor
        )
        self.bad = BadSamples(config.max_bad_fraction, field="media.max_bad_fraction")
        """What turned out to be unusable so far."""
        self._lock = threading.Lock()
        self._unusable: set[Extent] = set()
        """Where those in `bad` are: threads that meet one together count it once."""
        self._untold: list[tuple[Sample, str]] = []
        """Those in `bad` that `newly_bad` has not returned yet; what the index tells every rank, rank 0 alone says."""
        for number, fault in self._order.faults.items():
            self._add_bad(self._index[number], fault, is_told=rank > 0)
        self.bad.check(len(self._index))
        self._check_parts()
        largest = max(cell.batch for cell in self._order.cells) // ranks
        self._loader, callers = choose_loader(
            config, self._index, device=device or torch.device("cpu"), largest_batch=largest
        )
        self._pool = ThreadPoolExecutor(callers, thread_name_prefix="media", initializer=keep_to_one_core)
        self._coming: dict[int, tuple[list[Future[list[Tensor]]], Future[Tensor]]] = {}
        """Batches that were begun: their parts, and what puts the parts together."""

    @functools.cached_property
    def pictures(self) -> Samples:
        """The usable pictures, in the order of the inputs."""
        return Samples(self._index, self._order.pictures)

    @functools.cached_property
    def clips(self) -> Samples:
        """The usable clips, in the order of the inputs."""
        return Samples(self._index, self._order.clips)

    def batch(self, step: int, accumulation_index: int = 0) -> Tensor:
        """This rank's pixels of a batch of step `step` (the first is 1): pictures [B, C, H, W], clips [B, T, C, H, W].

        All ranks have the same shape. The next batches are begun before this one is waited for.

        Raises:
            InputError: too much is unusable.
        """
        number = (step - 1) * self._accumulation_steps + accumulation_index
        wanted = range(number, number + 1 + self.config.prefetch_batches)
        for stale in self._coming.keys() - set(wanted):
            parts, whole = self._coming.pop(stale)
            for future in (*parts, whole):
                future.cancel()
        for one in wanted:
            if one not in self._coming:
                self._coming[one] = self._begin(one)
        return self._coming.pop(number)[1].result()

    def whole(self, sample: Sample, max_frames: int) -> np.ndarray | None:
        """As `centred_square`; None where it cannot be used, which is noted."""
        try:
            return centred_square(sample, self.config, self._chunk_frames, max_frames)
        except MediaError as error:
            self._note(sample, error)
            return None

    @property
    def identity(self) -> dict[str, str | int]:
        """What a checkpoint says of the media that the run is made with."""
        unreadable = sum(1 for _ in self._index.faults())
        return {"digest": self._index.digest, "samples": len(self._index), "unreadable": unreadable}

    def newly_bad(self) -> list[tuple[Sample, str]]:
        """What has turned out to be unusable since the last call, and why."""
        with self._lock:
            found, self._untold = self._untold, []
        return found

    def learn_bad(self, found: Iterable[tuple[Sample, str]]) -> None:
        """Count what other ranks found to be unusable.

        Raises:
            InputError: of all together it is too much.
        """
        with self._lock:
            for sample, reason in found:
                self._add_bad(sample, reason, is_told=True)
            self.bad.check(len(self._index))

    def summary(self) -> str:
        """What is trained on, in a line."""
        buckets = {cell.bucket for cell in self._order.cells}
        shapes = ", ".join(f"{bucket.height}x{bucket.width}" for bucket in sorted(buckets))
        return f"{len(self.pictures)} pictures, {len(self.clips)} clips, shapes {shapes}, loader {self._loader.name}"

    def close(self) -> None:
        """Give up the batches that were begun; those in work are finished."""
        self._coming.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, number: int) -> tuple[list[Future[list[Tensor]]], Future[Tensor]]:
        slots = self._order.slots(number)
        part = len(slots) // self._ranks
        mine = slots[self._rank * part : (self._rank + 1) * part]
        at_once = self._loader.draws_at_once
        parts = [self._pool.submit(self._frames, mine[first : first + at_once]) for first in range(0, part, at_once)]
        # Tasks are begun in the order of their submission, so that this one never keeps a thread from its parts.
        return parts, self._pool.submit(_joined, parts)

    def _frames(self, slots: list[Slot]) -> list[Tensor]:
        """The frames of some places of a batch: of an unusable sample those of the next usable one of its cell."""
        attempts = dict.fromkeys(range(len(slots)), 0)
        frames: dict[int, Tensor] = {}
        while attempts:
            draws = {place: self._order.draw(slots[place], attempt) for place, attempt in attempts.items()}
            for place, draw in list(draws.items()):
                while self._index[draw.sample].media in self._unusable:
                    attempts[place] = self._next(slots[place], attempts[place])
                    draws[place] = draw = self._order.draw(slots[place], attempts[place])
            for (place, draw), found in zip(draws.items(), self._loader.decode(list(draws.values())), strict=True):
                if isinstance(found, MediaError):
                    self._note(self._index[draw.sample], found)
                    attempts[place] = self._next(slots[place], attempts[place])
                else:
                    frames[place] = found
                    del attempts[place]
        return [frames[place] for place in range(len(slots))]

    def _next(self, slot: Slot, attempt: int) -> int:
        if attempt + 1 == self._order.candidates(slot):
            raise InputError(f"media.inputs = {self.config.inputs}: none of {attempt + 1} samples can be decoded")
        return attempt + 1

    def _note(self, sample: Sample, error: MediaError) -> None:
        with self._lock:
            self._add_bad(sample, str(error), is_told=False)
            self.bad.check(len(self._index))

    def _add_bad(self, sample: Sample, reason: str, *, is_told: bool) -> None:
        if sample.media not in self._unusable:
            self._unusable.add(sample.media)
            self.bad.add(sample.source, reason)
            if not is_told:
                self._untold.append((sample, reason))

    def _check_parts(self) -> None:
        for cell in self._order.cells:
            if cell.batch % self._ranks:
                kind, bucket = "clips" if cell.is_clip else "pictures", cell.bucket
                raise InputError(
                    f"media.batch_size = {self.config.batch_size}: a batch of {cell.batch} {kind} of {bucket.height}x"
                    f"{bucket.width} does not divide by {self._ranks} ranks"
                )


def centred_square(sample: Sample, config: MediaConfig, chunk_frames: int, max_frames: int) -> np.ndarray:
    """A sample as it is tokenized, uint8 [H, W, C] or [T, H, W, C]: the centred square at the training size.

    Of a clip the first frames, at most `max_frames` and a multiple of `chunk_frames`.

    Raises:
        MediaError: it cannot be used.
    """
    square = ResizeConfig(rule="square", size=config.size)
    data = sample.media.read()
    if sample.kind == "image":
        return resize_picture(decode_picture(data), square, factor=1)
    return decode_clip(
        data,
        frame_rate=config.clip_frame_rate,
        max_frames=min(max_frames, config.clip_max_frames),
        multiple=chunk_frames,
        resize=lambda frame_HWC: resize_picture(frame_HWC, square, factor=1),
    ).frames_THWC


def read_inputs(inputs: list[str], index_dir: str | None) -> MediaIndex:
    """The index of all inputs, with a bar where that takes long.

    Raises:
        InputError: an input is missing or holds nothing; the index cannot be kept.
    """
    return build_index(inputs, index_dir, _shown)


def _joined(parts: list[Future[list[Tensor]]]) -> Tensor:
    """The batch of its parts, as the tokenizer takes it; the few frames that another device decoded are moved."""
    frames = [frame for part in parts for frame in part.result()]
    return from_uint8(torch.stack([frame.to(frames[0].device) for frame in frames]))


@contextlib.contextmanager
def _shown(label: str, total: int, unit: str) -> Iterator:
    if total < SHOWN_FROM:
        yield lambda count: None
    else:
        with progress(label, total, unit, Console(highlight=False)) as advance:
            yield advance


def torch_generator(*parts: int | str) -> torch.Generator:
    """A generator for one random choice, seeded by what names it."""
    return torch.Generator().manual_seed(int.from_bytes(derive_key(*parts)[:7], "big"))
