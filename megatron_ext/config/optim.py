"""Section `optim`: AdamW, clipping and the learning-rate schedule. Names are megatron-core's."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, clipping and the learning-rate schedule."""

    lr: float = 5e-5
    """Peak learning rate (Emu3 section 2.4: 5e-5)."""

    min_lr: float = 0.0
    """Learning rate at the end of the decay."""

    lr_warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0."""

    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""

    lr_decay_steps: int | None = None
    """Optimizer steps at which min_lr is reached, warm-up included; empty means train.train_steps."""

    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; norms have none."""

    adam_beta1: float = 0.9
    """Decay of the first moment."""

    adam_beta2: float = 0.95
    """Decay of the second moment."""

    adam_eps: float = 1e-8
    """Added to the root of the second moment."""

    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
