"""A stand-in for the module `torch` inside megatron-core on a machine without a GPU.

megatron-core names CUDA in literals (`device="cuda"`, `torch.cuda.current_device()`). `TorchOnCpu` is bound to the
global name `torch` of megatron-core's modules only: it answers the same questions for the CPU and passes everything
else on. The real `torch`, and every other library's view of it, stays untouched.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FACTORIES = ("empty", "empty_like", "full", "full_like", "ones", "ones_like", "rand", "randn", "tensor", "zeros",
             "zeros_like", "arange", "as_tensor")  # fmt: skip


class _Stream:
    """A CUDA stream on a machine that has none: work is finished as soon as it is called."""

    def wait_stream(self, stream: "_Stream") -> None:
        """Nothing is pending."""

    def synchronize(self) -> None:
        """Nothing is pending."""


class CudaOnCpu(types.ModuleType):
    """What megatron-core asks of `torch.cuda`, answered for the CPU; the rest is torch.cuda's own."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def is_available() -> bool:
        return False

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(device: Any = None) -> None:
        """Kernels on a CPU have finished when they return."""

    @staticmethod
    def current_stream(device: Any = None) -> _Stream:
        return _Stream()

    default_stream = current_stream

    @staticmethod
    def stream(stream: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)


class TorchOnCpu(types.ModuleType):
    """`torch` whose factories take "cuda" for "cpu" and never pin memory."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = CudaOnCpu()
        for name in FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return build


class _CudaTypeNames(TorchFunctionMode):
    """Answers `tensor.type()` with the CUDA name of the type, for code that compares it with a string."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """While open, `tensor.type()` says "torch.cuda.FloatTensor" for a CPU float tensor."""
    with _CudaTypeNames():
        yield
