"""The data sets, and how their conversations become rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bft_megatron.llamafactory.conversion import Conversion


def carry(to: Conversion) -> None:
    """`dataset`, `eval_dataset`, `template`, `cutoff_len`, packing and what is masked."""
    config = to.config
    to.carry(
        "data", f"dataset {','.join(config.texts('dataset'))}", "data.train", _sources(to, "dataset"), "data.train"
    )
    if config.given("eval_dataset"):
        names = ",".join(config.texts("eval_dataset"))
        to.carry("held-out data", f"eval_dataset {names}", "data.valid", _sources(to, "eval_dataset"), "data.valid")
    if config.number("val_size", 0.0):
        to.lose("val_size", "nothing is split off: write the held-out conversations to a file of their own, data.valid")
    if config.given("max_samples"):
        to.lose("max_samples", "the whole data set is taken: write the first conversations to a file of their own")
    if config.text("mix_strategy", "concat") != "concat":
        to.lose("mix_strategy", "an epoch takes each source `weight` times, 1 here: set it in data.train")
    if template := config.text("template"):
        to.carry("template", f"template {template}", "data.chat_template", None, "the model's own chat template")
    _carry_rows(to)
    _carry_masks(to)


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
    to.carry("longer samples", "cut off", "data.overlong", "truncate")


def _divisible(to: Conversion, length: int) -> int:
    """What context and sequence parallelism can cut: the next multiple of their parts."""
    tensor, _, context = (
        to.config.integer(f"{name}_size", 1)
        for name in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")
    )
    multiple = (2 * context if context > 1 else 1) * tensor
    return -(-length // multiple) * multiple


def _carry_masks(to: Conversion) -> None:
    config = to.config
    if config.flag("train_on_prompt"):
        to.carry("learned", "train_on_prompt", "data.supervise", "all")
    elif config.flag("mask_history"):
        to.carry("learned", "mask_history", "data.supervise", "last")
    else:
        to.carry("learned", "every answer", "data.supervise", None, "data.supervise assistant, the default")


def _sources(to: Conversion, field: str) -> list[dict[str, Any]]:
    """The items of a `data` field: entries of `dataset_dir`'s dataset_info.json, or data sets of the hub's cache."""
    config = to.config
    folder = config.raw("dataset_dir") or "data"
    if not isinstance(folder, str):
        raise config.wrong("dataset_dir", "must be the folder of a dataset_info.json")
    if folder.startswith("REMOTE:"):
        raise config.wrong("dataset_dir", "lies on the hub: download it, and name its folder here")
    names = config.texts(field)
    if twice := [name for name in names if names.count(name) > 1]:
        raise config.wrong(field, f"names {twice[0]} twice; give it once, and a `weight` of 2 in the recipe")
    if folder == "ONLINE":
        return [{"path": name} for name in names]
    info = str(Path(folder) / "dataset_info.json")
    return [{"path": info, "name": name} for name in names]
