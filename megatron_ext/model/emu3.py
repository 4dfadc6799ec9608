"""The Emu3 decoder: section `model` -> TransformerConfig -> megatron-core's GPTModel as it is.

Shape legend: B rows (always 1: a micro-batch is one packed row), T tokens of this rank's share of the row, S the same
in megatron-core's sequence-first order, V this tensor rank's share of the padded vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.config.errors import InputError
from megatron_ext.config.model import DecoderShape, ModelConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.validate import shape_faults
from megatron_ext.data.batch import Batch
from megatron_ext.model.initialize import initialize_weights
from megatron_ext.model.lm_head import ChunkedHead
from megatron_ext.model.specs import check_modules, layer_specs
from megatron_ext.plan import pad_vocabulary
from megatron_ext.runtime import Topology, seed_microbatch
from megatron_ext.vocab import VocabLayout

# Formats that Transformer Engine's recipes default to (common/recipe/__init__.py): E4M3 everywhere where scales are
# fine enough, else E5M2 for gradients. "delayed" is left out: its history of scales would have to be checkpointed.
FP8_FORMATS = {"tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}


class Emu3Model(GPTModel):
    """GPTModel that takes packed batches, and whose head never holds full logits (lm_head.py)."""

    def __init__(self, config: TransformerConfig, shape: DecoderShape, layout: VocabLayout, topology: Topology) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=layer_specs(config, topology.device),
            vocab_size=pad_vocabulary(layout.size, topology.tensor_parallel_size),
            max_sequence_length=0,  # only learned positions would read it
            position_embedding_type="rope",
            rotary_base=shape.rotary_base,
            share_embeddings_and_output_weights=False,
            pg_collection=topology.groups,
        )
        self.shape = shape
        self.layout = layout
        rows = self.vocab_size // topology.tensor_parallel_size
        self.real_rows = min(rows, max(0, layout.size - topology.tensor_parallel_rank * rows))
        self.output_layer = ChunkedHead(
            shape.hidden_size, self.vocab_size,
            config=config, init_method=config.init_method, bias=False, tp_group=topology.groups.tp,
        )  # fmt: skip

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """GPTModel's; with labels the head defers its projection to the loss."""
        self.output_layer.defers_projection = labels is not None
        return super().forward(*args, labels=labels, **kwargs)

    def forward_batch(self, batch: Batch, *, with_loss: bool = True) -> Tensor:
        """Cross entropy per token, loss_BT in fp32; without `with_loss`, logits_BTV of this tensor rank's rows."""
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )
        return self(
            input_ids=batch.tokens_BT,
            position_ids=batch.position_ids_BT,
            attention_mask=None,
            labels=batch.labels_BT if with_loss else None,
            packed_seq_params=packed,
        )

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy of labels_BT. `logits` is what the head handed through: hidden_SBH."""
        return self.output_layer.loss(logits, labels, self.real_rows)


def transformer_config(shape: DecoderShape, parallel: ParallelConfig, topology: Topology) -> TransformerConfig:
    """megatron-core's configuration of the decoder."""
    fused = topology.device.type != "cpu"  # on a CPU these fusions would run torch.compile, which needs a compiler
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        qk_layernorm=shape.qk_layernorm,
        normalization="RMSNorm",
        layernorm_epsilon=shape.layernorm_epsilon,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=shape.attention_dropout,
        hidden_dropout=shape.hidden_dropout,
        # model/initialize.py draws the weights. megatron-core must still "initialize" them: only then does it mark
        # which are sharded (tensor_parallel/layers.py, set_tensor_model_parallel_attributes).
        init_method=_leave,
        output_layer_init_method=_leave,
        use_cpu_initialization=topology.device.type == "cpu",
        params_dtype=topology.dtype,
        bf16=topology.dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        cp_comm_type=parallel.cp_comm_type,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        fp8=FP8_FORMATS[topology.fp8_recipe] if topology.fp8_recipe else None,
        fp8_recipe=topology.fp8_recipe or "tensorwise",
        deterministic_mode=topology.deterministic,
        # The sum of weighted losses is divided once, by the weight of the whole global batch (finalize_model_grads.py).
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
    )


def _leave(weight: Tensor) -> Tensor:
    return weight


def build_model(
    model: ModelConfig, parallel: ParallelConfig, layout: VocabLayout, topology: Topology, seed: int
) -> Emu3Model:
    """The decoder on this rank's device, its weights a function of `seed` alone.

    Raises:
        InputError: the shape does not divide over the tensor axis, or not as FP8 wants, or the device's modules are not
            installed.
    """
    check_modules(topology.device)
    shape = DecoderShape.of(model)
    for fault in shape_faults(shape, parallel, topology.fp8_recipe):
        raise InputError(fault)
    seed_microbatch(seed, 0, 0, topology)  # modules enter the random streams while they are built
    decoder = Emu3Model(transformer_config(shape, parallel, topology), shape, layout, topology).to(topology.device)
    initialize_weights(decoder, std=shape.init_method_std, vocab_size=layout.size, seed=seed, topology=topology)
    return decoder
