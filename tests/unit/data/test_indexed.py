"""Datasets on disk: megatron-core reads them, the sidecar comes back, nothing half-written is taken for whole."""

import json
import os

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_ext.config import InputError
from megatron_ext.data import KINDS, DocumentDataset, DocumentWriter, document_kind
from megatron_ext.data.indexed import FILES_OPEN
from megatron_ext.vocab import Text, Vocabulary, decode_document, encode_document, spans
from tests.unit.data.samples import (
    VISION_TOKENIZER,
    clip,
    make_vocabulary,
    picture,
    random_dataset,
    random_document,
    text_of,
    write_dataset,
)


def documents(vocabulary: Vocabulary, count: int = 40) -> list:
    rng = np.random.default_rng(7)
    return [random_document(vocabulary, rng) for _ in range(count)]


def test_megatron_core_reads_one_int32_sequence_per_document(tmp_path, vocabulary):
    written = documents(vocabulary)
    dataset = IndexedDataset(str(write_dataset(tmp_path / "set", vocabulary, written)))
    assert dataset.index.dtype == np.int32 and len(dataset) == len(written)
    assert dataset.document_indices.tolist() == list(range(len(written) + 1))
    for number, segments in enumerate(written):
        np.testing.assert_array_equal(dataset[number], encode_document(segments, vocabulary))


def test_documents_come_back(tmp_path, vocabulary):
    written = documents(vocabulary)
    dataset = DocumentDataset(write_dataset(tmp_path / "set", vocabulary, written), vocabulary)
    for number, segments in enumerate(written):
        ids = dataset.ids(number)
        assert decode_document(ids, vocabulary) == tuple(segments)
        assert dataset.sidecar.key(number) == f"key/{number}"
        np.testing.assert_array_equal(dataset.sidecar.spans.of(number), spans(ids, vocabulary))
        np.testing.assert_array_equal(dataset.ids(number, 1, 2), ids[1:3])
    assert all(dataset.check_files().values())
    assert DocumentDataset.open(tmp_path / "set").vocabulary.identity == vocabulary.identity


def test_an_open_dataset_holds_as_many_files_as_are_asked_for(tmp_path, vocabulary):
    prefix = write_dataset(tmp_path / "set", vocabulary, documents(vocabulary))
    before = len(os.listdir("/proc/self/fd"))
    dataset = DocumentDataset(prefix, vocabulary)
    assert len(os.listdir("/proc/self/fd")) - before == FILES_OPEN
    assert len(dataset)


def test_manifest_counts(tmp_path, vocabulary):
    rng = np.random.default_rng(0)
    text = text_of(vocabulary, 5, rng)
    written = [[text], [text, picture(rng)], [clip(rng)], [picture(rng), text, picture(rng)], [text]]
    kinds = ["text", "image", "video", "interleaved", "text"]
    assert [document_kind(segments) for segments in written] == kinds
    manifest = DocumentDataset(write_dataset(tmp_path / "set", vocabulary, written), vocabulary).manifest
    assert manifest.documents == {"text": 2, "image": 1, "video": 1, "interleaved": 1}
    assert manifest.ids["text"] == 2 * (5 + 2)
    assert manifest.visual_ids == 6 + 18 + 12
    assert manifest.num_ids == sum(len(encode_document(segments, vocabulary)) for segments in written)
    assert (manifest.vocabulary, manifest.vision_tokenizer) == (vocabulary.identity, VISION_TOKENIZER)


def test_same_documents_same_bytes(tmp_path, vocabulary):
    for name in ("a", "b"):
        random_dataset(tmp_path / name / "set", vocabulary)
    files = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert {path.suffix for path in files} >= {".bin", ".idx", ".npz", ".json"}
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


def test_an_absent_sidecar_is_rebuilt(tmp_path, vocabulary):
    prefix = random_dataset(tmp_path / "set", vocabulary)
    original = DocumentDataset(prefix, vocabulary).sidecar
    (tmp_path / "set.spans.npz").unlink()
    rebuilt = DocumentDataset(prefix, vocabulary).sidecar
    for name in ("kinds", "span_offsets", "span_bounds"):
        np.testing.assert_array_equal(getattr(rebuilt, name), getattr(original, name))
    assert rebuilt.key(3) == "set#3"
    assert (tmp_path / "set.spans.npz").exists() and not list(tmp_path.glob("*.partial"))


def test_a_damaged_sidecar_is_refused(tmp_path, vocabulary):
    prefix = random_dataset(tmp_path / "set", vocabulary)
    (tmp_path / "set.spans.npz").write_bytes(b"PK\3\4 half an archive")
    with pytest.raises(InputError, match="set.spans.npz is damaged .* remove it"):
        DocumentDataset(prefix, vocabulary).sidecar.key(0)


def test_the_sidecar_of_other_documents_is_refused(tmp_path, vocabulary):
    prefix = random_dataset(tmp_path / "set", vocabulary)
    random_dataset(tmp_path / "other", vocabulary, seed=1)
    os.replace(tmp_path / "other.spans.npz", tmp_path / "set.spans.npz")
    with pytest.raises(InputError, match="set.spans.npz does not describe these documents: remove it"):
        DocumentDataset(prefix, vocabulary).sidecar.key(0)


def test_a_sidecar_is_not_rebuilt_from_other_documents(tmp_path, vocabulary):
    rng = np.random.default_rng(0)
    segments = [text_of(vocabulary, 5, rng), picture(rng)]
    prefix = write_dataset(tmp_path / "set", vocabulary, [segments])
    write_dataset(tmp_path / "other", vocabulary, [segments[::-1]])
    os.replace(tmp_path / "other.bin", tmp_path / "set.bin")
    (tmp_path / "set.spans.npz").unlink()
    with pytest.raises(InputError, match="set.bin holds other documents than its manifest says"):
        DocumentDataset(prefix, vocabulary).sidecar.key(0)
    assert not (tmp_path / "set.spans.npz").exists()


def test_unfinished_work_leaves_nothing(tmp_path, vocabulary):
    with pytest.raises(KeyboardInterrupt), DocumentWriter(tmp_path / "set", vocabulary, None) as writer:
        writer.add([Text(text_of(vocabulary, 3, np.random.default_rng(0)).ids)], "key")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_dataset_is_replaced_as_a_whole(tmp_path, vocabulary):
    random_dataset(tmp_path / "set", vocabulary, count=5, seed=0)
    random_dataset(tmp_path / "set", vocabulary, count=9, seed=1)
    dataset = DocumentDataset(tmp_path / "set", vocabulary)
    assert len(dataset) == 9 and all(dataset.check_files().values())


def test_an_empty_dataset_is_refused(tmp_path, vocabulary):
    with DocumentWriter(tmp_path / "set", vocabulary, None) as writer:
        with pytest.raises(InputError, match="would be empty"):
            writer.commit()


def test_a_bad_document_names_its_key(tmp_path, vocabulary):
    with DocumentWriter(tmp_path / "set", vocabulary, None) as writer:
        with pytest.raises(InputError, match="photo/7: segment 0 is Text but holds"):
            writer.add([Text(np.array([vocabulary.layout.sov]))], "photo/7")


def test_broken_datasets_are_refused_by_file(tmp_path, vocabulary, text_model):
    def refused(prefix, message, other=vocabulary):
        with pytest.raises(InputError, match=message):
            DocumentDataset(prefix, other)

    refused(tmp_path / "nothing", "nothing.manifest.json is missing")
    refused(random_dataset(tmp_path / "a", vocabulary), "made with vocabulary", make_vocabulary(text_model, 49))
    (random_dataset(tmp_path / "b", vocabulary).parent / "b.idx").unlink()
    refused(tmp_path / "b", "b.idx is missing")
    with (random_dataset(tmp_path / "c", vocabulary).parent / "c.bin").open("ab") as file:
        file.write(b"1234")
    refused(tmp_path / "c", "c.bin has .* bytes, its manifest says")
    path = random_dataset(tmp_path / "d", vocabulary).parent / "d.manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    refused(tmp_path / "d", "format version")


def test_the_files_are_those_of_megatron_core_and_of_numpy(tmp_path, vocabulary):
    """Ours are written in bounded memory; theirs are the oracles."""
    written = documents(vocabulary)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for segments in written:
        ids = encode_document(segments, vocabulary)
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    prefix = write_dataset(tmp_path / "ours", vocabulary, written)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    bounds = [spans(encode_document(segments, vocabulary), vocabulary) for segments in written]
    keys = [f"key/{number}".encode() for number in range(len(written))]
    np.savez(
        tmp_path / "theirs.npz",
        kinds=np.array([KINDS.index(document_kind(segments)) for segments in written], np.uint8),
        key_offsets=np.cumsum([0, *map(len, keys)]),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        span_offsets=np.cumsum([0, *map(len, bounds)]),
        span_bounds=np.concatenate(bounds).astype(np.int32),
    )
    assert prefix.with_name("ours.spans.npz").read_bytes() == (tmp_path / "theirs.npz").read_bytes()
