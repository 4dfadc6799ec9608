"""The decoder's checkpoints: megatron-core's dist_checkpointing in the folders of the store.

step_XXXXXXXX/decoder/      weights, master weights and moments
step_XXXXXXXX/config.yaml   the run's configuration
step_XXXXXXXX/vocabulary/   what rebuilds the vocabulary
"""

import pickle
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ext.checkpoint.attempt import WEIGHTS, SaveAttempt, SaveOutcome
from megatron_ext.checkpoint.consistency import contradiction
from megatron_ext.checkpoint.repairs import own_groups, unpadded_offsets, unshare_adam_steps
from megatron_ext.checkpoint.room import check_room, checkpoint_bytes
from megatron_ext.checkpoint.store import CheckpointStore, check_contents, damaged, read_metadata
from megatron_ext.config.checkpoint import CheckpointConfig
from megatron_ext.config.errors import InputError, reason_of
from megatron_ext.model import Emu3Model
from megatron_ext.optim import Optimizer, gradient_buckets
from megatron_ext.runtime import Topology
from megatron_ext.vocab import Vocabulary

INHERITED = ("vocabulary", "model", "vision_tokenizer")
"""Identities that weights depend on; data may change when a new run begins with them."""

SECONDS_BETWEEN_POLLS = 0.02


def load_weights(folder: Path, model: Emu3Model) -> None:
    """Load a checkpoint's weights into `model`, in one process, whatever layout saved them; optimizer state is left
    aside.

    Raises:
        InputError: not a checkpoint, a damaged one, or the checkpoint of another model.
    """
    check_contents(folder)
    _load_model(model, _load(folder, {"model": _model_state(model)})["model"])


class DecoderCheckpoint:
    """Saves and restores the training of one decoder in RUN_FOLDER/checkpoints."""

    def __init__(
        self,
        section: CheckpointConfig,
        run_folder: Path,
        optimizer: Optimizer,
        topology: Topology,
        vocab: Vocabulary,
        identities: Mapping[str, str | None],
        config_yaml: str,
    ) -> None:
        """`identities`: of all that a resume must find unchanged beside vocabulary and model: name -> identity."""
        self.section = section
        self.store = CheckpointStore(
            run_folder / "checkpoints",
            section.keep,
            keep_every=section.keep_every,
            from_main=topology.from_main,
            barrier=topology.barrier,
        )
        self.model: Emu3Model = optimizer.model.module
        self.optimizer = optimizer
        self.inner = optimizer.inner
        (self.distributed,) = optimizer.inner.chained_optimizers
        """Ours has one type of gradient, and therefore one."""
        self.buckets = [bucket.elements for bucket in gradient_buckets(optimizer.model)]
        self.topology = topology
        self.vocab = vocab
        self.identities = {"vocabulary": vocab.identity, "model": self.model.shape.identity, **identities}
        self.config_yaml = config_yaml
        self.saved_step: int | None = None
        self._attempt: SaveAttempt | None = None
        self._metadata: dict[str, Any] = {}

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`."""
        return step % self.section.save_interval == 0

    def check_room(self) -> None:
        """Raise InputError, on every rank, where the disk has no room for the checkpoints that are kept."""
        needed = checkpoint_bytes(self.model, self.topology.tensor_parallel_size)
        self.topology.from_main(lambda: check_room(self.store.root, needed, self.section.keep))

    def check_format(self, optimizer_format: str) -> None:
        """Raise InputError, on every rank, where a rank would have nothing of a gradient bucket to save in this format.

        megatron-core takes that for a fault, in both directions (distrib_optimizer.py, "empty bucket encountered").
        """
        buckets = [bucket for ranges in self.distributed.gbuf_ranges for each in ranges.values() for bucket in each]
        is_empty = any(not bucket["param_map"] for bucket in buckets)
        if self.topology.any(is_empty and optimizer_format == "dp_reshardable"):
            raise InputError(
                f"checkpoint.optimizer_format dp_reshardable with a gradient bucket of {min(self.buckets):,} elements "
                "leaves a rank without a part of one: raise parallel.bucket_size, or set checkpoint.optimizer_format "
                "to fully_reshardable"
            )

    def start_save(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin to checkpoint weights, optimizer and `state` (JSON data) as they are now. `poll` or `finish` tells the
        outcome; call one of them until it has, before the next start.
        """
        assert self._attempt is None
        self._attempt = SaveAttempt(step, self.store, self.topology, timeout_s=self.section.save_timeout_s)
        self.optimizer.gather_weights()
        sharded = self._sharded_state(self.section.optimizer_format, is_loading=False)
        self._metadata = {
            "train_state": dict(state),
            "optimizer_format": self.section.optimizer_format,
            "layout": self.topology.layout,
            "gradient_buckets": self.buckets,
            **self.identities,
        }
        if not self._attempt.refuse(contradiction(self.model, self.distributed, sharded["optimizer"])):
            self._attempt.start(
                sharded, _beside_weights(self.vocab, self.config_yaml), in_background=self.section.async_save
            )

    def poll(self) -> SaveOutcome | None:
        """The outcome of the save in progress, the same on every rank; None where there is none yet, or no save."""
        outcome = None if self._attempt is None else self._attempt.poll(self._metadata)
        if outcome is not None:
            self._attempt = None
            if outcome.folder is not None:
                self.saved_step = outcome.step
        return outcome

    def finish(self) -> SaveOutcome | None:
        """`poll`, waiting for the writers; None where nothing is being saved."""
        while self._attempt is not None:
            if (outcome := self.poll()) is not None:
                return outcome
            time.sleep(SECONDS_BETWEEN_POLLS)
        return None

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Save and wait. Raises OSError where it fails."""
        self.start_save(step, state)
        return _folder_of(self.finish())

    def load_latest(self) -> dict[str, Any] | None:
        """Restore the run's newest checkpoint and return its `state`; None where the run has none.

        Raises:
            InputError: the checkpoint is damaged, or belongs to another model or vocabulary.
        """
        # One rank looks, all follow: on a network file system the others may still see an older `latest`.
        folder = self.topology.from_main(self.store.latest)
        if folder is None:
            return None
        metadata = self._open(folder, tuple(self.identities))
        self._restore_all(folder, metadata)
        self.saved_step = metadata["step"]
        return metadata["train_state"]

    def load_initial(self, folder: Path, *, with_optimizer: bool) -> None:
        """Take the weights of a step_XXXXXXXX folder, and the optimizer's moments where asked.

        Raises:
            InputError: no complete checkpoint, one of another model or vocabulary, or one without moments.
        """
        metadata = self._open(folder, INHERITED)
        if not with_optimizer:
            _load_model(self.model, _load(folder, {"model": _model_state(self.model)})["model"])
            self.inner.reload_model_params()  # its master weights are copies
        elif "train_state" in metadata:
            self._restore_all(folder, metadata)
        else:
            raise InputError(
                f"checkpoint.init_optimizer is true and checkpoint.init_from {str(folder)!r} holds weights only: "
                "set checkpoint.init_optimizer to false"
            )

    def _open(self, folder: Path, names: Sequence[str]) -> dict[str, Any]:
        """The metadata of a checkpoint that is whole and fits this run by its identities `names`; agreed by all
        ranks."""

        def read() -> dict[str, Any]:
            metadata = read_metadata(folder)
            self._check_identities(folder, metadata, names)
            return metadata

        metadata = self.topology.from_main(read)
        damage = None
        try:
            check_contents(folder, part=self.topology.rank, parts=self.topology.world_size)
        except InputError as error:
            damage = error
        if self.topology.any(damage is not None):
            raise damage or damaged(folder, "another rank found a file that is not what was written")
        return metadata

    def _check_identities(self, folder: Path, metadata: dict[str, Any], names: Sequence[str]) -> None:
        for name in names:
            saved, ours = metadata.get(name), self.identities.get(name)
            if saved is not None and ours is not None and saved != ours:
                raise InputError(
                    f"{folder} was trained with {name.replace('_', ' ')} {saved}, this run has {ours}: go on with what "
                    "the checkpoint was trained with, or start another observe.run_dir"
                )

    def _check_same_parts(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Raise InputError unless the parts of a dp_reshardable checkpoint are parts of this run's optimizer."""
        size, elements = metadata.get("layout", {}).get("tensor_parallel_size"), metadata.get("gradient_buckets")
        if size != self.topology.tensor_parallel_size:
            raise InputError(
                f"{folder} was saved with checkpoint.optimizer_format dp_reshardable at "
                f"parallel.tensor_model_parallel_size {size}, this run has {self.topology.tensor_parallel_size}: go on "
                f"with {size}, and to change it save once with checkpoint.optimizer_format fully_reshardable"
            )
        if elements is not None and elements != self.buckets:
            raise InputError(
                f"{folder} was saved with checkpoint.optimizer_format dp_reshardable in {len(elements)} gradient "
                f"buckets (the first of {elements[0]:,} elements), this run has {len(self.buckets)} "
                f"({self.buckets[0]:,}): go on with its parallel.bucket_size and parallel.overlap_grad_reduce "
                f"({folder / 'config.yaml'}), and to change them save once with checkpoint.optimizer_format "
                "fully_reshardable"
            )

    def _restore_all(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Weights and optimizer, whatever `checkpoint.optimizer_format` they were saved in."""
        saved_as = metadata.get("optimizer_format", "fully_reshardable")  # the only one of format 1
        if saved_as == "dp_reshardable":
            self._check_same_parts(folder, metadata)
            self.check_format(saved_as)
        # A fresh torch AdamW has no state yet, and upstream reads one (distrib_optimizer.py:642).
        self.distributed._init_optimizer_states_with_dummy_values()
        state = _load(folder, self._sharded_state(saved_as, is_loading=True))
        _load_model(self.model, state["model"])
        # Before the master weights are restored: in fp32 they are the weights.
        fault = contradiction(self.model, self.distributed, state["optimizer"])
        if self.topology.any(fault is not None):
            raise _contradictory(folder, metadata, fault or "another rank found it")
        groups = state["optimizer"]["optimizer"]
        groups["param_groups"] = own_groups(groups["param_groups"], self.distributed.param_groups)
        self.inner.load_state_dict(state["optimizer"])
        unshare_adam_steps(self.distributed.optimizer)

    def _sharded_state(self, optimizer_format: str, *, is_loading: bool) -> dict[str, Any]:
        model_state = _model_state(self.model)
        metadata = {
            "distrib_optim_sharding_type": optimizer_format,
            # Gathers to data rank 0 in host memory: works without a GPU, and spares the memory of one.
            "distrib_optim_fully_reshardable_mem_efficient": True,
            "dp_cp_group": self.topology.groups.dp_cp,
        }
        with unpadded_offsets(self.distributed):
            optimizer_state = self.inner.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
        if optimizer_state["param_state"] is None:
            # Gathered elsewhere. Left in, it would count as a value that differs from rank 0's, and be warned of.
            del optimizer_state["param_state"]
        return {"model": model_state, "optimizer": optimizer_state}


def _contradictory(folder: Path, metadata: dict[str, Any], fault: str) -> InputError:
    """The refusal of a checkpoint whose master weights are not its weights."""
    cause = (
        ""
        if "gradient_buckets" in metadata
        else ", as in checkpoints written before several padded gradient buckets were saved right (docs/checkpoints.md)"
    )
    return InputError(
        f"{folder} contradicts itself ({fault}){cause}: its moments are lost, its weights are not; start another "
        f"observe.run_dir with checkpoint.init_from {folder} and checkpoint.init_optimizer false"
    )


def _beside_weights(vocab: Vocabulary, config_yaml: str) -> Any:
    """What the main rank adds to a checkpoint's folder."""

    def prepare(folder: Path) -> None:
        (folder / "config.yaml").write_text(config_yaml, encoding="utf-8")
        vocab.save(folder / "vocabulary")

    return prepare


def _folder_of(outcome: SaveOutcome) -> Path:
    if outcome.folder is None:
        raise InputError(
            f"the checkpoint of step {outcome.step} was not saved ({outcome.failure}): make room, check permissions, "
            "or give another path"
        )
    return outcome.folder


def _load(folder: Path, sharded: dict[str, Any]) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(sharded, str(Path(folder) / WEIGHTS))
    except (
        CheckpointException,
        dist_checkpointing.core.CheckpointingException,
        KeyError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        last = str(error).strip().splitlines()[-1:]
        reason = reason_of(last[0] if last else error)
        raise InputError(
            f"{folder} does not fit this run ({reason}): use the model and vocabulary of its folder"
        ) from error


def _model_state(model: Emu3Model) -> dict[str, Any]:
    """The sharded weights. Transformer Engine's extra state is left out: without FP8 it is empty, and the torch
    modules, whose checkpoints must open on a GPU, have none.
    """
    state = model.sharded_state_dict(prefix="model.")
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def _load_model(model: Emu3Model, state: dict[str, Any]) -> None:
    result = model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()}, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
    assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)
