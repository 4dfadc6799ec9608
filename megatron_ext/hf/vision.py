"""The vision tokenizer: our names, which are BAAI's, <-> those of transformers' Emu3VQVAE.

The renames are those of the conversion that published the -hf weights (transformers commit 996a4017,
convert_emu3_weights_to_hf.py): attention's 1x1 convolutions become linear layers, its norms move beside it.
"""

from typing import Any

from megatron_ext.config import InputError
from megatron_ext.hf.table import Rule, Table
from megatron_ext.vision import VisionTokenizerConfig

_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj_out": "out_proj"}


def vision_table() -> Table:
    """The rules of a vision tokenizer of any shape."""
    places = {
        "{coder}.mid.attn_1.": "{coder}.middle_block.attn_1.",
        "encoder.down.{level}.attn.{block}.": "encoder.down_block.down.{level}.attn.{block}.",
        "decoder.up.{level}.attn.{block}.": "decoder.up_block.up.{level}.attn.{block}.",
    }
    norms = {
        "{coder}.mid.attn_1.norm.{rest}": "{coder}.middle_block.attn_norm.{rest}",
        "encoder.down.{level}.attn.{block}.norm.{rest}": "encoder.down_block.down.{level}.attn_norms.{block}.{rest}",
        "decoder.up.{level}.attn.{block}.norm.{rest}": "decoder.up_block.up.{level}.attn_norms.{block}.{rest}",
    }
    sections = {
        "{coder}.mid.{rest}": "{coder}.middle_block.{rest}",
        "encoder.down.{rest}": "encoder.down_block.down.{rest}",
        "decoder.up.{rest}": "decoder.up_block.up.{rest}",
        "{rest}": "{rest}",
    }
    projections = (
        Rule(ours=f"{ours}{name}.{kind}", theirs=(f"{theirs}{their_name}.{kind}",), pointwise=kind == "weight")
        for ours, theirs in places.items()
        for name, their_name in _PROJECTIONS.items()
        for kind in ("weight", "bias")
    )
    renames = (Rule(ours=ours, theirs=(theirs,)) for ours, theirs in (norms | sections).items())
    return Table((*projections, *renames))


_SAME_FIELDS = (
    "codebook_size",
    "embed_dim",
    "in_channels",
    "out_channels",
    "temporal_downsample_factor",
    "num_res_blocks",
    "attn_resolutions",
)
_RENAMED_FIELDS = {"z_channels": "latent_channels", "ch": "base_channels", "ch_mult": "channel_multiplier"}


def check_quantizer(config: VisionTokenizerConfig) -> None:
    """Raises InputError where Emu3's published classes would choose other codes for the same weights."""
    if config.quantizer != "nearest":
        raise InputError(
            f"quantizer = {config.quantizer!r}: Emu3's published classes choose the nearest code, so such a vision "
            "tokenizer cannot be exported in their layout"
        )


def vq_config(config: VisionTokenizerConfig) -> dict[str, Any]:
    """Keyword arguments of transformers' Emu3VQVAEConfig.

    Raises:
        InputError: another quantizer than Emu3's, which transformers does not have; attention at a stage of another
            width than the last, as transformers builds all with one width.
    """
    check_quantizer(config)
    hidden_size = config.widths[-1]
    for stage in config.attn_resolutions:
        if config.widths[stage] != hidden_size:
            raise InputError(
                f"attn_resolutions = {config.attn_resolutions}: transformers' Emu3VQVAE has attention only at stages "
                f"as wide as the last ({hidden_size}), stage {stage} is {config.widths[stage]} wide; such a vision "
                "tokenizer cannot be exported"
            )
    names = {name: name for name in _SAME_FIELDS} | _RENAMED_FIELDS
    fields = {theirs: getattr(config, ours) for ours, theirs in names.items()}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return fields | {"hidden_size": hidden_size, "double_latent": False, "num_attention_heads": 1}


def vision_config(fields: dict[str, Any]) -> VisionTokenizerConfig:
    """The inverse of `vq_config`, from the `vq_config` of a config.json.

    Raises:
        InputError: the configuration asks for what Emu3's vision tokenizer does not have.
    """
    if fields.get("double_latent") or fields.get("num_attention_heads", 1) != 1:
        raise InputError("config.json: vq_config with double_latent or several attention heads is not Emu3's")
    names = {name: name for name in _SAME_FIELDS} | _RENAMED_FIELDS
    values = {ours: fields[theirs] for ours, theirs in names.items() if theirs in fields}
    return VisionTokenizerConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
