"""The declaration of a change to Megatron or torch, with its reason, and the means to make the change."""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

MEGATRON, TORCH = "megatron-core 0.19.2", "torch 2.14.1"
"""The releases that the declarations are written for."""


@dataclass(frozen=True)
class Change:
    """The declaration that a name of Megatron or torch is replaced, wrapped, or used although it is internal."""

    target: str
    """`module:name` or `module:Class.name`."""
    kind: Literal["wrapped", "replaced", "internal"]
    """wrapped: the original still runs. replaced: it does not. internal: it is used unchanged, although it is not a
    public interface."""
    why: str
    until: str
    """The condition that makes the change unnecessary."""
    test: str
    """The test that fails when the behaviour behind the change is different."""
    parameters: tuple[str, ...] | None = None
    """Names of the original's parameters: for a wrapped or internal function those passed or read by name, for a
    replaced one all of them in order. None: none of them matters."""

    @property
    def release(self) -> str:
        """Return the release that the change is for."""
        return MEGATRON if self.target.startswith("megatron") else TORCH

    @property
    def owner(self) -> Any:
        """Return the module or class that holds the name."""
        module, _, name = self.target.partition(":")
        return pkgutil.resolve_name(f"{module}:{name.rpartition('.')[0]}")

    @property
    def name(self) -> str:
        """Return the name within its owner."""
        return self.target.rpartition(":")[2].rpartition(".")[2]

    def put(self, new: Any, *, on: Any = None) -> None:
        """Set the name to `new` for the rest of this process; with `on`, for that instance of the owner only."""
        setattr(self.owner if on is None else on, self.name, new)

    def wrap(self, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]], *, on: Any = None) -> None:
        """Replace the current value by `wrapper(value)`; with `on`, for that instance of the owner only."""
        original = getattr(self.owner if on is None else on, self.name)
        self.put(functools.wraps(original)(wrapper(original)), on=on)

    def around(self, context: Callable[[], AbstractContextManager[Any]], *, on: Any = None) -> None:
        """Run each call within a new `context()`; with `on`, for that instance of the owner only."""

        def within(original: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any, **kwargs: Any) -> Any:
                with context():
                    return original(*args, **kwargs)

            return called

        self.wrap(within, on=on)

    def after(self, hear: Callable[[Any], None]) -> None:
        """Call `hear(result)` after each call."""

        def then(original: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any, **kwargs: Any) -> Any:
                result = original(*args, **kwargs)
                hear(result)
                return result

            return called

        self.wrap(then)

    def read(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the declared parameters of a call by name, with defaults.

        Raises:
            KeyError: the original has no parameter of that name.
        """
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        return {name: bound.arguments[name] for name in self.parameters or ()}
