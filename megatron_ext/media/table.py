"""The samples of an input in columns, and the file that keeps them."""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np

from megatron_ext.files import replacing, writing
from megatron_ext.media.headers import Header
from megatron_ext.media.names import Names
from megatron_ext.media.samples import Sample

FORMAT = 2
"""Number of the layout of the index files; others are made anew."""

COLUMNS = {
    "is_clip": np.bool_,
    "offset": np.int64,
    "size": np.int64,
    "stamp": np.int64,
    "height": np.int32,
    "width": np.int32,
    "num_frames": np.int32,
    "frame_rate": np.float64,
    "codec": np.uint16,
}
"""The columns that are plain arrays, and their types."""


@dataclass(frozen=True, kw_only=True)
class MediaTable:
    """Samples, a column for each property; row i of every column is sample i."""

    names: Names
    """Path of the media file inside the input."""

    is_clip: np.ndarray
    """Bool."""

    offset: np.ndarray
    """First byte inside the file."""

    size: np.ndarray
    """Number of bytes."""

    stamp: np.ndarray
    """Modification time of the file in nanoseconds."""

    height: np.ndarray
    """Pixels, upright; 0 where the header is unreadable."""

    width: np.ndarray
    """Pixels, upright."""

    num_frames: np.ndarray
    """Frames of a clip."""

    frame_rate: np.ndarray
    """Frames per second of a clip."""

    codec: np.ndarray
    """Place in `codecs`."""

    codecs: tuple[str, ...]
    """The codecs that occur, as in `Header`."""

    faults: dict[int, str]
    """Row -> why its header is unreadable."""

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, names: Sequence[str], samples: Sequence[Sample], found: Sequence[Header | str]) -> "MediaTable":
        """The table of `samples`, whose headers, or why those are unreadable, are `found`."""
        headers = [item if isinstance(item, Header) else Header(height=0, width=0, codec="") for item in found]
        codecs = {codec: place for place, codec in enumerate(dict.fromkeys(header.codec for header in headers))}
        values = {name: map(attrgetter(f"media.{name}"), samples) for name in ("offset", "size", "stamp")}
        values |= {
            name: map(attrgetter(name), headers) for name in ("height", "width", "num_frames", "frame_rate", "codec")
        }
        values["is_clip"] = (sample.kind == "video" for sample in samples)
        values["codec"] = map(codecs.__getitem__, values["codec"])
        return cls(
            names=Names.of(names),
            codecs=tuple(codecs),
            faults={row: item for row, item in enumerate(found) if not isinstance(item, Header)},
            **{name: np.fromiter(values[name], kind, count=len(samples)) for name, kind in COLUMNS.items()},
        )

    @classmethod
    def joined(cls, parts: Sequence["MediaTable"]) -> "MediaTable":
        """The rows of all parts, one after the other."""
        codecs = {codec: place for place, codec in enumerate(dict.fromkeys(c for part in parts for c in part.codecs))}
        firsts = np.cumsum([0, *map(len, parts)]).tolist()
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS if name != "codec"}
        places = [np.array([codecs[codec] for codec in part.codecs], COLUMNS["codec"])[part.codec] for part in parts]
        return cls(
            names=Names.joined([part.names for part in parts]),
            codec=np.concatenate(places),
            codecs=tuple(codecs),
            faults={
                first + row: why for first, part in zip(firsts, parts, strict=False) for row, why in part.faults.items()
            },
            **columns,
        )

    def header(self, row: int) -> Header:
        """The header of a row that has one."""
        return Header(
            height=int(self.height[row]),
            width=int(self.width[row]),
            num_frames=int(self.num_frames[row]),
            frame_rate=float(self.frame_rate[row]),
            codec=self.codecs[self.codec[row]],
        )

    def save(self, path: Path, stamp: list[int]) -> None:
        """Write the table under `path`; `stamp` is what must still hold of the input for the table to hold."""
        header = {"format": FORMAT, "stamp": stamp, "codecs": self.codecs, "faults": list(self.faults.items())}
        arrays = {name: getattr(self, name) for name in COLUMNS}
        arrays |= {"names": self.names.content, "name_ends": self.names.ends}
        encoded = np.frombuffer(json.dumps(header).encode("ascii"), dtype=np.uint8)
        with writing(path, "media.index_dir"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, is_shared=True) as temporary, temporary.open("wb") as file:
                np.savez(file, header=encoded, **arrays)

    @classmethod
    def load(cls, path: Path) -> tuple["MediaTable", list[int]] | None:
        """The table under `path` and its stamp; None where there is none that can be read."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                header = json.loads(arrays["header"].tobytes())
                if header["format"] != FORMAT:
                    return None
                table = cls(
                    names=Names(arrays["names"], arrays["name_ends"]),
                    codecs=tuple(header["codecs"]),
                    faults=dict(header["faults"]),
                    **{name: arrays[name] for name in COLUMNS},
                )
                return table, header["stamp"]
        except (OSError, EOFError, zipfile.BadZipFile, ValueError, KeyError, TypeError):
            return None  # a cache: what cannot be read is made anew
