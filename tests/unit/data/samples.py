"""Random documents and datasets for the tests of this room."""

import io
import json
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_ext.data import DocumentWriter
from megatron_ext.vocab import Image, Segment, SentencePieceTokenizer, Text, Video, VocabLayout, Vocabulary

CODEBOOK_SIZE = 50
VISION_TOKENIZER = "0123456789abcdef"


def train_text_tokenizer() -> bytes:
    """A small lossless SentencePiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat sits on the mat", "two dogs and 3 birds", "0123456789*"] * 20),
        model_writer=model, vocab_size=300, model_type="bpe", normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True, byte_fallback=True,
        required_chars="0123456789*", unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


def make_vocabulary(model: bytes, codebook_size: int = CODEBOOK_SIZE) -> Vocabulary:
    text = SentencePieceTokenizer(model)
    return Vocabulary(VocabLayout.custom(text_size=text.size, codebook_size=codebook_size), text)


def text_of(vocabulary: Vocabulary, length: int, rng: np.random.Generator) -> Text:
    low, high = vocabulary.text_ranges[-1]
    return Text(rng.integers(low, high, size=length))


def picture(rng: np.random.Generator, height: int = 2, width: int = 3) -> Image:
    return Image(rng.integers(0, CODEBOOK_SIZE, size=(height, width)))


def clip(rng: np.random.Generator, frames: int = 3) -> Video:
    return Video(rng.integers(0, CODEBOOK_SIZE, size=(frames, 2, 3)), frame_rate_mhz=24_000, duration_ms=500)


def random_document(vocabulary: Vocabulary, rng: np.random.Generator) -> list[Segment]:
    text = text_of(vocabulary, int(rng.integers(1, 60)), rng)
    return [
        [text],
        [text, picture(rng)],
        [picture(rng), text],
        [text, clip(rng)],
        [picture(rng), text, picture(rng)],
    ][rng.integers(5)]


def write_dataset(
    prefix: Path,
    vocabulary: Vocabulary,
    documents: list[list[Segment]],
    vision_tokenizer: str | None = VISION_TOKENIZER,
) -> Path:
    with DocumentWriter(prefix, vocabulary, vision_tokenizer) as writer:
        for number, segments in enumerate(documents):
            writer.add(segments, f"key/{number}")
        writer.commit()
    return prefix


def random_dataset(prefix: Path, vocabulary: Vocabulary, count: int = 60, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    return write_dataset(prefix, vocabulary, [random_document(vocabulary, rng) for _ in range(count)])


def write_tokenized_folder(
    folder: Path, samples: dict[str, tuple[np.ndarray, list[str]]], codebook_size: int = CODEBOOK_SIZE,
    vision_tokenizer: str = VISION_TOKENIZER,
) -> Path:  # fmt: skip
    """A folder as tokenize_vision.py writes it, made with webdataset's own writer: two shards."""
    import webdataset  # here: others need the documents of this file, not its shards

    folder.mkdir(parents=True)
    items = list(samples.items())
    shards = []
    counts = {"image": 0, "video": 0}
    for number, part in enumerate((items[: len(items) // 2], items[len(items) // 2 :])):
        name = f"codes-{number:05d}.tar"
        with webdataset.TarWriter(str(folder / name)) as writer:
            for key, (codes, captions) in part:
                kind = "image" if codes.ndim == 2 else "video"
                timing = {"frame_rate_mhz": 4000, "duration_ms": 750} if kind == "video" else {}
                facts = {"key": key, "kind": kind, "captions": captions, "source": f"{key}.jpg", **timing}
                writer.write({"__key__": key, "codes.npy": codes.astype(np.uint16), "json": facts})
                counts[kind] += 1
        shards.append({"name": name, "sha256": "", "samples": len(part)})
    manifest = {
        "format_version": 1, "vision_tokenizer": vision_tokenizer, "codebook_size": codebook_size,
        "spatial_factor": 4, "temporal_factor": 4, "samples": counts, "shards": shards,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
