"""What is killed, when: a list that follows from a seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

ANY_TIME = "any time"
START_UP = "start-up"

PARTIAL = r"checkpoints/\.partial-\d{8}-[^/]+"
WEIGHTS = PARTIAL + r"/decoder/__\d+_\d+\.distcp"
MOMENTS = {
    "folder made": ("made", PARTIAL),
    "weights begun": ("made", WEIGHTS),
    "weights written": ("closed", WEIGHTS),
    "before the manifest": ("renamed", PARTIAL + r"/decoder/\.metadata"),
    "manifest written": ("closed", PARTIAL + r"/manifest\.json"),
    "renamed": ("renamed", r"checkpoints/step_\d{8}"),
    "before `latest` moves": ("closed", r"checkpoints/\.partial-latest-.*"),
    "`latest` moved": ("renamed", "checkpoints/latest"),
    "old one being removed": ("renamed", r"checkpoints/\.partial-step_.*"),
}
"""Moment of a save -> what happens to which path of the run folder then, in the order of a save."""

RANK, MAIN_RANK, ALL_RANKS, WRITER = "a rank", "rank 0", "all ranks", "a writer"
EVERYTHING, TORCHRUN, TERMINATE = "everything", "torchrun", "SIGTERM to all"
ONE_FILE_FULL, ALL_FILES_FULL = "full disk, one file", "full disk, every file"
ENDS_THE_JOB = (EVERYTHING, TORCHRUN, TERMINATE)
"""After these somebody starts torchrun again."""

Kind = tuple[str | None, str]
"""Target and moment."""

KINDS: tuple[Kind, ...] = (
    *[(RANK, ANY_TIME)] * 2,
    (ALL_RANKS, ANY_TIME),
    (EVERYTHING, ANY_TIME),
    (TORCHRUN, ANY_TIME),
    (TERMINATE, ANY_TIME),
    *[(WRITER, "weights begun")] * 3,
    (WRITER, "weights written"),
    (RANK, START_UP),
    (EVERYTHING, START_UP),
    *[(ONE_FILE_FULL, "weights begun")] * 2,
    (ONE_FILE_FULL, "manifest written"),
    (ALL_FILES_FULL, ANY_TIME),
    *[(None, moment) for moment in MOMENTS],
)
"""One round; None: rank 0, which makes the checkpoints, all ranks or everything, as the seed says."""

SHORT: tuple[Kind, ...] = (
    (RANK, ANY_TIME),
    (WRITER, "weights begun"),
    (ONE_FILE_FULL, "weights begun"),
    (EVERYTHING, "renamed"),
    (TORCHRUN, ANY_TIME),
    (TERMINATE, ANY_TIME),
)
"""For the tests, in this order."""

STRIDE = 3
"""Steps of the run from one kill to the next: it always gets on, and never ends before the last kill."""

LAST_STEPS = 12
"""Steps after the last kill."""

LONGEST_DELAY_S = 0.4
"""At any time: about two steps and a save."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill, as the seed has it."""

    number: int
    target: str
    moment: str
    step: int
    """Not before this step's line of metrics."""
    delay_s: float
    """At any time: so long after it."""
    share: float
    """At start-up: after this part of an undisturbed start-up."""
    rank: int
    """Which one, where one is killed."""


def plan(seed: int, count: int, ranks: int, kinds: Sequence[Kind] = KINDS) -> list[Kill]:
    """`count` kills: rounds of all kinds, each in an order of its own (SHORT in its own). A start-up that is killed
    follows a kill that ends a job.
    """
    moments = random.Random(seed)
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count:
        chosen += _round(moments, kinds)
    return [
        Kill(
            number=number,
            target=target,
            moment=moment,
            step=1 + STRIDE * number + moments.randrange(STRIDE),
            delay_s=round(moments.uniform(0, LONGEST_DELAY_S), 4),
            share=round(moments.random(), 4),
            rank=moments.randrange(ranks),
        )
        for number, (target, moment) in enumerate(chosen[:count])
    ]


def steps_of(count: int) -> int:
    """Length of the run that suffers `count` kills."""
    return STRIDE * count + LAST_STEPS


def _round(moments: random.Random, kinds: Sequence[Kind]) -> list[tuple[str, str]]:
    order = [
        (target or moments.choice((MAIN_RANK, ALL_RANKS, EVERYTHING)), moment)
        for target, moment in kinds
        if moment != START_UP
    ]
    if kinds is not SHORT:
        moments.shuffle(order)
    for target in [target for target, moment in kinds if moment == START_UP]:
        places = [place for place, kill in enumerate(order, start=1) if kill[0] in ENDS_THE_JOB and kill[1] != START_UP]
        order.insert(moments.choice(places), (target, START_UP))
    return order
