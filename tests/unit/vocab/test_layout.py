"""Ids of the published vocabularies (Emu3's table of special tokens) and the arithmetic on them."""

import numpy as np
import pytest

from megatron_ext.config import InputError
from megatron_ext.vocab import VocabLayout

EMU3_IDS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|extra_0|>": 151646,
    "<|extra_100|>": 151746,
    "<|extra_200|>": 151846,
    "<|extra_201|>": 151847,
    "<|extra_202|>": 151848,
    "<|extra_203|>": 151849,
    "<|extra_204|>": 151850,
    "<|image token|>": 151851,
    "<|image start|>": 151852,
    "<|image end|>": 151853,
}
ROLES = ("pad", "bos", "eos", "sov", "sot", "eov", "eol", "eof", "image_placeholder", "visual_start")


@pytest.mark.parametrize("layout, size", [(VocabLayout.emu3(), 184_622), (VocabLayout.emu3_5(), 282_926)])
def test_published_ids(layout: VocabLayout, size: int) -> None:
    assert layout.size == size
    assert len(layout.special_tokens) == 211
    assert EMU3_IDS.items() <= dict(layout.special_tokens).items()
    assert [getattr(layout, role) for role in ROLES] == [
        151643, 151849, 151850, 151852, 151851, 151853, 151846, 151847, 151646, 151854,
    ]  # fmt: skip


def test_published_strings() -> None:
    layout = VocabLayout.emu3()
    assert layout.token_string(151854) == "<|visual token 000000|>"
    assert layout.token_string(184621) == "<|visual token 032767|>"
    assert VocabLayout.emu3_5().token_string(282925) == "<|visual token 131071|>"
    assert {string: layout.token_string(token_id) for string, token_id in layout.special_tokens} == {
        string: string for string, _ in layout.special_tokens
    }


def test_custom_layout() -> None:
    layout = VocabLayout.custom(text_size=1000, codebook_size=512)
    strings = [string for string, _ in layout.special_tokens]
    assert strings == [
        "<|endoftext|>", "<|extra_0|>", *(f"<|extra_{n}|>" for n in range(200, 205)),
        "<|image token|>", "<|image start|>", "<|image end|>",
    ]  # fmt: skip
    assert [token_id for _, token_id in layout.special_tokens] == list(range(1000, 1010))
    assert (layout.visual_start, layout.size) == (1010, 1522)
    assert layout.token_string(layout.bos) == "<|extra_203|>"


def test_codes_and_ids_are_inverse() -> None:
    layout = VocabLayout.custom(text_size=7, codebook_size=70_000)
    codes = np.arange(70_000, dtype=np.uint32).reshape(100, 700)
    ids = layout.code_to_id(codes)
    assert ids.dtype == np.int32 and ids.min() == layout.visual_start and ids.max() == layout.size - 1
    assert layout.is_visual(ids).all() and not layout.is_visual(np.arange(layout.visual_start)).any()
    assert np.array_equal(layout.id_to_code(ids), codes)


@pytest.mark.parametrize("codes", [[-1], [32768], [0.0]])
def test_codes_out_of_range(codes: list) -> None:
    with pytest.raises(InputError, match="codebook|integers"):
        VocabLayout.emu3().code_to_id(np.array(codes))


@pytest.mark.parametrize("token_id", [151853, 184622])
def test_ids_out_of_range(token_id: int) -> None:
    with pytest.raises(InputError, match="151854..184621"):
        VocabLayout.emu3().id_to_code(np.array([token_id]))


@pytest.mark.parametrize("token_id", [0, 184622, -1])
def test_no_string_for_other_ids(token_id: int) -> None:
    with pytest.raises(InputError, match=str(token_id)):
        VocabLayout.emu3().token_string(token_id)


def test_sizes_must_be_positive() -> None:
    with pytest.raises(InputError, match="codebook_size 0"):
        VocabLayout.custom(text_size=3, codebook_size=0)
