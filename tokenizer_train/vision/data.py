"""Training batches of pictures and of clips: a function of (seed, step), so that a resumed run sees the same ones.

Shapes: B batch, T frames, C colour channels, H W pixels.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_ext.config import BadSamples, InputError
from megatron_ext.data.order import Permutation, derive_key
from megatron_ext.media import MediaError, ResizeConfig, Sample, decode_clip, decode_picture, list_samples, resize
from megatron_ext.vision import from_uint8
from tokenizer_train.vision.config import MediaConfig


class TrainingMedia:
    """The pictures and clips of a training, decoded when they are needed."""

    def __init__(
        self,
        config: MediaConfig,
        *,
        seed: int,
        chunk_frames: int,
        accumulation_steps: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """`chunk_frames` is the tokenizer's temporal factor: clips are seen in independent chunks of so many frames.

        A step has `accumulation_steps` batches, of which this rank sees one of `ranks` equal parts.

        Raises:
            InputError: there is nothing to train on, or a batch cannot be divided.
        """
        self.config = config
        self._accumulation_steps, self._rank, self._ranks = accumulation_steps, rank, ranks
        for size in {config.batch_size} | ({config.batch_size // chunk_frames} if config.clip_share else set()):
            if size % ranks:
                raise InputError(f"media.batch_size = {config.batch_size}: {ranks} ranks cannot share {size} samples")
        self._seed = seed
        self._chunk_frames = chunk_frames
        samples = list_samples(config.inputs)
        self.pictures = [sample for sample in samples if sample.kind == "image"]
        self.clips = [sample for sample in samples if sample.kind == "video"]
        self.bad = BadSamples(config.max_bad_fraction, field="media.max_bad_fraction")
        """What turned out to be unusable so far."""
        if config.clip_share and not self.clips:
            raise InputError(f"media.clip_share = {config.clip_share}: {config.inputs} hold no clip; set it to 0")
        if config.clip_share < 1 and not self.pictures:
            raise InputError(f"media.clip_share = {config.clip_share}: {config.inputs} hold no picture; set it to 1")
        self._decoded = functools.lru_cache(maxsize=config.cached_samples)(self._decode)

    def batch(self, step: int, accumulation_index: int = 0) -> Tensor:
        """This rank's pixels of a batch of `step` (the first is 1): pictures [B, C, H, W], or chunks of clips
        [B, T, C, H, W]."""
        step = (step - 1) * self._accumulation_steps + accumulation_index + 1
        random = np.random.default_rng(np.frombuffer(derive_key(self._seed, "batch", step), dtype=np.uint32))
        if random.random() < self.config.clip_share:
            count = self.config.batch_size // self._chunk_frames
            frames = [self._random_chunk(position) for position in self._positions("clips", step, count)]
        else:
            frames = self._pictures_of(step, random)
        return from_uint8(np.stack(np.array_split(frames, self._ranks)[self._rank]))

    def whole(self, sample: Sample) -> np.ndarray | None:
        """A sample as it is tokenized, uint8 [H, W, C] or [T, H, W, C]: the centred square at the training size.

        None where it cannot be used.
        """
        decoded = self._decoded_or_bad(sample)
        if decoded is None:
            return None
        return decoded if sample.kind == "video" else self._square(decoded)

    def _pictures_of(self, step: int, random: np.random.Generator) -> list[np.ndarray]:
        augmented = round(self.config.batch_size * self.config.augmented_share)
        whole = self.config.batch_size - augmented
        frames = [self._square(self._usable(self.pictures, p)) for p in self._positions("pictures", step, whole)]
        for position in self._positions("augmented", step, augmented):
            frames.append(self._random_crop(self._usable(self.pictures, position), random))
        return frames

    def _positions(self, stream: str, step: int, count: int) -> list[int]:
        """Positions of `count` samples at `step`: a stream goes through all its samples, each time newly shuffled."""
        size = self._num_chunks if stream == "clips" else len(self.pictures)
        positions = []
        for index in range((step - 1) * count, step * count):
            epoch, place = divmod(index, size)
            positions.append(Permutation(derive_key(self._seed, stream, epoch), size)[place])
        return positions

    @functools.cached_property
    def _num_chunks(self) -> int:
        """Chunks of a clip at most, times clips; a shorter clip's chunks come round again."""
        return len(self.clips) * max(1, self.config.clip_max_frames // self._chunk_frames)

    def _random_chunk(self, position: int) -> np.ndarray:
        chunk, clip = divmod(position, len(self.clips))
        frames_THWC = self._usable(self.clips, clip)
        first = chunk % (len(frames_THWC) // self._chunk_frames) * self._chunk_frames
        return frames_THWC[first : first + self._chunk_frames]

    def _usable(self, samples: Sequence[Sample], position: int) -> np.ndarray:
        """The decoded sample at `position`, or the next one that can be decoded."""
        for offset in range(len(samples)):
            sample = samples[(position + offset) % len(samples)]
            if (decoded := self._decoded_or_bad(sample)) is not None:
                return decoded
        raise InputError(f"media.inputs = {self.config.inputs}: none of {len(samples)} samples can be decoded")

    def _decoded_or_bad(self, sample: Sample) -> np.ndarray | None:
        """The decoded sample; None, and a note, where it cannot be used. Too many of those raise InputError."""
        if sample.source in self.bad.reasons:
            return None
        try:
            return self._decoded(sample)
        except MediaError as error:
            self.bad.add(sample.source, str(error))
            self.bad.check(len(self.pictures) + len(self.clips))
            return None

    def _decode(self, sample: Sample) -> np.ndarray:
        """A picture at its own size, a clip's frames at the training size."""
        data = sample.media.read()
        if sample.kind == "image":
            return decode_picture(data)
        clip = decode_clip(
            data,
            frame_rate=self.config.clip_frame_rate,
            max_frames=self.config.clip_max_frames,
            multiple=self._chunk_frames,
            resize=self._square,
        )
        return clip.frames_THWC

    def _square(self, picture_HWC: np.ndarray) -> np.ndarray:
        return resize(picture_HWC, ResizeConfig(rule="square", size=self.config.size), factor=1)

    def _random_crop(self, picture_HWC: np.ndarray, random: np.random.Generator) -> np.ndarray:
        height, width = picture_HWC.shape[:2]
        side = min(height, width) * random.uniform(self.config.smallest_crop, 1)
        left, top = random.uniform(0, width - side), random.uniform(0, height - side)
        size = (self.config.size, self.config.size)
        box = (left, top, left + side, top + side)
        crop = np.asarray(Image.fromarray(picture_HWC).resize(size, Image.Resampling.BICUBIC, box=box))
        return crop[:, ::-1] if random.random() < 0.5 else crop


def torch_generator(*parts: int | str) -> torch.Generator:
    """A generator for one random choice, seeded by what names it."""
    return torch.Generator().manual_seed(int.from_bytes(derive_key(*parts)[:7], "big"))
