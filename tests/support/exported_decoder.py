"""The decoder of an exported folder read back by our model; without transformers, so that ranks start fast."""

from pathlib import Path

import numpy as np
import torch

from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.data.batch import Window, collate
from megatron_ext.hf import load_decoder_weights, model_section, read_shape, read_vocabulary
from megatron_ext.model import Emu3Model, build_model
from megatron_ext.runtime import Topology
from tests.support.weights_only import save_weights


def load_release(folder: Path, topology: Topology, layout: ParallelConfig) -> Emu3Model:
    """The decoder of a Hugging Face folder as ours, on any tensor axis."""
    section = model_section(read_shape(folder))
    model = build_model(section, layout, read_vocabulary(folder).layout, topology, seed=9)
    load_decoder_weights(folder, model, topology)
    return model.eval()


def logits_of_release(folder: str, tensor_parallel_size: int, ids: np.ndarray, checkpoint: str) -> torch.Tensor:
    """Logits [T, V] of one document over this rank's tensor axis, without the padded ids.

    Saves what the ranks have loaded as a checkpoint, through megatron-core.
    """
    layout = ParallelConfig(tensor_model_parallel_size=tensor_parallel_size, sequence_parallel=tensor_parallel_size > 1)
    with Topology.start(RuntimeConfig(device="cpu"), layout) as topology, torch.no_grad():
        model = load_release(Path(folder), topology, layout)
        save_weights(Path(checkpoint), model, topology, read_vocabulary(folder), "{}")
        mask = np.ones(len(ids), dtype=bool)
        window = Window(ids=ids, labels=np.roll(ids, -1), mask=mask, boundaries=np.array([0, len(ids)]))
        logits_BTV = model.forward_batch(collate([window], [0], "document"), with_loss=False)
        parts = [torch.empty_like(logits_BTV) for _ in range(topology.tensor_parallel_size)]
        torch.distributed.all_gather(parts, logits_BTV.contiguous(), group=topology.groups.tp)
        return torch.cat(parts, dim=-1)[0, :, : model.layout.size]
