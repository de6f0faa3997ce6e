"""Reading and writing adapters as PEFT folders, and merging them into a whole model; one tensor in memory at a time.

`factors` describes the factors; `hf.torch_dist` reads a checkpoint and `hf.export` writes a model folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bft_megatron.errors import UserError
from bft_megatron.hf import shards, stops
from bft_megatron.hf.architectures import companions, read_config
from bft_megatron.hf.export import refuse_used, write_model, written_whole
from bft_megatron.hf.hub import find_model
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.hf.tensors import HFTensor, Weight
from bft_megatron.hf.torch_dist import Checkpoint, newest_checkpoint
from bft_megatron.hf.weights import places
from bft_megatron.lora import joined
from bft_megatron.lora.adapter_config import adapter_config
from bft_megatron.lora.base import check_base
from bft_megatron.lora.factors import adapted, all_factors, in_files, scale, settings_of
from bft_megatron.recipe.schema import LoraSettings, Recipe
from bft_megatron.run.folder import RunFolder

PREFIX = "base_model.model."
"""PEFT's prefix of the base model's own names."""

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

REFUSED = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform")
"""PEFT's settings under which the same factors would define another function."""


class AdapterFolder:
    """The factors in a PEFT folder as a `hf.load.Source`, by the names in `factors`.

    Raises:
        UserError: no LoRA adapter; or its sizes, modules, scale or base model differ from the recipe's.
    """

    def __init__(self, folder: Path, config: ModelConfig, settings: LoraSettings) -> None:
        _check_config(folder / CONFIG, adapter_config("", config, settings))
        entries = shards.read_header(folder / WEIGHTS)
        factors = all_factors(adapted(config, settings))
        self._joined = joined.places(factors, config)
        if not self._joined:
            _refuse_joined(folder / WEIGHTS, entries)
        needed = [self._joined[t].whole if t in self._joined else t for t in in_files(factors)]
        expected = {PREFIX + t.name: t.shape for t in needed}
        found = {name: entry.shape for name, entry in entries.items()}
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if differing:
            name = differing[0]
            raise UserError(
                f"{len(differing)} factors are not those of the recipe's model and `lora.target`, the first {name}: "
                f"{found.get(name, 'not there')}, needed {expected.get(name, 'none')}",
                str(folder / WEIGHTS),
            )
        self._read = shards.Reader(entries)
        self._refuse_mixed(folder / WEIGHTS)

    def _refuse_mixed(self, path: Path) -> None:
        """Raise UserError if gate and up of joined experts share ranks, whichever expert's."""
        for place in self._joined.values():
            if place.expert == 0 and place.is_mixed(self._read(PREFIX + place.whole.name)):
                raise UserError(
                    f"{place.whole.name} mixes the ranks of {' and '.join(place.matrices)}, as training by peft does: "
                    "read are adapters of each, as an export has them",
                    str(path),
                )

    def __call__(self, factor: HFTensor, axis: int | None, start: int, stop: int) -> Tensor:
        """Return [start, stop) along an axis (None: all) of a factor, in the file's dtype."""
        place = self._joined.get(factor)
        if place is None:
            return factor.read(partial(self._read, PREFIX + factor.name), axis, start, stop)
        value = place.of(self._read(PREFIX + place.whole.name))
        return value if axis is None else value.narrow(axis, start, stop - start)


def export_adapter(
    run: RunFolder, recipe: Recipe, out: Path, *, iteration: int | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write the adapters of a LoRA run as a folder that `peft` loads onto the base model.

    Tokenizer, template and generation config are beside them. Prints the stop tokens where they are not only those of
    the base's config.json.

    Args:
        iteration, dtype: as in `hf.export.export`.

    Raises:
        UserError: as `hf.export.export`.
    """
    refuse_used(out)
    settings = settings_of(recipe)
    config, checkpoint = read_config(run.model), newest_checkpoint(run.checkpoints, iteration)
    factors = all_factors(adapted(config, settings))
    for weight in factors:
        checkpoint.check_shape(weight)
    outputs = {
        t: shards.Output(
            t.name, dtype or checkpoint.dtype(parts[0][0]), t.shape, partial(checkpoint.read_whole, t, parts)
        )
        for t, parts in in_files(factors).items()
    }
    tensors = [replace(o, name=PREFIX + o.name) for o in joined.join(outputs, joined.places(factors, config))]
    with written_whole(out) as unfinished:
        for file in companions(run.model):
            if file.name != "config.json":  # transformers would take the folder for a whole model
                shutil.copyfile(file, unfinished / file.name)
        text = json.dumps(adapter_config(recipe.model, config, settings), indent=2, sort_keys=True)
        (unfinished / CONFIG).write_text(text + "\n")
        shards.write(unfinished / WEIGHTS, tensors, lambda _: None)
    stops.announce(run.model)


def export_merged(
    run: RunFolder, recipe: Recipe, out: Path, *, iteration: int | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write base + scale * B A as a whole model, computed in fp32 and rounded once to `dtype` or the base's dtype.

    Args:
        iteration, dtype: as in `hf.export.export`.

    Raises:
        UserError: as `hf.export.export`, or the base model is missing or is not the one that the run started from.
    """
    from bft_megatron.hf.load import open_source  # imports Megatron, which nothing else here needs

    refuse_used(out)
    config, settings = read_config(run.model), settings_of(recipe)
    folder = find_model(recipe.model) if recipe.init == "pretrained" else None
    check_base(run, recipe, config, folder)
    checkpoint, source = newest_checkpoint(run.checkpoints, iteration), open_source(folder, config, recipe.train.seed)
    factors = _by_matrix(config, settings, checkpoint)

    def read(tensor: HFTensor) -> Tensor:
        value = source(tensor, None, 0, 0)
        if tensor not in factors:
            return value
        a, b = (checkpoint.read_whole(*item).float() for item in in_files(factors[tensor]).items())
        return (value.float() + scale(settings) * (b @ a)).to(dtype or value.dtype)

    tensors = [
        shards.Output(t.name, dtype or source(t, 0, 0, 1).dtype, t.shape, partial(read, t)) for t in places(config)
    ]
    write_model(out, run.model, tensors, checkpoint.identity, base=folder)


def _by_matrix(config: ModelConfig, settings: LoraSettings, checkpoint: Checkpoint) -> dict[HFTensor, list[Weight]]:
    """Return A and the parts of B by the matrix that they adapt."""
    found = {f.matrix: [f.a, *f.b] for entry in adapted(config, settings) for f in entry.factors}
    for weight in (w for factors in found.values() for w in factors):
        checkpoint.check_shape(weight)
    return found


def _refuse_joined(path: Path, entries: Iterable[str]) -> None:
    """Raise UserError if factors are of all experts of a layer, which join those of gate and up."""
    joined = [name for name in entries if re.search(r"\.experts\.(base_layer\.)?lora_[AB]\.", name)]
    if joined:
        raise UserError(
            f"{len(joined)} factors join all experts of a layer, as peft writes them with transformers 5, the first "
            f"{min(joined)}: read are each expert's own, as an export has them",
            str(path),
        )


def _check_config(path: Path, expected: dict[str, Any]) -> None:
    try:
        values = json.loads(path.read_text())
    except OSError as e:
        raise UserError(f"cannot read the adapter: {e.strerror}", str(path)) from None
    except ValueError as e:
        raise UserError(f"not JSON: {e}", str(path)) from None
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise UserError("not a LoRA adapter of PEFT's", str(path))
    for key in REFUSED:
        if values.get(key) and values[key] != expected.get(key):
            raise UserError(f"not supported: {values[key]!r}", f"{path}: {key}")
    if values.get("bias", "none") != "none":
        raise UserError(f"not supported: {values['bias']!r}", f"{path}: bias")
    for key, field in (("r", "rank"), ("lora_alpha", "alpha")):
        if values.get(key) != expected[key]:
            raise UserError(f"{values.get(key)}, the recipe's lora.{field} is {expected[key]}", f"{path}: {key}")
