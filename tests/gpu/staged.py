"""Collectives of ranks that share one GPU, which NCCL refuses: each is staged through gloo on the host.

`Staged` is a process group of torch's. Every tensor of a call is copied to the host, gloo does the same call there, and
what it wrote is copied back when the call is waited for. Gloo itself takes tensors of a GPU for some calls only.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup, Work

NAME = "staged"
WRITTEN = (  # the first argument is what they write
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "recv", "recv_anysource"),
    *("allgather", "allgather_coalesced", "_allgather_base", "allgather_into_tensor_coalesced"),
    *("all_gather_single", "all_gather_single_coalesced", "gather", "scatter"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
    *("reduce_scatter_single", "reduce_scatter_single_coalesced"),
    *("alltoall", "alltoall_base", "all_to_all_single"),
)
READ = ("send", "barrier", "monitored_barrier")


def register() -> None:
    """Let torch make groups of this kind by the name `staged`."""
    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, Staged.make, devices=["cpu", "cuda"])


def take_over() -> None:
    """Make the groups of this process, from its first on, of this kind wherever NCCL or the default is asked for."""
    register()
    if dist.is_initialized():
        dist.destroy_process_group()
    whole = dist.init_process_group

    def init_process_group(backend: str | None = None, device_id: Any = None, **kwargs: Any) -> None:
        whole(NAME, **kwargs)

    dist.init_process_group = init_process_group


class Staged(ProcessGroup):
    """A process group that stages every call through a group of gloo with the same ranks."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.host = ProcessGroup(store, rank, size)
        self.host._set_default_backend(ProcessGroup.BackendType.GLOO)
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.host._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, gloo)

    @staticmethod
    def make(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Staged:
        return Staged(store, rank, size, timeout)

    def getBackendName(self) -> str:
        """The name by which torch's own messages and checks know it."""
        return NAME

    def _get_backend(self, device: torch.device) -> Any:
        """Gloo's for either device: it tells torch not to join sends and receives into one call."""
        return self.host._get_backend(torch.device("cpu"))

    def _set_sequence_number_for_group(self) -> None: ...

    def _get_sequence_number_for_group(self) -> int:
        return 0


def _staging(name: str, writes: bool) -> Callable[..., Work]:
    def call(self: Staged, *args: Any, **kwargs: Any) -> Work:
        staged = [_on_host(x) for x in args]
        work = getattr(self.host, name)(*staged, **{key: _on_host(value) for key, value in kwargs.items()})
        return Waited(work, staged[0], args[0]) if writes else Waited(work, staged)

    return call


for _name in WRITTEN + READ:
    if hasattr(ProcessGroup, _name):  # torch renamed some
        setattr(Staged, _name, _staging(_name, _name in WRITTEN))


class Waited(Work):
    """A call on the host; waiting for it copies the result to where it was asked for.

    It keeps the tensors on the host alive, which gloo reads or writes until then.
    """

    def __init__(self, work: Work, staged: Any, out: Any = None) -> None:
        super().__init__()
        self.work, self.staged, self.out = work, staged, out

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for gloo and copy back, once."""
        self.work.wait()
        if self.out is not None:
            _copy(self.staged, self.out)
        self.out = self.staged = None
        return True

    def is_completed(self) -> bool:
        return bool(self.work.is_completed())

    def get_future(self) -> torch.futures.Future[Any]:
        done: torch.futures.Future[Any] = torch.futures.Future()
        out = self.out
        self.wait()
        done.set_result(out)
        return done


def _on_host(x: Any) -> Any:
    """A copy on the host of a tensor, or of each tensor of a list; anything else as it is."""
    if isinstance(x, Tensor):
        return x.detach().to("cpu", copy=True).contiguous()
    return [_on_host(y) for y in x] if isinstance(x, list | tuple) and _holds_tensors(x) else x


def _holds_tensors(x: Any) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, list | tuple) and any(_holds_tensors(y) for y in x))


def _copy(source: Any, to: Any) -> None:
    if isinstance(to, Tensor):
        to.detach().copy_(source)
    else:
        for x, y in zip(source, to, strict=True):
            _copy(x, y)
