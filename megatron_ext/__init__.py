"""Pretraining of Emu3-style decoders on megatron-core: one room per noun (see docs/architecture.md)."""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

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

# What megatron-core 0.19 logs at every start, module by module, and why it does not concern a user of this project.
for module, begins in (
    # Its successor HybridModel serves mixtures of attention and state-space layers, which Emu3 has not.
    ("models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    # The layout that DDP computes by itself is the one it asks callers to compute with the same function.
    ("distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
    # A layer spec that 0.16.1 takes as well; the MLP built from it is the same.
    ("transformer.transformer_layer", "Rewrapping ModuleSpec with module"),
):
    logging.getLogger(f"megatron.core.{module}").addFilter(
        lambda record, begins=begins: not record.getMessage().startswith(begins)
    )


class _WithoutCompiler(MetaPathFinder):
    """Calls megatron-core's own `disable_jit_fuser` as soon as its module is there, on a machine without a GPU.

    Otherwise megatron-core hands functions to torch.compile while it is imported, which imports the compiler: 2.4 of
    the 5.4 s of CPU that every program and every rank took to start, for fusions that no run on a CPU asks for
    (model/emu3.py). So in megatron/core/jit.py of 0.16.1 and 0.19.2; but 0.19.2 names torch.compile a second time
    (transformer/moe/router.py:918), and imports the compiler nevertheless.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if fullname != "megatron.core.jit":
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None:
            spec.loader.exec_module = partial(_execute, spec.loader.exec_module)
        return spec


def _execute(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    import torch

    execute(module)
    if not torch.accelerator.is_available():
        module.disable_jit_fuser()


sys.meta_path.insert(0, _WithoutCompiler())
