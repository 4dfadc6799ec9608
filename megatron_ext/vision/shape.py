"""Shape of a vision tokenizer: what its weights and its codes follow from."""

from dataclasses import dataclass
from typing import Annotated, Any

from megatron_ext.config import InputError, as_dict
from megatron_ext.config.section import Bound, Count, Number, Section
from megatron_ext.vision.blocks import NUM_GROUPS
from megatron_ext.vision.quantizer import QuantizerName

POWER_OF_TWO = Bound("a power of two", lambda value: value & (value - 1) == 0)
WHOLE_GROUPS = Bound(f"a multiple of {NUM_GROUPS}, the groups of the norms", lambda value: value % NUM_GROUPS == 0)


@dataclass(frozen=True, kw_only=True)
class VisionTokenizerConfig(Section):
    """Shape of a vision tokenizer; the defaults are Emu3's (270,740,287 parameters). Names are BAAI's."""

    codebook_size: Count = 32768
    """Number of visual codes."""

    embed_dim: Count = 4
    """Numbers in a codebook vector."""

    quantizer: QuantizerName = "nearest"
    """How a latent becomes a code: nearest is Emu3's nearest neighbour, ibq Emu3.5's largest inner product."""

    z_channels: Count = 4
    """Channels of the latent map; equal to embed_dim, because the decoder's temporal layers take both maps."""

    in_channels: Count = 3
    """Colour channels read."""

    out_channels: Count = 3
    """Colour channels drawn."""

    temporal_downsample_factor: Annotated[Count, POWER_OF_TWO] = 4
    """Frames of a clip behind one frame of codes; a power of two."""

    ch: Annotated[Count, WHOLE_GROUPS] = 256
    """Width of the finest stage; a multiple of 32, the number of groups of the group norms."""

    ch_mult: tuple[Count, ...] = (1, 2, 2, 4)
    """Width of each stage over ch; n stages give the spatial factor 2^(n-1)."""

    num_res_blocks: Count = 2
    """Residual blocks in a stage of the encoder (the decoder has one more) and in each temporal stack."""

    attn_resolutions: tuple[Number, ...] = (3,)
    """Indices of the stages (not pixels) with attention."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.z_channels != self.embed_dim:
            raise InputError(f"z_channels {self.z_channels}: must equal embed_dim {self.embed_dim}")
        stages = len(self.ch_mult)
        if not stages:
            raise InputError("ch_mult is empty: give the width of at least one stage")
        if max(self.attn_resolutions, default=0) >= stages:
            raise InputError(
                f"attn_resolutions {list(self.attn_resolutions)}: must be indices of the {stages} stages, from 0"
            )

    def fields(self) -> dict[str, Any]:
        """What files and identities hold: BAAI's fields, and the quantizer where it is not theirs."""
        fields = as_dict(self)
        if self.quantizer == "nearest":
            del fields["quantizer"]
        return fields

    @property
    def spatial_factor(self) -> int:
        """Pixels along one side of a code."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage, finest first."""
        return tuple(self.ch * multiple for multiple in self.ch_mult)

    @property
    def num_time_convs(self) -> int:
        """Temporal halvings in the encoder, doublings in the decoder."""
        return self.temporal_downsample_factor.bit_length() - 1
