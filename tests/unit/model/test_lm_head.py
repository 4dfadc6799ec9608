"""Full logits never exist: the largest tensor that forward and backward make is a chunk's."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.model import build_model
from megatron_ext.runtime import Topology
from tests.support.decoding import LAYOUT, MODEL, global_batch


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.fixture(scope="module")
def decoder():
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        yield build_model(MODEL, ParallelConfig(), LAYOUT, topology, seed=1)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_the_largest_tensor_is_a_chunk(decoder, chunk):
    hidden_SBH = torch.randn(64, 1, MODEL.hidden_size, requires_grad=True)
    labels_BS = torch.randint(LAYOUT.size, (1, 64))
    decoder.output_layer.chunk_elements = chunk * LAYOUT.size
    with LargestTensor() as largest:
        decoder.output_layer.loss(hidden_SBH, labels_BS, decoder.real_rows).sum().backward()
    weight_or_hidden = max(decoder.output_layer.weight.numel(), hidden_SBH.numel())
    assert largest.numel == max(min(chunk, 64) * LAYOUT.size, weight_or_hidden)


def test_logits_are_there_where_no_loss_is_wanted(decoder):
    (batch,) = global_batch(0, 4, "document")
    loss_BT = decoder.forward_batch(batch)
    logits_BTV = decoder.forward_batch(batch, with_loss=False)
    assert logits_BTV.shape == (*loss_BT.shape, decoder.vocab_size)
    expected_T = torch.nn.functional.cross_entropy(
        logits_BTV[0, :, : LAYOUT.size], batch.labels_BT[0], reduction="none"
    )
    assert (loss_BT[0] - expected_T).abs().max() < 2e-6  # measured 5e-7
