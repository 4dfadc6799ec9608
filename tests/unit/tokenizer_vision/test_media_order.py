"""Which samples a batch holds and how they are cut: buckets, shares, epochs, draws."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config import InputError
from megatron_ext.media.index import MediaIndex
from megatron_ext.media.names import Names
from megatron_ext.media.table import MediaTable
from tokenizer_train.vision.buckets import Bucket, assign, give_up_rare, make_buckets
from tokenizer_train.vision.config_media import MediaConfig
from tokenizer_train.vision.order import BatchOrder

RATIOS = [0.5, 2 / 3, 0.75, 1.0, 4 / 3, 1.5, 2.0]


def index_of(*inputs: list[tuple]) -> MediaIndex:
    """An index of inputs whose samples are (height, width) or (height, width, frames, rate)."""
    return MediaIndex([(number, Path(f"input {number}"), table_of(part)) for number, part in enumerate(inputs)])


def table_of(samples: list[tuple]) -> MediaTable:
    rows = [(*sample, *(1, 0.0)[: 4 - len(sample)]) for sample in samples]
    height, width, num_frames, frame_rate = (np.array(column) for column in zip(*rows, strict=True))
    zeros = np.zeros(len(rows), dtype=np.int64)
    return MediaTable(
        names=Names.of([""] * len(rows)), codec=zeros, codecs=("",), faults={}, offset=zeros, size=zeros, stamp=zeros,
        height=height, width=width, num_frames=num_frames, frame_rate=frame_rate.astype(float), is_clip=frame_rate > 0,
    )  # fmt: skip


def order_of(index, *, seed: int = 1, chunk_frames: int = 4, factor: int = 8, **options) -> BatchOrder:
    inputs = [f"input {number}" for number in range(int(index.input_number.max()) + 1)]
    config = MediaConfig(inputs=inputs, **options)
    return BatchOrder(index, config, seed=seed, chunk_frames=chunk_frames, spatial_factor=factor)


def draws(order: BatchOrder, number: int) -> list:
    return [order.draw(slot) for slot in order.slots(number)]


@given(size=st.integers(4, 128).map(lambda n: 8 * n), ratio=st.floats(0.2, 5), factor=st.sampled_from([4, 8, 16]))
def test_a_bucket_has_the_area_and_the_ratio(size, ratio, factor):
    (bucket,) = make_buckets([size], [ratio], factor)
    assert bucket.height % factor == bucket.width % factor == 0
    assert bucket.width * bucket.height <= size * size or factor in (bucket.width, bucket.height)
    # A whole multiple more of the width would be too much.
    assert (bucket.width + factor) * bucket.height > size * size
    if ratio == 1:
        assert bucket.height == bucket.width == size // factor * factor


def test_samples_go_to_the_nearest_ratio_and_the_largest_size_they_fill():
    buckets = make_buckets([64, 128], RATIOS, 8)
    height, width = np.array([300, 300, 100, 20, 1000]), np.array([300, 580, 100, 20, 400])
    chosen = [buckets[number] for number in assign(buckets, height, width)]
    assert chosen[0] == Bucket(128, 128, 128) and chosen[2] == chosen[3] == Bucket(64, 64, 64)
    assert (chosen[1].size, chosen[4].size) == (128, 128)
    assert chosen[1].width / chosen[1].height == pytest.approx(2, rel=0.1)
    assert chosen[4].width / chosen[4].height == pytest.approx(0.5, rel=0.1)


def test_rare_buckets_are_given_up_to_their_neighbours():
    buckets = make_buckets([64], [0.5, 1.0, 2.0], 8)
    tall, square, wide = sorted(range(3), key=lambda number: buckets[number].width)
    chosen = np.array([tall] * 3 + [square] * 20 + [wide] * 20)
    kept = give_up_rare(buckets, chosen, [4, 4, 4])
    assert Counter(kept.tolist()) == {square: 23, wide: 20}
    assert set(give_up_rare(buckets, chosen[:3], [4, 4, 4]).tolist()) == {tall}, "the last one stays"


def test_batches_have_one_shape_and_every_sample_comes_once_an_epoch():
    shapes = [(100, 100)] * 8 + [(100, 200)] * 12 + [(200, 100)] * 4
    order = order_of(index_of(shapes), size=32, aspect_ratios=RATIOS, batch_size=4, seed=3)
    seen: Counter = Counter()
    for number in range(6):  # 6 batches of 4: the 24 samples
        found = draws(order, number)
        assert len({(draw.height, draw.width) for draw in found}) == 1
        seen.update(draw.sample for draw in found)
        expected = [shapes[draw.sample] for draw in found]
        assert len(set(expected)) == 1
    assert seen == Counter(range(24))


def test_the_order_is_a_function_of_the_seed_and_the_number():
    options = dict(size=32, aspect_ratios=RATIOS, batch_size=4, clip_share=0.3, clip_strides=[1, 2])
    index = index_of([(100, 100)] * 9 + [(100, 200)] * 9 + [(90, 120, 30, 25.0)] * 5)
    first, second, other = (order_of(index, seed=seed, **options) for seed in (1, 1, 2))
    there = {number: draws(first, number) for number in range(30)}
    assert {number: draws(second, number) for number in reversed(range(30))} == there
    assert {number: draws(other, number) for number in range(30)} != there


def test_weights_are_the_shares_of_the_inputs_in_each_kind():
    pictures, more = [(64, 64)] * 30, [(64, 64)] * 10
    clips, other_clips = [(64, 64, 16, 8.0)] * 4, [(64, 64, 16, 8.0)] * 20
    index = index_of(pictures + clips, more + other_clips)
    order = order_of(index, size=32, batch_size=8, input_weights=[1, 3], clip_share=0.25)
    batches = [draws(order, number) for number in range(400)]
    is_clip = [bool(batch[0].frames) for batch in batches]
    assert sum(is_clip) == 100 and {len(batch) for batch in batches} == {8, 2}
    for kind in (False, True):
        samples = [draw.sample for batch, clip in zip(batches, is_clip, strict=True) if clip == kind for draw in batch]
        assert np.mean(index.input_number[samples] == 1) == pytest.approx(0.75, abs=0.01)
    unweighted = order_of(index, size=32, batch_size=8)
    samples = [draw.sample for number in range(40) for draw in draws(unweighted, number)]
    assert Counter(samples) == Counter({sample: 8 for sample in range(len(index)) if not index.is_clip[sample]})


def test_larger_pictures_make_smaller_batches():
    order = order_of(index_of([(64, 64)] * 40 + [(128, 128)] * 40), size=32, larger_sizes=[64, 128], batch_size=16)
    assert {(cell.bucket.size, cell.batch) for cell in order.cells} == {(64, 4), (128, 1)}


@given(seed=st.integers(0, 1000), height=st.integers(1, 400), width=st.integers(1, 400), smallest=st.floats(0, 1))
def test_crops_lie_inside_and_have_the_shape(seed, height, width, smallest):
    order = order_of(
        index_of([(height, width)] * 4), seed=seed, size=32, batch_size=4, augmented_share=0.5, smallest_crop=smallest
    )
    whole, *_, random = draws(order, 0)
    side = min(height, width)
    assert whole.box == ((height - side) // 2, (width - side) // 2, side, side) and not whole.is_mirrored
    top, left, box_height, box_width = random.box
    assert 0 <= top <= height - box_height and 0 <= left <= width - box_width
    assert max(1, round(smallest * side)) <= box_height == box_width <= side


def test_random_crops_reach_everywhere():
    order = order_of(index_of([(60, 90)] * 4), size=32, batch_size=4, augmented_share=1.0, smallest_crop=0.5)
    found = [draw for number in range(250) for draw in draws(order, number)]
    assert 0.45 < np.mean([draw.is_mirrored for draw in found]) < 0.55
    sides = [draw.box[2] for draw in found]
    assert min(sides) == 30 and max(sides) == 60 and abs(np.mean(sides) - 45) < 1
    assert min(draw.box[1] for draw in found) == 0
    assert max(draw.box[1] + draw.box[3] for draw in found) == 90
    assert not any(
        draw.is_mirrored for draw in draws(order_of(index_of([(60, 90)] * 4), mirrored_share=0.0, size=32), 0)
    )


def test_whole_clips_walk_through_their_pieces():
    order = order_of(index_of([(64, 64, 48, 25.0)]), size=32, batch_size=4, augmented_share=0, clip_share=1,
                     clip_frame_rate=4, clip_max_frames=8)  # fmt: skip
    first, second, again = (draws(order, number)[0].frames for number in range(3))
    # 4 a second of 25 a second: the frames on show at 0, 0.25, 0.5 ... seconds.
    assert first == (0, 6, 12, 18) and second == (25, 31, 37, 43) and again == first


def test_random_clips_start_anywhere_and_take_the_strides_that_fit():
    index = index_of([(64, 64, 20, 10.0), (64, 64, 8, 10.0)])
    order = order_of(index, size=32, batch_size=8, augmented_share=1.0, clip_share=1, clip_strides=[1, 2, 4])
    seen: dict[int, set] = {0: set(), 1: set()}
    for number in range(200):
        for draw in draws(order, number):
            steps = np.diff(draw.frames)
            assert len(draw.frames) == 4 and len(set(steps)) == 1 and draw.frames[-1] < index.num_frames[draw.sample]
            seen[draw.sample].add((int(steps[0]), draw.frames[0]))
    assert {stride for stride, _ in seen[0]} == {1, 2, 4} and {stride for stride, _ in seen[1]} == {1, 2}
    assert {start for stride, start in seen[0] if stride == 4} == set(range(8))


def test_short_clips_are_faults_and_missing_kinds_are_refused():
    index = index_of([(64, 64, 3, 10.0), (64, 64, 9, 10.0), (64, 64)])
    order = order_of(index, size=32, clip_share=0.5)
    assert order.faults == {0: "3 frames at 10 a second: at least 4 are needed"}
    assert [order.clips.tolist(), order.pictures.tolist()] == [[1], [2]]
    with pytest.raises(InputError, match=r"none of 2 clips can be used \(3 frames at 10 .*at least 16"):
        order_of(index, size=32, clip_share=0.5, clip_frames=16)
    with pytest.raises(InputError, match="hold no clip; set it to 0"):
        order_of(index_of([(64, 64)]), clip_share=0.5)
    with pytest.raises(InputError, match="hold no picture; set it to 1"):
        order_of(index_of([(64, 64, 9, 10.0)]), clip_share=0.5)
    with pytest.raises(InputError, match="input_weights .* give weight to an input with clips"):
        order_of(index_of([(64, 64)], [(64, 64, 9, 10.0)]), size=32, clip_share=0.5, input_weights=[1.0, 0.0])


@pytest.mark.parametrize(
    ("field", "value"),
    [("input_weights", [1.0, 2.0]), ("input_weights", [0.0]), ("input_weights", [float("nan")]),
     ("larger_sizes", [256]), ("aspect_ratios", []), ("clip_strides", [0]),
     ("workers", 0), ("mirrored_share", 1.5), ("clip_frames", -1), ("cache_megabytes", -1)],
)  # fmt: skip
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(InputError, match=f"media.{field}"):
        MediaConfig(inputs=["a"], **{field: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [({"size": 36}, "media.size = 36"), ({"size": 32, "larger_sizes": [44]}, "media.larger_sizes = 44"),
     ({"clip_frames": 6}, "media.clip_frames = 6"), ({"clip_share": 0.5, "batch_size": 3}, "media.batch_size = 3"),
     ({"clip_share": 0.5, "clip_frames": 16}, "hold the 16 frames")],
)  # fmt: skip
def test_what_the_tokenizer_cannot_take_is_refused(options, words):
    MediaConfig(inputs=["a"]).check_factors(8, 4)
    with pytest.raises(InputError, match=words):
        MediaConfig(inputs=["a"], **options).check_factors(8, 4)
