"""The page docs/megatron.md, made from the declarations: `python -m bft_megatron.upstream.page > docs/megatron.md`."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import sys
from types import ModuleType

from bft_megatron import upstream
from bft_megatron.upstream.change import MEGATRON, TORCH, Change

_INTRODUCTION = f"""\
# What we change in Megatron

The functions, methods and globals of Megatron, and of torch where there is no GPU, that are replaced, wrapped, or used
although they are internal. The declarations are written for {MEGATRON} and {TORCH}, and this
page is made from them: `python -m bft_megatron.upstream.page > docs/megatron.md`. Nothing outside
`bft_megatron/upstream/` assigns to a module or a class of Megatron or torch.

*wrapped*: the original still runs. *replaced*: it does not. *internal*: it is used unchanged, although it is not a
public interface.

To move to a new release, first run `python -m pytest tests/upstream`: a test fails for each name that is gone, each
parameter that was renamed, and each behaviour that has changed. Then run the other tests that are named here.
"""


def changes() -> dict[ModuleType, list[Change]]:
    """Return the changes that each module of the package declares, in order of declaration."""
    found = {}
    for info in pkgutil.iter_modules(upstream.__path__):
        module = importlib.import_module(f"{upstream.__name__}.{info.name}")
        values = [value if isinstance(value, tuple) else (value,) for value in vars(module).values()]
        found[module] = [value for value in itertools.chain(*values) if isinstance(value, Change)]
    return {module: declared for module, declared in found.items() if declared}


def page() -> str:
    """Return the page as Markdown."""
    return "\n".join([_INTRODUCTION, *(_section(module, declared) for module, declared in changes().items())])


def _section(module: ModuleType, declared: list[Change]) -> str:
    path = module.__name__.replace(".", "/")
    about = (module.__doc__ or "").partition("\n")[0]
    rows = ["| what | how | why | until | held by |", "| --- | --- | --- | --- | --- |"]
    for (kind, why, until, test), some in itertools.groupby(declared, lambda c: (c.kind, c.why, c.until, c.test)):
        targets = "<br>".join(f"`{change.target}`" for change in some)
        rows.append(f"| {targets} | {kind} | {why} | {until} | `{test}` |")
    return "\n".join([f"## {module.__name__.rpartition('.')[2]}", "", f"{about} (`{path}.py`)", "", *rows, ""])


if __name__ == "__main__":
    sys.stdout.write(page())
