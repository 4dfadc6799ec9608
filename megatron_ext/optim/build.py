"""AdamW on megatron-core's DistributedOptimizer, also at data-parallel size 1: its checkpoints and a plain
optimizer's do not interchange.
"""

from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer import optimizer as upstream
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_ext.config.errors import InputError
from megatron_ext.config.optim import OptimConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.validate import precision_fault, schedule_fault
from megatron_ext.model import Emu3Model
from megatron_ext.optim.gradient_groups import GradientGroups
from megatron_ext.optim.schedule import learning_rate
from megatron_ext.runtime import Topology


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    grad_norm: float
    """Global gradient norm before clipping."""

    learning_rate: float


class Optimizer:
    """The decoder wrapped for gradient reduction, its optimizer and its schedule."""

    def __init__(
        self,
        optim: OptimConfig,
        model: DistributedDataParallel,
        inner: MegatronOptimizer,
        groups: GradientGroups,
        steps: int,
    ) -> None:
        self.optim = optim
        self.model = model
        self.inner = inner
        self.groups = groups
        """Norms of parts of the gradient, to be asked between `gradient_norm` and `apply`."""
        self.decay_steps = optim.lr_decay_steps or steps

    def zero_grad(self) -> None:
        """Clear the gradient buffers."""
        self.model.zero_grad_buffer()
        self.inner.zero_grad()

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (the first is 1)."""
        return learning_rate(
            step,
            peak=self.optim.lr,
            minimum=self.optim.min_lr,
            warmup_steps=self.optim.lr_warmup_steps,
            decay_steps=self.decay_steps,
            style=self.optim.lr_decay_style,
        )

    def step(self, step: int) -> StepResult:
        """Clip, update the weights, gather them on every data rank. Gradients must have been finalized."""
        grad_norm = self.gradient_norm()
        return StepResult(grad_norm=grad_norm, learning_rate=self.apply(step, grad_norm))

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Global norm of the finalized gradients, before clipping; the same on every rank. `apply` may follow."""
        self.inner.prepare_grads()
        return float(self.inner.get_grad_norm())

    @torch.no_grad()
    def apply(self, step: int, grad_norm: float) -> float:
        """What is left of a step after `gradient_norm`; the learning rate.

        Together they are megatron-core's ChainedOptimizer.step, cut where the norm can be judged.
        """
        rate = self.learning_rate(step)
        for group in self.inner.param_groups:
            group["lr"] = rate
            # megatron-core only marks the groups; its own scheduler, which we do not use, would apply the mark.
            group["weight_decay"] = self.optim.weight_decay * group.get("wd_mult", 1.0)
        if self.optim.clip_grad > 0:
            for optimizer in self.inner.chained_optimizers:
                upstream.clip_grad_by_total_norm_fp32(  # looked up here: runtime/cpu.py replaces it
                    optimizer.get_parameters(), max_norm=self.optim.clip_grad, total_norm=grad_norm
                )
        self.inner.step_with_ready_grads()
        return rate

    def gather_weights(self) -> None:
        """Complete the weights on every data rank, where parallel.overlap_param_gather left that to the next forward
        pass; to be called before anything else reads them."""
        if self.model.ddp_config.overlap_param_gather:
            self.model.start_param_sync(force_sync=True)


def build_optimizer(
    optim: OptimConfig, parallel: ParallelConfig, model: Emu3Model, topology: Topology, steps: int
) -> Optimizer:
    """The optimizer of `model`; norms (one-dimensional weights) have no weight decay. `steps`: length of the run.

    Raises:
        InputError: the schedule contradicts itself, or the precision cannot be trained in on this device.
    """
    on_gpu = topology.device.type != "cpu"
    for fault in (schedule_fault(optim, steps), precision_fault(topology.precision.name, on_gpu=on_gpu)):
        if fault:
            raise InputError(fault)
    wrapped = DistributedDataParallel(
        config=model.config,
        ddp_config=DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            bucket_size=parallel.bucket_size,
            grad_reduce_in_fp32=True,
        ),
        module=model,
        pg_collection=topology.groups,
    )
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        bf16=topology.dtype == torch.bfloat16,
        params_dtype=topology.dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    inner = get_megatron_optimizer(config, [wrapped])
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.no_sync_func = wrapped.no_sync
    return Optimizer(optim, wrapped, inner, GradientGroups(wrapped, inner, topology), steps)
