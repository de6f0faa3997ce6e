"""The CUDA surface that Megatron touches, redirected to the CPU.

With `install()` Megatron's GPT model, pipeline schedules, DDP, distributed optimizer, torch_dist checkpoints and
`pretrain` run on gloo. Nothing of the computation is changed: devices are rewritten, streams and events do nothing,
counters are zero. What stands in for Transformer Engine's layers is in `layers`, what torch's Adam needs for a
resume in `cpu.optimizer`.
"""

from __future__ import annotations

import collections
import contextlib
import os
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_mode: TorchFunctionMode | None = None


def gpu_is_visible() -> bool:
    """True where torch sees a CUDA device, also after `install()`, which makes Megatron believe that there is one."""
    return _mode is None and torch.cuda.is_available()  # installed: there was none


def install(device: str = "cpu") -> None:
    """Redirect `torch.cuda` to the CPU for the rest of this process; a second call does nothing.

    Call before Megatron builds anything. `torch.cuda.is_available()` is True afterwards, as `initialize_megatron`
    asserts.

    Args:
        device: what to redirect to; `meta`, whose tensors have shapes and no values, for `plan`.
    """
    global _mode
    if _mode is not None:
        return
    torch.compiler.set_stance("force_eager")  # Megatron's jit_fuser would compile C++ in every process
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron's arguments demand it where TP or CP is above 1
    torch.set_num_threads(1)  # the processes share the cores, and one thread adds in one order
    _mode = _CudaElsewhere(torch.device(device))
    _mode.__enter__()
    _redirect_torch(torch.device(device))
    _redirect_megatron()


class _CudaElsewhere(TorchFunctionMode):
    """Rewrites the device of every torch call that names a CUDA one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _LOOKED_INTO:
            if func is torch.Tensor.pin_memory:
                return args[0]
            if func is torch.Tensor.cuda:
                return args[0].to(self.device)
            if func is torch.Tensor.type and len(args) == 1 and not kwargs:
                # Megatron's optimizers sort parameters by the *string* 'torch.cuda.FloatTensor'.
                return func(*args).replace("meta.", "").replace("torch.", "torch.cuda.", 1)
            if func is torch.Tensor.to and len(args) > 1 and str(args[1]).startswith("cuda"):
                args = (args[0], self.device, *args[2:])
        if not kwargs:
            return func(*args)
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": self.device}
        return func(*args, **kwargs)


_LOOKED_INTO = {torch.Tensor.pin_memory, torch.Tensor.cuda, torch.Tensor.type, torch.Tensor.to}


class _Stream:
    """A stream without a device: work is done when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...


class _Event:
    """An event without a device."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def _redirect_torch(device: torch.device) -> None:
    cuda, stream = torch.cuda, _Stream()
    cuda.current_device = lambda: device
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "device_memory_used",
    ):
        setattr(cuda, name, lambda *_, **__: 0)
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *_, **__: stream)
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, lambda *_: None)
    cuda.Stream, cuda.Event = _Stream, _Event  # classes: transformers annotates with them when it is imported later
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.is_available = lambda: True  # initialize_megatron asserts it
    cuda.device_count = lambda: 8  # 0 would skip the model-parallel set-up; the number itself is not used
    cuda.memory_stats = lambda *_, **__: collections.defaultdict(int)
    cuda.get_device_capability = lambda *_, **__: (9, 0)
    cuda.get_device_properties = lambda *_, **__: types.SimpleNamespace(
        major=9, minor=0, name="cpu", total_memory=1 << 34, multi_processor_count=1
    )
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.is_available = lambda *_, **__: False
    torch.nn.Module.cuda = lambda self, *_, **__: self if device.type == "cpu" else self.to(device)


def _redirect_megatron() -> None:
    import megatron.core.tensor_parallel.random as tensor_parallel_random

    tensor_parallel_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


MEGATRON_FLAGS = [
    *("--transformer-impl", "local"),
    *("--distributed-backend", "gloo"),
    "--use-cpu-initialization",  # only here: on a GPU Megatron would never move the model there
    *("--num-workers", "0"),
    "--no-persist-layer-norm",
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
]
"""What Megatron's arguments need where its CUDA kernels are not to be had."""
