"""The loader on NVIDIA DALI: JPEGs and clips decoded, cut and brought to size on the device that trains (nvJPEG,
NVDEC), or by DALI's own decoders on the CPU. The only file that imports DALI.

Shapes: T frames, H W pixels, C colour channels.
"""

from collections.abc import Callable, Sequence

import numpy as np
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from megatron_ext.media import MediaError, MediaIndex
from megatron_ext.runtime.device import OwnCopies
from tokenizer_train.vision.loader_cpu import CpuLoader
from tokenizer_train.vision.order import Draw

PICTURES = frozenset({"jpeg"})
CLIPS_ON_CPU = frozenset({"vp8", "vp9", "mjpeg"})
CLIPS_ON_GPU = CLIPS_ON_CPU | {"av1", "mpeg4", "h264", "hevc"}
"""What `fn.decoders.video` takes, by its documentation (DALI 2.4)."""


class DaliLoader:
    """Decodes and cuts whole batches; what DALI does not decode, or fails on, goes to the CPU loader."""

    def __init__(
        self, index: MediaIndex, cpu: CpuLoader, *, device_id: int | None, threads: int, largest_batch: int
    ) -> None:
        """`device_id` is the number of the GPU, None for DALI's decoders on the CPU. `cpu` judges what DALI fails on:
        which samples are bad does not depend on the loader.

        Raises:
            RuntimeError: DALI is incomplete: a library that it loads at run time is missing.
        """
        self.name = "dali" if device_id is None else f"dali on GPU {device_id}"
        self.draws_at_once = largest_batch
        self._index = index
        self._cpu = cpu
        self._device_id = device_id
        self._copies = OwnCopies(device_id)
        self._threads = threads
        self._largest_batch = largest_batch
        self._clip_codecs = CLIPS_ON_CPU if device_id is None else CLIPS_ON_GPU
        self._pipelines = {is_clip: self._pipeline(is_clip=is_clip) for is_clip in (False, True)}

    def decodes(self, codec: str, *, is_clip: bool) -> bool:
        """Whether DALI takes this codec on this device."""
        return codec in (self._clip_codecs if is_clip else PICTURES)

    def decode(self, draws: Sequence[Draw]) -> list[Tensor | MediaError]:
        """Uint8 [H, W, C] of a picture, [T, H, W, C] of a clip, on the device; of what cannot be used the reason.

        `draws` are all pictures or all clips.
        """
        is_clip = bool(draws[0].frames)
        found: list[Tensor | MediaError | None] = [None] * len(draws)
        data: dict[int, np.ndarray] = {}
        for place, draw in enumerate(draws):
            if self.decodes(self._index.codec(draw.sample), is_clip=is_clip):
                try:
                    data[place] = np.frombuffer(self._index[draw.sample].media.read(), dtype=np.uint8)
                except MediaError as error:
                    found[place] = error
        if data:
            try:
                frames = self._run([draws[place] for place in data], list(data.values()), is_clip=is_clip)
                found = [dict(zip(data, frames, strict=True)).get(place, item) for place, item in enumerate(found)]
            except RuntimeError:
                # One bad sample fails the batch and breaks the pipeline: the CPU loader tells which it was.
                self._pipelines[is_clip] = self._pipeline(is_clip=is_clip)
        return [self._cpu.decode([draw])[0] if item is None else item for draw, item in zip(draws, found, strict=True)]

    def _run(self, draws: Sequence[Draw], data: list[np.ndarray], *, is_clip: bool) -> list[Tensor]:
        pipeline = self._pipelines[is_clip]
        pipeline.feed_input("data", data)
        inputs: dict[str, tuple[type, Callable[[Draw], object]]] = {
            "anchor": (np.int32, lambda draw: draw.box[:2]),
            "shape": (np.int32, lambda draw: draw.box[2:]),
            "size": (np.float32, lambda draw: (draw.height, draw.width)),
            "mirror": (np.int32, lambda draw: draw.is_mirrored),
        }
        if is_clip:
            inputs["frames"] = (np.int32, lambda draw: draw.frames)
        for name, (kind, value) in inputs.items():
            pipeline.feed_input(name, [np.array(value(draw), dtype=kind) for draw in draws])
        (output,) = pipeline.run()
        # The pipeline, which knows nothing of torch's streams, writes its next batch where this one lies.
        return self._copies.take(output[place] for place in range(len(draws)))

    def _pipeline(self, *, is_clip: bool) -> Pipeline:
        # Fed by hand, one batch in, one out: running ahead is the business of whoever calls.
        pipeline = Pipeline(
            batch_size=self._largest_batch,
            num_threads=self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )
        device = "cpu" if self._device_id is None else "mixed"
        with pipeline:
            encoded = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
            anchor, shape = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("anchor", "shape"))
            size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
            mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
            if is_clip:
                numbers = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
                frames = fn.decoders.video(encoded, device=device, frames=numbers, pad_mode="none")
            else:
                frames = fn.decoders.image(encoded, device=device, output_type=types.RGB, adjust_orientation=True)
            frames = fn.slice(frames, anchor, shape, axis_names="HW")
            frames = fn.resize(frames, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
            pipeline.set_outputs(fn.flip(frames, horizontal=mirror))
        pipeline.build()
        return pipeline
