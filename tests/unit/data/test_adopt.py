"""Shards that megatron-core's own builder wrote become datasets, or are refused by what is wrong with them."""

import json
import os
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ext.config import InputError
from megatron_ext.data import DocumentDataset, adopt
from megatron_ext.vocab import Text, encode_document
from tests.unit.data.samples import CODEBOOK_SIZE, VISION_TOKENIZER, random_document, write_dataset
from tools import adopt_dataset, merge_datasets


@pytest.fixture(scope="module")
def documents(vocabulary) -> list:
    rng = np.random.default_rng(3)
    return [random_document(vocabulary, rng) for _ in range(40)]


def write_foreign(prefix: Path, arrays: list, dtype: type = np.int32, sequences: int = 1) -> Path:
    """As others write them: with megatron-core's builder."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in arrays:
        parts = np.array_split(np.asarray(ids), sequences)
        builder.add_document(np.concatenate(parts), [len(part) for part in parts])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def foreign(tmp_path, documents, vocabulary, text_model) -> Path:
    (tmp_path / "text.model").write_bytes(text_model)
    return write_foreign(tmp_path / "theirs", [encode_document(each, vocabulary) for each in documents])


def arguments(*prefixes: Path, **options) -> list[str]:
    given = {
        "prefix": json.dumps(list(map(str, prefixes))),
        "vocab.layout": "custom",
        "vocab.text_tokenizer": prefixes[0].parent / "text.model",
        "vocab.codebook_size": CODEBOOK_SIZE,
        "vision_tokenizer": VISION_TOKENIZER,
        **options,
    }
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def refusal(*given: Path, **options) -> str:
    with pytest.raises(InputError) as refused:
        adopt_dataset.main(arguments(*given, **options))
    return str(refused.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_foreign_shard_is_what_ours_would_be(tmp_path, foreign, documents, vocabulary, workers, monkeypatch, capsys):
    monkeypatch.setattr(adopt, "PIECE_IDS", 300)
    before = {path: path.read_bytes() for path in tmp_path.glob("theirs.*")}
    adopt_dataset.main(arguments(foreign, workers=workers))
    assert {path: path.read_bytes() for path in before} == before
    assert f"{foreign}: 40 documents" in capsys.readouterr().out
    ours = DocumentDataset(write_dataset(tmp_path / "ours", vocabulary, documents), vocabulary)
    theirs = DocumentDataset.open(foreign)
    assert all(theirs.check_files().values()) and theirs.sidecar.key(7) == "theirs#7"
    for name in ("documents", "ids", "visual_ids", "longest", "vocabulary", "vision_tokenizer", "sidecar"):
        assert getattr(theirs.manifest, name) == getattr(ours.manifest, name)
    assert theirs.manifest.files[".bin"] == ours.manifest.files[".bin"]
    names = {path.name for path in tmp_path.iterdir() if path.name.startswith("theirs")}
    assert names == {f"theirs{each}" for each in (".bin", ".idx", ".spans.npz", ".vocabulary", ".manifest.json")}


def test_an_adopted_shard_is_not_read_again(foreign, monkeypatch, capsys):
    adopt_dataset.main(arguments(foreign))
    monkeypatch.setattr(adopt, "decode_document", None)  # whoever reads a document again fails
    adopt_dataset.main(arguments(foreign))
    assert "theirs is a dataset already: reused" in capsys.readouterr().out
    assert "says vision_tokenizer 0123456789abcdef, given is ffff" in refusal(foreign, vision_tokenizer="f" * 16)
    assert "theirs.manifest.json says vocabulary sha256:" in refusal(foreign, **{"vocab.codebook_size": 49})


def test_killed_it_goes_on_with_the_next_piece(tmp_path, foreign, monkeypatch):
    """Killed after its third piece, or between its renames: no dataset, and no piece is read twice."""
    monkeypatch.setattr(adopt, "PIECE_IDS", 300)
    whole = len(list(adopt.runs(adopt.foreign_lengths(tmp_path / "theirs.idx"), 300)))
    decode, written = adopt.decode_document, adopt.write_sidecar

    def killed(patch) -> None:
        child = os.fork()
        if not child:
            patch()
            adopt_dataset.main(arguments(foreign))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not (tmp_path / "theirs.manifest.json").exists()

    def fourth_piece() -> None:
        done = []
        adopt.write_sidecar = lambda *given: (
            os.kill(os.getpid(), signal.SIGKILL) if len(done) == 3 else done.append(written(*given))
        )

    def manifest() -> None:
        replace = os.replace
        os.replace = lambda one, other: (
            os.kill(os.getpid(), signal.SIGKILL) if str(other).endswith(".manifest.json") else replace(one, other)
        )

    killed(fourth_piece)
    parts = sorted((tmp_path / "theirs.adopting").glob("[0-9]*.npz"))
    assert len(parts) == 3 < whole
    killed(manifest)
    seen = []
    monkeypatch.setattr(adopt, "decode_document", lambda *given: seen.append(1) or decode(*given))
    adopt_dataset.main(arguments(foreign))
    assert not seen and all(DocumentDataset.open(foreign).check_files().values())
    assert not (tmp_path / "theirs.adopting").exists() and not list(tmp_path.glob("*.partial"))


def test_pieces_of_another_file_or_vocabulary_are_not_taken(foreign, documents, vocabulary, monkeypatch):
    monkeypatch.setattr(adopt, "PIECE_IDS", 300)
    refusal(foreign, vision_tokenizer=None)  # all pieces are done by then
    shard = adopt.Adoption.of(foreign, vocabulary, VISION_TOKENIZER)
    parts = foreign.with_name("theirs.adopting")
    kept = len(list(parts.iterdir()))
    assert kept > 3 and len(list(shard._begin(shard._facts()).iterdir())) == kept
    write_foreign(foreign, [encode_document(each, vocabulary) for each in documents[::-1]])
    shard = adopt.Adoption.of(foreign, vocabulary, VISION_TOKENIZER)
    assert [path.name for path in shard._begin(shard._facts()).iterdir()] == ["of.json"]


def test_documents_that_are_none_are_named(tmp_path, foreign, documents, vocabulary, capsys):
    arrays = [encode_document(each, vocabulary) for each in documents]
    layout = vocabulary.layout
    picture = next(number for number, ids in enumerate(arrays) if layout.eol in ids)
    bad = {
        2: (arrays[2][1:], "at position 0: expected"),  # without BOS, as Megatron's own preprocess_data.py writes
        5: (np.append(arrays[5], layout.pad), f"at position {len(arrays[5])}: expected nothing after EOS"),
        9: (arrays[9][:-1], f"at position {len(arrays[9]) - 1}: the ids end before EOS"),
        11: (np.array([layout.bos, layout.size + 5, layout.eos]), "at position 1: expected text"),
        13: (np.array([], np.int32), "at position 0: there are no ids"),
        picture: (arrays[picture][arrays[picture] != layout.eol], ": expected"),
    }
    for number, (ids, _) in bad.items():
        arrays[number] = ids
    write_foreign(foreign, arrays)
    message = refusal(foreign)
    assert "theirs: 6 of 40 documents are none of vocabulary custom (document " in message
    lines = capsys.readouterr().out.splitlines()
    for number, (_, reason) in bad.items():
        assert any(f"document {number} (theirs#{number}) at position" in line and reason in line for line in lines)
    assert not (tmp_path / "theirs.manifest.json").exists()
    write_foreign(foreign, [np.array([], np.int32)])
    assert "1 of 1 documents are none" in refusal(foreign)


def test_shards_in_another_form_are_refused_with_the_remedy(tmp_path, foreign, documents, vocabulary):
    arrays = [encode_document(each, vocabulary) for each in documents]
    index = (tmp_path / "theirs.idx").read_bytes()

    def with_index(content: bytes) -> Path:
        (tmp_path / "theirs.idx").write_bytes(content)
        return foreign

    assert "theirs.idx is of int64 ids: write int32" in refusal(write_foreign(foreign, arrays, np.int64))
    assert "theirs.idx has 80 sequences in 40 documents: write each" in refusal(
        write_foreign(foreign, arrays, sequences=2)
    )
    write_foreign(foreign, arrays)
    assert "40 documents need" in refusal(with_index(index + b"\0" * 40))
    assert "does not begin as Megatron's" in refusal(with_index(b"x" * 60))
    assert "cannot read" in refusal(with_index(b"x"))
    offset = 34 + 40 * 4
    shifted = index[:offset] + struct.pack("<q", 4) + index[offset + 8 :]
    assert "do not follow one another" in refusal(with_index(shifted))
    with_index(index)
    with (tmp_path / "theirs.bin").open("ab") as file:
        file.write(b"1234")
    assert "theirs.bin has" in refusal(foreign) and "theirs.idx says" in refusal(foreign)
    (tmp_path / "theirs.bin").unlink()
    assert "theirs.bin is missing" in refusal(foreign)
    assert "none.idx is missing: give the path" in refusal(foreign, prefix=json.dumps([str(tmp_path / "none")]))
    assert "has no document" in refusal(write_foreign(foreign, []))


def test_visual_ids_want_their_tokenizer_and_texts_none(tmp_path, foreign, vocabulary):
    assert "visual ids: give the folder or the identity" in refusal(foreign, vision_tokenizer=None)
    assert "vision_tokenizer is 'nobody': give its folder, or" in refusal(foreign, vision_tokenizer="nobody")
    low, _ = vocabulary.text_ranges[-1]
    text = write_foreign(tmp_path / "text", [encode_document([Text(np.array([low, low + 1]))], vocabulary)])
    adopt_dataset.main(arguments(text))
    assert DocumentDataset.open(text).manifest.vision_tokenizer is None


def test_a_shard_that_changes_meanwhile_is_refused(tmp_path, foreign, monkeypatch):
    hashed = adopt.Adoption._hash

    def changed(shard):
        os.utime(tmp_path / "theirs.bin", ns=(1, 1))
        return hashed(shard)

    monkeypatch.setattr(adopt.Adoption, "_hash", changed)
    assert "changed while it was read: start again" in refusal(foreign)
    assert not (tmp_path / "theirs.manifest.json").exists()


def test_an_adopted_shard_joins_ours(tmp_path, foreign, documents, vocabulary):
    adopt_dataset.main(arguments(foreign))
    ours = write_dataset(tmp_path / "ours", vocabulary, documents)
    given = ["--inputs", json.dumps([str(ours), str(foreign)]), "--output_prefix", str(tmp_path / "both")]
    merge_datasets.main(given)
    assert len(DocumentDataset.open(tmp_path / "both")) == 80
