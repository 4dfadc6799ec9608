"""megatron-core on a CPU: the table of adaptations, by version.

megatron-core itself is never edited. Where no GPU is visible, `adapt_to_cpu()` binds the replacements below to the
names that megatron-core's modules look up. With a GPU it does nothing. Each row says what is replaced, where it stands
upstream, why, and which test fails without it.
"""

import contextlib
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ext.config.errors import InputError
from megatron_ext.runtime.torch_proxy import TorchOnCpu, cuda_type_names

SUPPORTED = ("0.16.1", "0.19.2")

# Imported before the proxy is bound: a module that megatron-core would import later would see the real torch.
MODULES = (
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.transformer.transformer_layer",
    "megatron.core.distributed",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
)


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """One replaced name of megatron-core."""

    symbol: str
    """Dotted name of the replaced attribute; "*.torch" is the global `torch` of every loaded megatron-core module."""

    build: Callable[[Any], Any]
    """Takes the original, returns the replacement."""

    upstream: dict[str, str]
    """megatron-core version -> where the reason stands; the row is applied to these versions."""

    why: str
    test: str
    """The test that fails without this row."""


def _cpu_rng_state(original: Any) -> Any:
    return lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()


def _set_cpu_rng_state(original: Any) -> Any:
    return lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def _cpu_fork(original: Any) -> Any:
    """`CudaRNGStatesTracker.fork` with one generator: entering swaps its state, leaving swaps it back."""

    @contextlib.contextmanager
    def fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
        if name not in self.states_:
            raise RuntimeError(f"random state {name!r} was not added to the tracker")
        outer, outer_name = torch.get_rng_state(), self._current_state_name
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)
            self._current_state_name = outer_name

    return fork


def _clip_on_cpu(original: Any) -> Any:
    def clip_grad_by_total_norm_fp32(
        parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False
    ) -> None:
        coefficient = max_norm / (total_norm + 1e-6)
        if coefficient < 1.0:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], coefficient)

    return clip_grad_by_total_norm_fp32


def _set_adamw_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
    """`DistributedOptimizer._set_main_param_and_optimizer_states` for torch's AdamW."""
    group_index, group_order = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group_index]["params"][group_order]
    with torch.no_grad():
        main_param.copy_(tensors["param"])
        for name in ("exp_avg", "exp_avg_sq"):
            self.optimizer.state[main_param][name].copy_(tensors[name])


def _of_utils(name: str) -> Callable[[Any], Any]:
    """megatron-core's own implementation in plain torch, which it takes where Transformer Engine is not installed."""
    return lambda original: getattr(importlib.import_module("megatron.core.utils"), name)


def _under_cuda_type_names(original: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with cuda_type_names():
            return original(*args, **kwargs)

    return wrapped


TABLE = (
    Adaptation(
        symbol="*.torch",
        build=lambda original: TorchOnCpu(),
        upstream={
            "0.16.1": "tensor_parallel/mappings.py:91, pipeline_parallel/schedules.py:596, optimizer.py:473, ...",
            "0.19.2": "the same places",
        },
        why="buffers and counters are allocated with device literals that name CUDA",
        test="tests/distributed/test_layouts.py",
    ),
    Adaptation(
        symbol="megatron.core.tensor_parallel.random._get_cuda_rng_state",
        build=_cpu_rng_state,
        upstream={"0.16.1": "tensor_parallel/random.py:41", "0.19.2": "tensor_parallel/random.py:104"},
        why="recomputation saves the state of the CUDA generator",
        test="tests/unit/runtime/test_cpu.py",
    ),
    Adaptation(
        symbol="megatron.core.tensor_parallel.random._set_cuda_rng_state",
        build=_set_cpu_rng_state,
        upstream={"0.16.1": "tensor_parallel/random.py:72", "0.19.2": "tensor_parallel/random.py:135"},
        why="the tracker and recomputation restore the state of the CUDA generator",
        test="tests/unit/runtime/test_cpu.py",
    ),
    Adaptation(
        symbol="megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork",
        build=_cpu_fork,
        upstream={"0.16.1": "tensor_parallel/random.py:243", "0.19.2": "tensor_parallel/random.py:311"},
        why="upstream assumes separate CPU and CUDA generators and warns when the CPU's moves",
        test="tests/unit/runtime/test_cpu.py",
    ),
    Adaptation(
        symbol="megatron.core.optimizer.optimizer.clip_grad_by_total_norm_fp32",
        build=_clip_on_cpu,
        upstream={"0.16.1": "optimizer/clip_grads.py:167", "0.19.2": "optimizer/clip_grads.py:174"},
        why="asserts that gradients are torch.cuda.FloatTensor",
        test="tests/distributed/test_layouts.py",
    ),
    Adaptation(
        symbol="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.__init__",
        build=_under_cuda_type_names,
        upstream={
            "0.16.1": "optimizer/distrib_optimizer.py:361,420,582",
            "0.19.2": "optimizer/distrib_optimizer.py:401,466,758",
        },
        why="sorts parameters by comparing tensor.type() with CUDA type names",
        test="tests/distributed/test_layouts.py",
    ),
    Adaptation(
        symbol="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states",
        build=lambda original: _set_adamw_states,
        upstream={"0.16.1": "optimizer/distrib_optimizer.py:939", "0.19.2": "optimizer/distrib_optimizer.py:1193"},
        why=(
            "torch's AdamW keeps a `step` beside the moments, which checkpoints do not hold per parameter: "
            "KeyError on load"
        ),
        test="tests/distributed/test_resume.py",
    ),
    Adaptation(
        symbol="megatron.core.optimizer.USING_PYTORCH_OPTIMIZER",
        build=lambda original: True,
        upstream={"0.16.1": "optimizer/__init__.py:359", "0.19.2": "optimizer/__init__.py:556"},
        why="where Transformer Engine is installed, its FusedAdam is taken, which computes on CUDA only",
        test="tests/gpu/test_decoder.py",
    ),
    Adaptation(
        symbol="megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE",
        build=lambda original: False,
        upstream={"0.16.1": "optimizer/distrib_optimizer.py:640", "0.19.2": "optimizer/distrib_optimizer.py:837"},
        why="decides how Adam's step is saved and loaded; it must agree with the row above",
        test="tests/gpu/test_decoder.py",
    ),
    Adaptation(
        symbol="megatron.core.optimizer.clip_grads.multi_tensor_applier",
        build=_of_utils("local_multi_tensor_applier"),
        upstream={"0.16.1": "optimizer/clip_grads.py:12", "0.19.2": "optimizer/clip_grads.py:12"},
        why="where Transformer Engine is installed, its kernels sum the gradient norm, on CUDA only",
        test="tests/gpu/test_decoder.py",
    ),
    Adaptation(
        symbol="megatron.core.optimizer.clip_grads.l2_norm_impl",
        build=_of_utils("local_multi_tensor_l2_norm"),
        upstream={"0.16.1": "optimizer/clip_grads.py:17", "0.19.2": "optimizer/clip_grads.py:18"},
        why="goes with the row above",
        test="tests/gpu/test_decoder.py",
    ),
    Adaptation(
        symbol="megatron.core.optimizer.clip_grads.multi_tensor_scale_tensor_impl",
        build=lambda original: None,
        upstream={"0.19.2": "optimizer/clip_grads.py:20"},
        why="where Transformer Engine is installed, the norm stays an fp32 tensor and is rounded otherwise",
        test="tests/gpu/test_decoder.py",
    ),
)


def check_version() -> str:
    """The installed megatron-core version. Raises InputError for one that this table was not written for."""
    version = importlib.metadata.version("megatron-core")
    if version not in SUPPORTED:
        raise InputError(
            f"megatron-core {version} is not supported: install one of {', '.join(SUPPORTED)}, "
            "or extend the table in megatron_ext/runtime/cpu.py and its tests"
        )
    return version


_applied: set[str] = set()


def adapt_to_cpu() -> None:
    """Apply the table's rows for the installed version; again for modules that were loaded since the last call."""
    version = check_version()
    for module in MODULES:
        importlib.import_module(module)
    for row in TABLE:
        if version not in row.upstream or row.symbol in _applied:
            continue
        for owner, name in _owners(row.symbol):
            setattr(owner, name, row.build(vars(owner)[name]))
        if not row.symbol.startswith("*"):
            _applied.add(row.symbol)


def _owners(symbol: str) -> list[tuple[Any, str]]:
    """The objects that hold the name: a module or class, or every loaded megatron-core module for "*"."""
    path, name = symbol.rsplit(".", 1)
    if path == "*":
        loaded = [module for key, module in sys.modules.items() if key.startswith("megatron.core")]
        return [(module, name) for module in loaded if vars(module).get(name) is torch]
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        owner = sys.modules.get(".".join(parts[:cut]))
        if owner is not None:
            for part in parts[cut:]:
                owner = getattr(owner, part)
            return [(owner, name)]
    raise AttributeError(f"megatron-core has no {symbol}")
