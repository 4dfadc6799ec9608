"""Rules that span sections, as a table. What one section can check alone, its room checks."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from megatron_ext.config.errors import InputError
from megatron_ext.config.objective import LARGEST_DENOMINATOR
from megatron_ext.config.optim import OptimConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.run import RunConfig
from megatron_ext.config.runtime import FP8_MULTIPLES


@dataclass(frozen=True)
class Rule:
    """One rule: broken where `broken(config, world_size)` holds."""

    broken: Callable[[RunConfig, int], bool]
    message: Callable[[RunConfig, int], str]
    """Names the fields, their values and the fix, in one line."""


def _data_parallel_size(config: RunConfig, world_size: int) -> int:
    ranks = config.parallel.tensor_model_parallel_size * config.parallel.context_parallel_size
    return max(1, world_size // max(1, ranks))


def _samples_per_microstep(config: RunConfig, world_size: int) -> int:
    return max(1, config.train.micro_batch_size * _data_parallel_size(config, world_size))


def _sequence_divisor(config: RunConfig) -> int:
    """A row must divide into zig-zag chunks per context rank, and those over the tensor axis under sequence
    parallelism."""
    context, tensor = config.parallel.context_parallel_size, config.parallel.tensor_model_parallel_size
    return (2 * context if context > 1 else 1) * (max(1, tensor) if config.parallel.sequence_parallel else 1)


def _tokens_per_context_rank(config: RunConfig) -> int:
    return config.train.micro_batch_size * config.train.seq_length // max(1, config.parallel.context_parallel_size)


def _largest_weight(config: RunConfig) -> int:
    """The largest integer weight of a label: weights are k/n over one n (objectives/next_token.py)."""
    fraction = Fraction(config.objective.vision_loss_weight).limit_denominator(LARGEST_DENOMINATOR)
    return max(fraction.numerator, fraction.denominator)


def layout_fault(parallel: ParallelConfig, world_size: int) -> str | None:
    """Why the parallel sizes do not lay out over `world_size` ranks, and the fix; None if they do."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if tensor < 1 or context < 1 or world_size % (tensor * context):
        return (
            f"parallel.tensor_model_parallel_size {tensor} x parallel.context_parallel_size {context} does not divide "
            f"the {world_size} ranks that were started: "
            f"change the sizes or start a multiple of {tensor * context} ranks"
        )
    if parallel.sequence_parallel and tensor == 1:
        return (
            "parallel.sequence_parallel is true with parallel.tensor_model_parallel_size 1: "
            "there is no tensor axis to split along, set it to false"
        )
    return None


def schedule_fault(optim: OptimConfig, steps: int) -> str | None:
    """Why the learning rate of a run of `steps` contradicts itself, and the fix; None if it does not."""
    decay_steps = optim.lr_decay_steps or steps
    if optim.lr_decay_style == "constant" or optim.lr_warmup_steps < decay_steps:
        return None
    return (
        f"optim.lr_warmup_steps {optim.lr_warmup_steps} is not below the {decay_steps} steps of the decay: "
        "shorten the warm-up or set optim.lr_decay_steps"
    )


def ramp_fault(config: RunConfig, world_size: int) -> str | None:
    """Why the global batch cannot grow as asked on `world_size` ranks, and the fix; None if it can."""
    if config.train.global_batch_size_ramp is None:
        return None
    first, increment, samples = config.train.global_batch_size_ramp
    unit, full = _samples_per_microstep(config, world_size), config.train.global_batch_size
    if min(first, increment, samples) >= 1 and first < full and (full - first) % increment == 0:
        if first % unit == 0 and increment % unit == 0:
            return None
    return (
        f"train.global_batch_size_ramp {[first, increment, samples]} with train.global_batch_size {full}: "
        f"give [first size, increment, samples], sizes in multiples of {unit} (train.micro_batch_size x data-parallel "
        "size) that reach train.global_batch_size in whole increments"
    )


def possible_precisions(precision: str, *, on_gpu: bool) -> tuple[str, ...]:
    """What a new run can compute in: auto is bf16 on a GPU, and on a CPU depends on which one that is."""
    if precision != "auto":
        return (precision,)
    return ("bf16",) if on_gpu else ("fp32", "bf16")


def precision_fault(precision: str, *, on_gpu: bool) -> str | None:
    """Why no decoder can be trained in this precision on this device, and the fix; None if one can."""
    if precision == "fp8" and not on_gpu:
        return (
            "runtime.precision is fp8, which needs a GPU with Transformer Engine: on a CPU set it to auto, bf16 or fp32"
        )
    if precision == "fp32" and on_gpu:
        return (
            "runtime.precision is fp32 on a GPU, where Transformer Engine has no attention over packed documents in "
            "fp32: set runtime.precision to auto or bf16, or runtime.device to cpu"
        )
    return None


RULES = (
    Rule(lambda c, n: layout_fault(c.parallel, n) is not None, lambda c, n: layout_fault(c.parallel, n) or ""),
    Rule(
        lambda c, n: (
            min(c.train.micro_batch_size, c.train.global_batch_size, c.train.train_steps, c.train.seq_length) < 1
        ),
        lambda c, n: (
            f"train.micro_batch_size {c.train.micro_batch_size}, train.global_batch_size {c.train.global_batch_size}, "
            f"train.train_steps {c.train.train_steps}, train.seq_length {c.train.seq_length}: each must be at least 1"
        ),
    ),
    Rule(
        lambda c, n: c.train.global_batch_size % _samples_per_microstep(c, n) != 0,
        lambda c, n: (
            f"train.global_batch_size {c.train.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{c.train.micro_batch_size} x data-parallel size {_data_parallel_size(c, n)}: "
            f"use a multiple of {_samples_per_microstep(c, n)}"
        ),
    ),
    Rule(lambda c, n: ramp_fault(c, n) is not None, lambda c, n: ramp_fault(c, n) or ""),
    Rule(
        lambda c, n: c.train.seq_length % _sequence_divisor(c) != 0,
        lambda c, n: (
            f"train.seq_length {c.train.seq_length} does not divide over parallel.context_parallel_size "
            f"{c.parallel.context_parallel_size} and the tensor axis: use a multiple of {_sequence_divisor(c)}"
        ),
    ),
    Rule(
        lambda c, n: (
            c.data.attention_scope == "document"
            and c.parallel.context_parallel_size > 1
            and c.data.document_alignment % (2 * c.parallel.context_parallel_size) != 0
        ),
        lambda c, n: (
            f"data.document_alignment {c.data.document_alignment} with data.attention_scope document and "
            f"parallel.context_parallel_size {c.parallel.context_parallel_size}: "
            f"use a multiple of {2 * c.parallel.context_parallel_size}"
        ),
    ),
    Rule(
        lambda c, n: c.train.seq_length % max(1, c.data.document_alignment) != 0 or c.data.document_alignment < 1,
        lambda c, n: (
            f"data.document_alignment {c.data.document_alignment} does not divide train.seq_length "
            f"{c.train.seq_length}: "
            "use a divisor of it"
        ),
    ),
    Rule(
        lambda c, n: c.train.global_batch_size * c.train.seq_length * _largest_weight(c) >= 2**31,
        lambda c, n: (
            f"train.global_batch_size {c.train.global_batch_size} x train.seq_length {c.train.seq_length} at "
            f"objective.vision_loss_weight {c.objective.vision_loss_weight} can pass 2^31, the largest count that "
            "megatron-core adds up: use a smaller batch or a weight with a smaller denominator, such as 0.5"
        ),
    ),
    Rule(
        lambda c, n: schedule_fault(c.optim, c.train.train_steps) is not None,
        lambda c, n: schedule_fault(c.optim, c.train.train_steps) or "",
    ),
    Rule(
        lambda c, n: not c.data.train,
        lambda c, n: "data.train is empty: give a list of {prefix, weight}, as tools/preprocess_data.py wrote them",
    ),
    Rule(
        lambda c, n: c.train.eval_interval > 0 and not c.data.valid,
        lambda c, n: (
            f"train.eval_interval {c.train.eval_interval} with an empty data.valid: "
            "give held-out datasets or set train.eval_interval to 0"
        ),
    ),
    Rule(
        lambda c, n: c.parallel.overlap_param_gather and not c.parallel.overlap_grad_reduce,
        lambda c, n: (
            "parallel.overlap_param_gather is true with parallel.overlap_grad_reduce false: "
            "set parallel.overlap_grad_reduce to true as well"
        ),
    ),
    Rule(
        lambda c, n: (
            (c.parallel.recompute_granularity == "full")
            != (c.parallel.recompute_method is not None and (c.parallel.recompute_num_layers or 0) > 0)
        ),
        lambda c, n: (
            f"parallel.recompute_granularity {c.parallel.recompute_granularity} with recompute_method "
            f"{c.parallel.recompute_method} and recompute_num_layers {c.parallel.recompute_num_layers}: "
            "full needs both (uniform or block, and at least 1), anything else neither"
        ),
    ),
    Rule(
        lambda c, n: (
            c.runtime.precision == "fp8" and _tokens_per_context_rank(c) % FP8_MULTIPLES[c.runtime.fp8_recipe] != 0
        ),
        lambda c, n: (
            f"runtime.fp8_recipe {c.runtime.fp8_recipe} with {_tokens_per_context_rank(c)} tokens per context rank "
            "(train.micro_batch_size x train.seq_length / parallel.context_parallel_size): "
            f"use a multiple of {FP8_MULTIPLES[c.runtime.fp8_recipe]}"
        ),
    ),
    Rule(
        lambda c, n: c.train.manual_gc_interval < 0 or (c.train.exit_duration or 0) < 0,
        lambda c, n: (
            f"train.manual_gc_interval {c.train.manual_gc_interval}, train.exit_duration {c.train.exit_duration}: "
            "neither may be negative"
        ),
    ),
    Rule(
        lambda c, n: c.resilience.hang_timeout_s >= c.runtime.distributed_timeout_s,
        lambda c, n: (
            f"resilience.hang_timeout_s {c.resilience.hang_timeout_s:g} is not below runtime.distributed_timeout_s "
            f"{c.runtime.distributed_timeout_s}, at which collectives end the run without a stack: lower the first or "
            "raise the second"
        ),
    ),
    Rule(
        lambda c, n: c.checkpoint.init_optimizer and c.checkpoint.init_from is None,
        lambda c, n: (
            "checkpoint.init_optimizer is true without checkpoint.init_from: name the checkpoint, or set it to false"
        ),
    ),
)


def broken_rules(config: RunConfig, world_size: int) -> list[Rule]:
    """Every rule that the configuration breaks, in the table's order."""
    return [rule for rule in RULES if rule.broken(config, world_size)]


def validate(config: RunConfig, world_size: int) -> None:
    """Raise InputError with the first broken rule."""
    for rule in broken_rules(config, world_size)[:1]:
        raise InputError(rule.message(config, world_size))
