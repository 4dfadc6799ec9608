"""Layouts that fit, ranked by how little time they spend on anything but the model's own work."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ext.config.errors import InputError
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.run import RunConfig
from megatron_ext.config.validate import broken_rules
from megatron_ext.plan.activations import BYTES
from megatron_ext.plan.flops import flops_per_token
from megatron_ext.plan.job import USABLE_SHARE, Plan
from megatron_ext.plan.memory import Memory, rank_memory
from megatron_ext.plan.question import Question

# The machine that the ranking imagines: NVIDIA's DGX H100.
GPUS_PER_NODE = 8
NODE_BANDWIDTH = 450e9
"""Bytes per second that a GPU sends over NVLink."""
NETWORK_BANDWIDTH = 50e9
"""Bytes per second that a GPU sends to another node: 400 Gbit/s."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to lay the job out."""

    parallel: ParallelConfig
    data_parallel_size: int
    memory: Memory
    overhead: float
    """Estimated time for recomputation and waiting for other ranks, over the time for the model's own work."""


def suggest_layouts(config: RunConfig, plan: Plan, question: Question) -> list[Layout]:
    """Layouts of the planned job that break no rule and fit into `question.memory_gib`, the best first.

    Micro-batch, global batch and data stay the configuration's. Each pair of tensor and context size comes with the
    least recomputation that fits.

    Raises:
        InputError: the configuration is for a CPU.
    """
    if config.runtime.device == "cpu":
        raise InputError("--suggest ranks layouts of GPUs, and runtime.device is cpu: set it to cuda")
    config = config.computing_in(plan.precision)
    incurable = broken_rules(_laid_out(config, tensor=1, context=1, recomputed=0), 1)
    found = []
    for tensor, context in _sizes(question.world_size):
        for recomputed in range(plan.shape.num_layers + 1):
            candidate = _laid_out(config, tensor=tensor, context=context, recomputed=recomputed)
            parallel = candidate.parallel
            if set(broken_rules(candidate, question.world_size)) - set(incurable):
                break
            memory = rank_memory(
                plan.shape, plan.vocab_size, config.runtime, parallel, config.train, question.world_size
            )
            if memory.peak <= USABLE_SHARE * question.memory_gib * 2**30:
                found.append(
                    Layout(
                        parallel=parallel,
                        data_parallel_size=question.world_size // (tensor * context),
                        memory=memory,
                        overhead=_overhead(plan, candidate, question),
                    )
                )
                break
    return sorted(found, key=lambda layout: layout.overhead)


def _sizes(world_size: int) -> Iterator[tuple[int, int]]:
    """(tensor, context) sizes: powers of two that divide the world, tensor within a node."""
    powers = [2**exponent for exponent in range(world_size.bit_length())]
    for tensor in powers:
        for context in powers:
            if tensor <= GPUS_PER_NODE and world_size % (tensor * context) == 0:
                yield tensor, context


def _laid_out(config: RunConfig, *, tensor: int, context: int, recomputed: int) -> RunConfig:
    parallel = dataclasses.replace(
        config.parallel,
        tensor_model_parallel_size=tensor,
        context_parallel_size=context,
        sequence_parallel=tensor > 1,
        recompute_granularity="full" if recomputed else None,
        recompute_method="block" if recomputed else None,
        recompute_num_layers=recomputed or None,
    )
    return dataclasses.replace(config, parallel=parallel)


def _overhead(plan: Plan, config: RunConfig, question: Question) -> float:
    """Estimated for a token of a rank's row, against its share of the model's FLOPs at the question's MFU."""
    shape, parallel, number = plan.shape, config.parallel, BYTES[config.runtime.precision]
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    rate = tensor * question.peak_tflops * 1e12 * question.mfu
    own_work = plan.flops_per_token / rate
    without_head = flops_per_token(shape, config.train.seq_length, vocab_size=0) / rate
    again = without_head / 3 * (parallel.recompute_num_layers or 0) / shape.num_layers
    # Sequence parallelism, per layer: two all-gathers and two reduce-scatters of the residual stream in either pass,
    # and two all-gathers again for the gradients of weights. Nothing else can run meanwhile.
    stream = 10 * shape.num_layers * shape.hidden_size * number * (tensor - 1) / tensor / NODE_BANDWIDTH
    # Keys and values go around the ring in the forward pass, they and their gradients in the backward pass, behind
    # attention's own work.
    bandwidth = NODE_BANDWIDTH if tensor * context <= GPUS_PER_NODE else NETWORK_BANDWIDTH
    keys = 2 * shape.num_query_groups * shape.kv_channels / tensor
    ring = 3 * shape.num_layers * keys * number * (context - 1) / bandwidth
    attention = without_head - flops_per_token(shape, 0, vocab_size=0) / rate
    return (again + stream + max(0.0, ring - attention)) / own_work
