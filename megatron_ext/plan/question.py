"""What `--dry_run` and `--suggest` ask, taken from the command line before the rest of it becomes a RunConfig."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.config.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Question:
    """A job to plan: how many ranks, on which machine, for how many tokens."""

    world_size: int
    """Ranks of the job."""

    suggest: bool
    """Rank other layouts as well."""

    tokens: float | None
    """Tokens to train on; None means the configuration's steps."""

    mfu: float
    """Share of the peak that the model's FLOPs reach."""

    memory_gib: float
    """Memory of a GPU."""

    peak_tflops: float
    """Peak of a GPU, dense, in the precision of the matrix products."""

    def __post_init__(self) -> None:
        for name in ("world_size", "mfu", "memory_gib", "peak_tflops", "tokens"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name} {value:g}: give a number above 0")
        if self.mfu > 1:
            raise InputError(f"--mfu {self.mfu:g}: it is a share of the peak, give a number up to 1, such as 0.4")


def take_question(argv: Sequence[str]) -> tuple[Question | None, list[str]]:
    """The question that `argv` asks, if any, and the arguments that are not part of it.

    Raises:
        InputError: a value that is no number, or an option of the question without --dry_run or --suggest.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--suggest", action="store_true")
    parser.add_argument("--world_size", type=int)
    for name in ("tokens", "mfu", "memory_gib", "peak_tflops"):
        parser.add_argument(f"--{name}", type=float)
    try:
        asked, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(str(error).replace("argument ", "", 1)) from None
    given = {name: value for name, value in vars(asked).items() if value is not None and value is not False}
    if not (asked.dry_run or asked.suggest):
        if given:
            raise InputError(f"--{next(iter(given))} belongs to --dry_run or --suggest: add one of them, or remove it")
        return None, rest
    # NVIDIA's H100 and H200: 80 GB and more, 989.4 TFLOP/s in bf16.
    defaults = {"world_size": int(os.environ.get("WORLD_SIZE", 1)), "mfu": 0.4, "memory_gib": 80, "peak_tflops": 989.4}
    given.pop("dry_run", None)
    return Question(**({"suggest": False, "tokens": None} | defaults | given)), rest
