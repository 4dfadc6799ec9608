"""Where a run begins: its own newest checkpoint, else checkpoint.init_from, else random weights."""

from megatron_ext.checkpoint.decoder import DecoderCheckpoint
from megatron_ext.checkpoint.open import find_checkpoint
from megatron_ext.config.checkpoint import CheckpointConfig
from megatron_ext.config.errors import InputError
from megatron_ext.hf import is_hf_folder, load_decoder_weights
from megatron_ext.optim import Optimizer
from megatron_ext.runtime import Topology
from megatron_ext.train.state import TrainState


def resume_or_init(
    section: CheckpointConfig, checkpoint: DecoderCheckpoint, optimizer: Optimizer, topology: Topology
) -> TrainState:
    """Load what the run begins with and return its state.

    Raises:
        InputError: the checkpoint or folder is damaged, belongs to another model or vocabulary, or holds no moments
            where `checkpoint.init_optimizer` asks for them; the disk has no room for the run's checkpoints.
    """
    checkpoint.check_room()
    checkpoint.check_format(section.optimizer_format)
    saved = checkpoint.load_latest()
    if saved is not None:
        return TrainState.from_dict(saved)
    if section.init_from is None:
        return TrainState()
    if topology.from_main(lambda: is_hf_folder(section.init_from)):
        if section.init_optimizer:
            raise InputError(
                f"checkpoint.init_optimizer is true and checkpoint.init_from {section.init_from!r} is a Hugging Face "
                "folder, which holds no moments: set checkpoint.init_optimizer to false, or give a checkpoint"
            )
        load_decoder_weights(section.init_from, optimizer.model.module, topology)
        optimizer.inner.reload_model_params()  # its master weights are copies
    else:
        # One rank looks: on a network file system the others may see an older `latest`.
        folder = topology.from_main(lambda: find_checkpoint(section.init_from))
        checkpoint.load_initial(folder, with_optimizer=section.init_optimizer)
    return TrainState()
