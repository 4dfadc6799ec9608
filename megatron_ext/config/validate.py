"""Rules that span sections, as a table. What one section can check alone, it checks when it is made."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_ext.config.errors import InputError
from megatron_ext.config.model import DecoderShape
from megatron_ext.config.objective import as_fraction
from megatron_ext.config.optim import OptimConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.run import RunConfig
from megatron_ext.config.runtime import FP8_MULTIPLES, FP8_NEEDS_A_GPU


@dataclass(frozen=True)
class Rule:
    """One rule: broken where `broken(config, world_size)` holds."""

    broken: Callable[[RunConfig, int], bool]
    message: Callable[[RunConfig, int], str]
    """Names the fields, their values and the fix, in one line."""


def _data_parallel_size(config: RunConfig, world_size: int) -> int:
    ranks = config.parallel.tensor_model_parallel_size * config.parallel.context_parallel_size
    return max(1, world_size // ranks)


def _samples_per_microstep(config: RunConfig, world_size: int) -> int:
    return config.train.micro_batch_size * _data_parallel_size(config, world_size)


def _sequence_divisor(config: RunConfig) -> int:
    """A row must divide into zig-zag chunks per context rank, and those over the tensor axis under sequence
    parallelism."""
    context, tensor = config.parallel.context_parallel_size, config.parallel.tensor_model_parallel_size
    return (2 * context if context > 1 else 1) * (tensor if config.parallel.sequence_parallel else 1)


def _tokens_per_context_rank(config: RunConfig) -> int:
    return config.train.micro_batch_size * config.train.seq_length // config.parallel.context_parallel_size


def _largest_weight(config: RunConfig) -> int:
    """The largest integer weight of a label: weights are k/n over one n (objectives/next_token.py)."""
    fraction = as_fraction(config.objective.vision_loss_weight)
    return max(fraction.numerator, fraction.denominator)


def layout_fault(parallel: ParallelConfig, world_size: int) -> str | None:
    """Why the parallel sizes do not lay out over `world_size` ranks, and the fix; None if they do."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if world_size % (tensor * context):
        return (
            f"parallel.tensor_model_parallel_size {tensor} x parallel.context_parallel_size {context} does not divide "
            f"the {world_size} ranks that were started: "
            f"change the sizes or start a multiple of {tensor * context} ranks"
        )
    return None


DIVIDED = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
"""Numbers of section model that the tensor axis divides."""


def tensor_fault(shape: DecoderShape, parallel: ParallelConfig, name: str) -> str | None:
    """Why the tensor axis cannot divide `name` of `DIVIDED`, and the fix; None if it can."""
    size, ranks = getattr(shape, name), parallel.tensor_model_parallel_size
    if size % ranks == 0:
        return None
    return f"model.{name} {size} is not a multiple of parallel.tensor_model_parallel_size {ranks}: change one of them"


def exchange_fault(shape: DecoderShape, parallel: ParallelConfig) -> str | None:
    """Why heads cannot be dealt to the context ranks, and the fix; None if they can, or are not to be."""
    groups = shape.num_query_groups // parallel.tensor_model_parallel_size
    if parallel.cp_comm_type != "a2a" or groups % parallel.context_parallel_size == 0:
        return None
    return (  # Transformer Engine's assertion, context_parallel.py AttnFuncWithCPAndQKVOA2A
        f"parallel.cp_comm_type a2a deals the {groups} query groups of a tensor rank to "
        f"{parallel.context_parallel_size} context ranks, which does not come out even: use p2p or all_gather"
    )


def fp8_fault(shape: DecoderShape, parallel: ParallelConfig, fp8_recipe: str | None) -> str | None:
    """Which matrices are of no shape for 8 bits, and the fix; None if all are, or 16 bits are used."""
    tensor, multiple = parallel.tensor_model_parallel_size, FP8_MULTIPLES.get(fp8_recipe, 1)
    widths = {
        "model.hidden_size": shape.hidden_size,
        "model.ffn_hidden_size / parallel.tensor_model_parallel_size": shape.ffn_hidden_size // tensor,
        "model.num_attention_heads x model.kv_channels / parallel.tensor_model_parallel_size": (
            shape.num_attention_heads * shape.kv_channels // tensor
        ),
    }
    wrong = " and ".join(f"{name} is {width}" for name, width in widths.items() if width % multiple)
    if not wrong:
        return None
    return (
        f"{wrong}, runtime.fp8_recipe {fp8_recipe} needs a multiple of {multiple}: "
        "change the shape or set runtime.precision to bf16"
    )


def shape_faults(shape: DecoderShape, parallel: ParallelConfig, fp8_recipe: str | None) -> list[str]:
    """What keeps a decoder from running in this layout, and in 8 bits: one message each, with its fix."""
    faults = (
        *(tensor_fault(shape, parallel, name) for name in DIVIDED),
        exchange_fault(shape, parallel),
        fp8_fault(shape, parallel, fp8_recipe),
    )
    return [fault for fault in faults if fault]


def _fp8_fault(config: RunConfig) -> str | None:
    fp8_recipe = config.runtime.fp8_recipe if config.runtime.precision == "fp8" else None
    return fp8_fault(DecoderShape.of(config.model), config.parallel, fp8_recipe)


def schedule_fault(optim: OptimConfig, steps: int) -> str | None:
    """Why the learning rate of a run of `steps` contradicts itself, and the fix; None if it does not."""
    decays_to_the_end = optim.lr_decay_style != "constant" and optim.lr_decay_steps is None
    if not decays_to_the_end or optim.lr_warmup_steps < steps:
        return None
    return (
        f"optim.lr_warmup_steps {optim.lr_warmup_steps} is not below the {steps} steps of the decay: "
        "shorten the warm-up or set optim.lr_decay_steps"
    )


def ramp_fault(config: RunConfig, world_size: int) -> str | None:
    """Why the global batch cannot grow as asked on `world_size` ranks, and the fix; None if it can."""
    if config.train.global_batch_size_ramp is None:
        return None
    first, increment, samples = config.train.global_batch_size_ramp
    unit, full = _samples_per_microstep(config, world_size), config.train.global_batch_size
    if first < full and (full - first) % increment == 0:
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
        return FP8_NEEDS_A_GPU
    if precision == "fp32" and on_gpu:
        return (
            "runtime.precision is fp32 on a GPU, where Transformer Engine has no attention over packed documents in "
            "fp32: set runtime.precision to auto or bf16, or runtime.device to cpu"
        )
    return None


RULES = (
    Rule(lambda c, n: layout_fault(c.parallel, n) is not None, lambda c, n: layout_fault(c.parallel, n) or ""),
    *(
        Rule(
            lambda c, n, name=name: tensor_fault(DecoderShape.of(c.model), c.parallel, name) is not None,
            lambda c, n, name=name: tensor_fault(DecoderShape.of(c.model), c.parallel, name) or "",
        )
        for name in DIVIDED
    ),
    Rule(
        lambda c, n: exchange_fault(DecoderShape.of(c.model), c.parallel) is not None,
        lambda c, n: exchange_fault(DecoderShape.of(c.model), c.parallel) or "",
    ),
    Rule(lambda c, n: _fp8_fault(c) is not None, lambda c, n: _fp8_fault(c) or ""),
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
        lambda c, n: c.train.seq_length % c.data.document_alignment != 0,
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
        lambda c, n: c.resilience.hang_timeout_s >= c.runtime.distributed_timeout_s,
        lambda c, n: (
            f"resilience.hang_timeout_s {c.resilience.hang_timeout_s:g} is not below runtime.distributed_timeout_s "
            f"{c.runtime.distributed_timeout_s}, at which collectives end the run without a stack: lower the first or "
            "raise the second"
        ),
    ),
    Rule(
        lambda c, n: c.runtime.names_gpu and precision_fault(c.runtime.precision, on_gpu=True) is not None,
        lambda c, n: precision_fault(c.runtime.precision, on_gpu=True) or "",
    ),
    Rule(
        lambda c, n: c.observe.record_memory_history and c.runtime.device == "cpu",
        lambda c, n: (
            "observe.record_memory_history is true with runtime.device cpu: it looks at a GPU's memory, set it to false"
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
