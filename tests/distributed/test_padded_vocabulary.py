"""515 ids are padded to 640, 768 and 1,024 rows at tensor size 1, 2 and 4, where one rank has nothing but padding. The
padding takes no part in anything, on disk neither."""

import functools
from pathlib import Path

import pytest
import torch

from megatron_ext.vocab import VocabLayout
from tests.support.comparison import assert_same_history, assert_same_weights
from tests.support.decoding import Training, random_windows, start, walk

LAYOUT = VocabLayout.custom(text_size=205, codebook_size=300)
WHAT = {"layout": LAYOUT, "windows": functools.partial(random_windows, num_ids=LAYOUT.size)}
TP2, TP4 = {"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 4}
TP4_SP = TP4 | {"sequence_parallel": True}
VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")
# Measured: 9.4e-8 and 2.4e-7.
LOSS_BOUND, WEIGHT_BOUND = 2e-6, 3e-6


def pad_with_noise(parallel):
    """(rows of the padded vocabulary, losses and gradient norms of one batch before and after the padding of embedding
    and head is filled with large numbers)."""
    with start(parallel, Training(**WHAT)) as rank:
        outcomes = []
        for noise in (0.0, 50.0):
            for name in VOCABULARY_WEIGHTS:
                weight = rank.decoder.get_parameter(name)
                weight.data[rank.decoder.real_rows :] = noise
            losses = rank.backward(0)
            for name in VOCABULARY_WEIGHTS:
                grad = rank.decoder.get_parameter(name).main_grad
                assert not grad[rank.decoder.real_rows :].any(), f"gradient of padding in {name}"
            assert grad[: rank.decoder.real_rows].any(dim=1).all(), "every real row of the head has a gradient"
            norms = {name: p.main_grad.norm().item() for name, p in rank.decoder.named_parameters()}
            outcomes.append((losses, norms))
        return rank.decoder.vocab_size, outcomes


def tensors_on_disk(folder: str) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint in `folder`, whole: weights, master weights, both moments."""
    from megatron.core import dist_checkpointing

    from megatron_ext.checkpoint.store import latest_checkpoint

    with start({}, Training(**WHAT)):
        found = dist_checkpointing.load_plain_tensors(str(latest_checkpoint(Path(folder) / "checkpoints") / "decoder"))
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(("parallel", "world_size", "padded"), [({}, 1, 640), (TP2, 2, 768), (TP4_SP, 4, 1024)])
def test_padding_is_outside_the_softmax_and_has_no_gradient(parallel, world_size, padded, ranks):
    for vocab_size, (quiet, noisy) in ranks.run(pad_with_noise, world_size, parallel):
        assert vocab_size == padded
        assert quiet == noisy


@pytest.fixture(scope="module")
def resharded(ranks, tmp_path_factory):
    """Histories and weights of: 5 steps on one process; 2 there, 1 at TP 4, 2 on one again; and the folders of the
    checkpoint after step 2 as one process wrote it, as TP 4 wrote it again, and as one process did once more."""
    first, second, third, going = (str(tmp_path_factory.mktemp("checkpoint")) for _ in range(4))
    straight, _ = ranks.run(walk, 1, [({}, WHAT | {"steps": 5}), ({}, WHAT | {"steps": 2, "folder": first})])[0]
    _, middle = ranks.run(
        walk, 4,
        [(TP4, WHAT | {"steps": 2, "begin_with": first, "folder": second}),
         (TP4_SP, WHAT | {"steps": 3, "begin_with": first, "folder": going})],
    )[0]  # fmt: skip
    _, end = ranks.run(
        walk, 1,
        [({}, WHAT | {"steps": 2, "begin_with": second, "folder": third}),
         ({}, WHAT | {"steps": 5, "folder": going})],
    )[0]  # fmt: skip
    return straight, middle, end, (first, second, third)


def test_training_goes_on_across_paddings(resharded):
    (history, weights), (middle, _), (end, end_weights), _ = resharded
    assert_same_history(middle + end, history[2:], LOSS_BOUND)
    assert_same_weights(end_weights, weights, WEIGHT_BOUND)


def test_weights_and_moments_survive_other_paddings_bit_for_bit(resharded, ranks):
    """One process (640 rows) -> TP 4 (1,024) -> one process, without a step between."""
    one, four, back = (ranks.run(tensors_on_disk, 1, folder)[0] for folder in resharded[-1])
    assert one.keys() == four.keys() == back.keys()
    kinds = [name.split("model.")[0] for name in one if name.endswith(VOCABULARY_WEIGHTS)]
    assert sorted(kinds) == sorted(
        2 * ["", *(f"optimizer.state.{kind}." for kind in ("param", "exp_avg", "exp_avg_sq"))]
    )
    for name, value in one.items():
        if name.endswith(VOCABULARY_WEIGHTS):
            assert (len(value), len(four[name]), len(back[name])) == (640, 1024, 640), name
            for padded in (value, four[name], back[name]):
                assert not padded[LAYOUT.size :].any(), f"padding of {name}"
                assert padded[: LAYOUT.size].equal(value[: LAYOUT.size]), name
            assert value[: LAYOUT.size].any()
        else:
            assert four[name].equal(value) and back[name].equal(value), name
