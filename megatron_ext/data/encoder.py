"""From what was read to encoded documents of each split."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from megatron_ext.config import InputError
from megatron_ext.data.drafts import Lookup, caption_drafts, row_draft
from megatron_ext.data.draws import draw
from megatron_ext.data.encoded import Draft, EncodedDocuments, encode_drafts
from megatron_ext.data.held_out import HeldOut
from megatron_ext.data.inputs import Batch, row_place
from megatron_ext.data.options import PreprocessConfig
from megatron_ext.data.shingles import text_signatures
from megatron_ext.data.sources import MediaSample, parse_sample
from megatron_ext.media.texts import NOT_UNICODE, BadText, is_unicode
from megatron_ext.vocab import Vocabulary

TRAIN, VALID = "train", "valid"


@dataclass(kw_only=True)
class Result:
    """What became of a batch."""

    documents: dict[str, EncodedDocuments] = field(default_factory=dict)
    """By split."""
    samples: int = 0
    """Pictures, clips, rows and texts, the bad ones included."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(source, reason)."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Captions and texts without a character: passed over."""
    divided: list[tuple[str, str]] = field(default_factory=list)
    """(source, reason) of rows that stand on neither side of the split: dropped."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """What encodes batches; a function of each batch alone."""

    config: PreprocessConfig
    vocabulary: Vocabulary
    lookup: Lookup
    held_out: HeldOut

    def encode(self, batch: Batch) -> Result:
        """Raises InputError: a damaged tokenized sample."""
        result = Result(samples=len(batch.items))
        drafts = {"media": self._of_media, "rows": self._of_rows, "text": self._of_texts}[batch.kind](batch, result)
        by_split: dict[str, list[Draft]] = {}
        for split, draft in drafts:
            by_split.setdefault(split, []).append(draft)
        result.documents = {split: encode_drafts(each, self.vocabulary) for split, each in by_split.items()}
        return result

    def _split(self, key: str) -> str:
        """Of a picture or clip."""
        return VALID if key in self.held_out else TRAIN

    def _of_media(self, batch: Batch, result: Result) -> Iterator[tuple[str, Draft]]:
        for raw in _without_bad(batch.items, result):
            sample = parse_sample(raw, self.vocabulary.layout.codebook_size)
            for document in self._of_sample(sample, raw.place, result):
                yield self._split(sample.key), document

    def _of_sample(self, sample: MediaSample, place: str, result: Result) -> Iterator[Draft]:
        captions = [caption.strip() for caption in sample.captions]
        result.left_out["empty captions"] += captions.count("")
        captions = [caption for caption in captions if caption]
        if not all(map(is_unicode, captions)):
            result.bad.append((place, f"a caption is {NOT_UNICODE}"))
        elif captions:
            yield from caption_drafts(sample.key, sample.media, captions, self.config)
        elif self.config.missing_caption == "keep":
            yield Draft(sample.key, (sample.media,))
        else:
            result.bad.append((place, "it has no caption"))

    def _of_rows(self, batch: Batch, result: Result) -> Iterator[tuple[str, Draft]]:
        """A row stands where all its pictures do; one without, where its text does."""
        for key, row in _without_bad(batch.items, result):
            seen: list[str] = []

            def find(media_key: str, seen: list[str] = seen) -> MediaSample | None:
                seen.append(media_key)
                return self.lookup(media_key)

            try:
                document = row_draft(key, row, find, self.config)
            except InputError as error:
                result.bad.append((row_place(batch.path, key), str(error)))
                continue
            held_out = [each for each in seen if each in self.held_out]
            if held_out and len(held_out) < len(seen):
                trained = next(each for each in seen if each not in self.held_out)
                reason = f"it shows {held_out[0]!r}, which is held out, and {trained!r}, which is in training"
                result.divided.append((row_place(batch.path, key), reason))
                continue
            yield self._split(seen[0]) if seen else self._text_splits(["".join(document.parts)])[0], document

    def _of_texts(self, batch: Batch, result: Result) -> Iterator[tuple[str, Draft]]:
        texts = list(_without_bad(batch.items, result))
        filled = [(key, text) for key, text in texts if text.strip()]
        result.left_out["empty texts"] += len(texts) - len(filled)
        splits = self._text_splits([text for _, text in filled])
        for (key, text), split in zip(filled, splits, strict=True):
            yield split, Draft(key, (text,))

    def _text_splits(self, texts: list[str]) -> list[str]:
        fraction = self.config.valid_fraction
        if not fraction:  # nobody asks for the side
            return [TRAIN] * len(texts)
        groups = [f"text:{signature:016x}" for signature in text_signatures(texts).tolist()]
        return [VALID if draw("valid", group) < fraction else TRAIN for group in groups]


def _without_bad(items: Iterable, result: Result) -> Iterator:
    """The items that can be used; the others are noted as they come."""
    for item in items:
        if isinstance(item, BadText):
            result.bad.append((item.place, item.reason))
        else:
            yield item
