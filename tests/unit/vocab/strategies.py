"""Random documents of any vocabulary, for the property tests."""

import numpy as np
from hypothesis import strategies as st

from megatron_ext.vocab import Image, Segment, Text, Video, Vocabulary


def _codes(vocabulary: Vocabulary, *shape: int) -> st.SearchStrategy[np.ndarray]:
    codebook_size = vocabulary.layout.codebook_size
    return st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).integers(0, codebook_size, shape))


def texts(vocabulary: Vocabulary) -> st.SearchStrategy[Text]:
    strings = st.sampled_from(["a cat", "12*12", "<|image start|>3*3<|image token|>", "猫", "\n"]) | st.text(min_size=1)
    strings = strings.map(vocabulary.text.encode).filter(bool)
    return strings.map(Text)


def pictures(vocabulary: Vocabulary) -> st.SearchStrategy[Image]:
    side = st.integers(1, 12)
    return st.tuples(side, side).flatmap(lambda shape: _codes(vocabulary, *shape)).map(Image)


def clips(vocabulary: Vocabulary) -> st.SearchStrategy[Video]:
    side, number = st.integers(1, 4), st.integers(1, 999_999_999)
    codes = st.tuples(side, side, side).flatmap(lambda shape: _codes(vocabulary, *shape))
    return st.builds(Video, codes, number, number)


@st.composite
def documents(draw: st.DrawFn, vocabulary: Vocabulary) -> tuple[Segment, ...]:
    kinds = [texts(vocabulary), pictures(vocabulary)]
    if vocabulary.block.frame_ends:
        kinds.append(clips(vocabulary))
    segments = draw(st.lists(st.one_of(kinds), min_size=1, max_size=5))
    return tuple(
        segment
        for index, segment in enumerate(segments)
        if not (index and isinstance(segment, Text) and isinstance(segments[index - 1], Text))
    )


@st.composite
def mutations(draw: st.DrawFn, ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """`ids` with one to three ids changed, removed, doubled, swapped or inserted, mostly structural ones."""
    layout = vocabulary.layout
    roles = (layout.bos, layout.eos, layout.sov, layout.sot, layout.eov, layout.eol, layout.eof, layout.pad)
    foreign = st.sampled_from([*roles, *vocabulary.meta_ids.values(), -1, 0, layout.visual_start, layout.size])
    mutated = ids.tolist()
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, max(len(mutated) - 1, 0)))
        match draw(st.sampled_from(["change", "remove", "double", "swap", "insert", "cut"])):
            case "change":
                mutated[position : position + 1] = [draw(foreign)]
            case "remove":
                del mutated[position : position + 1]
            case "double":
                mutated[position:position] = mutated[position : position + 1]
            case "swap":
                mutated[position : position + 2] = mutated[position : position + 2][::-1]
            case "insert":
                mutated.insert(position, draw(foreign))
            case "cut":
                del mutated[position:]
    return np.array(mutated, dtype=np.int64)
