"""What megatron-core's optimizer loses on its way through a checkpoint, and gets back here.

megatron-core's files are as they were published. Each repair stands around one call of it, in checkpoint/decoder.py; a
row of REPAIRS says what is lost without it, where, and which release needs it no more.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


@contextlib.contextmanager
def unpadded_offsets(optimizer: DistributedOptimizer) -> Iterator[None]:
    """Number the parameters of each gradient buffer without the padding at the ends of its buckets.

    For a fully reshardable state megatron-core joins all buckets without their padding, and then looks parameters up by
    their places in the padded buffer. With more than one bucket, all after the first padding would be saved shifted and
    the last filled up with zeros: master weights and moments. A release that subtracts the padding itself would
    subtract it twice here: the check of every save (checkpoint/consistency.py) refuses that.
    """
    padded = [buffer.param_index_map for buffer in optimizer.buffers]
    for buffer in optimizer.buffers:
        buffer.param_index_map = _unpadded(buffer)
    try:
        yield
    finally:
        for buffer, places in zip(optimizer.buffers, padded, strict=True):
            buffer.param_index_map = places


def _unpadded(buffer: Any) -> dict[torch.nn.Parameter, tuple[int, int, int]]:
    """Parameter -> its begin and end among the elements of all buckets, and its bucket."""
    padding_before = [0]
    for bucket in buffer.buckets:
        padding_before.append(padding_before[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
    return {
        parameter: (begin - padding_before[bucket], end - padding_before[bucket], bucket)
        for parameter, (begin, end, bucket) in buffer.param_index_map.items()
    }


def own_groups(saved: Sequence[dict[str, Any]], current: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups for a load: those of this run, with the number of updates of the `saved` ones.

    megatron-core takes every setting of a group from the checkpoint: betas and eps that the configuration no longer
    has, and of torch's AdamW no `bias_correction`, which Transformer Engine's FusedAdam reads. Since 0.19 it also finds
    the groups by their settings (max_lr, min_lr), and with another learning rate finds none.
    """
    updates = max((group["step"] for group in saved if "step" in group), default=0)
    settings = [{name: value for name, value in group.items() if name != "params"} for group in current]
    return [{**group, "step": int(updates)} for group in settings]  # FusedAdam's kernel refuses a float


def unshare_adam_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its own Adam `step` after a load.

    megatron-core stores ONE tensor as the step of all parameters; torch's AdamW then advances it once per parameter,
    and bias correction is silently wrong from the first resumed step on.
    """
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()


@dataclass(frozen=True, kw_only=True)
class Repair:
    """One thing that a checkpoint would lose."""

    function: Callable[..., Any]
    loses: str
    upstream: dict[str, str]
    """megatron-core version -> where it is lost."""

    fix: str
    """Upstream's, or the write-up that proposes one."""

    test: str
    """The test that fails without it, and the one that tells when a release needs it no more."""


REPAIRS = (
    Repair(
        function=unpadded_offsets,
        loses="master weights and moments behind a padded gradient bucket (fully_reshardable)",
        upstream={
            "0.16.1": "optimizer/distrib_optimizer.py:1475, sharded_param_state_fully_reshardable",
            "0.19.2": "optimizer/distrib_optimizer.py:1761, sharded_param_state_fully_reshardable",
        },
        fix="https://github.com/NVIDIA/Megatron-LM/pull/5077",
        test="tests/distributed/test_resume.py",
    ),
    Repair(
        function=own_groups,
        loses="the configuration's settings of Adam; with 0.19 a resume with another optim.lr or optim.min_lr",
        upstream={
            "0.16.1": "optimizer/distrib_optimizer.py:763, load_state_dict",
            "0.19.2": "optimizer/distrib_optimizer.py:970, load_state_dict; the keys: optimizer/optimizer.py:139",
        },
        fix="docs/upstream_group_keys.md",
        test="tests/distributed/test_optimizer_state.py::test_every_setting_of_the_optimizer_may_change_at_a_resume",
    ),
    Repair(
        function=unshare_adam_steps,
        loses="the number of updates of each parameter, with torch's AdamW",
        upstream={
            "0.16.1": "optimizer/distrib_optimizer.py:821, load_state_dict",
            "0.19.2": "optimizer/distrib_optimizer.py:1027, load_state_dict",
        },
        fix="docs/upstream_adam_step.md",
        test="tests/distributed/test_resume.py",
    ),
)
