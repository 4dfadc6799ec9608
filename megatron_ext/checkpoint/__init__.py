"""Checkpoints: atomic folders (`store`) and the decoder's distributed state in them (`decoder`)."""

from megatron_ext.checkpoint.store import CheckpointStore, latest_checkpoint, read_metadata

__all__ = ["CheckpointStore", "latest_checkpoint", "read_metadata"]
