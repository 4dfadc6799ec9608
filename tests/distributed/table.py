"""The layouts and knobs that the walk combines, as a table in which every pair of values meets."""

import itertools
from dataclasses import dataclass
from typing import Any

# Written by a greedy search for the fewest rows: 10 layouts x 3 ways to recompute (or to overlap) need 30.
TABLE = """
tp  cp  dp  sp  scope     accumulation  recompute  overlap  norm  buckets
1   1   1   -   document  1             full       both     qk    several
1   1   1   -   window    4             none       grads    -     several
1   1   1   -   document  1             selective  none     -     one
2   1   1   -   window    4             full       grads    qk    several
2   1   1   sp  document  1             none       none     -     one
2   1   1   sp  window    4             selective  both     qk    several
1   2   1   -   window    4             selective  none     -     one
1   2   1   -   document  1             full       grads    qk    several
1   2   1   -   document  1             none       both     qk    several
1   1   2   -   document  4             selective  both     qk    several
1   1   2   -   window    1             none       grads    -     one
1   1   2   -   window    4             full       none     -     one
4   1   1   -   window    4             full       grads    -     several
4   1   1   sp  window    1             selective  none     qk    one
4   1   1   sp  document  4             none       both     qk    several
1   4   1   -   window    4             none       none     qk    one
1   4   1   -   document  1             full       both     -     several
1   4   1   -   document  1             selective  grads    qk    several
1   1   4   -   document  1             full       none     qk    one
1   1   4   -   window    4             none       grads    -     several
1   1   4   -   window    1             selective  both     -     several
2   2   1   -   window    1             selective  none     qk    one
2   2   1   sp  document  4             none       grads    -     several
2   2   1   sp  document  1             full       both     qk    several
2   1   2   -   window    1             none       both     -     several
2   1   2   sp  window    1             selective  grads    qk    several
2   1   2   sp  document  4             full       none     -     one
1   2   2   -   window    1             none       both     -     one
1   2   2   -   document  4             full       grads    qk    several
1   2   2   -   window    4             selective  none     -     one
"""

SEQUENCE_PARALLEL = {"-": False, "sp": True}
RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
OVERLAP = {
    "none": {},
    "grads": {"overlap_grad_reduce": True},
    "both": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}
NORM = {"-": {}, "qk": {"qk_layernorm": True}}
BUCKETS = {"one": {}, "several": {"bucket_size": 1000}}
"""Gradients are reduced in: several buckets are padded on every layout."""

GLOBAL_BATCH = 16
"""Windows of a step: divides into 1 and into 4 microbatches at data-parallel size 1, 2 and 4."""

FACTORS = {
    "layout": tuple(
        sizes for world in (1, 2, 4) for sizes in itertools.product((1, 2, 4), repeat=3)
        if sizes[0] * sizes[1] * sizes[2] == world
    ),
    "sp": tuple(SEQUENCE_PARALLEL),
    "scope": ("document", "window"),
    "accumulation": ("1", "4"),
    "recompute": tuple(RECOMPUTE),
    "overlap": tuple(OVERLAP),
    "norm": tuple(NORM),
    "buckets": tuple(BUCKETS),
}  # fmt: skip
"""What is combined. `layout` is (tensor, context, data) parallel size."""


@dataclass(frozen=True)
class Case:
    """One row."""

    layout: tuple[int, int, int]
    sp: str
    scope: str
    accumulation: str
    recompute: str
    overlap: str
    norm: str
    buckets: str

    def __str__(self) -> str:
        sizes = "tp{}-cp{}-dp{}".format(*self.layout)
        return "-".join([sizes, *(value for name, value in vars(self).items() if name != "layout" and value != "-")])

    @property
    def world_size(self) -> int:
        tensor, context, data = self.layout
        return tensor * context * data

    @property
    def reference(self) -> tuple[str, str]:
        """What the training itself depends on; the rest is layout."""
        return self.scope, self.norm

    def parallel(self) -> dict[str, Any]:
        """Section `parallel`."""
        tensor, context, _ = self.layout
        sizes = {"tensor_model_parallel_size": tensor, "context_parallel_size": context}
        return (
            sizes
            | {"sequence_parallel": SEQUENCE_PARALLEL[self.sp]}
            | RECOMPUTE[self.recompute]
            | OVERLAP[self.overlap]
            | BUCKETS[self.buckets]
        )

    def micro_batch_size(self) -> int:
        return GLOBAL_BATCH // (self.layout[2] * int(self.accumulation))

    def pairs(self) -> set[frozenset[tuple[str, Any]]]:
        """Every two values that meet in this row."""
        return {frozenset(pair) for pair in itertools.combinations(vars(self).items(), 2)}


def cases() -> tuple[Case, ...]:
    """The rows of TABLE."""
    rows = (line.split() for line in TABLE.strip().splitlines()[1:])
    return tuple(Case((int(tp), int(cp), int(dp)), *rest) for tp, cp, dp, *rest in rows)


def is_possible(case: Case) -> bool:
    """Without a tensor axis there is nothing for sequence parallelism to split along; gradients that are reduced at the
    end are so at once."""
    return (case.sp == "-" or case.layout[0] > 1) and (case.buckets == "one" or case.overlap != "none")
