"""One process is a Llama in plain torch: losses per token, the weighted mean, its gradient. This anchors the layout
tests, which compare with one process. And where RoPE's positions start does not matter."""

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.data.batch import Batch
from megatron_ext.vocab import VocabLayout
from tests.support.decoding import Training, random_windows, rows, start
from tests.support.oracles import llama, segment_mask

VOCABULARY_515 = VocabLayout.custom(text_size=205, codebook_size=300)
GROUPED = {"num_attention_heads": 8}


@contextlib.contextmanager
def decoder_with_norms(**options):
    """A rank whose weights are large enough for attention to be far from a plain mean, and whose norms are not ones;
    and all its weights, without padded rows."""
    with start({}, Training(**options)) as rank:
        generator = torch.Generator().manual_seed(1)
        for parameter in rank.decoder.parameters():
            if parameter.ndim == 1:
                parameter.data.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.data.mul_(8)
        names = ("embedding.word_embeddings.weight", "output_layer.weight")
        weights = {
            name: (p.detach()[: rank.decoder.layout.size] if name in names else p.detach()).clone().requires_grad_()
            for name, p in rank.decoder.named_parameters()
        }
        yield rank, weights


def oracle_losses(rank, weights, batch: Batch, positions_T: torch.Tensor) -> torch.Tensor:
    """loss_T of a whole row."""
    mask_TT = segment_mask(batch.cu_seqlens.tolist())
    logits_TV = llama(weights, rank.decoder.shape, batch.tokens_BT[0], positions_T, mask_TT)
    return F.cross_entropy(logits_TV, batch.labels_BT[0], reduction="none")


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("scope", ["document", "window"])
@pytest.mark.parametrize("norm", [False, True])
def test_losses_and_gradients_are_plain_torchs(norm, scope, micro_batch_size):
    options = {"scope": scope, "micro_batch_size": micro_batch_size, "layout": VOCABULARY_515}
    with decoder_with_norms(model=GROUPED | {"qk_layernorm": norm}, windows=many_ids, **options) as (rank, weights):
        measured = rank.backward(0)
        loss_sum, weight_sum = 0.0, 0
        for batch in rows(many_ids(0), micro_batch_size, scope):
            loss_T = oracle_losses(rank, weights, batch, batch.position_ids_BT[0])
            with torch.no_grad():
                error = (rank.decoder.forward_batch(batch)[0] - loss_T).abs().max()
            assert error < 3e-5  # measured 2.4e-6, losses up to 13
            # The rule of the paper, spelt out: visual labels weigh half, masked ones nothing.
            for loss, label, counts in zip(loss_T, batch.labels_BT[0], batch.label_mask_BT[0], strict=True):
                weight = (0.5 if label >= VOCABULARY_515.visual_start else 1.0) if counts else 0.0
                loss_sum, weight_sum = loss_sum + weight * loss, weight_sum + weight
        (loss_sum / weight_sum).backward()
        assert measured["loss"] == pytest.approx((loss_sum / weight_sum).item(), rel=1e-6)
        largest = max(weight.grad.abs().max() for weight in weights.values())
        for name, weight in weights.items():
            found = rank.decoder.get_parameter(name).main_grad
            assert (found[: len(weight)] - weight.grad).abs().max() < 1e-5 * largest, name  # measured 1.0e-6


def many_ids(step):
    return random_windows(step, num_ids=VOCABULARY_515.size)


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("scope", ["document", "window"])
def test_rope_is_relative(scope, micro_batch_size):
    """Positions may restart in each document or run on through the row: nothing changes within a document. They may not
    jump inside one."""
    with decoder_with_norms() as (rank, weights), torch.no_grad():
        batch = rows(random_windows(0), micro_batch_size, scope)[0]
        ours_T = rank.decoder.forward_batch(batch)[0]
        restarting_T = batch.position_ids_BT[0]
        through_T = torch.arange(len(restarting_T))
        assert not torch.equal(restarting_T, through_T) or (scope, micro_batch_size) == ("window", 1)
        for positions_T in (restarting_T, through_T, through_T + 1000):
            # measured 3.8e-6
            assert (ours_T - oracle_losses(rank, weights, batch, positions_T)).abs().max() < 3e-5
        jumping_T = torch.where(through_T % 8 < 4, through_T, through_T + 3)
        assert (ours_T - oracle_losses(rank, weights, batch, jumping_T)).abs().max() > 1  # measured 2.2 and more


def test_positions_start_at_zero_in_each_segment():
    """cu_seqlens say where: a segment in a row is the same segment alone."""
    with decoder_with_norms() as (rank, _), torch.no_grad():
        batch = rows(random_windows(0), 2, "document")[0]
        together_T = rank.decoder.forward_batch(batch)[0]
        for first, end in batch.cu_seqlens.unfold(0, 2, 1).tolist():
            assert batch.position_ids_BT[0, first:end].tolist() == list(range(end - first))
            alone_T = rank.decoder.forward_batch(cut(batch, first, end))[0]
            assert (together_T[first:end] - alone_T).abs().max() < 3e-5  # measured 0


def cut(batch: Batch, first: int, end: int) -> Batch:
    """One segment as a row of its own."""
    tensors = {name: value[:, first:end] for name, value in vars(batch).items() if name.endswith("_BT")}
    bounds = torch.tensor([0, end - first], dtype=torch.int32)
    return dataclasses.replace(batch, **tensors, cu_seqlens=bounds, num_windows=1)
