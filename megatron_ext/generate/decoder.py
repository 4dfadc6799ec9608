"""The decoder as generation sees it: prefill a batch, then step by one id each.

Generation runs transformers' text model with its key-value cache, whatever the weights come from: a Hugging Face folder
is read as it is, a checkpoint's weights go through the same table as an export, in memory. megatron-core's own
inference context allocates on CUDA and wants its attention kernels; the decoder in transformers is the same function
(tests/parity compares their logits), runs on every device and leaves one engine to keep right.

Shapes: B sequences, T ids of the longest prompt, S ids so far, V ids of the vocabulary.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, Emu3ForCausalLM, Emu3TextConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from megatron_ext.hf import decoder_tensors, read_config, read_decoder_tensors, read_shape
from megatron_ext.model import Emu3Model
from megatron_ext.plan import DecoderShape


class CachedDecoder(Protocol):
    """What the engine asks of a model."""

    def prefill(self, prompts: list[Tensor]) -> Tensor:
        """Begin a batch with prompts of any lengths; logits_BV of the ids that follow them."""

    def step(self, ids_B: Tensor) -> Tensor:
        """Append one id to each sequence; logits_BV of the ids that follow."""


class TextDecoder:
    """transformers' Emu3 text model behind the protocol; with QK norm Qwen3's, the same architecture otherwise."""

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval()
        self._cache: DynamicCache | None = None
        self._valid_BS: Tensor | None = None
        self._next_position_B: Tensor | None = None

    @classmethod
    def from_checkpoint(cls, model: Emu3Model, *, dtype: torch.dtype, device: torch.device) -> "TextDecoder":
        """From our model, not sharded; its weights are shared where type and layout allow."""
        return cls(_text_model(model.shape, model.layout.size, decoder_tensors(model, dtype), device))

    @classmethod
    def from_hf(cls, folder: str | Path, *, dtype: torch.dtype, device: torch.device) -> "TextDecoder":
        """From a Hugging Face folder of either layout. Raises InputError when it holds no Emu3 decoder."""
        config = read_config(folder)
        vocab_size = config.get("text_config", config)["vocab_size"]
        return cls(_text_model(read_shape(folder), vocab_size, read_decoder_tensors(folder, dtype), device))

    @torch.inference_mode()
    def prefill(self, prompts: list[Tensor]) -> Tensor:
        """Prompts are padded on the left, so that all sequences end together; padding is masked and has no position."""
        longest = max(prompt.numel() for prompt in prompts)
        device = self.model.device
        ids_BT = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
        valid_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids_BT[row, longest - prompt.numel() :] = prompt
            valid_BT[row, longest - prompt.numel() :] = True
        causal_TT = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
        # A padded query sees itself: an empty row of a softmax is NaN.
        mask_B1TT = ((causal_TT & valid_BT[:, None]) | torch.eye(longest, dtype=torch.bool, device=device))[:, None]
        self._cache = DynamicCache(config=self.model.config)
        self._valid_BS = valid_BT
        self._next_position_B = valid_BT.sum(1)
        return self._run(ids_BT, mask_B1TT, (valid_BT.cumsum(1) - 1).clamp(min=0))

    @torch.inference_mode()
    def step(self, ids_B: Tensor) -> Tensor:
        """See the protocol; the cache grows by one."""
        self._valid_BS = torch.cat([self._valid_BS, torch.ones_like(self._valid_BS[:, :1])], dim=1)
        positions_B1 = self._next_position_B[:, None]
        self._next_position_B = self._next_position_B + 1
        return self._run(ids_B[:, None].to(self.model.device), self._valid_BS[:, None, None], positions_B1)

    def _run(self, ids_BT: Tensor, mask_B1TS: Tensor, positions_BT: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids_BT,
            attention_mask=mask_B1TS,
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def _text_model(
    shape: DecoderShape, vocab_size: int, tensors: Iterable[tuple[str, Tensor]], device: torch.device
) -> PreTrainedModel:
    """The transformers model of this shape with these weights."""
    config_class, model_class = (
        (Qwen3Config, Qwen3ForCausalLM) if shape.qk_layernorm else (Emu3TextConfig, Emu3ForCausalLM)
    )
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        rms_norm_eps=shape.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rotary_base},
        attn_implementation="sdpa",
        # Nothing here reads these (the grammar begins and ends sequences), but each must be a row of the vocabulary.
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(dict(tensors), assign=True)
    # The rotary frequencies are no part of the weights and were created on the meta device: create them again.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.to(device).requires_grad_(False)
