"""Adapters to and from `peft`: the same logits on any layout, the same model merged; a fresh one changes nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from bft_megatron.errors import UserError
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.torch_dist import Checkpoint
from bft_megatron.lora.adapters import lora_hook
from bft_megatron.lora.factors import Fresh, adapted, all_factors
from bft_megatron.lora.peft import WEIGHTS, AdapterFolder, export_adapter, export_merged
from bft_megatron.recipe.schema import LoraSettings, Recipe
from bft_megatron.run.folder import RunFolder
from tests.helpers import sharded, tiny_models
from tests.helpers.sharded import Sharding
from tests.helpers.tiny_models import SavedModel
from tests.helpers.world import run_world
from tests.lora.test_experts import write_adapter

SETTINGS = LoraSettings(rank=3, alpha=6)
ON_TP2_PP2 = Sharding(tp=2, pp=2)


def _adapt(folder: Path, adapter: Path | None, gpt: Any) -> None:
    config = read_config(folder)
    source = Fresh(1) if adapter is None else AdapterFolder(adapter, config, SETTINGS)
    gpt.pre_wrap_hooks.append(lora_hook(config, SETTINGS, source))


def _logits(
    folders: list[Path], layout: Sharding, adapters: list[Path | None], saved: list[Path] | None = None
) -> list[Tensor | None]:
    """Logits with each model's adapter, which is saved as a checkpoint too where a folder is given for it."""
    found = []
    for i, (folder, adapter) in enumerate(zip(folders, adapters, strict=True)):
        flags = ("--sequence-parallel",) if layout.tp > 1 else ()
        with sharded.model(folder, layout, flags=flags, adapt=partial(_adapt, folder, adapter)) as chunks:
            found.append(sharded.logits(chunks))
            if saved:
                sharded.save(chunks, saved[i])
    return found


def _load(folder: Path) -> Any:
    return getattr(transformers, read_config(folder).architecture).from_pretrained(folder).eval()


def _peft_logits(base: Path, adapter: Path) -> Tensor:
    return tiny_models.logits(peft.PeftModel.from_pretrained(_load(base), adapter).eval())


def _assert_close(found: Tensor, expected: Tensor) -> None:
    prompt = tiny_models.prompts()[1].bool()
    difference = (found[..., : tiny_models.VOCABULARY] - expected)[prompt].abs().max()
    assert difference <= 1e-5 * expected[prompt].abs().max()


@pytest.fixture(scope="module")
def adapters(models: list[SavedModel], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A random adapter of each model, made and saved by peft."""
    folders = []
    for model in models:
        torch.manual_seed(2)
        base = transformers.AutoModelForCausalLM.from_pretrained(model.folder)
        wanted = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
        made = peft.get_peft_model(base, wanted)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.1)
        folders.append(tmp_path_factory.mktemp("adapter"))
        made.save_pretrained(folders[-1])
    return folders


def test_in_and_out_and_merged(models: list[SavedModel], adapters: list[Path], tmp_path: Path):
    """peft's adapter on TP 2 x PP 2 with SP; saved there, exported, back in peft; merged, in transformers alone."""
    _assert_in_and_out_and_merged(models, adapters, ON_TP2_PP2, tmp_path)


@pytest.mark.slow
def test_mixtures_in_and_out_and_merged(mixtures: list[SavedModel], tmp_path: Path):
    """The same with an adapter an expert, which peft joins, on PP 2 x EP 2."""
    adapters = [write_adapter(tmp_path / f"{m.name}-adapter", m.folder, SETTINGS) for m in mixtures]
    _assert_in_and_out_and_merged(mixtures, adapters, Sharding(pp=2, dp=2, ep=2), tmp_path)


@pytest.mark.slow
def test_hybrids_in_and_out_and_merged(hybrids: list[SavedModel], tmp_path: Path):
    """Of whole models, and of the decoder beside a vision part."""
    adapters = [write_adapter(tmp_path / f"{m.name}-adapter", m.folder, SETTINGS) for m in hybrids]
    _assert_in_and_out_and_merged(hybrids, adapters, Sharding(tp=2, pp=2), tmp_path)


def test_a_mixture_beside_a_vision_part_in_and_out_and_merged(hybrids: list[SavedModel], tmp_path: Path):
    """Its experts' adapters are joined in the files, of which those that mix gate and up are refused."""
    [model] = [m for m in hybrids if m.name == "hybrid_moe_vl"]
    adapter = write_adapter(tmp_path / "adapter", model.folder, SETTINGS)
    _assert_in_and_out_and_merged([model], [adapter], Sharding(tp=2), tmp_path)
    factors = load_file(adapter / WEIGHTS)
    name = next(n for n in factors if n.endswith("experts.base_layer.lora_B.weight"))
    factors[name][0, -1] = 1.0
    save_file(factors, adapter / WEIGHTS)
    with pytest.raises(UserError, match="mixes the ranks of gate_proj and up_proj"):
        AdapterFolder(adapter, read_config(model.folder), SETTINGS)


def _assert_in_and_out_and_merged(
    models: list[SavedModel], adapters: list[Path], layout: Sharding, tmp_path: Path
) -> None:
    folders = [m.folder for m in models]
    runs = [RunFolder(tmp_path / m.name) for m in models]
    ranks = run_world(
        layout.world, _logits, folders, layout, adapters, [run.checkpoints for run in runs], megatron=True
    )
    for i, (model, run) in enumerate(zip(models, runs, strict=True)):
        expected = _peft_logits(model.folder, adapters[i])
        assert (expected - model.logits).abs().max() > 0.1 * model.logits.abs().max()
        for rank in ranks[-2:]:
            _assert_close(rank[i], expected)
        made = Recipe(model=str(model.folder), data=None, output=str(run.root), lora=SETTINGS)
        run.model.mkdir()
        for name in ("config.json", "generation_config.json"):
            (run.model / name).write_bytes((model.folder / name).read_bytes())
        export_adapter(run, made, run.root / "adapter")
        assert torch.equal(_peft_logits(model.folder, run.root / "adapter"), expected)
        export_merged(run, made, run.root / "merged")
        _assert_close(tiny_models.logits(_load(run.root / "merged")), expected)


def test_a_fresh_adapter_is_the_same_on_every_layout_and_changes_nothing(
    models: list[SavedModel],
    tmp_path: Path,
):
    """Not a bit of the logits: zeros are added."""
    folders = [models[0].folder, models[2].folder]
    layouts = {"one": Sharding(), "tp2": Sharding(tp=2)}
    for name, layout in layouts.items():
        saved = [tmp_path / name / str(i) for i in range(len(folders))]
        adapted_ranks = run_world(layout.world, _logits, folders, layout, [None] * 2, saved, megatron=True)
        plain_ranks = run_world(layout.world, _plain, folders, layout, megatron=True)
        assert all(torch.equal(a, b) for a, b in zip(adapted_ranks[0], plain_ranks[0], strict=True))
    for i, folder in enumerate(folders):
        one, two = (Checkpoint(tmp_path / name / str(i) / "iter_0000003") for name in layouts)
        factors = all_factors(adapted(read_config(folder), SETTINGS))
        for factor in factors:
            assert torch.equal(one.read_tensor(factor, 0), two.read_tensor(factor, 0)), factor.name
            assert bool(one.read_tensor(factor, 0).any()) == ("lora_A" in factor.name)


def _plain(folders: list[Path], layout: Sharding) -> list[Tensor | None]:
    """Logits of the frozen models: Megatron multiplies by frozen weights in another order."""

    def freeze(gpt: Any) -> None:
        gpt.pre_wrap_hooks.append(lambda chunks: [chunk.requires_grad_(False) for chunk in chunks])

    found = []
    for folder in folders:
        flags = ("--sequence-parallel",) if layout.tp > 1 else ()
        with sharded.model(folder, layout, flags=flags, adapt=freeze) as chunks:
            found.append(sharded.logits(chunks))
    return found
