"""Where a run begins: its own newest checkpoint, else checkpoint.init_from, else random weights."""

from megatron_ext.checkpoint.decoder import DecoderCheckpoint
from megatron_ext.checkpoint.open import find_checkpoint
from megatron_ext.config.checkpoint import CheckpointConfig
from megatron_ext.hf import is_hf_folder, load_decoder_weights
from megatron_ext.optim import Optimizer
from megatron_ext.runtime import Topology
from megatron_ext.train.state import TrainState


def resume_or_init(
    section: CheckpointConfig, checkpoint: DecoderCheckpoint, optimizer: Optimizer, topology: Topology
) -> TrainState:
    """Load what the run begins with and return its state.

    Raises:
        InputError: the checkpoint or folder is damaged, or belongs to another model or vocabulary.
    """
    saved = checkpoint.load_latest()
    if saved is not None:
        return TrainState(**saved)
    if section.init_from is not None:
        if is_hf_folder(section.init_from):
            load_decoder_weights(section.init_from, optimizer.model.module, topology)
        else:
            checkpoint.load_initial(find_checkpoint(section.init_from))
        optimizer.inner.reload_model_params()  # its master weights are copies
    return TrainState()
