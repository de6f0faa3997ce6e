"""The CUDA surface that Megatron touches, redirected to the CPU.

After `install()` Megatron's GPT model, pipeline schedules, DDP, distributed optimizer, torch_dist checkpoints and
`pretrain` run on gloo. The computation is unchanged: devices are rewritten, streams and events do nothing, counters are
zero. The layers that replace Transformer Engine's are in `bft_megatron.layers`.
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

from bft_megatron.upstream import dataset_helpers, experts_on_gloo, torch_adam
from bft_megatron.upstream.change import Change

_NEVER = "Megatron trains without CUDA"
_TEST = "tests/upstream/test_cuda_on_cpu.py"

_WHY = {
    "Moves to a device, pinned memory and device arguments are rewritten by a `TorchFunctionMode`. Megatron's "
    "optimizers sort parameters by the string `torch.cuda.FloatTensor`, so `type` returns it.": (
        *("torch:Tensor.cuda", "torch:Tensor.to", "torch:Tensor.pin_memory", "torch:Tensor.type"),
    ),
}
_REDIRECTED = {
    "On the CPU a module is already in place; for the meta device it is moved there.": ("torch.nn:Module.cuda",),
    "There is one device.": (
        *("torch.cuda:current_device", "torch.cuda:set_device", "torch.accelerator:current_device_index"),
        *("torch.cuda:get_device_capability", "torch.cuda:get_device_properties"),
    ),
    "`initialize_megatron` asserts that it is True.": ("torch.cuda:is_available",),
    "0 would skip Megatron's set-up of model parallelism; the number itself is not used.": ("torch.cuda:device_count",),
    "torch must not use the accelerator's allocator.": ("torch.accelerator:is_available",),
    "Work is finished when the call returns, so there is nothing to wait for.": (
        *("torch.cuda:synchronize", "torch.cuda:Stream", "torch.cuda:Event", "torch.cuda:stream"),
        *("torch.cuda:current_stream", "torch.cuda:default_stream", "torch.cuda:is_current_stream_capturing"),
    ),
    "Memory is reported as 0.": (
        *("torch.cuda:memory_allocated", "torch.cuda:max_memory_allocated", "torch.cuda:memory_reserved"),
        *("torch.cuda:max_memory_reserved", "torch.cuda:device_memory_used", "torch.cuda:memory_stats"),
        *("torch.cuda:empty_cache", "torch.cuda:reset_peak_memory_stats"),
    ),
    "There is no profiler.": ("torch.cuda.nvtx:range_push", "torch.cuda.nvtx:range_pop"),
    "The CPU's random state is the only one.": (
        *("torch.cuda:get_rng_state", "torch.cuda.random:get_rng_state", "torch.cuda:set_rng_state"),
        *("torch.cuda:manual_seed", "megatron.core.tensor_parallel.random:_set_cuda_rng_state"),
    ),
}
_PARAMETERS = {
    "megatron.core.tensor_parallel.random:_set_cuda_rng_state": ("new_state", "device", "graph_safe"),
}
IN_THE_MODE = tuple(Change(name, "replaced", why, _NEVER, _TEST) for why, names in _WHY.items() for name in names)
REDIRECTED = tuple(
    Change(name, "replaced", why, _NEVER, _TEST, _PARAMETERS.get(name))
    for why, names in _REDIRECTED.items()
    for name in names
)

_mode: TorchFunctionMode | None = None


def gpu_is_visible() -> bool:
    """Return whether torch sees a CUDA device; False after `install()`, though `is_available` is then True."""
    return _mode is None and torch.cuda.is_available()  # `install` is called only where there is none


def install(device: str = "cpu") -> None:
    """Redirect `torch.cuda` to the CPU for the rest of this process; a second call does nothing.

    To be called before Megatron builds anything. `torch.cuda.is_available()` is True afterwards, as
    `initialize_megatron` asserts.

    Args:
        device: the device to redirect to; `plan` uses `meta`, whose tensors have shapes and no values.
    """
    global _mode
    if _mode is not None:
        return
    torch.compiler.set_stance("force_eager")  # Megatron's jit_fuser would compile C++ in every process
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron's arguments require it if TP or CP is above 1
    torch.set_num_threads(1)  # the processes share the cores, and one thread adds in a fixed order
    _mode = _CudaElsewhere(torch.device(device))
    _mode.__enter__()
    stand_ins = _stand_ins(torch.device(device))
    for change in REDIRECTED:
        change.put(stand_ins[change.target])
    torch_adam.install()
    dataset_helpers.without_compiling()
    experts_on_gloo.install()


class _CudaElsewhere(TorchFunctionMode):
    """A mode that rewrites the device of every torch call that names a CUDA device."""

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
            if func is torch.device and args == (f"cuda:{self.device}",):  # made with `torch.cuda.current_device()`
                return self.device
            if func is torch.Tensor.type and len(args) == 1 and not kwargs:
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


_LOOKED_INTO = {torch.Tensor.pin_memory, torch.Tensor.cuda, torch.Tensor.type, torch.Tensor.to, torch.device}


class _Stream:
    """A stream without a device: work is finished when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


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


def _stand_ins(device: torch.device) -> dict[str, Any]:
    """Return the stand-in for each target in `REDIRECTED`."""
    stream = _Stream()
    properties = types.SimpleNamespace(major=9, minor=0, name="cpu", total_memory=1 << 34, multi_processor_count=1)
    found = {
        "torch.nn:Module.cuda": lambda self, *_, **__: self if device.type == "cpu" else self.to(device),
        "torch.cuda:current_device": lambda: device,
        "torch.accelerator:current_device_index": lambda: 0,
        "torch.cuda:get_device_capability": lambda *_, **__: (9, 0),
        "torch.cuda:get_device_properties": lambda *_, **__: properties,
        "torch.cuda:is_available": lambda: True,
        "torch.cuda:device_count": lambda: 8,
        "torch.accelerator:is_available": lambda *_, **__: False,
        "torch.cuda:Stream": _Stream,  # a class, as transformers uses it in annotations when it is imported later
        "torch.cuda:Event": _Event,
        "torch.cuda:stream": lambda *_: contextlib.nullcontext(),
        "torch.cuda:current_stream": lambda *_, **__: stream,
        "torch.cuda:default_stream": lambda *_, **__: stream,
        "torch.cuda:is_current_stream_capturing": lambda: False,
        "torch.cuda:memory_stats": lambda *_, **__: collections.defaultdict(int),
        "torch.cuda:get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "torch.cuda.random:get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "torch.cuda:set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "torch.cuda:manual_seed": lambda seed: torch.manual_seed(seed),
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state": _set_rng_state,
    }
    for target in _DO_NOTHING:
        found[target] = lambda *_, **__: None
    for target in _COUNT_NOTHING:
        found[target] = lambda *_, **__: 0
    return found


_DO_NOTHING = (
    *("torch.cuda:set_device", "torch.cuda:synchronize", "torch.cuda:empty_cache"),
    *("torch.cuda:reset_peak_memory_stats", "torch.cuda.nvtx:range_push", "torch.cuda.nvtx:range_pop"),
)
_COUNT_NOTHING = (
    *("torch.cuda:memory_allocated", "torch.cuda:max_memory_allocated", "torch.cuda:memory_reserved"),
    *("torch.cuda:max_memory_reserved", "torch.cuda:device_memory_used"),
)


def _set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)
