"""Options of preprocess_data.py."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_ext.config import InputError
from megatron_ext.config.section import Count, Name, Number, Seed, Share, below, most
from megatron_ext.config.vocab import VocabConfig
from megatron_ext.data.templates import check_template
from megatron_ext.media.array import ShardConfig
from megatron_ext.media.texts import TextUnit


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(ShardConfig):
    """Write indexed datasets of documents from tokenized media, captions, rows and text files.

    With --plan, print how many tasks, hours and terabytes a corpus takes instead (--plan --help)."""

    vocab: VocabConfig = field(default_factory=VocabConfig)
    """Which ids mean what."""

    vision: tuple[Name, ...] = ()
    """List of folders of tokenized pictures and clips, as tokenize_vision.py writes them; documents of captions."""

    rows: tuple[Name, ...] = ()
    """List of glob patterns of .jsonl (also .gz or .zst) and .parquet files whose rows are documents that refer to
    media by key: interleaved ones (content), or questions and answers (media, question, answer or turns)."""

    row_media: tuple[Name, ...] = ()
    """List of folders of tokenized media that rows refer to."""

    text: tuple[Name, ...] = ()
    """List of glob patterns of text files (`**` for folders): UTF-8, or .jsonl and .parquet with a document per row in
    text_field; each but .parquet also as .gz or .zst."""

    output_prefix: Name
    """Path of the datasets without `_train`, `_valid` and suffix."""

    text_unit: TextUnit = "paragraph"
    """What of a plain text file is one document: a line, a paragraph (up to an empty line), or the file."""

    text_field: Name = "text"
    """Field of .jsonl and column of .parquet that holds the text of a document."""

    caption_position: Literal["before", "after", "both", "random"] = "random"
    """A caption stands before its picture (to draw it), after it (to describe it), both (two documents), or random."""

    caption_after_probability: Share = 0.5
    """Probability of `after` for caption_position random; drawn per caption from seed and source key."""

    captions_per_sample: Number = 0
    """How many captions of a picture or clip become documents, drawn from seed and source key; 0: all."""

    empty_caption_probability: Share = 0.0
    """Probability that a caption before its picture is left out, so that pictures can be drawn without a prompt, as
    classifier-free guidance needs it; drawn per caption from seed and source key."""

    before_templates: tuple[str, ...] = ("{caption}{media}",)
    """How a caption and the picture after it are written; of several one is drawn per caption."""

    after_templates: tuple[str, ...] = ("{media}{caption}",)
    """How a picture and the caption after it are written; of several one is drawn per caption."""

    understanding_templates: tuple[str, ...] = (
        "You are a helpful assistant. USER: {media}{question}. ASSISTANT: {answer}",
    )
    """How a row's media, question and answer are written (Emu3-Chat's template); of several one is drawn per row."""

    next_turn_template: str = " USER: {question}. ASSISTANT: {answer}"
    """How each further question and answer of a row is written."""

    missing_caption: Literal["skip", "keep"] = "skip"
    """What a picture or clip without a caption is: a bad sample, or a document of its own."""

    max_bad_fraction: Share = 0.01
    """Largest share of pictures, clips, rows and texts that may be unusable (no caption, not UTF-8, no string where a
    text should be, a key that comes twice, media that are missing); more of them stop, as soon as it is plain."""

    valid_fraction: Annotated[Share, below(1)] = 0.0
    """Share of the sources held out, whatever the seed; all documents of a picture fall on one side, and near-duplicate
    texts and pictures (see duplicates) on the same."""

    duplicates: tuple[Name, ...] = ()
    """List of glob patterns of Parquet files with columns key and phash, as curate_images.py writes them: pictures
    whose perceptual hashes differ little fall on one side of the held-out split. Without: each key by itself."""

    duplicate_distance: Annotated[Number, most(15)] = 4
    """Largest number of bits in which the 64-bit perceptual hashes of near-duplicates differ."""

    seed: Seed = 1234
    """Of all that is drawn but the held-out side."""

    workers: Count = 1
    """Processes that encode; 1: this one, whose text tokenizer uses all its cores. The bytes are the same."""

    overwrite: bool = False
    """Do work again that is finished and whose inputs and options have not changed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.vision and not self.text and not self.rows:
            raise InputError("vision and text are both empty, and so is rows: give at least one folder or pattern")
        for name, wanted in _PLACES.items():
            given = getattr(self, name)
            if not given:
                raise InputError(f"{name} is empty: give at least one template")
            for template in (given,) if isinstance(given, str) else given:
                check_template(name, template, wanted)


_PLACES = {
    "before_templates": {"caption", "media"},
    "after_templates": {"caption", "media"},
    "understanding_templates": {"media", "question", "answer"},
    "next_turn_template": {"question", "answer"},
}
