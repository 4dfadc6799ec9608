"""One process that is all ranks, with or without a GPU: where the reproducers of this folder run."""

import contextlib
import functools
import os
from collections.abc import Iterator

import torch
from megatron.core import parallel_state


@contextlib.contextmanager
def one_process() -> Iterator[torch.device]:
    """The device to compute on, between the beginning and the end of megatron-core's process groups."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        without_a_gpu()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29512")
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield device
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@functools.cache
def without_a_gpu() -> None:
    """megatron-core names CUDA in literals; the bugs do not depend on the device."""

    def on_cpu(factory):
        return lambda *args, **kwargs: factory(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})

    for name in ("tensor", "zeros", "empty", "zeros_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.current_stream = torch.cuda.synchronize = lambda *args: None
    type_of = torch.Tensor.type
    torch.Tensor.type = lambda self, *args: (
        type_of(self, *args) if args else type_of(self).replace("torch.", "torch.cuda.", 1)
    )
