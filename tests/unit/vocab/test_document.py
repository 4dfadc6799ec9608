"""The document format: golden ids, the bijection, unbreakable spans, errors that name position and reason."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config import InputError
from megatron_ext.vocab import (
    DocumentError,
    Grid,
    Image,
    Text,
    Video,
    Vocabulary,
    decode_document,
    encode_block_start,
    encode_document,
    spans,
)
from tests.unit.vocab.strategies import documents

BOS, EOS, IMG, BOI, EOI, EOL, EOF = 151849, 151850, 151851, 151852, 151853, 151846, 151847
V = 151854
CODES_2x3 = np.array([[0, 1, 2], [3, 4, 32767]])


def test_emu3_picture(emu3: Vocabulary) -> None:
    """baaivision/Emu3 @ f6ea9aa, emu3/mllm/processing_emu3.py:166-174,241-252: every row ends in EOL."""
    caption = emu3.text.encode("a cat")
    ids = encode_document([Text(caption), Image(CODES_2x3)], emu3)
    meta = [17, 9, 18]
    rows = [V, V + 1, V + 2, EOL, V + 3, V + 4, V + 32767, EOL]
    assert ids.dtype == np.int32
    assert ids.tolist() == [BOS, *caption, BOI, *meta, IMG, *rows, EOF, EOI, EOS]


@pytest.mark.parametrize("side, ids_after_img", [(64, 4162), (90, 8192)])
def test_emu3_picture_lengths(emu3: Vocabulary, side: int, ids_after_img: int) -> None:
    ids = encode_document([Image(np.zeros((side, side), dtype=int))], emu3)
    assert len(ids) - 1 - ids.tolist().index(IMG) == ids_after_img + 1  # and EOS


def test_emu3_5_picture(emu3_5: Vocabulary) -> None:
    """baaivision/Emu3.5 @ 8fcf1da, src/utils/input_utils.py:21-40: rows joined by EOL, no EOF."""
    ids = encode_document([Image(CODES_2x3)], emu3_5)
    rows = [V, V + 1, V + 2, EOL, V + 3, V + 4, V + 32767]
    assert ids.tolist() == [BOS, BOI, 17, 9, 18, IMG, *rows, EOI, EOS]


def test_clip(custom: Vocabulary) -> None:
    layout = custom.layout
    ids = encode_document([Video(np.arange(4).reshape(2, 1, 2), 23976, 5005)], custom)
    meta = [custom.meta_ids[character] for character in "2*1*2*23976*5005"]
    v, frame_end = layout.visual_start, [layout.eol, layout.eof]
    body = [v, v + 1, *frame_end, v + 2, v + 3, *frame_end, layout.eov]
    assert ids.tolist() == [layout.bos, layout.sov, *meta, layout.sot, *body, layout.eos]


def test_one_frame_clip_is_no_picture(custom: Vocabulary) -> None:
    codes = np.ones((1, 2, 2), dtype=int)
    clip, picture = Video(codes, 1000, 1), Image(codes[0])
    for segment in (clip, picture):
        assert decode_document(encode_document([segment], custom), custom) == (segment,)


def test_block_start_is_the_prompt_of_a_picture(custom: Vocabulary) -> None:
    ids = encode_document([Image(np.zeros((10, 7), dtype=int))], custom)
    start = encode_block_start(Grid(1, 10, 7), custom)
    assert ids[1 : 1 + len(start)].tolist() == start.tolist()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_segments_and_ids_are_in_bijection(vocabulary: Vocabulary, data: st.DataObject) -> None:
    document = data.draw(documents(vocabulary))
    ids = encode_document(document, vocabulary)
    assert decode_document(ids, vocabulary) == document
    assert np.array_equal(encode_document(decode_document(ids, vocabulary), vocabulary), ids)


def _spans_by_definition(document: tuple, vocabulary: Vocabulary) -> list[list[int]]:
    """Encode piece by piece and count."""
    layout, position, found = vocabulary.layout, 1, []
    for segment in document:
        ids = encode_document([segment], vocabulary)[1:-1].tolist()
        if isinstance(segment, Image):
            found.append([position, position + len(ids)])
        elif isinstance(segment, Video):
            ends = [index + 1 for index, token_id in enumerate(ids) if token_id == layout.eof]
            bounds = [0, *ends[:-1], len(ids)]
            found += [[position + a, position + b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        position += len(ids)
    return found


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_spans(vocabulary: Vocabulary, data: st.DataObject) -> None:
    document = data.draw(documents(vocabulary))
    found = spans(encode_document(document, vocabulary), vocabulary)
    assert found.shape[1] == 2
    assert found.tolist() == _spans_by_definition(document, vocabulary)


@pytest.mark.parametrize(
    "segments, message",
    [
        ([], "at least one segment"),
        ([Text([5]), Text([6])], "segments 0 and 1 are both Text"),
        ([Text([5, 10**6])], "segment 0 is Text but holds id 1000000"),
        ([Text([0])], "stands for no text"),
        ([Image([[50]])], "codebook has 50"),
        ([Video([[[1]]], 0, 1)], "outside 1..999999999"),
        ([Video([[[1]]], 1, 10**9)], "outside 1..999999999"),
    ],
)
def test_encode_refuses(custom: Vocabulary, segments: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_document(segments, custom)


def test_special_ids_are_no_text(custom: Vocabulary) -> None:
    with pytest.raises(InputError, match="SOV <.image start.>"):
        encode_document([Text([custom.layout.sov])], custom)


def test_emu3_5_has_no_clips(emu3_5: Vocabulary) -> None:
    with pytest.raises(InputError, match="emu3_5 has no video"):
        encode_document([Video([[[1]]], 1, 1)], emu3_5)


@pytest.mark.parametrize("make", [lambda: Text([]), lambda: Text([0.5]), lambda: Image([1]), lambda: Image([[]])])
def test_segments_check_their_arrays(make) -> None:
    with pytest.raises(InputError, match="non-empty integer array"):
        make()


def _meta(vocabulary: Vocabulary, meta: str) -> list[int]:
    layout = vocabulary.layout
    return [layout.bos, layout.sov, *(vocabulary.meta_ids[character] for character in meta), layout.sot]


@pytest.mark.parametrize(
    "meta, position",
    [
        ("01*2", 2),
        ("0*2", 2),
        ("2*03", 4),
        ("*2", 2),
        ("2", 3),
        ("2*", 4),
        ("2**2", 4),
        ("2*2*2", 7),
        ("2*2*2*2", 9),
        ("2*2*2*2*2*2", 11),
        ("1234567890*2", 11),
        ("", 2),
    ],
)
def test_metas_have_one_spelling(custom: Vocabulary, meta: str, position: int) -> None:
    with pytest.raises(DocumentError, match=f"position {position}: expected one of .* after meta") as caught:
        decode_document(np.array(_meta(custom, meta)), custom)
    assert caught.value.position == position


def test_huge_grids_cost_nothing(custom: Vocabulary) -> None:
    ids = _meta(custom, "*".join(["999999999"] * 5)) + [custom.layout.visual_start] * 10
    with pytest.raises(DocumentError, match="there are 10") as caught:
        decode_document(np.array(ids), custom)
    assert caught.value.position == len(ids)


def test_errors_name_position_and_reason(custom: Vocabulary) -> None:
    layout = custom.layout
    ids = encode_document([Image(np.zeros((2, 2), dtype=int))], custom)
    first = ids.tolist().index(layout.eol)

    def error(changed: np.ndarray) -> DocumentError:
        with pytest.raises(DocumentError) as caught:
            decode_document(changed, custom)
        return caught.value

    wrong = ids.copy()
    wrong[first] = layout.visual_start
    assert error(wrong).position == first
    assert str(pickle.loads(pickle.dumps(error(wrong)))) == str(error(wrong))
    assert error(wrong).reason == ("expected EOL <|extra_200|> at offset 2 of block 2*2, found <|visual token 000000|>")
    assert (error(ids[:-1]).position, error(ids[:-1]).reason) == (len(ids) - 1, "the ids end before EOS")
    assert error(np.append(ids, layout.pad)).reason.startswith("expected nothing after EOS, found PAD")
    assert error(ids[1:]).reason.startswith("expected BOS <|extra_203|>, found SOV")
    assert error(ids[:0]).position == 0
    assert error(np.array([layout.bos, layout.eos])).reason.startswith("expected text or SOV, found EOS")


@pytest.mark.parametrize("ids", [np.zeros((2, 2), dtype=int), np.zeros(3)])
def test_only_integer_vectors_are_documents(custom: Vocabulary, ids: np.ndarray) -> None:
    with pytest.raises(InputError, match="1-dimensional integer array"):
        decode_document(ids, custom)
