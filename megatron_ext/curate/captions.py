"""What a captioning model is shown of a picture or a clip: JPEGs of evenly spaced frames.

Emu3 shows its captioner 12 frames of a clip under 20 seconds; a longer one is cut into pieces of 10 to 20 seconds that
are captioned one by one (Emu3 paper, section 2.1). The prompts are unpublished.

Shapes: H W pixels, C colour channels.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import cv2
import numpy as np

from megatron_ext.config.section import Count, Positive, Section, most
from megatron_ext.curate.spans import cut_evenly, evenly_spaced
from megatron_ext.media import MediaError, Sample, decode_picture
from megatron_ext.media.video import Video


@dataclass(frozen=True, kw_only=True)
class ShownConfig(Section, section="shown"):
    """What the model is shown."""

    picture_prompt: str = "Describe this picture in detail."
    """What is asked about a picture."""

    clip_prompt: str = "These are frames of one video clip, in order of time. Describe in detail what happens in it."
    """What is asked about the frames of a clip."""

    num_frames: Count = 12
    """Frames of a clip, or of a piece of a longer one."""

    whole_under_s: Positive = 20.0
    """Seconds: a clip this long or longer is cut into equal pieces of at least half of it."""

    picture_edge: Count = 1024
    """Pixels: pictures with a longer edge beyond it are reduced to it."""

    frame_edge: Count = 512
    """Pixels: likewise for the frames of clips."""

    jpeg_quality: Annotated[Count, most(100)] = 90
    """Quality of the JPEGs that are sent, up to 100."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one question is about: a picture, a clip, or a part of a clip."""

    number: int
    """Place among the pieces of the sample."""

    start_s: float = 0.0
    """Seconds from the clip's first frame."""

    end_s: float = 0.0
    """Seconds; 0 of a picture."""

    stamps: tuple[int, ...] = ()
    """Time stamps of the frames to show; none of a picture."""


def pieces_of(sample: Sample, shown: ShownConfig) -> list[Piece]:
    """The questions that a sample needs: one for a picture, one or more for a clip.

    Raises:
        MediaError: the clip cannot be read.
    """
    if sample.kind == "image":
        return [Piece(number=0)]
    with Video(sample.media.open()) as video:
        timeline = video.timeline
    spans = cut_evenly(timeline.duration_s, shown.whole_under_s)
    return [
        Piece(
            number=number,
            start_s=round(start, 3),
            end_s=round(end, 3),
            stamps=tuple(timeline.shown_at(evenly_spaced(start, end, shown.num_frames))),
        )
        for number, (start, end) in enumerate(spans)
    ]


def question(sample: Sample, piece: Piece, shown: ShownConfig) -> list[dict[str, Any]]:
    """The content of a user's message in OpenAI's chat format: pictures as data URLs, then the prompt.

    Raises:
        MediaError: the picture or clip cannot be decoded.
    """
    if sample.kind == "image":
        pictures = [_reduced(decode_picture(sample.media.read()), shown.picture_edge)]
        prompt = shown.picture_prompt
    else:
        with Video(sample.media.open()) as video:
            pictures = [_reduced(frame.pixels(), shown.frame_edge) for frame in video.frames_at(piece.stamps)]
        if not pictures:
            raise MediaError(f"no frame from {piece.start_s:g} s on can be decoded")
        prompt = shown.clip_prompt
    urls = (_data_url(picture, shown.jpeg_quality) for picture in pictures)
    return [
        *({"type": "image_url", "image_url": {"url": url}} for url in urls),
        {"type": "text", "text": prompt},
    ]


def record(sample: Sample, pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A finished sample's line, a row of a manifest (`media.manifests`); of a clip also its pieces with their times.

    A caption of a part does not describe the whole: a clip of several pieces has no `captions`.
    """
    media = sample.media
    fields: dict[str, Any] = {"key": sample.key, "kind": sample.kind, "source": sample.source}
    fields |= {"path": str(media.path.absolute()), "offset": media.offset, "size": media.size}
    fields["captions"] = [pieces[0]["caption"]] if len(pieces) == 1 else []
    if sample.kind == "video":
        names = ("start_s", "end_s", "num_frames", "caption")
        fields["pieces"] = [{name: piece[name] for name in names} for piece in pieces]
    return fields


def _reduced(picture_HWC: np.ndarray, edge: int) -> np.ndarray:
    height, width = picture_HWC.shape[:2]
    scale = edge / max(height, width)
    if scale >= 1:
        return picture_HWC
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(picture_HWC, size, interpolation=cv2.INTER_AREA)


def _data_url(picture_HWC: np.ndarray, quality: int) -> str:
    bgr = cv2.cvtColor(picture_HWC, cv2.COLOR_RGB2BGR)
    _, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
