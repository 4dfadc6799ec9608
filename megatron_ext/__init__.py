"""Pretraining of Emu3-style decoders on megatron-core: one room per noun (see docs/architecture.md)."""

import warnings

# megatron-core and torch say these on import or in every run on a machine without a GPU, where all of it is meant.
# Here, since it must stand before the first import of megatron-core. model/specs.py says when Transformer Engine is
# missing where it is needed.
for message in (
    r".*Apex (is|are) not installed.*",
    r".*CUDA_DEVICE_MAX_CONNECTIONS.*",
    r".*full scope is deprecated.*",
    r".*\.grad attribute of a Tensor that is not a leaf.*",
    r".*`torch\.distributed\.\w+` is deprecated.*",
    r".*`load_state_dict` is deprecated.*",
    r".*we are deprecating ShardedTensor.*",
):
    warnings.filterwarnings("ignore", message=message)
