"""Windows: every id once, labels inside pieces only, one cached index per shape."""

import multiprocessing
from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.config import InputError
from megatron_ext.data import PackedDataset, PackingRules
from megatron_ext.vocab import SentencePieceTokenizer, Text, VocabLayout, Vocabulary
from tests.unit.data.samples import picture, random_dataset, text_of, write_dataset

S = 64
RULES = PackingRules(seq_length=S)


@pytest.mark.parametrize("alignment", [1, 8])
def test_every_id_once_and_labels_inside_pieces(tmp_path, vocabulary, alignment):
    rules = PackingRules(seq_length=S, alignment=alignment)
    dataset = PackedDataset(random_dataset(tmp_path / "set", vocabulary), vocabulary, rules)
    rebuilt = [np.full(length, -1) for length in dataset.documents.lengths]
    for w in range(len(dataset)):
        window = dataset[w]
        assert window.ids.shape == window.labels.shape == window.mask.shape == (S,)
        assert window.boundaries[0] == 0 and window.boundaries[-1] == S and (np.diff(window.boundaries) > 0).all()
        assert not (window.boundaries % alignment).any()
        masked_out = np.ones(S, dtype=bool)
        pieces = range(dataset.index.window_offsets[w], dataset.index.window_offsets[w + 1])
        for begin, piece in zip(window.boundaries, pieces, strict=False):
            document, start, length = (
                int(getattr(dataset.index, f"piece_{name}")[piece]) for name in ("document", "start", "length")
            )
            ids = window.ids[begin : begin + length]
            rebuilt[document][start : start + length] = ids
            np.testing.assert_array_equal(window.labels[begin : begin + length - 1], ids[1:])
            assert window.mask[begin : begin + length - 1].all(), "every id but the piece's last has a label"
            masked_out[begin : begin + length - 1] = False
        assert not window.mask[masked_out].any(), "last ids, cuts and padding have none"
        assert len(dataset.keys(w)) == len(pieces)
    for document, ids in enumerate(rebuilt):
        np.testing.assert_array_equal(ids, dataset.documents.ids(document))
    positions = sum(int(dataset[w].mask.sum()) for w in range(len(dataset)))
    assert positions == dataset.index.piece_length.sum() - len(dataset.index.piece_length)


def test_padding_is_masked_by_position_not_by_id(tmp_path, text_model):
    """A vocabulary whose padding id is a text id: inside a document it is a label like any other."""

    class PadIsText(VocabLayout):
        pad = property(lambda self: self.text_size - 1)

    text = SentencePieceTokenizer(text_model)
    custom = VocabLayout.custom(text_size=text.size, codebook_size=50)
    layout = PadIsText(**{name: getattr(custom, name) for name in custom.__dataclass_fields__})
    vocabulary = Vocabulary(layout, text)
    prefix = write_dataset(tmp_path / "set", vocabulary, [[Text(np.full(10, layout.pad))]])
    window = PackedDataset(prefix, vocabulary, PackingRules(seq_length=16))[0]
    assert (window.ids[1:11] == layout.pad).all() and (window.ids[12:] == layout.pad).all()
    assert window.mask.tolist() == [True] * 11 + [False] * 5


def test_what_cannot_fit_is_named(tmp_path, vocabulary):
    rng = np.random.default_rng(0)
    documents = [[picture(rng)], [text_of(vocabulary, 20, rng), picture(rng, 8, 8)], [text_of(vocabulary, 200, rng)]]
    prefix = write_dataset(tmp_path / "set", vocabulary, documents)
    assert PackedDataset(prefix, vocabulary, RULES).skipped_keys == ("key/1",)
    assert PackedDataset(prefix, vocabulary, PackingRules(seq_length=128)).skipped_keys == ()
    with pytest.raises(InputError, match="no document of .* fits into train.seq_length 4"):
        PackedDataset(
            write_dataset(tmp_path / "big", vocabulary, [[picture(rng)]]), vocabulary, PackingRules(seq_length=4)
        )


def test_an_id_outside_the_vocabulary_is_named(tmp_path, vocabulary):
    rng = np.random.default_rng(0)
    prefix = write_dataset(tmp_path / "set", vocabulary, [[text_of(vocabulary, 20, rng)] for _ in range(3)])
    ids = np.memmap(f"{prefix}.bin", dtype=np.int32, mode="r+")
    for foreign in (vocabulary.layout.size, -1):
        ids[30] = foreign  # documents of 22 ids: the second one
        ids.flush()
        dataset = PackedDataset(prefix, vocabulary, PackingRules(seq_length=22))
        fine = 0
        for window in range(3):
            if dataset.keys(window) == ("key/1",):
                with pytest.raises(InputError, match=rf"set.bin holds id {foreign} in document 1 \(key/1\)"):
                    dataset[window]
            else:
                fine += len(dataset[window].ids)
        assert fine == 44


def test_the_index_is_cached_by_all_that_shaped_it(tmp_path, vocabulary):
    prefix = random_dataset(tmp_path / "set", vocabulary)

    def folders() -> int:
        return len(list((tmp_path / "cache").glob("packing-*")))

    def open_dataset(**rules) -> PackedDataset:
        return PackedDataset(prefix, vocabulary, replace(RULES, **rules), str(tmp_path / "cache"))

    first = open_dataset()
    assert folders() == 1
    stamp = [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").rglob("*"))]
    again = open_dataset()
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").rglob("*"))] == stamp
    assert again.identity == first.identity
    for name, array in first.index.arrays().items():
        np.testing.assert_array_equal(again.index.arrays()[name], array)
    others = [{"seq_length": 2 * S}, {"alignment": 8}, {"shortest_cut": 4}, {"seed": 1}, {"buffer_documents": 9}]
    assert len({open_dataset(**other).identity for other in others} | {first.identity}) == 6
    assert folders() == 6
    random_dataset(tmp_path / "set", vocabulary, seed=1)
    open_dataset()
    assert folders() == 7


def _open_and_digest(prefix, vocabulary, barrier, results):
    barrier.wait()
    dataset = PackedDataset(prefix, vocabulary, RULES)
    results.put(int(dataset[0].ids.sum()))


def test_ranks_may_start_at_once(tmp_path, vocabulary):
    """Also with the sidecar absent: both files are seen whole by all."""
    prefix = random_dataset(tmp_path / "set", vocabulary, count=500)
    (tmp_path / "set.spans.npz").unlink()
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(4), fork.Queue()
    ranks = [fork.Process(target=_open_and_digest, args=(prefix, vocabulary, barrier, results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    sums = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert len(set(sums)) == 1 and all(rank.exitcode == 0 for rank in ranks)
    assert len(list((tmp_path / "packing_cache").glob("packing-*"))) == 1


def test_fill_is_the_share_of_positions_with_ids(tmp_path, vocabulary):
    rng = np.random.default_rng(0)
    prefix = write_dataset(tmp_path / "set", vocabulary, [[picture(rng)], [picture(rng, 8, 8)], [picture(rng)]])
    dataset = PackedDataset(prefix, vocabulary, RULES)
    assert dataset.skipped_keys == ("key/1",)
    assert dataset.fill == dataset.index.fill(S) == dataset.index.piece_length.sum() / (len(dataset) * S)


def test_an_unwritable_cache_is_named(tmp_path, vocabulary):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="set data.cache_dir"):
        PackedDataset(random_dataset(tmp_path / "set", vocabulary), vocabulary, RULES, str(tmp_path / "file"))
