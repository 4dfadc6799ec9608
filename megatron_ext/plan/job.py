"""The plan of a job: everything about a configuration on a number of ranks that is known before it runs."""

import math
from dataclasses import dataclass

from megatron_ext.config.model import DecoderShape
from megatron_ext.config.run import RunConfig
from megatron_ext.config.validate import broken_rules, possible_precisions, precision_fault
from megatron_ext.plan.flops import flops_per_token
from megatron_ext.plan.memory import Memory, rank_memory
from megatron_ext.plan.parameters import Parameters, count_parameters, pad_vocabulary
from megatron_ext.plan.question import Question
from megatron_ext.vocab import layout_of

USABLE_SHARE = 0.9
"""Of a GPU's memory: the rest is for its context, communication buffers and fragmentation."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job is, needs and takes."""

    shape: DecoderShape
    vocab_size: int
    vocab_rows: int
    """The vocabulary, padded for the tensor axis."""

    parameters: Parameters
    """Of the model; padding left out."""

    data_parallel_size: int
    microbatches: int
    """Forward and backward passes of a rank in one step."""

    precision: str
    """Of weights and activations. For auto what it can become; on a CPU, which may be fp32 or bf16, what takes more."""

    memory: Memory
    flops_per_token: float
    tokens_per_step: int
    steps: int
    tokens: float
    tokens_per_second: float
    """Of the whole job, at the question's MFU."""

    faults: tuple[str, ...]
    """Every broken rule, with its fix."""

    @property
    def days(self) -> float:
        """Wall-clock time of all steps, without saving, evaluation and interruptions."""
        return self.tokens / self.tokens_per_second / 86_400


def plan_job(config: RunConfig, question: Question) -> Plan:
    """The plan of `config` on `question.world_size` ranks.

    Raises:
        InputError: the vocabulary's text tokenizer cannot be read.
    """
    parallel, train, world_size = config.parallel, config.train, question.world_size
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    shape = DecoderShape.of(config.model)
    vocab_size = layout_of(config.vocab).size
    data = max(1, world_size // (tensor * context))
    tokens_per_step = train.global_batch_size * train.seq_length
    flops = flops_per_token(shape, train.seq_length, vocab_size=vocab_size)
    steps = train.train_steps if question.tokens is None else math.ceil(question.tokens / tokens_per_step)
    on_gpu = config.runtime.device != "cpu"
    memories = {
        name: rank_memory(shape, vocab_size, config.computing_in(name).runtime, parallel, train, world_size)
        for name in possible_precisions(config.runtime.precision, on_gpu=on_gpu)
    }
    precision = max(memories, key=lambda name: memories[name].peak)
    faults = [rule.message(config, world_size) for rule in broken_rules(config, world_size)]
    # A rule where the device is named. A plan is one for GPUs otherwise.
    if config.runtime.device == "auto" and (fault := precision_fault(precision, on_gpu=True)):
        faults.append(fault)
    return Plan(
        shape=shape,
        vocab_size=vocab_size,
        vocab_rows=pad_vocabulary(vocab_size, tensor),
        parameters=count_parameters(shape, vocab_size),
        data_parallel_size=data,
        microbatches=math.ceil(train.global_batch_size / (data * train.micro_batch_size)),
        precision=precision,
        memory=memories[precision],
        flops_per_token=flops,
        tokens_per_step=tokens_per_step,
        steps=steps,
        tokens=train.samples_of(steps) * train.seq_length,
        tokens_per_second=world_size * question.peak_tflops * 1e12 * question.mfu / flops,
        faults=tuple(faults),
    )
