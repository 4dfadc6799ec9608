"""Files that belong together: a picture or clip and its captions have one key.

A key is the path without everything from the first dot of its last part (module members), as in WebDataset. Beside
KEY.jpg, KEY.mask.png is something else about the sample; alone it is a picture whose name has a dot. Its captions are
those of its whole name, else of its key. Of several such pictures and no KEY.jpg those of a folder are samples of their
own (`22.05.jpg`, `22.06.jpg`); in a tar, where a key is one sample, the first is used.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from megatron_ext.files import suffix_of
from megatron_ext.media.members import key_of
from megatron_ext.media.samples import KINDS, Extent, Fault, Sample, readable_name


class Entry(NamedTuple):
    """A file of an input."""

    name: str
    """Its path inside the input."""

    source: str
    """Where it is."""

    content: Extent | str
    """Its bytes, or why there are none."""


def matters(name: str) -> bool:
    """Whether a file of this name may be a picture, a clip or captions."""
    return suffix_of(name) in (*KINDS, "txt", "json")


def caption_suffixes(suffix: str) -> dict[str, tuple[str, ...]]:
    """What follows the key in names of captions, of which the first there is counts, for media of `suffix`; by the
    field of a sample that they are."""
    own = suffix[: suffix.rfind(".") + 1]
    return {"text": (f"{own}txt", "txt", "caption.txt"), "fields": (f"{own}json", "json")}


def grouped(entries: Iterable[Entry], *, in_tar: bool) -> list[Sample | Fault]:
    """The samples of files and, after them, what cannot be used, sorted by key; other files are passed over.

    Of two files of one name the first counts.
    """
    groups: dict[str, dict[str, Entry]] = {}
    faults: dict[str, list[Fault]] = {}
    for entry in entries:
        last = entry.name.rpartition("/")[2]
        if last.startswith("."):  # hidden files
            continue
        key, suffix = key_of(entry.name), last.partition(".")[2].lower()
        first = groups.setdefault(key, {}).setdefault(suffix, entry)
        if first is not entry and suffix_of(last) in KINDS:
            faults.setdefault(key, []).append(_second(key, entry, first))
    found = []
    for key in sorted(groups):
        found += _of_key(key, groups[key], in_tar)
        found += faults.get(key, [])
    return found


def _of_key(key: str, files: Mapping[str, Entry], in_tar: bool) -> Iterator[Sample | Fault]:
    media = [suffix for suffix in files if suffix_of(f".{suffix}") in KINDS]
    plain = [suffix for suffix in media if "." not in suffix]
    if plain or in_tar:
        used, others = (plain or media)[:1], (plain or media)[1:]
    else:
        used, others = media, []
    for suffix in used:
        own_key = key if len(used) == 1 else f"{key}.{suffix.rpartition('.')[0]}"
        entry = files[suffix]
        if isinstance(entry.content, Extent):
            beside = {
                field: next((files[name].content for name in names if name in files), None)
                for field, names in caption_suffixes(suffix).items()
            }
            yield Sample(
                key=readable_name(own_key),
                kind=KINDS[suffix_of(entry.name)],
                source=entry.source,
                media=entry.content,
                **{field: each if isinstance(each, Extent) else None for field, each in beside.items()},
            )
    yield from (_second(key, files[suffix], files[used[0]]) for suffix in others)
    for entry in files.values():
        if not isinstance(entry.content, Extent):
            yield Fault(key=readable_name(key), source=readable_name(entry.source), reason=entry.content)


def _second(key: str, entry: Entry, first: Entry) -> Fault:
    reason = f"two media files of one key: {readable_name(first.source)} is used"
    return Fault(key=readable_name(key), source=readable_name(entry.source), reason=reason)
