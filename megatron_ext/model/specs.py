"""The decoder layer as a megatron-core spec: Transformer Engine's modules on CUDA, plain torch elsewhere.

Both name their parameters alike on disk (megatron-core's Transformer Engine names), so a checkpoint of one opens in
the other.
"""

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_ext.config.errors import InputError
from megatron_ext.model.cp_attention import PackedAttention


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose gradient megatron-core sums over the tensor axis under sequence parallelism.

    megatron-core's own torch norm refuses sequence parallelism (torch_norm.py:32); the mark on the weight is all it
    takes (finalize_model_grads.py, `sequence_parallel`).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


def check_modules(device: torch.device) -> None:
    """Raise InputError where `device` needs Transformer Engine's modules and they do not import.

    To be asked before a TransformerConfig is made: its own complaint is about a fusion that nobody chose.
    """
    if device.type == "cpu":
        return
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"runtime.device is cuda and Transformer Engine does not import ({error}): "
            "install transformer-engine[pytorch], or set runtime.device to cpu"
        ) from None


def layer_specs(config: TransformerConfig, device: torch.device) -> TransformerBlockSubmodules:
    """The decoder's layers and final norm for `device`."""
    if device.type == "cpu":
        return TransformerBlockSubmodules(
            layer_specs=[_torch_layer(config)] * config.num_layers, layer_norm=SequenceParallelRMSNorm
        )
    return _transformer_engine_block(config)


def _torch_layer(config: TransformerConfig) -> ModuleSpec:
    head_norm = SequenceParallelRMSNorm if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=PackedAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=SequenceParallelRMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=SequenceParallelRMSNorm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
            # Transformer Engine fuses these norms into the projections that follow them; on disk we use its names.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _transformer_engine_block(config: TransformerConfig) -> TransformerBlockSubmodules:
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=TENorm)
