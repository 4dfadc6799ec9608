"""Section `optim`: AdamW, clipping and the learning-rate schedule. Names are megatron-core's."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.errors import InputError
from megatron_ext.config.section import Count, Decay, NonNegative, Number, Positive, Section


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section, section="optim"):
    """AdamW, clipping and the learning-rate schedule."""

    lr: NonNegative = 5e-5
    """Peak learning rate (Emu3 section 2.4: 5e-5)."""

    min_lr: NonNegative = 0.0
    """Learning rate at the end of the decay."""

    lr_warmup_steps: Number = 0
    """Optimizer steps of linear warm-up from 0."""

    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""

    lr_decay_steps: Count | None = None
    """Optimizer steps at which min_lr is reached, warm-up included; empty means train.train_steps."""

    weight_decay: NonNegative = 0.1
    """Decoupled weight decay on matrices; norms have none."""

    adam_beta1: Decay = 0.9
    """Decay of the first moment."""

    adam_beta2: Decay = 0.95
    """Decay of the second moment."""

    adam_eps: Positive = 1e-8
    """Added to the root of the second moment."""

    clip_grad: NonNegative = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.section_name
        if self.lr_decay_style == "constant":
            return
        if self.min_lr > self.lr:
            raise InputError(f"{name}.min_lr {self.min_lr} is above {name}.lr {self.lr}: a decay ends below its peak")
        if self.lr_decay_steps is not None and self.lr_warmup_steps >= self.lr_decay_steps:
            raise InputError(
                f"{name}.lr_warmup_steps {self.lr_warmup_steps} is not below {name}.lr_decay_steps "
                f"{self.lr_decay_steps}, which counts them too: shorten the warm-up"
            )
