"""Which aesthetic predictor is used, if any; `aesthetic.py` is the predictor, imported where one is asked for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ext.config import InputError
from megatron_ext.config.runtime import DeviceName, RuntimeConfig
from megatron_ext.config.section import Name, Section
from megatron_ext.runtime.device import choose_device

if TYPE_CHECKING:
    from megatron_ext.curate.aesthetic import AestheticPredictor


@dataclass(frozen=True, kw_only=True)
class AestheticConfig(Section, section="aesthetic"):
    """LAION's aesthetic predictor."""

    clip: Name | None = None
    """Folder in which transformers saved CLIP ViT-L/14 (openai/clip-vit-large-patch14, whole or its vision half); null
    turns the filter off, and the report says so."""

    head: Name | None = None
    """The head on it, .pth or .safetensors: LAION's linear one (sa_0_4_vit_l_14_linear) or the improved one
    (sac+logos+ava1-l14-linearMSE)."""

    device: DeviceName = "auto"
    """Where; auto takes CUDA when a GPU is visible."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.clip is None) != (self.head is None):
            given, missing = ("clip", "head") if self.head is None else ("head", "clip")
            raise InputError(f"aesthetic.{given} is given without aesthetic.{missing}: give both, or neither")


def load_predictor(config: AestheticConfig, *, rates: bool) -> "AestheticPredictor | None":
    """The predictor, or None without weight files; on its device where it `rates`. A job that only merges has no GPU,
    and needs but the identity.

    Raises:
        InputError: a file is missing, unreadable or of another layout; they do not fit each other.
    """
    if config.clip is None or config.head is None:
        return None
    from megatron_ext.curate.aesthetic import AestheticPredictor  # here: transformers takes seconds to import

    predictor = AestheticPredictor(config.clip, config.head)
    return predictor.to(choose_device(RuntimeConfig(device=config.device), 0)) if rates else predictor
