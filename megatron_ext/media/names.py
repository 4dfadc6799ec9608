"""Many short texts in two arrays: a list of str takes some 60 bytes more for each."""

from collections.abc import Iterable, Sequence

import numpy as np


class Names(Sequence[str]):
    """Texts that never change, as bytes end to end; what is not UTF-8 in a path goes through, as in `os.fsdecode`."""

    def __init__(self, content: np.ndarray, ends: np.ndarray) -> None:
        """`content` uint8: the bytes; `ends` int64: where each text ends in them."""
        self.content = content
        self.ends = ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Names":
        """These texts."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        content = np.frombuffer(bytearray(b"".join(encoded)), dtype=np.uint8)
        return cls(content, np.cumsum([len(text) for text in encoded], dtype=np.int64))

    @classmethod
    def joined(cls, parts: Sequence["Names"]) -> "Names":
        """The texts of all parts, one after the other."""
        firsts = np.cumsum([0, *(len(part.content) for part in parts)])
        ends = [part.ends + first for part, first in zip(parts, firsts, strict=False)]
        return cls(np.concatenate([part.content for part in parts]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        first = int(self.ends[row - 1]) if row else 0
        return self.content[first : int(self.ends[row])].tobytes().decode("utf-8", "surrogateescape")
