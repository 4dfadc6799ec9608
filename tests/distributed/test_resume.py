"""A resumed training is the uninterrupted one: bit for bit on the same layout, within rounding on another; and what
a save that goes on in the background may meet. All with several padded gradient buckets, as real jobs have.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from megatron_ext.config import InputError
from megatron_ext.config.checkpoint import CheckpointConfig
from tests.support.decoding import assert_several_padded
from tests.support.training import training

BUCKETS = {"overlap_grad_reduce": True, "bucket_size": 2000}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True} | BUCKETS
CP2 = {"context_parallel_size": 2} | BUCKETS
DP2 = BUCKETS
ONE_BUCKET: dict = {}


@pytest.fixture(scope="module")
def one(ranks, tmp_path_factory):
    """What `alone` returns."""
    return ranks.run(alone, 1, tmp_path_factory.mktemp("one"))[0]


@pytest.fixture(scope="module")
def two(ranks, tmp_path_factory):
    """What `together` returns, of both ranks."""
    return ranks.run(together, 2, tmp_path_factory.mktemp("two"))


def straight_and_resumed(folder, steps, pause, parallel=BUCKETS, **options):
    """Losses and gradient norms of both, and whether both ended with the same weights, master weights and moments."""
    with training(folder, parallel, **options) as run:
        assert_several_padded(run.optimizer)
        straight = run.steps(0, pause)
        run.checkpoint.save(pause, {"step": pause})
        straight += run.steps(pause, steps)
        expected = run.copies()
    with training(folder, parallel, **options) as run:
        resumed = straight[:pause] + run.steps(run.checkpoint.load_latest()["step"], steps)
        return straight, resumed, all(map(torch.equal, run.copies(), expected))


def alone(folder: Path) -> dict:
    """One process: resumes of both precisions and formats, an old checkpoint, a resume with the upstream bug."""
    import megatron_ext.checkpoint.decoder as decoder

    found = {}
    for precision in ("fp32", "bf16"):
        for optimizer_format in ("fully_reshardable", "dp_reshardable"):
            name = f"{precision}-{optimizer_format}"
            options = {"precision": precision, "optimizer_format": optimizer_format}
            found[name] = straight_and_resumed(folder / name, 6, 3, **options)
    found["format 1"] = resumed_from_format_1(folder / "fp32-fully_reshardable")
    found["straight"], found["weights"] = straight_weights(folder)
    found["without moments"] = init_optimizer_refusals(folder / "init")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "unshare_adam_steps", lambda optimizer: None)
        found["shared step"] = straight_and_resumed(folder / "broken", 5, 2)
    return found


def straight_weights(folder):
    with training(folder / "unused") as run:
        return run.steps(0, 6), run.weights()


def resumed_from_format_1(folder):
    """The checkpoint of step 3 with the manifest that the first version would have written."""
    path = folder / "checkpoints" / "step_00000003" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("layout", "optimizer_format", "gradient_buckets"):
        del manifest["metadata"][name]
    manifest["files"] = {name: record["bytes"] for name, record in manifest["files"].items()}
    path.write_text(json.dumps({**manifest, "format_version": 1}))
    with training(folder, BUCKETS) as run:
        return run.steps(run.checkpoint.load_latest()["step"], 6)


def init_optimizer_refusals(folder):
    """checkpoint.init_optimizer with a Hugging Face folder, with a checkpoint of weights, and with no checkpoint."""
    from megatron_ext.train import resume_or_init
    from tests.support.weights_only import save_weights

    (folder / "hf").mkdir(parents=True)
    (folder / "hf" / "config.json").write_text("{}")
    refusals = []
    with training(folder) as run:
        save_weights(folder / "weights", run.checkpoint.model, run.topology, run.checkpoint.vocab, "{}\n")
        for source in ("hf", "weights", "nothing"):
            section = CheckpointConfig(init_from=str(folder / source), init_optimizer=True)
            with pytest.raises(InputError) as refusal:
                resume_or_init(section, run.checkpoint, run.optimizer, run.topology)
            refusals.append(str(refusal.value))
    return refusals


def test_moments_are_taken_only_from_what_has_them(one):
    hf, weights, nothing = one["without moments"]
    assert "/hf' is a Hugging Face folder, which holds no moments: set checkpoint.init_optimizer to false" in hf
    assert "step_00000000' holds weights only: set checkpoint.init_optimizer to false" in weights
    assert "/nothing': give a step_XXXXXXXX folder" in nothing


@pytest.mark.parametrize("optimizer_format", ["fully_reshardable", "dp_reshardable"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bitwise_on_the_same_layout(one, precision, optimizer_format):
    straight, resumed, same_state = one[f"{precision}-{optimizer_format}"]
    assert resumed == straight
    assert same_state


def test_a_save_does_not_disturb_the_training(one):
    straight, *_ = one["fp32-fully_reshardable"]
    assert straight == one["straight"]


@pytest.mark.parametrize("case", ["DP 2", "DP 2, dp_reshardable", "CP 2", "TP 2"])
def test_resume_is_bitwise_on_two_ranks(two, case):
    for straight, resumed, same_state in (rank["same"][case] for rank in two):
        assert resumed == straight
        assert same_state


def test_a_checkpoint_of_format_1_is_resumed(one):
    straight, *_ = one["fp32-fully_reshardable"]
    assert one["format 1"] == straight[3:]


def test_shared_adam_step_would_be_caught(one):
    """megatron-core loads one `step` tensor for all parameters; without our repair the resumed training differs."""
    straight, broken, _ = one["shared step"]
    # The wrong step first acts in the update of step 3, so the loss of step 4 is the first to show it.
    assert broken[2]["loss"] == straight[2]["loss"]
    assert abs(broken[4]["loss"] - straight[4]["loss"]) > 1e-4


def together(folder: Path) -> dict:
    """Two processes: resumes across layouts, stage 1 to stage 2, and saves that go wrong."""
    found = {"moved": moved(folder / "moved"), "dp": moved_dp_reshardable(folder / "dp")}
    found["same"] = {
        "DP 2": straight_and_resumed(folder / "same_dp", 4, 2, DP2, precision="bf16"),
        "DP 2, dp_reshardable": straight_and_resumed(folder / "same_local", 4, 2, optimizer_format="dp_reshardable"),
        "CP 2": straight_and_resumed(folder / "same_cp", 4, 2, CP2, precision="bf16"),
        "TP 2": straight_and_resumed(folder / "same_tp", 4, 2, TP2_SP),
    }
    found["snapshots"] = [
        snapshot_is_kept(folder / f"snapshot{index}", **options)
        for index, options in enumerate(
            (
                {"parallel": TP2_SP},
                {"parallel": DP2, "optimizer_format": "dp_reshardable"},
                {"parallel": CP2, "precision": "bf16"},
            )
        )
    ]
    found["stages"] = stages(folder / "stages")
    found["hurt"] = saves_that_are_hurt(folder / "hurt")
    found["flipped"] = flipped_byte(folder / "hurt")
    return found


def moved(folder):
    """TP 2 to step 2, CP 2 to step 4, DP 2 in one bucket to step 6."""
    with training(folder, TP2_SP) as run:
        run.steps(0, 2)
        run.checkpoint.save(2, {"step": 2})
    with training(folder, CP2) as run:
        run.steps(run.checkpoint.load_latest()["step"], 4)
        run.checkpoint.save(4, {"step": 4})
    with training(folder, ONE_BUCKET) as run:
        return run.steps(run.checkpoint.load_latest()["step"], 6), run.weights()


def test_resume_on_other_layouts(one, two):
    history, weights = two[0]["moved"]
    assert len(history) == 2
    for step, expected in zip(history, one["straight"][4:], strict=True):
        assert step == pytest.approx(expected, rel=5e-6)  # measured 6e-8
    for name, value in one["weights"].items():
        assert (weights[name] - value).abs().max() < 7e-6, name  # measured 5e-7 after 6 steps at lr 1e-2


def moved_dp_reshardable(folder):
    """DP 2 to CP 2; TP 2, other buckets and too small ones are refused; saved once fully reshardable, TP 2 opens it."""
    from megatron_ext.train import resume_or_init

    with training(folder, DP2, optimizer_format="dp_reshardable") as run:
        run.steps(0, 2)
        run.checkpoint.save(2, {"step": 2})
    refusals = []
    for parallel in (TP2_SP, ONE_BUCKET, DP2 | {"bucket_size": 5000}):
        with training(folder, parallel) as run, pytest.raises(InputError) as refusal:
            run.checkpoint.load_latest()
        refusals.append(str(refusal.value))
    with training(folder / "unused", BUCKETS | {"bucket_size": 1}, optimizer_format="dp_reshardable") as run:
        with pytest.raises(InputError) as refusal:
            resume_or_init(run.checkpoint.section, run.checkpoint, run.optimizer, run.topology)
    refusals.append(str(refusal.value))
    with training(folder, CP2) as run:
        run.checkpoint.load_latest()
        history = run.steps(2, 4)
        run.checkpoint.save(4, {"step": 4})
    with training(folder, TP2_SP) as run:
        run.checkpoint.load_latest()
        return history + run.steps(4, 6), refusals


def test_dp_reshardable_moves_along_data_and_context_and_is_refused_in_other_parts(one, two):
    for history, (refusal, *buckets, empty) in (rank["dp"] for rank in two):
        for step, expected in zip(history, one["straight"][2:], strict=True):
            assert step == pytest.approx(expected, rel=5e-6)  # measured 2e-7
        assert "step_00000002 was saved with checkpoint.optimizer_format dp_reshardable" in refusal
        assert "parallel.tensor_model_parallel_size 1, this run has 2: go on with 1" in refusal
        for other, found in zip(buckets, ("1 (", "4 ("), strict=True):
            assert f"in 7 gradient buckets (the first of 4,096 elements), this run has {found}" in other
            assert "go on with its parallel.bucket_size and parallel.overlap_grad_reduce" in other
        assert "a gradient bucket of 32 elements leaves a rank without a part of one: raise" in empty
        assert not any("\n" in line for line in (refusal, *buckets, empty))


def snapshot_is_kept(folder, **options):
    """Everything is overwritten as soon as start_save returns; the checkpoint has what was there before."""
    with training(folder, **options) as run:
        run.steps(0, 2)
        before = run.copies()
        run.checkpoint.start_save(2, {"step": 2})
        with torch.no_grad():
            for tensor in run.tensors():
                tensor.fill_(7)
        assert run.checkpoint.finish().failure is None
    with training(folder, **options) as run:
        run.checkpoint.load_latest()
        return all(torch.equal(found, kept) for found, kept in zip(run.copies(), before, strict=True))


def test_what_happens_after_start_save_does_not_reach_the_checkpoint(two):
    assert [rank["snapshots"] for rank in two] == [[True, True, True]] * 2


def stages(folder):
    """Stage 1 on TP 2 to step 2, then two steps of windows twice as long: in the same training, and as a stage 2 that
    begins with the checkpoint on CP 2, with and without the moments."""
    with training(folder / "unused") as run:
        run.steps(0, 2)
        straight = run.steps(2, 4, blocks=2)
    with training(folder, TP2_SP) as run:
        run.steps(0, 2)
        source = run.checkpoint.save(2, {"step": 2})
    found = {}
    for with_optimizer in (True, False):
        with training(folder / "unused", CP2) as run:
            run.checkpoint.load_initial(source, with_optimizer=with_optimizer)
            found[with_optimizer] = run.steps(2, 4, blocks=2)
    return straight, found


def test_stage_2_begins_with_weights_and_if_asked_with_moments(two):
    straight, found = two[0]["stages"]
    for step, expected in zip(found[True], straight, strict=True):
        assert step == pytest.approx(expected, rel=5e-6)  # measured 1.2e-7
    # The first loss is that of the weights; the update after it needs the moments.
    assert found[False][0] == pytest.approx(straight[0], rel=5e-6)
    assert abs(found[False][1]["loss"] - straight[1]["loss"]) > 1e-4


def saves_that_are_hurt(folder):
    """One rank's writer is stopped, until the deadline; another is killed; then all is well."""
    # Fully reshardable, data rank 1 would have nothing to write.
    options = {"optimizer_format": "dp_reshardable", "parallel": DP2}
    with training(folder, save_timeout_s=1.0, **options) as run:
        run.steps(0, 1)
        stuck = hurt_save(run, signal.SIGSTOP)
    with training(folder, **options) as run:
        run.steps(0, 1)
        killed = hurt_save(run, signal.SIGKILL)
        run.steps(1, 2)
        run.checkpoint.start_save(2, {"step": 2})
        saved = run.checkpoint.finish()
    return stuck, killed, saved, sorted(path.name for path in (folder / "checkpoints").iterdir())


def hurt_save(run, number):
    """The outcome of a save whose writer on rank 1 gets a signal."""
    for _ in range(20):  # the writer of so small a model may be done before the signal
        run.checkpoint.start_save(1, {"step": 1})
        if run.topology.rank == 1:
            os.kill(run.checkpoint._attempt._writer.pid, number)
        outcome = run.checkpoint.finish()
        if outcome.failure is not None:
            break
    return outcome


def test_a_writer_that_is_killed_or_stuck_costs_one_checkpoint(two):
    stuck, killed, saved, left = two[0]["hurt"]
    assert stuck.folder is None and "not written within checkpoint.save_timeout_s 1" in stuck.failure
    assert 1.0 < stuck.seconds < 60 and stuck.blocked_seconds <= stuck.seconds
    assert killed.folder is None and killed.failure == "rank 1: the writer process ended with SIGKILL"
    assert saved.failure is None and saved.folder.name == "step_00000002"
    assert "latest" in left and not any(name.startswith(".partial") for name in left)
    assert [outcome.failure is None for outcome in two[1]["hurt"][:3]] == [False, False, True]


def flipped_byte(folder):
    """Each rank's refusal of a checkpoint with one changed byte, and of one of another model."""
    refusals = []
    with training(folder, DP2) as run:
        path = folder / "checkpoints" / "step_00000002"
        if run.topology.is_main:
            shutil.copytree(path, path.with_name("step_00000001"), dirs_exist_ok=True)
            file = max((path / "decoder").iterdir(), key=lambda file: file.stat().st_size)
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        run.topology.barrier()
        for change in ({}, {"model": "of another shape"}):
            run.checkpoint.identities |= change
            with pytest.raises(InputError) as refusal:
                run.checkpoint.load_latest()
            refusals.append(str(refusal.value))
    return refusals


def test_a_changed_byte_and_another_model_are_refused_by_every_rank(two):
    for damaged, foreign in (rank["flipped"] for rank in two):
        assert "step_00000002 is damaged: " in damaged and "is not what was written" in damaged
        assert "run `echo step_00000001 > " in damaged
        assert "was trained with model num_layers 2" in foreign and "this run has of another shape" in foreign
