"""Documents before their texts are ids: captions beside their picture, rows that refer to pictures, plain texts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron_ext.config import InputError
from megatron_ext.data.draws import choose, draw
from megatron_ext.data.encoded import Draft
from megatron_ext.data.options import PreprocessConfig
from megatron_ext.data.sources import MediaSample
from megatron_ext.data.templates import Part, fill
from megatron_ext.vocab import Image, Video

ROW_FIELDS = ("key", "content", "media", "question", "answer", "turns")
"""What is looked at in a row."""

Lookup = Callable[[str], MediaSample | None]
"""Key -> the tokenized sample that rows mean by it."""


def caption_drafts(
    key: str, media: Image | Video, captions: Sequence[str], config: PreprocessConfig
) -> Iterator[Draft]:
    """The documents of a picture or clip: one per chosen caption, two for caption_position both."""
    chosen = range(len(captions))
    if config.captions_per_sample:
        chosen = choose(config.captions_per_sample, chosen, "choose", config.seed, key)
    for number in chosen:
        position = config.caption_position
        if position == "random":
            after = draw("caption", config.seed, key, number) < config.caption_after_probability
            position = "after" if after else "before"
        if position in ("before", "both"):
            if draw("empty", config.seed, key, number) < config.empty_caption_probability:
                yield Draft(key, (media,))
            else:
                template = _one_of(config.before_templates, "before", config.seed, key, number)
                yield Draft(key, fill(template, caption=captions[number], media=media))
        if position in ("after", "both"):
            template = _one_of(config.after_templates, "after", config.seed, key, number)
            yield Draft(key, fill(template, caption=captions[number], media=media))


def _one_of(templates: Sequence[str], *drawn_for: int | str) -> str:
    return templates[int(draw(*drawn_for) * len(templates))]


def row_draft(key: str, row: Mapping[str, Any], lookup: Lookup, config: PreprocessConfig) -> Draft:
    """The document of a row: `content` (interleaved), or `media` with `question` and `answer`, or with `turns`.

    Raises:
        InputError: the row is neither, or refers to media that are not there; the message is the reason.
    """
    parts = _interleaved(row["content"], lookup) if row.get("content") else _answered(key, row, lookup, config)
    if not any(part.strip() if isinstance(part, str) else True for part in parts):
        raise InputError("it is empty")
    return Draft(key, parts)


def media_keys(row: Mapping[str, Any]) -> list[str]:
    """The keys of the media that a row names, in its order, whatever else may be wrong with it."""
    if content := row.get("content"):
        items = [item for item in content if isinstance(item, dict)] if isinstance(content, list) else []
        named = [item.get(name) for item in items for name in ("image", "video")]
    else:
        media = row.get("media")
        named = media if isinstance(media, list) else [media]
    return [key for key in named if isinstance(key, str)]


def _interleaved(content: object, lookup: Lookup) -> tuple[Part, ...]:
    if not isinstance(content, list):
        raise InputError("content is no list")
    parts: list[Part] = []
    for number, item in enumerate(content):
        fields = {"text": item} if isinstance(item, str) else item
        # Parquet gives every field of a struct, most of them null.
        given = (
            [(name, value) for name, value in fields.items() if value is not None] if isinstance(fields, dict) else []
        )
        if len(given) != 1 or given[0][0] not in ("text", "image", "video") or not isinstance(given[0][1], str):
            raise InputError(f"content {number} is neither a text nor one of text, image and video with a string")
        name, value = given[0]
        parts.append(value if name == "text" else _media(value, lookup, {"image": Image, "video": Video}[name]))
    return fill("{parts}", parts=parts)


def _answered(key: str, row: Mapping[str, Any], lookup: Lookup, config: PreprocessConfig) -> tuple[Part, ...]:
    turns = row.get("turns") or [row]
    keys = row.get("media") or []
    keys = [keys] if isinstance(keys, str) else keys
    if not isinstance(turns, list):
        raise InputError("turns is no list")
    texts = [turn.get(name) if isinstance(turn, dict) else None for turn in turns for name in ("question", "answer")]
    if not isinstance(keys, list) or not all(isinstance(text, str) for text in (*keys, *texts)):
        raise InputError("it has neither content, nor question and answer as strings, nor turns of these")
    media = [_media(each, lookup, (Image, Video)) for each in keys]
    template = _one_of(config.understanding_templates, "understanding", config.seed, key)
    parts = fill(template, media=media, question=texts[0], answer=texts[1])
    for question, answer in zip(texts[2::2], texts[3::2], strict=True):
        parts = (*parts, *fill(config.next_turn_template, question=question, answer=answer))
    return fill("{parts}", parts=parts)


def _media(key: str, lookup: Lookup, kind: type | tuple[type, ...]) -> Image | Video:
    sample = lookup(key)
    if sample is None:
        raise InputError(f"no sample {key!r} in row_media")
    if not isinstance(sample.media, kind):
        raise InputError(f"{key!r} is no {'picture' if kind is Image else 'clip'}")
    return sample.media
