"""Kept clips on disk: a WebDataset tar and a table of rows for each part of the videos.

FOLDER/clips/clips-000000.tar   KEY.mp4 (a whole video keeps its own suffix) and KEY.json of each clip that part 0 kept
The rows name tar (from FOLDER), offset and size of a kept clip, of a dropped one those of its video.
"""

import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from megatron_ext.curate.clips import Span
from megatron_ext.curate.table import PartTable, Row, replace_file, schema_of
from megatron_ext.curate.verdict import KEPT, UNREADABLE, Judgement, Verdict, verdict_of
from megatron_ext.curate.video_filters import Looked
from megatron_ext.media import Fault, Sample, readable_name
from megatron_ext.media.members import add_member, stem_of
from megatron_ext.media.samples import Extent

CLIPS = "clips"
"""Folder of the tars."""

MEASURED = ("motion", "text", "aesthetic")
"""Scores of their own columns; null where they were not measured."""

SCHEMA = schema_of(
    [
        pa.field("clip_of", pa.string(), nullable=False),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("num_frames", pa.int64()),
        pa.field("frame_rate", pa.float64()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        *(pa.field(name, pa.float64()) for name in MEASURED),
    ]
)
"""A row per scene, the clip that may become of it; of an unreadable video one row without figures."""


@dataclass(frozen=True, kw_only=True)
class JudgedClip:
    """A scene with its final verdict."""

    span: Span
    judgements: tuple[Judgement, ...]
    content: bytes
    """The clip's file; empty of a dropped one."""

    suffix: str
    """Its kind of file."""

    @property
    def verdict(self) -> Verdict:
        """What all filters together say."""
        return verdict_of(self.judgements)


@dataclass(frozen=True, kw_only=True)
class JudgedVideo:
    """A video and what becomes of it."""

    entry: Sample | Fault
    looked: Looked | None
    """None of an unreadable one."""

    clips: tuple[JudgedClip, ...] = ()
    fault: str = ""
    """Why it is unreadable."""


def write_part(table: PartTable, number: int, videos: Iterable[JudgedVideo]) -> list[Row]:
    """Write tar and rows of a part. The rows come last: a part without them is made again."""
    path = table.folder / CLIPS / f"clips-{number:06d}.tar"
    rows: list[Row] = []

    def fill(temporary: Path) -> None:
        rows.clear()
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for video in videos:
                rows.extend(_rows(video, tar, path))

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, fill)
    if not any(row["verdict"] == KEPT for row in rows):
        path.unlink()
    table.write(number, rows)
    return rows


def _rows(video: JudgedVideo, tar: tarfile.TarFile, path: Path) -> Iterable[Row]:
    entry = video.entry
    names = {"kind": "video", "source": readable_name(entry.source), "clip_of": readable_name(entry.key)}
    if video.looked is None:
        place = _place(entry.media) if isinstance(entry, Sample) else {"path": names["source"], "offset": 0, "size": 0}
        verdict = {"verdict": UNREADABLE, "reason": UNREADABLE, "detail": video.fault}
        yield {"key": names["clip_of"], "captions": [], **names, **place, **verdict}
    for clip in video.clips:
        fields = {**names, **_fields(video, clip)}
        place = _place(entry.media)
        if clip.verdict.verdict == KEPT:
            stem = stem_of(fields["key"])
            offset = add_member(tar, f"{stem}.{clip.suffix}", clip.content)
            add_member(tar, f"{stem}.json", json.dumps(fields, ensure_ascii=False).encode())
            place = {"path": f"{CLIPS}/{path.name}", "offset": offset, "size": len(clip.content)}
        yield {**fields, **place, **vars(clip.verdict)}


def _place(media: Extent) -> Row:
    return {"path": readable_name(str(media.path)), "offset": media.offset, "size": media.size}


def _fields(video: JudgedVideo, clip: JudgedClip) -> Row:
    """What a clip's row and its JSON both say."""
    scores = {judgement.filter: judgement.score for judgement in clip.judgements}
    return {
        "key": f"{video.entry.key}-{clip.span.number:05d}",
        # What is said of a whole video need not be true of a part.
        "captions": list(video.looked.captions) if clip.span.is_whole else [],
        "start_s": round(clip.span.start_s, 6),
        "end_s": round(clip.span.end_s, 6),
        "num_frames": clip.span.num_frames,
        "frame_rate": video.looked.frame_rate,
        "height": video.looked.height,
        "width": video.looked.width,
        **{name: scores.get(name) for name in MEASURED},
    }
