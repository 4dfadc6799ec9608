"""Samples as members of a WebDataset tar: a member is KEY.SUFFIX, and the key ends at the first dot of its last part.

A key that would not come out of such a name as it went in (`img_0001.jpg` of a manifest) is escaped in it.
"""

import io
import re
import tarfile

from megatron_ext.files import suffix_of
from megatron_ext.media.samples import KINDS

_ESCAPES = str.maketrans({character: f"%{ord(character):02X}" for character in "%.\0"})
_ESCAPED = re.compile("%(25|2E|00|2F)")
_LOST = re.compile(rf"{_ESCAPED.pattern}|\0|/\Z")  # beside dots


def stem_of(key: str) -> str:
    """What stands before the dot and the suffix in the names of a sample's members; `key_of` gives the key again.

    A key without a dot in its last part, and without what looks like an escape, is its own stem. Otherwise its `%`,
    `.` and NUL are written as `%25`, `%2E` and `%00`, and a slash at its end as `%2F`.
    """
    if _cut(f"{key}.x") == key and not _LOST.search(key):
        return key
    stem = key.translate(_ESCAPES)
    return stem[:-1] + "%2F" if stem.endswith("/") else stem


def key_of(name: str) -> str:
    """The key in a file's name: what is before the first dot of its last part, unescaped where `stem_of` wrote it."""
    stem = _cut(name)
    key = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), stem)
    return key if key != stem and stem_of(key) == stem else stem


def media_suffix(kind: str, *names: str) -> str:
    """The suffix of the first of `names` (paths, addresses) that says `kind`, else a common one: a reader takes the
    kind from the suffix, and how it is encoded from the content."""
    suffixes = map(suffix_of, names)
    return next((suffix for suffix in suffixes if KINDS.get(suffix) == kind), "mp4" if kind == "video" else "jpg")


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a file to a tar; where its bytes begin in it. Equal files give equal tars: no times, no owner."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    blocks = -(-len(content) // tarfile.BLOCKSIZE)
    return tar.offset - blocks * tarfile.BLOCKSIZE


def _cut(name: str) -> str:
    folder, slash, last = name.removeprefix("./").rpartition("/")
    return folder + slash + last.partition(".")[0]
