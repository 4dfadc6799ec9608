"""Films cut from the example clips, for the tests of curation."""

import functools
import io
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from megatron_ext.media import list_samples
from megatron_ext.media.samples import Extent
from megatron_ext.media.video import Video

CLIPS = Path(__file__).parents[3] / "examples" / "media" / "clips"


@functools.cache
def shot(name: str) -> np.ndarray:
    """All frames of an example clip, RGB uint8 [T, 192, 192, C]."""
    (sample,) = list_samples([CLIPS / f"{name}.mp4"])
    with Video(sample.media.open()) as video:
        return np.stack([frame.pixels() for frame in video.frames()])


def fade_out_and_in(first_THWC: np.ndarray, second_THWC: np.ndarray, frames: int) -> np.ndarray:
    """The end of one shot darkening to black, then the start of another growing out of it."""
    light = np.linspace(1, 0, frames)[:, None, None, None]
    down, up = first_THWC[-frames:] * light, second_THWC[:frames] * light[::-1]
    return np.concatenate([first_THWC[:-frames], down, up, second_THWC[frames:]]).astype(np.uint8)


def film(frames_THWC: Sequence[np.ndarray], path: Path, rate: int = 8, codec: str = "libx264") -> Extent:
    """Write frames as a video (MP4 or what the name says); its bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format={"mkv": "matroska"}.get(path.suffix[1:], path.suffix[1:])) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames_THWC[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 8_000_000  # of the codecs that have no such options
        if codec == "libx264":
            stream.options = {"preset": "ultrafast", "crf": "12"}
        for pixels in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return extent_of(path)


def extent_of(path: Path) -> Extent:
    status = path.stat()
    return Extent(path=path, offset=0, size=status.st_size, stamp=status.st_mtime_ns)
