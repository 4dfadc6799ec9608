"""Dropout is a function of (seed, step, microbatch, data rank, context rank), and of the tensor rank only where
activations are sharded over the tensor axis."""

import hashlib
import itertools

import pytest

from tests.support.comparison import assert_same_history, assert_same_weights
from tests.support.decoding import GLOBAL_BATCH, Training, start, walk
from tests.support.distributed import use_next_store

TP2, CP2 = {"tensor_model_parallel_size": 2}, {"context_parallel_size": 2}
SP = {"sequence_parallel": True}
STEPS = 2


def digest(tensor) -> str:
    return hashlib.sha256(tensor.detach().float().numpy().tobytes()).hexdigest()


def dropped(cases):
    """Per layout: (tensor, context, data rank), and (step, microbatch) -> digests of the mask on the embeddings, and of
    the activations after each layer."""
    results = []
    for parallel in cases:
        with start(parallel, Training(model={"hidden_dropout": 0.5, "attention_dropout": 0.5})) as rank:
            topology = rank.topology
            masks, activations = [], []
            rank.decoder.embedding.embedding_dropout.register_forward_hook(
                lambda module, inputs, output, masks=masks: masks.append(digest(output == 0))
            )
            for layer in rank.decoder.decoder.layers:
                layer.register_forward_hook(
                    lambda module, inputs, output, found=activations: found.append(digest(output[0]))
                )
            for step in range(STEPS):
                rank.step(step)
            place = topology.tensor_parallel_rank, topology.context_parallel_rank, topology.data_parallel_rank
            results.append((place, masks, activations))
        use_next_store()
    return results


@pytest.fixture(scope="module")
def by_layout(ranks):
    """layout -> {(tensor, context, data rank): (masks, activations)}, each in order of step and microbatch."""
    layouts = {"tp2_cp2": TP2 | CP2, "tp2_dp2": TP2, "tp2_sp_dp2": TP2 | SP}
    by_rank = ranks.run(dropped, 4, list(layouts.values()))
    return {
        layout: {place: (masks, activations) for place, masks, activations in found}
        for layout, found in zip(layouts, zip(*by_rank, strict=True), strict=True)
    }


@pytest.mark.parametrize("layout", ["tp2_cp2", "tp2_dp2"])
def test_tensor_ranks_drop_alike_what_they_hold_whole(layout, by_layout):
    """And so the activations between the layers, which each of them holds, are equal bit for bit."""
    found = by_layout[layout]
    for context, data in {place[1:] for place in found}:
        assert found[0, context, data] == found[1, context, data]


@pytest.mark.parametrize("layout", ["tp2_cp2", "tp2_dp2"])
def test_masks_differ_over_context_and_data_ranks_microbatches_and_steps(layout, by_layout):
    masks = [mask for (tensor, *_), (masks, _) in by_layout[layout].items() if tensor == 0 for mask in masks]
    data_parallel_size = len({data for _, _, data in by_layout[layout]})
    places = len({place[1:] for place in by_layout[layout]})
    assert len(masks) == places * STEPS * GLOBAL_BATCH // data_parallel_size
    assert len(set(masks)) == len(masks)


def test_masks_differ_over_tensor_ranks_where_activations_are_sharded(by_layout):
    masks = [mask for masks, _ in by_layout["tp2_sp_dp2"].values() for mask in masks]
    assert len(masks) == 4 * STEPS * GLOBAL_BATCH // 2
    assert len(set(masks)) == len(masks)


def drop_attention(parallel):
    """(tensor, data rank), and which attention weights the first layer drops in two microbatches of two steps."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_ext.runtime import seed_microbatch

    with start(parallel, Training(model={"attention_dropout": 0.5})) as rank:
        attention = rank.decoder.decoder.layers[0].self_attention.core_attention
        length = 16
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, length], dtype=torch.int32))
        ones_TND = torch.ones(length, 1, length)
        values_TND = torch.eye(length)[:, None]  # one value per key: the output shows the weights themselves
        masks = []
        for step, microbatch in itertools.product(range(2), range(2)):
            seed_microbatch(3, step, microbatch, rank.topology)
            masks.append(digest(attention(ones_TND, ones_TND, values_TND, None, packed_seq_params=packed) == 0))
        return (rank.topology.tensor_parallel_rank, rank.topology.data_parallel_rank), masks


def test_attention_dropout_differs_wherever_heads_do(ranks):
    """Heads are sharded over the tensor axis, with and without sequence parallelism."""
    masks = [mask for _, masks in ranks.run(drop_attention, 4, TP2) for mask in masks]
    assert len(set(masks)) == 4 * 4


DROPOUT = {"model": {"attention_dropout": 0.1, "hidden_dropout": 0.1}}
LONG = DROPOUT | {"steps": 20}
REPLICATED = {"tp2_cp2": TP2 | CP2, "tp2_sp_dp2": TP2 | SP, "cp2_dp2": CP2}


@pytest.fixture(scope="module")
def long_trainings(ranks):
    return dict(
        zip(REPLICATED, zip(*ranks.run(walk, 4, [(p, LONG) for p in REPLICATED.values()]), strict=True), strict=True)
    )


@pytest.mark.parametrize("layout", REPLICATED)
def test_replicas_are_equal_bit_for_bit_after_20_steps(layout, long_trainings):
    (history, weights), *others = long_trainings[layout]
    for other_history, other_weights in others:
        assert other_history == history
        assert_same_weights(other_weights, weights, 0)


RECOMPUTE = {
    "selective": {"recompute_granularity": "selective"},
    "uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
}


def test_recomputation_repeats_dropout(ranks):
    """What the backward pass computes again must drop what the forward pass dropped."""
    layouts = [layout | recompute for layout in (TP2, TP2 | SP) for recompute in ({}, *RECOMPUTE.values())]
    found = ranks.run(walk, 2, [(layout, DROPOUT) for layout in layouts])[0]
    for first in (0, 4):
        (plain, _), *recomputed = found[first : first + 4]
        for history, _ in recomputed:
            assert_same_history(history, plain, 0)
