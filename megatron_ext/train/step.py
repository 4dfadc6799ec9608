"""Forward and backward over the microbatches of one global batch, and the reduction of what was measured."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining

from megatron_ext.data.batch import Batch
from megatron_ext.objectives import Objective
from megatron_ext.runtime import Topology, seed_microbatch


class MicrobatchRunner:
    """Runs the decoder and its objective over global batches."""

    def __init__(self, model: DistributedDataParallel, objective: Objective, topology: Topology, *, seed: int) -> None:
        self.model = model
        self.objective = objective
        self.topology = topology
        self.seed = seed
        self._loss_sums: list[torch.Tensor] = []
        self.computed_at = 0.0
        """When this rank last had its own gradients, on the clock of time.perf_counter. On a GPU: had queued them."""
        model.module.config.finalize_model_grads_func = self._noting_when(model.module.config.finalize_model_grads_func)

    def _noting_when(self, finalize: Callable[..., Any]) -> Callable[..., Any]:
        """`finalize`, in which the data ranks wait for each other, with a look at the clock before."""

        def noting(*arguments: Any, **named: Any) -> Any:
            self.computed_at = time.perf_counter()
            return finalize(*arguments, **named)

        return noting

    def not_finite(self) -> list[int]:
        """Which of this rank's microbatches of the last run had a loss that is NaN or infinite."""
        return [number for number, loss in enumerate(self._loss_sums) if not torch.isfinite(loss)]

    def run(
        self, microbatches: Sequence[Batch], dataset_names: Sequence[str], *, step: int, forward_only: bool = False
    ) -> dict[str, float]:
        """Losses of a global batch, each averaged over the batch's tokens on all ranks; NaN where it has none.

        Unless `forward_only`, the gradient buffers hold the gradient of the weighted mean afterwards. `microbatches`
        are this rank's; `step` (0-based) seeds dropout.
        """
        names = self.objective.metric_names(dataset_names)
        queue = iter(enumerate(microbatches))
        self._loss_sums = []
        sums = torch.zeros(len(names), 2, dtype=torch.float64, device=self.topology.device)

        def forward_step(_: object, wrapped: DistributedDataParallel) -> tuple:
            index, batch = next(queue)
            batch = batch.to(self.topology.device)
            seed_microbatch(self.seed, step, index, self.topology)
            loss_BT = wrapped.module.forward_batch(batch)

            def loss_func(output_BT: torch.Tensor) -> tuple:
                result = self.objective.loss(batch, output_BT, dataset_names)
                self._loss_sums.append(result.loss_sum.detach())
                sums.add_(
                    torch.stack([torch.stack([value.double() for value in result.metrics[name]]) for name in names])
                )
                return result.loss_sum, result.weight_sum, {}

            return loss_BT, loss_func

        forward_backward_no_pipelining(
            forward_step_func=forward_step,
            data_iterator=None,
            model=self.model,
            num_microbatches=len(microbatches),
            seq_length=microbatches[0].max_seqlen,
            micro_batch_size=microbatches[0].num_windows,
            forward_only=forward_only,
            pg_collection=self.topology.groups,
        )
        dist.all_reduce(sums, group=self.topology.groups.dp_cp)
        return dict(zip(names, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
