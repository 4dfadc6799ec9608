"""What a checkpoint keeps of the optimizer and what it does not: the state is the checkpoint's, the settings are the
run's; and a checkpoint whose master weights are not its weights is neither written nor resumed from.
"""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint.streaming import read_weights
from megatron_ext.config import InputError
from megatron_ext.config.optim import OptimConfig
from megatron_ext.hf.decoder import canonical_name
from tests.support.decoding import OPTIM, assert_several_padded
from tests.support.training import training

BUCKETS = {"overlap_grad_reduce": True, "bucket_size": 2000}

OTHER_SETTINGS = {
    "lr": 2e-2, "min_lr": 1e-3, "lr_warmup_steps": 5, "lr_decay_style": "linear", "lr_decay_steps": 7,
    "weight_decay": 0.3, "adam_beta1": 0.5, "adam_beta2": 0.7, "adam_eps": 1e-3, "clip_grad": 0.01,
}  # fmt: skip
"""Every field of section optim with another value than OPTIM has."""

CHANGES = {"lr": {"lr": 2e-2}, "min_lr": {"min_lr": 1e-3}, "all": OTHER_SETTINGS}


def changed_settings(folder: Path) -> dict:
    """Change of section optim -> what a resume with it has loaded, and then does.

    megatron-core 0.19 finds parameter groups by their learning rates; 0.16.1 is made to do so here.
    """
    from megatron.core.optimizer import distrib_optimizer

    keys = tuple(dict.fromkeys((*distrib_optimizer.param_group_identifier_keys, "max_lr", "min_lr")))
    found: dict = {}
    with training(folder) as run:
        run.steps(0, 2)
        source, saved = run.checkpoint.save(2, {"step": 2}), run.copies()
        found["straight"] = run.steps(2, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distrib_optimizer, "param_group_identifier_keys", keys)
        for name, change in CHANGES.items():
            with training(folder, optim=change) as run:
                run.checkpoint.load_latest()
                kept = all(map(torch.equal, run.copies(), saved))
                found[name] = kept, adam_settings(run), run.steps(2, 3), run.optimizer.learning_rate(3)
        with training(folder / "stage_2", optim=OTHER_SETTINGS) as run:
            run.checkpoint.load_initial(source, with_optimizer=True)
            found["init_optimizer"] = all(map(torch.equal, run.copies(), saved)), adam_settings(run)
    return found


def adam_settings(run) -> tuple[set, set]:
    """(betas, eps) of every parameter group, and the number of updates of every parameter."""
    inner = run.checkpoint.distributed.optimizer
    groups = {(*group["betas"], group["eps"]) for group in inner.param_groups}
    return groups, {int(state["step"]) for state in inner.state.values()}


def test_every_setting_of_the_optimizer_may_change_at_a_resume(ranks, tmp_path):
    found = ranks.run(changed_settings, 1, tmp_path)[0]
    assert {field.name for field in dataclasses.fields(OptimConfig)} == set(OTHER_SETTINGS)
    assert not any(getattr(OPTIM, name) == value for name, value in OTHER_SETTINGS.items())
    rates = {"lr": 2e-2, "min_lr": OPTIM.lr, "all": 2e-2 * 3 / 5}
    for name, change in CHANGES.items():
        kept, settings, step, rate = found[name]
        assert kept and settings == expected_settings(change), name
        # The gradient is that of the loaded weights; a setting acts in the update after it.
        assert step == found["straight"] and rate == pytest.approx(rates[name]), name
    assert found["init_optimizer"] == (True, expected_settings(OTHER_SETTINGS))


def expected_settings(change: dict) -> tuple[set, set]:
    """What `adam_settings` finds two updates after the start."""
    optim = dataclasses.replace(OPTIM, **change)
    return {(optim.adam_beta1, optim.adam_beta2, optim.adam_eps)}, {2}


def _leave_out_buckets(path: Path) -> None:
    """As checkpoints were before the repair."""
    manifest = json.loads(path.read_text())
    del manifest["metadata"]["gradient_buckets"]
    path.write_text(json.dumps(manifest))


def contradictory(folder: Path) -> tuple:
    """What a save without the repair comes to; the checkpoint that it would have left, resumed from and begun with."""
    from megatron_ext.checkpoint import decoder

    with training(folder, BUCKETS, precision="bf16") as run, pytest.MonkeyPatch.context() as patch:
        assert_several_padded(run.optimizer)
        run.steps(0, 2)
        weights = [weight.detach().clone() for weight in run.checkpoint.model.parameters()]
        patch.setattr(decoder, "unpadded_offsets", lambda optimizer: contextlib.nullcontext())
        run.checkpoint.start_save(2, {"step": 2})
        outcome = run.checkpoint.finish()
        left = (folder / "checkpoints").exists()
        patch.setattr(decoder, "contradiction", lambda *arguments: None)
        source = run.checkpoint.save(2, {"step": 2})
        run.topology.from_main(lambda: _leave_out_buckets(source / "manifest.json"))
    refusals = []
    with training(folder, BUCKETS, precision="bf16") as run:
        for load in (run.checkpoint.load_latest, lambda: run.checkpoint.load_initial(source, with_optimizer=True)):
            with pytest.raises(InputError) as refusal:
                load()
            refusals.append(str(refusal.value))
    with pytest.raises(InputError) as refusal:
        [weight.whole() for weight in read_weights(source, exact=True).values()]
    refusals.append(str(refusal.value))
    with training(folder / "next", BUCKETS, precision="bf16") as run:
        run.checkpoint.load_initial(source, with_optimizer=False)
        taken = all(map(torch.equal, run.checkpoint.model.parameters(), weights))
    return outcome.failure, left, refusals, taken


def test_a_checkpoint_that_contradicts_itself_is_not_saved_and_not_resumed_from(ranks, tmp_path):
    by_rank = ranks.run(contradictory, 2, tmp_path)
    failure, left, *_ = by_rank[0]
    assert failure.startswith("rank 0: master weights do not round to the weights: ") and "others" in failure
    assert not left, "nothing is written"
    for _, _, (*refusals, export), taken in by_rank:
        assert "step_00000002 contradicts itself (" in export and "take them with dtype bfloat16" in export
        for refusal in refusals:
            assert "step_00000002 contradicts itself (" in refusal and "\n" not in refusal
            assert "written before several padded gradient buckets were saved right" in refusal
            assert "checkpoint.init_from" in refusal and "checkpoint.init_optimizer false" in refusal
        assert taken


def read_as_saved(folder: Path, optimizer_format: str) -> tuple:
    """Weights and master weights of a training in bf16 by name; what a reader of its checkpoint finds, in both ways."""
    with training(folder, BUCKETS, precision="bf16", optimizer_format=optimizer_format) as run:
        run.steps(0, 2)
        source, inner = run.checkpoint.save(2, {"step": 2}), run.checkpoint.distributed
        weights, masters = {}, {}
        for name, weight in run.checkpoint.model.named_parameters():
            group, place = inner.model_param_group_index_map[weight]
            weights[canonical_name(name)] = weight.detach().clone()
            masters[canonical_name(name)] = (
                inner.optimizer.param_groups[group]["params"][place].view(weight.shape).clone()
            )
    found = ({name: t.whole() for name, t in read_weights(source, exact=exact).items()} for exact in (False, True))
    return weights, masters, *found


@pytest.mark.parametrize("optimizer_format", ["fully_reshardable", "dp_reshardable"])
def test_master_weights_are_read_where_the_checkpoint_has_them_by_name(ranks, tmp_path, optimizer_format):
    weights, masters, rounded, exact = ranks.run(read_as_saved, 1, tmp_path, optimizer_format)[0]
    assert rounded.keys() == exact.keys() == weights.keys()
    expected = masters if optimizer_format == "fully_reshardable" else weights
    for name in weights:
        assert torch.equal(rounded[name], weights[name]) and rounded[name].dtype == torch.bfloat16
        assert torch.equal(exact[name], expected[name]) and exact[name].dtype == expected[name].dtype
    assert any((masters[name] != weights[name].float()).any() for name in weights), "rounding loses something"
