"""What a checkpoint keeps of the optimizer and what it does not: the state is the checkpoint's, the settings are the
run's; and a checkpoint whose master weights are not its weights is neither written nor resumed from.
"""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_ext.config import InputError
from megatron_ext.config.optim import OptimConfig
from tests.support.decoding import OPTIM
from tests.support.training import assert_several_padded, training

BUCKETS = {"overlap_grad_reduce": True, "bucket_size": 2000}

OTHER_SETTINGS = {
    "lr": 2e-2, "min_lr": 1e-3, "lr_warmup_steps": 5, "lr_decay_style": "linear", "lr_decay_steps": 7,
    "weight_decay": 0.3, "adam_beta1": 0.5, "adam_beta2": 0.7, "adam_eps": 1e-3, "clip_grad": 0.01,
}  # fmt: skip
"""Every field of section optim with another value than OPTIM has."""


def changed_settings(folder: Path) -> dict:
    """Field of section optim -> what a resume with another value of it has loaded, and then does.

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
        for name, value in OTHER_SETTINGS.items():
            with training(folder, optim={name: value}) as run:
                run.checkpoint.load_latest()
                kept = all(map(torch.equal, run.copies(), saved))
                found[name] = kept, adam_settings(run), run.steps(2, 3), run.optimizer.learning_rate(3)
        with training(folder / "stage_2", optim={"lr": 3e-2}) as run:
            run.checkpoint.load_initial(source, with_optimizer=True)
            found["init_optimizer"] = all(map(torch.equal, run.copies(), saved))
    return found


def adam_settings(run) -> tuple[set, set]:
    """(betas, eps) of every parameter group, and the number of updates of every parameter."""
    inner = run.checkpoint.distributed.optimizer
    groups = {(*group["betas"], group["eps"]) for group in inner.param_groups}
    return groups, {int(state["step"]) for state in inner.state.values()}


def test_every_setting_of_the_optimizer_may_change_at_a_resume(ranks, tmp_path):
    found = ranks.run(changed_settings, 1, tmp_path)[0]
    assert {field.name for field in dataclasses.fields(OptimConfig)} == set(OTHER_SETTINGS)
    for name, value in OTHER_SETTINGS.items():
        kept, (groups, updates), step, rate = found[name]
        assert kept and updates == {2}, name
        other = dataclasses.replace(OPTIM, **{name: value})
        assert other != OPTIM and groups == {(other.adam_beta1, other.adam_beta2, other.adam_eps)}, name
        # The gradient is that of the loaded weights; the setting acts in the update after it.
        assert step == found["straight"], name
        assert rate == pytest.approx({"lr": 2e-2, "lr_warmup_steps": 1e-2 * 3 / 5}.get(name, rate))
    assert found["init_optimizer"]


def contradictory(folder: Path) -> tuple:
    """What a save without the repair comes to; the checkpoint that it would have left, resumed from and begun with."""
    from megatron_ext.checkpoint import decoder

    with training(folder, BUCKETS) as run, pytest.MonkeyPatch.context() as patch:
        assert_several_padded(run)
        run.steps(0, 2)
        weights = [weight.detach().clone() for weight in run.checkpoint.model.parameters()]
        patch.setattr(decoder, "unpadded_offsets", lambda optimizer: contextlib.nullcontext())
        run.checkpoint.start_save(2, {"step": 2})
        outcome = run.checkpoint.finish()
        left = (folder / "checkpoints").exists()
        patch.setattr(decoder, "contradiction", lambda *arguments: None)
        source = run.checkpoint.save(2, {"step": 2})
        manifest = json.loads((source / "manifest.json").read_text())
        del manifest["metadata"]["gradient_buckets"]
        run.topology.from_main(lambda: (source / "manifest.json").write_text(json.dumps(manifest)))
    refusals = []
    with training(folder, BUCKETS) as run:
        for load in (run.checkpoint.load_latest, lambda: run.checkpoint.load_initial(source, with_optimizer=True)):
            with pytest.raises(InputError) as refusal:
                load()
            refusals.append(str(refusal.value))
    with training(folder / "next", BUCKETS) as run:
        run.checkpoint.load_initial(source, with_optimizer=False)
        taken = all(map(torch.equal, run.checkpoint.model.parameters(), weights))
    return outcome.failure, left, refusals, taken


def test_a_checkpoint_that_contradicts_itself_is_not_saved_and_not_resumed_from(ranks, tmp_path):
    by_rank = ranks.run(contradictory, 2, tmp_path)
    failure, left, *_ = by_rank[0]
    assert failure.startswith("rank 0: master weights do not round to the weights: ") and "others" in failure
    assert not left, "nothing is written"
    for _, _, refusals, taken in by_rank:
        for refusal in refusals:
            assert "step_00000002 contradicts itself (" in refusal and "\n" not in refusal
            assert "written before several padded gradient buckets were saved right" in refusal
            assert "checkpoint.init_from" in refusal and "checkpoint.init_optimizer false" in refusal
        assert taken
