"""A plan on the console."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_ext.config.errors import InputError
from megatron_ext.config.model import DecoderShape
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.run import RunConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.config.train import TrainConfig
from megatron_ext.plan.job import USABLE_SHARE, Plan, plan_job
from megatron_ext.plan.question import Question
from megatron_ext.plan.suggest import Layout, suggest_layouts

MOST_LAYOUTS = 12


def answer(question: Question, config: RunConfig) -> None:
    """Print the plan of `config`, and other layouts if asked for.

    Raises:
        InputError: the run would not start; what is wrong has been printed.
    """
    console = Console(highlight=False)
    plan = plan_job(config, question)
    print_plan(console, config, plan, question)
    if question.suggest:
        print_layouts(console, config.parallel, plan, suggest_layouts(config, plan, question), question)
    if plan.faults:
        raise InputError(f"this run would not start on {question.world_size} ranks; broken rules: {len(plan.faults)}")


def print_plan(console: Console, config: RunConfig, plan: Plan, question: Question) -> None:
    """Model, layout, step, time, memory of a rank, broken rules."""
    console.print(f"[bold]{config.model.preset} on {question.world_size:,} ranks[/bold]\n")
    console.print(_facts(config, plan, question))
    console.print()
    console.print(_memory(config, plan, question))
    for fault in plan.faults:
        console.print(f"\n[red]broken[/red]  {escape(fault)}", soft_wrap=True)


def print_layouts(
    console: Console, current: ParallelConfig, plan: Plan, layouts: Sequence[Layout], question: Question
) -> None:
    """The best layouts, and the arguments that choose the first instead of the current one."""
    console.print()
    if not layouts:
        console.print(
            f"No layout of {question.world_size:,} ranks fits into {_usable(question)}: "
            "use more ranks, a smaller train.micro_batch_size or a shorter train.seq_length",
            soft_wrap=True,
        )
        return
    table = Table("tensor", "context", "data", "recompute", "GiB", "overhead", box=None, header_style="dim")
    for column in (0, 1, 2, 4, 5):
        table.columns[column].justify = "right"
    for layout in layouts[:MOST_LAYOUTS]:
        parallel = layout.parallel
        table.add_row(
            str(parallel.tensor_model_parallel_size),
            str(parallel.context_parallel_size),
            str(layout.data_parallel_size),
            _recomputation(parallel, plan.shape),
            _gib(layout.memory.peak),
            f"{layout.overhead:.0%}",
        )
    console.print("[bold]Layouts that fit[/bold], by estimated time beyond the model's own work (docs/planning.md)\n")
    console.print(table)
    console.print("\n" + _arguments(current, layouts[0].parallel), soft_wrap=True)


def _facts(config: RunConfig, plan: Plan, question: Question) -> Table:
    shape, parameters, parallel = plan.shape, plan.parameters, config.parallel
    tensor = f"tensor {parallel.tensor_model_parallel_size}"
    sequence = " with sequence parallelism" if parallel.sequence_parallel else ""
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "model",
        f"{shape.num_layers} layers, {shape.hidden_size:,} wide, {shape.num_attention_heads} heads in "
        f"{shape.num_query_groups} groups, MLP {shape.ffn_hidden_size:,}, {plan.vocab_size:,} ids "
        f"({plan.vocab_rows:,} rows)",
    )
    table.add_row(
        "parameters",
        f"{parameters.total:,} (matrices {parameters.matrices:,}, norms {parameters.norms:,}, embedding "
        f"{parameters.embedding:,}, head {parameters.head:,})",
    )
    table.add_row(
        "layout",
        f"{tensor}{sequence} x context {parallel.context_parallel_size} x data {plan.data_parallel_size}, "
        f"recompute {_recomputation(parallel, shape)}",
    )
    table.add_row(
        "step",
        f"{config.train.global_batch_size:,} windows of {config.train.seq_length:,} = {plan.tokens_per_step:,} tokens, "
        f"{plan.microbatches} microbatches a rank" + _ramp(config.train),
    )
    table.add_row("FLOPs", f"{plan.flops_per_token / 1e9:.1f} GF a token (causal, forward and backward)")
    table.add_row("run", f"{plan.steps:,} steps, {plan.tokens:,.0f} tokens")
    if config.runtime.device != "cpu":
        table.add_row(
            "time",
            f"{plan.days:,.1f} days at {question.mfu:.0%} of {question.peak_tflops:g} TFLOP/s: "
            f"{plan.tokens_per_second:,.0f} tokens/s, {plan.tokens_per_second / question.world_size:,.0f} a GPU",
        )
    return table


def _ramp(train: TrainConfig) -> str:
    if train.global_batch_size_ramp is None:
        return ""
    first, increment, samples = train.global_batch_size_ramp
    return f"; from {first:,} windows in increments of {increment:,} over {samples:,} windows"


def _memory(config: RunConfig, plan: Plan, question: Question) -> Table:
    memory = plan.memory
    table = Table("memory of a rank", "GiB", "", box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.columns[1].justify = "right"
    table.add_row("weights", _gib(memory.weights), _precision(config.runtime, plan))
    table.add_row("gradients", _gib(memory.gradients), "fp32")
    table.add_row("optimizer", _gib(memory.optimizer), "fp32, sharded over data x context")
    table.add_row("activations", _gib(memory.activations), "kept by the forward pass of a microbatch")
    table.add_row("head", _gib(memory.head), "while its backward pass runs")
    table.add_row("layer", _gib(memory.layer), "while its backward pass runs, after the head's")
    if config.runtime.device == "cpu":
        table.add_row("peak", _gib(memory.peak))
        return table
    fits = memory.peak <= USABLE_SHARE * question.memory_gib * 2**30
    verdict = "[green]fits[/green]" if fits else "[red]does not fit[/red]"
    advice = "" if fits else "; --suggest finds layouts that do"
    peak = f"[bold]{_gib(memory.peak)}[/bold]"
    table.add_row("[bold]peak[/bold]", peak, f"{verdict} into {_usable(question)}{advice}")
    return table


def _precision(runtime: RuntimeConfig, plan: Plan) -> str:
    if runtime.precision != "auto":
        return plan.precision
    if runtime.device != "cpu":
        return f"{plan.precision} (auto on a GPU)"
    return f"{plan.precision} (auto: bf16 where the CPU multiplies it, else fp32; this one takes more)"


def _usable(question: Question) -> str:
    return f"{USABLE_SHARE * question.memory_gib:g} GiB, {USABLE_SHARE:.0%} of a GPU's {question.memory_gib:g}"


def _gib(size: float) -> str:
    """Less than one in thousandths."""
    return f"{size / 2**30:.1f}" if size >= 2**30 else f"{size / 2**30:.3f}"


def _recomputation(parallel: ParallelConfig, shape: DecoderShape) -> str:
    if parallel.recompute_granularity is None:
        return "nothing"
    if parallel.recompute_granularity == "selective":
        return "core attention"
    layers = parallel.recompute_num_layers or 1
    if parallel.recompute_method == "block":
        return f"{min(layers, shape.num_layers)} of {shape.num_layers} layers"
    return f"all layers, {layers} at a time"


def _arguments(current: ParallelConfig, best: ParallelConfig) -> str:
    """What to add to the command line for the best layout."""
    changed = {name: value for name, value in vars(best).items() if value != getattr(current, name)}
    if not changed:
        return "The first one is the configuration's own."
    shown = {name: "null" if value is None else str(value).lower() for name, value in changed.items()}
    return "The first one: " + " ".join(f"--parallel.{name} {value}" for name, value in shown.items())
