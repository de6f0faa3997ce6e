"""The data sets, and how their conversations become rows."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from bft_megatron.data.packing import padded
from bft_megatron.errors import FieldError
from bft_megatron.llamafactory.conversion import Conversion
from bft_megatron.llamafactory.parallelism import context_size, tensor_size
from bft_megatron.reading import sources
from bft_megatron.recipe.sources import source_settings


def carry(to: Conversion) -> None:
    """Convert `dataset`, `eval_dataset`, `max_samples`, `val_size`, `cutoff_len`, packing and masking."""
    _carry_sources(to)
    _carry_rows(to)
    _carry_masks(to)


def _carry_sources(to: Conversion) -> None:
    config = to.config
    train, held_out = _sources(to, "dataset"), []
    limit = f", max_samples {config.integer('max_samples', 1)} of each" if config.given("max_samples") else ""
    counts = [_count(source) for source in train]
    known = [count for count in counts if count is not None]
    share = config.number("val_size", 0.0)
    if share and len(known) < len(train):
        to.lose("val_size", "the data are not here to be counted: give data.valid, or `rows` of each source")
    elif share:
        if config.given("eval_dataset"):
            raise config.wrong("val_size", "and eval_dataset both name held-out data: give one of them")
        held = _held_out(known, share)
        parts = zip(train, known, held, strict=True)
        held_out = [_split(to, source, count, some) for source, count, some in parts if some]
        known = [count - some for count, some in zip(known, held, strict=True)]
    to.samples = sum(known) if len(known) == len(train) else None
    to.carry("data", f"dataset {','.join(config.texts('dataset'))}{limit}", "data.train", train, _listed(train))
    if config.given("eval_dataset"):
        held_out = _sources(to, "eval_dataset")
        names = ",".join(config.texts("eval_dataset"))
        to.carry("held-out data", f"eval_dataset {names}{limit}", "data.valid", held_out, _listed(held_out))
    elif held_out:
        to.carry(
            "held-out data", f"val_size {share:g}, drawn", "data.valid", held_out, f"the last: {_listed(held_out)}"
        )


def _held_out(counts: list[int], share: float) -> list[int]:
    """Return the number of rows held out of each source: their share of all rows if below 1, else their number."""
    total = sum(counts)
    held = math.ceil(total * share) if share < 1 else int(share)
    ends = [held * end // total for end in accumulate(counts)]
    return [end - begin for begin, end in pairwise([0, *ends])]


def _split(to: Conversion, source: dict[str, Any], count: int, held: int) -> dict[str, Any]:
    """Cut the held-out rows, which are the last, off a source, and return them as a source."""
    edge = count - held
    if edge < 1:
        raise to.config.wrong("val_size", f"leaves none of the {count} rows of {_listed([source])} to train on")
    held_out = source | {"rows": f"{edge}:{count}"}
    source["rows"] = f":{edge}"
    return held_out


def _count(source: dict[str, Any]) -> int | None:
    """Return the number of rows taken from a source; None if its files are not here."""
    (settings,) = source_settings([source], "data.train")
    try:
        return sum(1 for chunk in sources.open_source(settings).chunks() for _ in chunk)
    except FieldError:
        return None


def _listed(items: list[dict[str, Any]]) -> str:
    return ", ".join(f"{item.get('name', item['path'])}{_rows(item)}" for item in items)


def _rows(item: dict[str, Any]) -> str:
    return f" (rows {item['rows']})" if "rows" in item else ""


def _carry_rows(to: Conversion) -> None:
    config = to.config
    neat = any([config.flag(name) for name in ("neat_packing", "use_packed_sequences", "sequence_packing")])
    packing = config.flag("packing") or neat
    theirs = "packing" if packing else "no packing"
    ours = (
        "many samples a row" if packing else "a sample a row; `true` is faster, its batches count rows of many samples"
    )
    if packing and not neat:
        theirs += ", samples of a row see each other"
        ours += ", none of which sees another"
    to.carry("packing", theirs, "data.packing", packing, f"data.packing {str(packing).lower()}: {ours}")
    length = config.integer("cutoff_len", 2048)
    to.carry("tokens of a row", f"cutoff_len {length}", "data.seq_length", _divisible(to, length))
    to.carry("longer samples", "prompt and answer cut", "data.overlong", "truncate", "data.overlong truncate: end cut")
    to.differ(
        "cutoff_len",
        "a longer sample loses its end, not parts of its prompts and answers: raise data.seq_length, or leave such "
        "samples out with data.overlong: drop",
    )


def _divisible(to: Conversion, length: int) -> int:
    """Round up to a length that context and sequence parallelism can divide."""
    context = context_size(to.config)
    return padded(length, (2 * context if context > 1 else 1) * tensor_size(to.config))


def _carry_masks(to: Conversion) -> None:
    config = to.config
    if config.flag("train_on_prompt") and config.flag("mask_history"):
        raise config.wrong("mask_history", "and train_on_prompt cannot both be true, nor in LLaMA-Factory: give one")
    if config.flag("train_on_prompt"):
        to.carry("learned", "train_on_prompt", "data.supervise", "all")
    elif config.flag("mask_history"):
        to.carry("learned", "mask_history", "data.supervise", "last")
    else:
        to.show("learned", "every answer", "data.supervise assistant, the default")


def _sources(to: Conversion, field: str) -> list[dict[str, Any]]:
    """Return the items of a `data` field: entries of `dataset_dir`'s dataset_info.json, or cached hub data sets."""
    config = to.config
    folder = config.raw("dataset_dir") or "data"
    if not isinstance(folder, str):
        raise config.wrong("dataset_dir", "must be the folder of a dataset_info.json")
    if folder.startswith("REMOTE:"):
        raise config.wrong("dataset_dir", "lies on the hub: download it, and name its folder here")
    names = config.texts(field)
    if twice := [name for name in names if names.count(name) > 1]:
        raise config.wrong(field, f"names {twice[0]} twice; give it once, and a `weight` of 2 in the recipe")
    rows = {"rows": f":{config.integer('max_samples', 1)}"} if config.given("max_samples") else {}
    if folder == "ONLINE":
        return [{"path": name} | rows for name in names]
    info = str(Path(folder) / "dataset_info.json")
    return [{"path": info, "name": name} | rows for name in names]
