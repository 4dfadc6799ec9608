"""Going back to a checkpoint leaves out every bad batch that was found since, not the last one alone."""

from megatron_ext.data.progress import BlendProgress
from megatron_ext.train.state import TrainState

BATCH, SEQ_LENGTH = 2, 8


def train(bad: set[int], saved: TrainState, last_sample: int) -> tuple[TrainState, list[int]]:
    """Steps of BATCH samples as the loop takes them, going back to `saved` at every batch that begins with one of
    `bad`; the state reached, and the bad samples met."""
    state, met = saved, []
    while state.consumed_samples < last_sample:
        state = state.past_the_passed_over()
        begin = state.consumed_samples
        if begin in bad:
            met.append(begin)
            assert len(met) < 10, f"met again and again: {met}"
            state = state.rewind(saved, begin, begin + BATCH)
        else:
            state = state.advance(BATCH, SEQ_LENGTH, BlendProgress(seed=0, first_sample=0, datasets=()))
    return state, met


def test_each_bad_batch_between_two_checkpoints_is_met_once():
    saved = TrainState(step=5, consumed_samples=12, passed_over=((2, 4),))
    state, met = train({14, 18, 20}, saved, last_sample=24)
    assert met == [14, 18, 20]
    assert state.passed_over == ((2, 4), (14, 16), (18, 20), (20, 22))
    # 12 samples after the checkpoint, three batches of two of them left out.
    assert (state.step, state.consumed_samples) == (8, 24)


def test_what_ends_before_the_checkpoint_is_not_taken_along():
    """Of a longer branch that was given up: the checkpoint knows what lies before it."""
    state = TrainState(step=9, consumed_samples=20, passed_over=((4, 6), (10, 14)))
    saved = TrainState(step=6, consumed_samples=12)
    assert state.rewind(saved, 8, 16).passed_over == ((10, 14), (12, 16)), "nor does a range begin before it"
    overlapping = TrainState(consumed_samples=12, passed_over=((10, 14), (12, 16)))
    assert overlapping.past_the_passed_over().consumed_samples == 16
