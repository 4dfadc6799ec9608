"""A checkpoint of weights alone, which a run can start from and no training leaves."""

from pathlib import Path

from megatron_ext.checkpoint.attempt import SaveAttempt
from megatron_ext.checkpoint.decoder import _beside_weights, _model_state
from megatron_ext.checkpoint.store import CheckpointStore
from megatron_ext.model import Emu3Model
from megatron_ext.runtime import Topology
from megatron_ext.vocab import Vocabulary


def save_weights(folder: Path, model: Emu3Model, topology: Topology, vocab: Vocabulary, config_yaml: str) -> None:
    """Write step 0, which checkpoint.init_from takes, into the store at `folder`."""
    store = CheckpointStore(folder, 1, from_main=topology.from_main, barrier=topology.barrier)
    attempt = SaveAttempt(0, store, topology, timeout_s=float("inf"))
    attempt.start({"model": _model_state(model)}, _beside_weights(vocab, config_yaml), in_background=False)
    outcome = attempt.poll({"vocabulary": vocab.identity, "model": model.shape.identity})
    assert outcome.folder is not None, outcome.failure
