"""The chunked head is the plain head: plain torch on the whole vocabulary, and megatron-core's at every tensor size."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.distributed import use_next_store

TOKENS, HIDDEN, VOCABULARY = 24, 16, 515
"""515 ids are padded to 640, 768 and 1,024 rows at tensor size 1, 2 and 4; there the last rank has padding only."""
CASES = {
    1: [(False, "fp32"), (False, "bf16")],
    2: [(False, "fp32"), (True, "fp32"), (True, "bf16")],
    4: [(False, "fp32"), (True, "fp32")],
}


def random_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """hidden_TH, weight of the real rows, labels, and the gradient that comes back to each token's loss."""
    generator = torch.Generator().manual_seed(5)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight_VH = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
    labels_T = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels_T[:2] = torch.tensor([0, VOCABULARY - 1])
    return hidden_TH, weight_VH, labels_T, torch.randn(TOKENS, generator=generator)


def plain_torch(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Loss and gradients by autograd through full logits."""
    hidden_TH, weight_VH, labels_T, upstream_T = random_inputs(dtype)
    hidden_TH.requires_grad_(), weight_VH.requires_grad_()
    loss_T = F.cross_entropy((hidden_TH @ weight_VH.t()).float(), labels_T, reduction="none")
    loss_T.backward(upstream_T)
    return {"loss": loss_T.detach(), "hidden": hidden_TH.grad, "weight": weight_VH.grad}


def heads(cases):
    """Per case: what the chunked head and megatron-core's own give on this rank, gathered to whole tensors."""
    results = []
    for case in cases:
        results.append(both_heads(*case))
        use_next_store()
    return results


def both_heads(sequence_parallel: bool, precision: str) -> dict[str, dict[str, torch.Tensor]]:
    import os

    import torch.distributed as dist
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from megatron_ext.config.parallel import ParallelConfig
    from megatron_ext.config.runtime import RuntimeConfig
    from megatron_ext.model.emu3 import transformer_config
    from megatron_ext.model.lm_head import ChunkedHead
    from megatron_ext.plan import DecoderShape, pad_vocabulary
    from megatron_ext.runtime import Topology
    from tests.support.decoding import MODEL

    size = int(os.environ["WORLD_SIZE"])
    parallel = ParallelConfig(tensor_model_parallel_size=size, sequence_parallel=sequence_parallel)
    with Topology.start(RuntimeConfig(device="cpu", precision=precision), parallel) as topology:
        config = transformer_config(DecoderShape.of(MODEL), parallel, topology)
        hidden_TH, weight_VH, labels_T, upstream_T = random_inputs(topology.dtype)
        padded = F.pad(weight_VH, (0, 0, 0, pad_vocabulary(VOCABULARY, size) - VOCABULARY))
        rows = len(padded) // size
        real_rows = min(rows, max(0, VOCABULARY - topology.rank * rows))

        def run(kind: type, in_buffer: bool = False) -> dict[str, torch.Tensor]:
            head = kind(HIDDEN, len(padded), config=config, init_method=lambda weight: weight, bias=False,
                        tp_group=topology.groups.tp)  # fmt: skip
            head.weight.data.copy_(padded.chunk(size)[topology.rank])
            if in_buffer:
                head.weight.main_grad = torch.ones(head.weight.shape)
            mine = hidden_TH.chunk(size)[topology.rank] if sequence_parallel else hidden_TH
            mine_SBH = mine[:, None].clone().requires_grad_()
            if kind is ChunkedHead:
                head.chunk_elements, head.defers_projection = (
                    5 * max(1, real_rows),
                    True,
                )  # chunks of 5 tokens, one of 4
                assert head(mine_SBH)[0] is mine_SBH
                loss_BS = head.loss(mine_SBH, labels_T[None], real_rows)
            else:
                loss_BS = plain_loss(head, mine_SBH, labels_T, real_rows)
            loss_BS.backward(upstream_T[None])
            grad_TH = gather(mine_SBH.grad[:, 0], topology) if sequence_parallel else mine_SBH.grad[:, 0]
            weight_grad = head.weight.main_grad - 1 if in_buffer else head.weight.grad
            assert not gather(weight_grad, topology)[VOCABULARY:].any(), "padded rows must have no gradient"
            return {
                "loss": loss_BS[0].detach(),
                "hidden": grad_TH,
                "weight": gather(weight_grad, topology)[:VOCABULARY],
            }

        def gather(tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
            parts = [torch.empty_like(tensor) for _ in range(size)]
            dist.all_gather(parts, tensor.contiguous(), group=topology.groups.tp)
            return torch.cat(parts)

        return {
            "chunked": run(ChunkedHead),
            "in_buffer": run(ChunkedHead, in_buffer=True),
            "megatron": run(ColumnParallelLinear),
        }


def plain_loss(head, hidden_SBH, labels_T, real_rows):
    """megatron-core's head and loss, padding masked."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits_SBV = head(hidden_SBH)[0].float()
    mask_V = torch.arange(logits_SBV.size(-1)) >= real_rows
    logits_SBV = logits_SBV.masked_fill(mask_V, torch.finfo(torch.float32).min)
    return vocab_parallel_cross_entropy(logits_SBV, labels_T[:, None]).t()


@pytest.fixture(scope="module", params=CASES)
def results(ranks, request):
    return request.param, ranks.run(heads, request.param, CASES[request.param])


# Measured, relative to the largest entry: losses 8e-8, gradients 1.1e-6 in fp32; in bf16 gradients 6e-3, one
# rounding of their own type.
BOUNDS = {
    "fp32": {"loss": 1e-6, "hidden": 5e-6, "weight": 5e-6},
    "bf16": {"loss": 1e-6, "hidden": 2e-2, "weight": 2e-2},
}


def test_loss_and_gradients_are_the_plain_heads(results):
    size, by_rank = results
    for rank_results in by_rank:
        for (_, precision), found in zip(CASES[size], rank_results, strict=True):
            torch_head = plain_torch({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
            for reference in (torch_head, found["megatron"]):
                for name, bound in BOUNDS[precision].items():
                    for kind in ("chunked", "in_buffer"):
                        expected = reference[name].float()
                        error = (found[kind][name].float() - expected).abs().max() / expected.abs().max()
                        print("ERR", size, precision, kind, name, error.item())
                        assert error < bound, (size, precision, kind, name, error.item())
