"""A change to Megatron or torch: declared with its reason, and made through its declaration."""

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
    """A name of Megatron or torch that is used in a way its release does not offer."""

    target: str
    """`module:name` or `module:Class.name`."""
    kind: Literal["wrapped", "replaced", "internal"]
    """wrapped: the original still runs. replaced: it does not. internal: it is used as it is, though it is no public
    interface."""
    why: str
    until: str
    """What makes the change unnecessary."""
    test: str
    """The test that fails when the behaviour behind the change is another."""
    parameters: tuple[str, ...] | None = None
    """Names of the original's parameters. Of a wrapped or internal function those that are passed or read by name; of a
    replaced one all of them, in their order. None: none of them matters."""

    @property
    def release(self) -> str:
        """The release that the change is for."""
        return MEGATRON if self.target.startswith("megatron") else TORCH

    @property
    def owner(self) -> Any:
        """The module or class that holds the name."""
        module, _, name = self.target.partition(":")
        return pkgutil.resolve_name(f"{module}:{name.rpartition('.')[0]}")

    @property
    def name(self) -> str:
        """The name within its owner."""
        return self.target.rpartition(":")[2].rpartition(".")[2]

    def put(self, new: Any, *, on: Any = None) -> None:
        """Set the name to `new` for the rest of this process; with `on` for that instance of the owner alone."""
        setattr(self.owner if on is None else on, self.name, new)

    def wrap(self, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]], *, on: Any = None) -> None:
        """Put `wrapper(original)` in the place of what stands there now."""
        original = getattr(self.owner if on is None else on, self.name)
        self.put(functools.wraps(original)(wrapper(original)), on=on)

    def around(self, context: Callable[[], AbstractContextManager[Any]], *, on: Any = None) -> None:
        """Run each call within a new `context()`."""

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
        """The declared parameters of a call, by name, defaults included.

        Raises:
            KeyError: the original has no parameter of that name.
        """
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        return {name: bound.arguments[name] for name in self.parameters or ()}
