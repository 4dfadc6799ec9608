"""What a release is made of, from models in memory."""

from collections.abc import Iterable

from torch import Tensor

from megatron_ext.checkpoint.lazy import LazyTensor
from megatron_ext.hf.contents import Source
from megatron_ext.hf.decoder import Decoder
from megatron_ext.model import Emu3Model
from megatron_ext.vision import MoVQGAN
from megatron_ext.vocab import Vocabulary

NOTHING_RECORDED = {
    "format_version": 1, "step": None, "consumed_samples": None, "consumed_tokens": None, "init_from": None,
    "vision_tokenizer": None, "starts": [], "datasets": [], "losses": {}, "config": {}, "exported_with": {},
}  # fmt: skip


def source_of(model: Emu3Model, vision: MoVQGAN | None, vocabulary: Vocabulary, positions: int = 128) -> Source:
    """A model that no run has trained."""
    return Source(
        decoder=Decoder.of(model),
        vocabulary=vocabulary,
        vision=vision,
        max_position_embeddings=positions,
        provenance=NOTHING_RECORDED,
    )


def lazy(tensors: dict[str, Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}


def whole(tensors: Iterable[tuple[str, LazyTensor]]) -> dict[str, Tensor]:
    return {name: tensor.whole() for name, tensor in tensors}
