"""Bytes on one rank, by kind: what megatron-core's buffers, its distributed optimizer and our head hold.

Left out, because they depend on the machine: the device's context, communication buffers, fragmentation (together a
few GiB on a GPU), and the few hundred elements by which megatron-core aligns parameters in its buffers.
"""

from dataclasses import dataclass

from megatron_ext.config.model import DecoderShape
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.config.train import TrainConfig
from megatron_ext.plan.activations import BYTES, ends_on_cpu, ends_on_gpu, layer_input, layer_on_cpu, layer_on_gpu
from megatron_ext.plan.parameters import count_parameters, pad_vocabulary

LOGITS_OF_A_CHUNK = 2**26
"""Logits that the head holds at once: 256 MiB in fp32, enough rows to keep a GPU's matrix units busy."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank."""

    weights: float
    """In the type of the activations, and their 8-bit copies in fp8."""

    gradients: float
    """Accumulated in fp32 over microbatches, not sharded."""

    optimizer: float
    """fp32 master weights (bf16 and fp8) and AdamW's two moments, sharded over the data and context axes."""

    activations: float
    """Kept at the end of a microbatch's forward pass, under the chosen recomputation."""

    head: float
    """While the head's backward pass runs: a chunk of logits, gradients of its input and of its weight."""

    layer: float
    """While a layer's backward pass runs: what is recomputed for it, and its gradients; less what was kept for the
    head, which is done by then."""

    @property
    def peak(self) -> float:
        """The most at any time."""
        return self.weights + self.gradients + self.optimizer + self.activations + max(self.head, self.layer)


def rank_memory(
    shape: DecoderShape,
    vocab_size: int,
    runtime: RuntimeConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    world_size: int,
) -> Memory:
    """Bytes on each of `world_size` ranks; runtime.device auto is planned as a GPU."""
    tensor = parallel.tensor_model_parallel_size
    rows = pad_vocabulary(vocab_size, tensor)
    parameters = count_parameters(shape, rows, tensor)
    number = BYTES[runtime.precision]
    eight_bit = 2 * parameters.matrices if runtime.precision == "fp8" else 0  # one for either pass, kept over a step
    master = 4 if number < 4 else 0
    tokens = train.micro_batch_size * train.seq_length / parallel.context_parallel_size
    ends, kept, rebuilt = _activations(shape, parallel, runtime, train)
    local_rows = rows / tensor
    weight_gradient = number * local_rows * shape.hidden_size
    chunk = min(LOGITS_OF_A_CHUNK, tokens * local_rows)
    upcast = 4 * chunk if number < 4 else 0
    return Memory(
        weights=number * parameters.total + eight_bit,
        gradients=4 * parameters.total,
        optimizer=(master + 4 + 4) * parameters.total * tensor / world_size,
        activations=tokens * (ends + kept),
        # The input's gradient adds up in fp32, a chunk's part of it beside.
        head=tokens * (4 + number) * shape.hidden_size + chunk * number + max(upcast, weight_gradient),
        layer=tokens * (rebuilt - ends) + _layer_gradients(shape, tensor, number, tokens),
    )


def _activations(
    shape: DecoderShape, parallel: ParallelConfig, runtime: RuntimeConfig, train: TrainConfig
) -> tuple[float, float, float]:
    """Bytes per token that the forward pass keeps for the ends, for the layers, and that the backward pass rebuilds."""
    if runtime.device == "cpu":
        ends = ends_on_cpu(shape, parallel, runtime.precision)
        full = layer_on_cpu(shape, parallel, runtime.precision, train.seq_length)
    else:
        ends = ends_on_gpu(shape, parallel, runtime.precision)
        full = layer_on_gpu(shape, parallel, runtime.precision)
    layers = shape.num_layers
    if parallel.recompute_granularity != "full":
        return ends, layers * full, 0
    ends += 4 * shape.kv_channels  # the rotations' angles: every recomputed unit is given the same ones
    checkpoint = layer_input(shape, parallel, runtime.precision)
    unit = parallel.recompute_num_layers or 1
    if parallel.recompute_method == "uniform":
        return ends, -(-layers // unit) * checkpoint, unit * full
    recomputed = min(unit, layers)  # block: the first layers; the others are kept, and gone before these are rebuilt
    kept = recomputed * checkpoint + (layers - recomputed) * full
    return ends, kept, full if recomputed == layers else 0


def _layer_gradients(shape: DecoderShape, tensor: int, number: int, tokens: float) -> float:
    """Gradients inside an MLP's backward pass, the widest part of a layer: activations', then the largest weight's."""
    activations = tokens * number * (3 * shape.ffn_hidden_size / tensor + 2 * shape.hidden_size)
    return activations + number * 2 * shape.ffn_hidden_size * shape.hidden_size / tensor
