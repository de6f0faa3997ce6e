"""Records the collectives that a piece of code issues."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """`seen`: each collective's name, and the bytes that this rank gives; `groups`: the names of the groups."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []
        self.groups: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            given = args[0] if isinstance(args[0], list) else [args[1]]  # an all-reduce's list, else (output, input)
            self.seen.append((func._schema.name.removeprefix("c10d::").strip("_"), sum(t.nbytes for t in given)))
            group = next(x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
            self.groups.append(dist.ProcessGroup.unbox(group).group_name)
        return func(*args, **(kwargs or {}))
