"""LAION's aesthetic predictor: the image embedding of CLIP ViT-L/14, normalised, and a small head that rates it.

Two heads are in use, both trained on that embedding and applied to it at length 1:
- github.com/LAION-AI/aesthetic-predictor, sa_0_4_vit_l_14_linear.pth: one linear layer (`weight`, `bias`);
- github.com/christophschuhmann/improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE.pth: five linear layers one
  after the other, nothing between them but dropout (`layers.0`, `.2`, `.4`, `.6`, `.7`).

Shapes: B pictures, H W pixels, C colour channels, E embedding.
"""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection, logging

from megatron_ext.config import InputError, reason_of
from megatron_ext.files import suffix_of
from megatron_ext.runtime.arithmetic import full_fp32

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, of the channels (github.com/openai/CLIP, clip/clip.py, `_transform`)."""

LINEAR = ("",)
"""Prefixes of the layers of the first head."""

IMPROVED = ("layers.0.", "layers.2.", "layers.4.", "layers.6.", "layers.7.")
"""Of the second: the numbers left out are dropout."""


class AestheticPredictor(nn.Module):
    """Rates pictures, in float32."""

    def __init__(self, clip: str | Path, head: str | Path) -> None:
        """`clip` is a folder that transformers saved (CLIPVisionModelWithProjection, or all of CLIP), `head` a .pth or
        .safetensors file of one of the two layouts.

        Raises:
            InputError: one is missing, unreadable or of another layout; they do not fit each other.
        """
        super().__init__()
        self.clip = _load_clip(Path(clip))
        self.head = _load_head(Path(head))
        width, wanted = self.clip.config.projection_dim, self.head[0].in_features
        if width != wanted:
            raise InputError(
                f"head {head} takes embeddings of {wanted} numbers, {clip} makes {width}: give its own CLIP"
            )
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy())
        self.identity = digest.hexdigest()[:16]
        """Of all weights."""

        self.requires_grad_(False)
        self.eval()

    @property
    def side(self) -> int:
        """Pixels of the square that CLIP looks at."""
        return self.clip.config.image_size

    def rate(self, squares_BHWC: np.ndarray) -> np.ndarray:
        """`forward` of arrays: [B] float32."""
        return self(torch.from_numpy(squares_BHWC)).cpu().numpy()

    @full_fp32()
    @torch.inference_mode()
    def forward(self, squares_BHWC: Tensor) -> Tensor:
        """[B] scores, about 1 to 10, of uint8 pictures made by `pictures.clip_square`."""
        device = self.head[0].weight.device
        mean, std = (torch.tensor(values, device=device) for values in (MEAN, STD))
        pixels_BHWC = (squares_BHWC.to(device) / 255 - mean) / std
        embedding_BE = self.clip(pixel_values=pixels_BHWC.permute(0, 3, 1, 2)).image_embeds
        return self.head(nn.functional.normalize(embedding_BE, dim=-1))[:, 0]


def _load_clip(folder: Path) -> CLIPVisionModelWithProjection:
    if not (folder / "config.json").is_file():
        raise InputError(f"clip {folder}: no config.json there: give a folder that transformers saved CLIP ViT-L/14 in")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # all of CLIP has a text half, whose weights are left over
    logging.disable_progress_bar()
    try:
        found, loading = CLIPVisionModelWithProjection.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"clip {folder} cannot be loaded ({reason_of(error)})") from None
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    if loading["missing_keys"]:
        raise InputError(
            f"clip {folder} lacks {len(loading['missing_keys'])} weights ({sorted(loading['missing_keys'])[0]}, ...): "
            "give a CLIPVisionModelWithProjection"
        )
    return found


def _load_head(path: Path) -> nn.Sequential:
    try:
        weights = load_file(path) if suffix_of(path) == "safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise InputError(f"head {path} cannot be loaded ({reason_of(error)})") from None
    names = set(weights) if isinstance(weights, Mapping) else set()
    for prefixes in (LINEAR, IMPROVED):
        if names == {prefix + kind for prefix in prefixes for kind in ("weight", "bias")}:
            layers = []
            for prefix in prefixes:
                weight = weights[prefix + "weight"]
                layer = nn.Linear(weight.shape[1], weight.shape[0])
                layer.load_state_dict({"weight": weight, "bias": weights[prefix + "bias"]})
                layers.append(layer.float())
            return nn.Sequential(*layers)
    raise InputError(
        f"head {path} holds {', '.join(sorted(names)[:4]) or 'no weights'}: give LAION's linear head (weight, bias) or "
        "the improved one (layers.0, 2, 4, 6, 7), which has no activations"
    )
