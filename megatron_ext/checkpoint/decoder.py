"""The decoder's checkpoints: megatron-core's dist_checkpointing in the folders of the store.

step_XXXXXXXX/decoder/      weights, master weights and moments; any layout opens what any layout saved
step_XXXXXXXX/config.yaml   the run's configuration
step_XXXXXXXX/vocabulary/   what rebuilds the vocabulary
"""

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ext.checkpoint.store import CheckpointStore, read_metadata
from megatron_ext.config.checkpoint import CheckpointConfig
from megatron_ext.config.errors import InputError
from megatron_ext.model import Emu3Model
from megatron_ext.optim import Optimizer
from megatron_ext.runtime import Topology
from megatron_ext.vocab import Vocabulary

WEIGHTS = "decoder"
INHERITED = ("vocabulary", "model", "vision_tokenizer")
"""Identities that weights depend on; data may change when a new run begins with them."""


def save_weights(folder: Path, model: Emu3Model, topology: Topology, vocab: Vocabulary, config_yaml: str) -> Path:
    """Write a weights-only checkpoint (step 0) that checkpoint.init_from takes, into the store at `folder`."""
    store = CheckpointStore(folder, 1, is_main=topology.is_main, barrier=topology.barrier, broadcast=topology.broadcast)
    sharded = {"model": _model_state(model)}
    return store.write(
        0,
        lambda body: _save(body, sharded, vocab, config_yaml, topology),
        {"vocabulary": vocab.identity, "model": model.shape.identity},
    )


def load_weights(folder: Path, model: Emu3Model) -> None:
    """Load a checkpoint's weights into `model`, whatever layout saved them. Optimizer state is left aside.

    Raises:
        InputError: not a checkpoint, or the checkpoint of another model.
    """
    state = _load(folder, {"model": _model_state(model)})
    _load_model(model, state["model"])


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
            run_folder / "checkpoints", section.keep,
            is_main=topology.is_main, barrier=topology.barrier, broadcast=topology.broadcast,
        )  # fmt: skip
        self.model: Emu3Model = optimizer.model.module
        self.optimizer = optimizer
        self.inner = optimizer.inner
        self.topology = topology
        self.vocab = vocab
        self.identities = {"vocabulary": vocab.identity, "model": self.model.shape.identity, **identities}
        self.config_yaml = config_yaml
        self.saved_step: int | None = None
        _start_result_queue()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`."""
        return step % self.section.save_interval == 0

    def save(self, step: int, state: dict[str, Any]) -> Path | None:
        """Checkpoint weights, optimizer and `state` (JSON data). Returns the folder; None where `step` is saved
        already."""
        if step == self.saved_step:
            return None
        self.optimizer.gather_weights()

        def write(folder: Path) -> None:
            sharded = self._sharded_state(is_loading=False)
            _save(folder, sharded, self.vocab, self.config_yaml, self.topology)

        folder = self.store.write(step, write, {"train_state": state, **self.identities})
        self.saved_step = step
        return folder

    def load_latest(self) -> dict[str, Any] | None:
        """Restore the run's newest checkpoint and return its `state`; None where the run has none.

        Raises:
            InputError: the checkpoint is damaged, or belongs to another model or vocabulary.
        """
        # One rank looks, all follow: on a network file system the others may still see an older `latest`.
        folder = self.topology.broadcast(self.store.latest() if self.topology.is_main else None)
        return None if folder is None else self._restore(folder)

    def load_initial(self, folder: Path) -> None:
        """Take only the weights of a step_XXXXXXXX folder.

        Raises:
            InputError: no complete checkpoint, or one of another model or vocabulary.
        """
        self._check_identities(folder, read_metadata(folder), INHERITED)
        load_weights(folder, self.model)

    def _restore(self, folder: Path) -> dict[str, Any]:
        metadata = read_metadata(folder)
        self._check_identities(folder, metadata, tuple(self.identities))
        for optimizer in self.inner.chained_optimizers:
            # A fresh torch AdamW has no state yet, and upstream reads one (distrib_optimizer.py:642).
            optimizer._init_optimizer_states_with_dummy_values()
        state = _load(folder, self._sharded_state(is_loading=True))
        _load_model(self.model, state["model"])
        self.inner.load_state_dict(state["optimizer"])
        for optimizer in self.inner.chained_optimizers:
            complete_groups(optimizer.optimizer)
            unshare_adam_steps(optimizer.optimizer)
        self.saved_step = metadata["step"]
        return metadata["train_state"]

    def _check_identities(self, folder: Path, metadata: dict[str, Any], names: Sequence[str]) -> None:
        for name in names:
            saved, ours = metadata.get(name), self.identities.get(name)
            if saved is not None and ours is not None and saved != ours:
                raise InputError(
                    f"{folder} was trained with {name.replace('_', ' ')} {saved}, this run has {ours}: go on with what "
                    "the checkpoint was trained with, or start another observe.run_dir"
                )

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        model_state = _model_state(self.model)
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            # Gathers over gloo to data rank 0 in host memory: works without a GPU, and spares the memory of one.
            "distrib_optim_fully_reshardable_mem_efficient": True,
            "dp_cp_group": self.topology.groups.dp_cp,
        }
        optimizer_state = self.inner.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
        return {"model": model_state, "optimizer": optimizer_state}


def complete_groups(optimizer: torch.optim.Optimizer) -> None:
    """Make the parameter groups of a load those of `optimizer`, which another Adam may have saved.

    torch's `load_state_dict` puts the saved groups in the place of the optimizer's own. Those of torch's AdamW lack
    the `bias_correction` that Transformer Engine's FusedAdam reads, and hold their step as a float, which its kernel
    refuses. In the other direction torch's AdamW completes its groups itself (`Adam.__setstate__`).
    """
    for group in optimizer.param_groups:
        for name, value in optimizer.defaults.items():
            group.setdefault(name, value)
        if "step" in group:
            group["step"] = int(group["step"])


def unshare_adam_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its own Adam `step` after a load.

    megatron-core 0.16.1 (distrib_optimizer.py:821) and 0.19.2 (:1027) store ONE tensor as the step of all parameters;
    torch's AdamW then advances it once per parameter, and bias correction is silently wrong from the first resumed
    step on.
    """
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()


def _save(folder: Path, sharded: dict[str, Any], vocab: Vocabulary, config_yaml: str, topology: Topology) -> None:
    body = folder / WEIGHTS
    if topology.is_main:
        body.mkdir()
        (folder / "config.yaml").write_text(config_yaml, encoding="utf-8")
        vocab.save(folder / "vocabulary")
    topology.barrier()
    dist_checkpointing.save(sharded, str(body))


def _load(folder: Path, sharded: dict[str, Any]) -> dict[str, Any]:
    read_metadata(folder)
    try:
        return dist_checkpointing.load(sharded, str(Path(folder) / WEIGHTS))
    except (CheckpointException, dist_checkpointing.core.CheckpointingException, KeyError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
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


def _start_result_queue() -> None:
    """Start megatron-core's queue process for write results (filesystem_async.py) deaf to SIGTERM.

    torchrun forwards SIGTERM to the whole process group. The queue lives as long as the run; killed by the signal that
    asks for a last checkpoint, it would take that checkpoint with it.
    """
    start = getattr(filesystem_async, "get_write_results_queue", None) or filesystem_async._get_write_results_queue
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        start()
    finally:
        signal.signal(signal.SIGTERM, previous)
