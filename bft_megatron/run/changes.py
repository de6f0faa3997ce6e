"""The fields of a recipe that may change when a run resumes, and those that did and may not."""

from __future__ import annotations

from collections.abc import Iterator

from bft_megatron.recipe import flags
from bft_megatron.recipe.schema import Recipe

MAY_CHANGE = {
    "data.valid",
    "objective.head",
    "objective.chunk_size",
    "objective.kernels",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.context",
    "parallel.data",
    "parallel.sequence",
    "train.micro_batch_size",
    "train.save_every",
    "train.validate_every",
    "train.exit_after",
    "train.keep_last",
    "train.keep_best",
    "train.best_metric",
    "train.max_skipped",
    "train.save_hf",
    "device",
    "output",
}
"""Fields that may change when a run resumes, because they affect its numbers by no more than rounding.

The model, the rows and their order, the objective, the schedule, the optimizer and the precision must stay the same.
`recipe.flags.may_change` covers the flags under `megatron`.
"""


def changed(before: Recipe, now: Recipe) -> Iterator[tuple[str, object, object]]:
    """Yield each field that differs and may not: its name, and both values as a message shows them."""
    one, other = _flat(before), _flat(now)
    for field in sorted(one.keys() | other.keys()):
        if one.get(field) != other.get(field) and not _may_change(field):
            yield field, _shown(field, one.get(field)), _shown(field, other.get(field))


def _may_change(field: str) -> bool:
    group, _, flag = field.partition(".")
    return flags.may_change(flag) if group == "megatron" else field in MAY_CHANGE


def _shown(field: str, value: object) -> object:
    return "left out" if value is None and field.startswith("megatron.") else value


def _flat(recipe: Recipe) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in vars(recipe).items():
        if name == "megatron":
            known = {flag: v for flag, v in value.items() if flags.passes(flag)}  # others are refused by their name
            flat |= {f"{name}.{flag}": v for flag, v in known.items() if not flags.is_left_out(flag, v)}
        elif hasattr(value, "__dict__"):
            flat |= {f"{name}.{k}": v for k, v in vars(value).items()}
        else:
            flat[name] = value
    return flat
