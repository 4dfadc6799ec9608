"""Which samples a batch holds, and how each is cut: a function of (seed, number of the batch) alone.

The samples of a kind (pictures, clips) and bucket form a cell. A blend over the cells says of which cell batch n is and
how many of that cell came before; a blend over the inputs inside the cell goes through each input's samples, newly
shuffled in every epoch. How a sample is cut is drawn from its number in the cell. So nothing is stored, and neither
ranks nor loaders nor a resume can change what is seen.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megatron_ext.config import InputError
from megatron_ext.config.data import LONGEST_PERIOD
from megatron_ext.data.order import Blend, derive_key
from megatron_ext.media import MediaIndex
from tokenizer_train.vision.buckets import Bucket, assign, give_up_rare, make_buckets
from tokenizer_train.vision.config_media import MediaConfig

CLOCK_SLACK = 5e-4
"""Seconds by which a frame counts as on show early, as in decode_clip: clocks of containers round."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A sample and what of it is seen; a loader decodes it and decides nothing."""

    sample: int
    """Number in the index."""

    box: tuple[int, int, int, int]
    """Top, left, height, width of the crop, in pixels of the upright picture."""

    is_mirrored: bool
    """Left and right are swapped after the crop."""

    height: int
    """To which the crop is brought, in pixels."""

    width: int
    """To which the crop is brought, in pixels."""

    frames: tuple[int, ...]
    """Numbers of a clip's frames, rising; empty for a picture."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Samples that may share a batch."""

    is_clip: bool
    bucket: Bucket
    batch: int
    """Samples of a batch, over all ranks."""

    members: tuple[np.ndarray, ...]
    """For each input with samples here, their numbers in the index."""

    blend: Blend
    """Over `members`."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place in a batch."""

    cell: Cell
    source: int
    epoch: int
    place: int
    is_augmented: bool
    key: bytes
    """Of what is drawn for this place."""


class BatchOrder:
    """The batches of a training over an index of media."""

    def __init__(
        self, index: MediaIndex, config: MediaConfig, *, seed: int, chunk_frames: int, spatial_factor: int
    ) -> None:
        """`faults` names the samples that no batch can hold: unreadable headers, clips that are too short.

        Raises:
            InputError: a kind that the configuration asks for is missing.
        """
        self._index = index
        self._config = config
        self._seed = seed
        self._frames = config.clip_frames or chunk_frames
        self._stride = min(config.clip_strides)
        self.faults = dict(index.faults())
        self._clip_lengths = self._lengths_at_rate()
        usable = np.ones(len(index), dtype=bool)
        usable[list(self.faults)] = False
        self.pictures = np.flatnonzero(usable & ~index.is_clip)
        """Numbers of the usable pictures."""
        self.clips = np.flatnonzero(usable & index.is_clip)
        """Numbers of the usable clips."""
        sizes = [config.size, *config.larger_sizes]
        self._buckets = make_buckets(sizes, config.aspect_ratios, spatial_factor)
        cells, weights = [], []
        clip_share = Fraction(str(config.clip_share))  # str: 0.1 means one tenth, not its nearest double
        for is_clip, share in ((False, 1 - clip_share), (True, clip_share)):
            if share > 0:
                for cell, part in self._cells(is_clip):
                    cells.append(cell)
                    weights.append(share * part)
        self.cells = tuple(cells)
        """What batches are made of."""
        self._blend = Blend(_floored(weights), [1] * len(cells), _seed(seed, "cells"))

    def slots(self, number: int) -> list[Slot]:
        """The places of batch `number` (the first is 0), over all ranks."""
        which, before, _ = self._blend.locate(number)  # a dataset of one window: its epoch is how often it came
        cell = self.cells[which]
        first_augmented = cell.batch - round(cell.batch * self._config.augmented_share)
        slots = []
        for place in range(cell.batch):
            index = before * cell.batch + place
            source, epoch, position = cell.blend.locate(index)
            key = derive_key(self._seed, "draw", which, index)
            is_augmented = place >= first_augmented
            slots.append(
                Slot(cell=cell, source=source, epoch=epoch, place=position, is_augmented=is_augmented, key=key)
            )
        return slots

    def candidates(self, slot: Slot) -> int:
        """How many samples could take the place."""
        return len(slot.cell.members[slot.source])

    def draw(self, slot: Slot, attempt: int = 0) -> Draw:
        """What is seen in a place; after `attempt` unusable samples the one so many further on takes it."""
        members = slot.cell.members[slot.source]
        sample = int(members[(slot.place + attempt) % len(members)])
        words = np.frombuffer(hashlib.shake_256(slot.key).digest(6 * 8), dtype="<u8")
        uniform = (words >> np.uint64(11)) * 2.0**-53
        bucket, config = slot.cell.bucket, self._config
        height, width = int(self._index.height[sample]), int(self._index.width[sample])
        scale = min(height / bucket.height, width / bucket.width)
        if slot.is_augmented:
            scale *= config.smallest_crop + (1 - config.smallest_crop) * uniform[0]
        box_height, box_width = (max(1, round(side * scale)) for side in (bucket.height, bucket.width))
        room = height - box_height, width - box_width
        top, left = (
            (int(part * (free + 1)) for part, free in zip(uniform[1:3], room, strict=True))
            if slot.is_augmented
            else (free // 2 for free in room)
        )
        return Draw(
            sample=sample,
            box=(top, left, box_height, box_width),
            is_mirrored=bool(slot.is_augmented and uniform[3] < config.mirrored_share),
            height=bucket.height,
            width=bucket.width,
            frames=self._frame_numbers(slot, sample, uniform[4:]) if slot.cell.is_clip else (),
        )

    def _frame_numbers(self, slot: Slot, sample: int, uniform: np.ndarray) -> tuple[int, ...]:
        length, stride = int(self._clip_lengths[sample]), self._stride
        if slot.is_augmented:
            fitting = [step for step in sorted(self._config.clip_strides) if self._span(step) <= length]
            stride = fitting[int(uniform[0] * len(fitting))]
            start = int(uniform[1] * (length - self._span(stride) + 1))
        else:
            pieces = max(1, length // (self._frames * stride))
            start = slot.epoch % pieces * self._frames * stride
        steps = start + stride * np.arange(self._frames)
        own_rate = self._index.frame_rate[sample]
        rate = self._config.clip_frame_rate or own_rate
        numbers = np.floor((steps / rate + CLOCK_SLACK) * own_rate).astype(int)
        return tuple(int(number) for number in np.minimum(numbers, self._index.num_frames[sample] - 1))

    def _span(self, stride: int) -> int:
        """Frames from the first to the last of a piece, both counted."""
        return (self._frames - 1) * stride + 1

    def _lengths_at_rate(self) -> np.ndarray:
        """Frames of each clip at the configured rate; those of too few become faults."""
        index, config = self._index, self._config
        own_rate = np.where(index.frame_rate > 0, index.frame_rate, 1.0)
        rate = own_rate if config.clip_frame_rate is None else config.clip_frame_rate
        seconds = index.num_frames / own_rate
        lengths = np.minimum(np.ceil((seconds - CLOCK_SLACK) * rate), config.clip_max_frames).astype(int)
        for sample in np.flatnonzero(index.is_clip & (index.height > 0) & (lengths < self._span(self._stride))):
            at = float(np.broadcast_to(rate, len(index))[sample])
            self.faults[int(sample)] = (
                f"{lengths[sample]} frames at {at:g} a second: at least {self._span(self._stride)} are needed"
            )
        return lengths

    def _cells(self, is_clip: bool) -> list[tuple[Cell, Fraction]]:
        """The cells of a kind, each with its share of the kind's batches: exact, so that small sets go round evenly."""
        samples, kind = (self.clips, "clips") if is_clip else (self.pictures, "pictures")
        if not len(samples):
            raise self._nothing_of(is_clip)
        frames = self._frames if is_clip else 1
        # As many pixels in a batch of a larger size.
        budget = self._config.batch_size * self._config.size**2
        batches = [max(1, round(budget / bucket.size**2) // frames) for bucket in self._buckets]
        chosen = assign(self._buckets, self._index.height[samples], self._index.width[samples])
        chosen = give_up_rare(self._buckets, chosen, batches)
        inputs = self._index.input_number[samples]
        # The weight of an input is shared out among its samples of this kind.
        counts = np.bincount(inputs, minlength=len(self._config.inputs)).tolist()
        configured = [Fraction(str(weight)) for weight in self._config.input_weights or counts]
        weights = [weight if count else Fraction(0) for weight, count in zip(configured, counts, strict=True)]
        if not sum(weights):
            raise InputError(f"media.input_weights = {self._config.input_weights}: give weight to an input with {kind}")
        each = [weight / sum(weights) / max(count, 1) for weight, count in zip(weights, counts, strict=True)]
        found = []
        for number in np.unique(chosen):
            groups = [samples[(chosen == number) & (inputs == which)] for which in range(len(counts))]
            present = [which for which, group in enumerate(groups) if len(group) and weights[which] > 0]
            if not present:
                continue
            shares = [each[which] * len(groups[which]) for which in present]
            members = tuple(groups[which] for which in present)
            seed = _seed(self._seed, "cell", kind, str(self._buckets[number]))
            blend = Blend(_floored(shares), [len(group) for group in members], seed)
            cell = Cell(
                is_clip=is_clip, bucket=self._buckets[number], batch=batches[number], members=members, blend=blend
            )
            found.append((cell, sum(shares)))
        return found

    def _nothing_of(self, is_clip: bool) -> InputError:
        kind, other = ("clip", 0) if is_clip else ("picture", 1)
        faults = [fault for sample, fault in self.faults.items() if self._index.is_clip[sample] == is_clip]
        where = f"media.clip_share = {self._config.clip_share}: {self._config.inputs}"
        if faults:
            return InputError(f"{where}: none of {len(faults)} {kind}s can be used ({faults[0]}): give others")
        return InputError(f"{where} hold no {kind}; set it to {other}")


def _floored(weights: Sequence[Fraction]) -> list[Fraction]:
    """Weights of which none is too small for a blend to give it a place."""
    least = 2 * sum(weights) / Fraction(LONGEST_PERIOD)
    return [max(weight, least) for weight in weights]


def _seed(*parts: int | str) -> int:
    return int.from_bytes(derive_key(*parts)[:8], "big")
