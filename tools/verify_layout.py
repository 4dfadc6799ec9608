"""Whether a layout trains as one process does: on a run's machines, with its configuration, before weeks are spent.

torchrun --nproc-per-node N tools/verify_layout.py --config FILE [--section.field VALUE ...]

Trains a narrowed decoder on random documents, alone and in the layout, and prints the differences and a verdict. Ends
with 0 if rounding explains them, else with 2.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from megatron_ext.config import InputError, load, run_program
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.run import RunConfig
from megatron_ext.config.section import Count
from megatron_ext.config.validate import validate

if TYPE_CHECKING:
    from megatron_ext.train.verify import Verification


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(RunConfig):
    """Verify the layout of a run: its configuration, as pretrain_emu3.py takes it."""

    steps: Count = 5
    """Optimizer steps to compare."""


PLAIN = ParallelConfig()


def report(found: "Verification", console: Console) -> None:
    """What was trained, and the table of differences."""
    parallel, runtime, train, model = (
        getattr(found.config, name) for name in ("parallel", "runtime", "train", "model")
    )
    settings = ", ".join(f"{name} {value}" for name, value in vars(parallel).items() if value != getattr(PLAIN, name))
    lines = [
        f"layout   {settings or 'data parallel only'}; {runtime.precision} on {found.device}",
        f"trained  {model.num_layers} layers of width {model.hidden_size}, {train.train_steps} steps of "
        f"{train.global_batch_size} windows of {train.seq_length:,} ids; gradient buckets: {len(found.buckets)}, "
        f"padded: {sum(bucket.padded > bucket.elements for bucket in found.buckets)}",
        "",
        f"{'quantity':<22}{'largest difference':>20}{'bound':>10}   where",
    ]
    for row in found.comparisons:
        verdict = "" if row.agrees else "   DIFFERS"
        lines.append(f"{row.quantity:<22}{row.difference:>20.1e}{row.bound:>10.1e}   {row.place}{verdict}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def main(argv: list[str]) -> None:
    """Verify the layout of the run that `argv` describes."""
    config = load(VerifyConfig, argv, prog="verify_layout.py")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    validate(config, world_size)
    # Imported here, so that --help and --print_config answer at once.
    from megatron_ext.train.verify import verify
    from megatron_ext.vocab import Vocabulary

    console = Console(quiet=rank != 0)
    found = verify(config, world_size, config.steps, Vocabulary.load(config.vocab).layout, console)
    report(found, console)
    if not found.disagreements:
        console.print("verified: this layout trains as one process does")
        return
    if rank != 0:
        return  # one rank fails: a second might have the launcher end the first before it said why
    first = found.disagreements[0]
    raise InputError(
        f"this layout does not train as one process does: {first.quantity} off by {first.difference:.1e}, rounding "
        f"explains {first.bound:.1e} ({first.place}): choose another layout, and report the table above"
    )


def cli() -> None:
    """Console script emu3-verify-layout."""
    run_program(main)


if __name__ == "__main__":
    cli()
