"""A ledger of everything that a step allocates, sends and computes, recorded from each of torch's operators.

A storage on the planned device counts for the part that was current when it was allocated. Collectives and matrix
products are operators too. Allowances (CUDA context, NCCL, fragmentation) are in budget.py.

A tensor is virtual if it has a shape and no values. Operators on real tensors alone, which are the index work of a
batch, run as usual. Reading a virtual value gives 0, so that no step is skipped and nothing is found to be infinite.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

CUDA_BLOCK = 512
"""Bytes; CUDA's caching allocator rounds each allocation up to a multiple of it."""


HEAD = "head"
"""The name of the part of the output layer and the objective."""


@dataclass(frozen=True)
class Collective:
    """One kind of collective that a rank issues."""

    operator: str
    """c10d's name, such as `allreduce_`."""
    group: str
    """tp, cp, pp, dp, ep, etp, edp (of the experts) or world."""
    size: int
    """Number of ranks in the group."""
    bytes: int
    """Bytes of the whole message: a gather's output, a reduce-scatter's input."""
    head: bool
    """Whether the output layer or the objective issues it."""


@dataclass(frozen=True)
class Work:
    """One kind of kernel."""

    kind: Literal["attention", "experts", "delta rule", "other"]
    """experts: a product of many experts' matrices at once. delta rule: a product of a gated delta net's rule."""
    flops: int
    bytes: int
    """Bytes read and written, each operand once."""
    dtype: str


@dataclass
class Moments:
    """The record of a step: its peak, its allocations over time, its collectives and its kernels."""

    peak: int = 0
    at_peak: Counter[str] = field(default_factory=Counter)
    peak_mark: str = ""
    deltas: list[tuple[str, int]] = field(default_factory=list)
    """(part, bytes) of each allocation and release, in order."""
    marks: list[tuple[int, str]] = field(default_factory=list)
    """(index in `deltas`, the name of what begins there)."""
    collectives: Counter[tuple[str, Collective]] = field(default_factory=Counter)
    """(phase, collective) -> count."""
    work: Counter[tuple[str, Work]] = field(default_factory=Counter)
    """(phase, kernel) -> count."""


class Ledger(TorchDispatchMode):
    """A mode that counts storages by part since it was entered, and collectives, work and the peak since `begin`.

    Args:
        device: "meta", or "cpu" under FakeTensorMode. Storages elsewhere are not counted.
        groups: the function from a process group's name to (kind, size), called once for each group.
        real: every tensor has values and collectives run, to compare a real step with the planned one.
    """

    def __init__(self, device: str, groups: Callable[[str], tuple[str, int]], *, real: bool = False) -> None:
        super().__init__()
        self.device, self.groups, self.real = device, lru_cache(groups), real
        self.part, self.phase = "other", "setup"
        self.live: dict[int, tuple[Any, str, int]] = {}
        self.total: Counter[str] = Counter()
        self.now = 0
        self.step = Moments()
        self._work = None if real else dist.all_reduce(torch.zeros(1), async_op=True).boxed()

    def begin(self) -> None:
        """Begin a step: forget earlier steps, keep the storages that are alive."""
        self.step = Moments(deltas=[(part, n) for part, n in self.total.items() if n])
        self._note_peak()

    def mark(self, what: str) -> None:
        """Record the name of what begins now."""
        self.step.marks.append((len(self.step.deltas), what))

    @contextlib.contextmanager
    def within(self, part: str, phase: str | None = None) -> Iterator[None]:
        """Make this the current part and phase, for allocations within the context."""
        before = self.part, self.phase
        self.part, self.phase = part, phase or self.phase
        try:
            yield
        finally:
            self.part, self.phase = before

    def assign(self, tensors: Iterator[Tensor], part: str) -> None:
        """Move the tensors' storages, allocated earlier, to this part."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self.live:
                reference, old, n = self.live[key]
                self.live[key] = reference, part, n
                self._add(old, -n)
                self._add(part, n)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((*args, *kwargs.values())))
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs, tensors)
        if self.real or any(map(_virtual, tensors)):
            if not self.real and _reads_values(func, kwargs):
                return _nothing(func, tensors[0], kwargs)
            out = func(*args, **kwargs)
        elif not tensors and self._makes_virtual(func, args, kwargs):
            out = func(*args, **kwargs)
        else:
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        born = list(_tensors((out,)))
        for tensor in born:
            self._born(tensor)
        if not _is_view(func):
            self._count_work(func, args, kwargs, out, tensors, born)
        return out

    def _makes_virtual(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a factory call makes a virtual tensor: one on the device, or a floating-point one if fake."""
        if self.device == "meta":
            return str(kwargs.get("device")) == "meta"
        if kwargs.get("dtype") is None and func._opname in ("arange", "full"):  # the arguments determine the dtype
            return any(isinstance(a, float) for a in args)
        return (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point

    def _born(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        n = storage.nbytes()
        if self.device == "meta":
            n = -(-n // CUDA_BLOCK) * CUDA_BLOCK
        self.live[key] = weakref.ref(storage, partial(self._died, key)), self.part, n
        self._add(self.part, n)

    def _died(self, key: int, _: object) -> None:
        _, part, n = self.live.pop(key)
        self._add(part, -n)

    def _add(self, part: str, n: int) -> None:
        self.total[part] += n
        self.now += n
        self.step.deltas.append((part, n))
        self._note_peak()

    def _note_peak(self) -> None:
        if self.now > self.step.peak:
            self.step.peak, self.step.at_peak = self.now, self.total.copy()
            self.step.peak_mark = self.step.marks[-1][1] if self.step.marks else ""

    def _collective(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        group = next((a for a in (*args, *kwargs.values()) if _is_group(a)), None)
        kind, size = self.groups(dist.ProcessGroup.unbox(group).group_name) if group is not None else ("world", 0)
        name = func._opname
        message = max((t.numel() * t.element_size() for t in tensors), default=0)
        if "coalesced" in name or name == "allgather_":
            first = list(_tensors((args[0],)))
            message = max(sum(t.numel() * t.element_size() for t in part) for part in (first, tensors[len(first) :]))
        kind = "pp" if name in ("send", "recv_") and kind == "world" else kind
        self.step.collectives[self.phase, Collective(name, kind, size, message, self.part == HEAD)] += 1
        if self.real:
            return func(*args, **kwargs)
        if "gather" in name or "scatter" in name:
            self._relabel_received(args[0])
        lists = [a for a in args if isinstance(a, list)]
        out = []
        for returned in func._schema.returns:
            kind = str(returned.type)
            out.append(tensors[0] if kind == "Tensor" else lists[0] if kind.startswith("List") else self._work)
        return out[0] if len(out) == 1 else tuple(out)

    def _relabel_received(self, received: Any) -> None:
        """Move a buffer that a collective fills to communication, unless its part has a more specific name."""
        for tensor in _tensors((received,)):
            _, part, _ = self.live.get(tensor.untyped_storage()._cdata, (None, "", 0))
            if part.startswith(("activations", "head", "backward")):
                self.assign(iter([tensor]), "communication")

    def _count_work(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        inputs: list[Tensor],
        born: list[Tensor],
    ) -> None:
        if not any(t.device.type == self.device for t in born):
            return
        count = flop_registry.get(func._overloadpacket)
        flops = 0 if count is None else count(*args, **kwargs, out_val=out)
        moved = sum(t.numel() * t.element_size() for t in inputs) + sum(t.numel() * t.element_size() for t in born)
        dtype = str((inputs or born)[0].dtype).removeprefix("torch.")
        self.step.work[self.phase, Work(_kind(func._opname), flops, moved, dtype)] += 1


def _kind(operator: str) -> Literal["attention", "experts", "delta rule", "other"]:
    if operator.startswith("attention") or "scaled_dot_product" in operator:
        return "attention"
    if operator.startswith("experts"):
        return "experts"
    return "delta rule" if operator.startswith("delta_") else "other"


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _virtual(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


@cache
def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _reads_values(func: Any, kwargs: dict[str, Any]) -> bool:
    if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.equal.default:
        return True
    return func is torch.ops.aten._to_copy.default and str(kwargs.get("device")) == "cpu"


def _nothing(func: Any, tensor: Tensor, kwargs: dict[str, Any]) -> Any:
    """Return the stand-in for a virtual value: 0, False, or True for an equality."""
    if func is torch.ops.aten.equal.default:
        return True
    if func is torch.ops.aten._to_copy.default:
        with unset_fake_temporarily():
            return torch.zeros(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype)
    return 0.0 if tensor.dtype.is_floating_point else False if tensor.dtype == torch.bool else 0


def gib(size: float) -> float:
    """Convert bytes to GiB."""
    return size / 2**30
