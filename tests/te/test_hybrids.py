"""A GPU's gated delta nets hold, load, save and export what the CPU's do."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from megatron.core.extensions import transformer_engine as te

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.export import export
from bft_megatron.hf.load import place_of
from bft_megatron.hf.weights import weights
from bft_megatron.layers.delta_net import with_delta_nets
from tests.helpers import sharded
from tests.helpers.exported import assert_same, tensors
from tests.helpers.runs import MODEL, VARIANTS
from tests.helpers.sharded import TRANSFORMER_ENGINE, Sharding, stored_tensors
from tests.helpers.world import run_world

SP, GROUPED, BF16 = ("--sequence-parallel",), ("--moe-grouped-gemm",), ("--bf16",)
DENSE, MIXTURES = ["hybrid"], ["hybrid_moe", "next"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that transformers saved, by variant, every parameter drawn."""
    root, base = tmp_path_factory.mktemp("hybrids"), json.loads((MODEL / "config.json").read_text())
    for name in DENSE + MIXTURES:
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(base | VARIANTS[name]))
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(root / name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-1, 1)
        model.save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


def _unwrapped(chunk: torch.nn.Module) -> Any:
    """A chunk without the module that holds it in 16 bits."""
    return getattr(chunk, "module", chunk)


def _with_delta_nets(gpt: Any) -> None:
    gpt.transformer_layer_spec = with_delta_nets(None)


def _contents(folders: list[Path], layout: Sharding, flags: tuple[str, ...]) -> list[dict[str, Any]]:
    """Of each model, this rank's parameters by their path in the whole model, and its sharded tensors by key."""
    found, adapt = [], _with_delta_nets if TRANSFORMER_ENGINE[0] in flags else lambda _: None
    for folder in folders:
        with sharded.model(folder, layout, flags=flags, adapt=adapt) as chunks:
            parameters, stored = {}, set()
            for chunk in map(_unwrapped, chunks):
                place = place_of(chunk, read_config(folder))
                parameters |= {place.path(n): p.detach() for n, p in chunk.named_parameters()}
                stored |= stored_tensors(chunk)
            found.append({"parameters": parameters, "stored": stored})
    return found


def _assert_those_of_the_cpu(
    folders: list[Path], layout: Sharding, flags: tuple[str, ...], more: tuple[str, ...] = ()
) -> None:
    cpu, engine = (
        run_world(layout.world, _contents, folders, layout, (*flags, *kind), megatron=True)
        for kind in ((), (*TRANSFORMER_ENGINE, *more))
    )
    for expected_rank, rank in zip(cpu, engine, strict=True):
        for expected, found in zip(expected_rank, rank, strict=True):
            assert_same(expected["parameters"], found["parameters"])
            assert expected["stored"] == found["stored"]


@pytest.mark.parametrize("precision", [(), BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("layout", "flags"),
    [(Sharding(), ()), (Sharding(tp=2), SP), (Sharding(tp=2, pp=2), SP), (Sharding(pp=2, vpp=2), ())],
    ids=str,
)
def test_parameters_and_checkpoint_keys_are_those_of_the_cpu(
    layout: Sharding, flags: tuple[str, ...], precision: tuple[str, ...], folders: dict[str, Path]
):
    _assert_those_of_the_cpu(list(folders.values()), layout, (*flags, *precision))


@pytest.mark.parametrize("experts", [(), GROUPED], ids=["sequential", "grouped"])
@pytest.mark.parametrize(("layout", "flags"), [(Sharding(tp=2, ep=2), SP), (Sharding(pp=2, dp=2, ep=2), ())], ids=str)
def test_with_experts_they_are_too(
    layout: Sharding, flags: tuple[str, ...], experts: tuple[str, ...], folders: dict[str, Path]
):
    _assert_those_of_the_cpu([folders[name] for name in MIXTURES], layout, (*flags, *BF16), experts)


def _layers(folder: Path) -> list[dict[str, tuple[str, Any, torch.dtype]]]:
    """Of each layer, the modules that have parameters: their classes, whether a norm is zero-centred, the dtype."""

    def described(module: torch.nn.Module) -> tuple[str, Any, torch.dtype]:
        zero_centred = getattr(module, "zero_centered_gamma", None)
        return type(module).__name__, zero_centred, next(module.parameters(recurse=False)).dtype

    with sharded.model(folder, Sharding(), flags=(*TRANSFORMER_ENGINE, *BF16), adapt=_with_delta_nets) as (chunk,):
        layers = _unwrapped(chunk).decoder.layers
        return [
            {n: described(m) for n, m in layer.self_attention.named_modules() if [*m.parameters(recurse=False)]}
            for layer in layers
        ]


def test_norms_are_zero_centred_but_for_the_one_of_heads(folders: dict[str, Path]):
    assert te.HAVE_TE
    [layers] = run_world(1, _layers, folders["hybrid"], megatron=True)
    fp32, bf16 = torch.float32, torch.bfloat16
    assert layers[0] == layers[1] == layers[2]
    assert layers[0] == {
        "": ("DeltaNet", None, bf16),
        "in_proj": ("TELayerNormColumnParallelLinear", True, bf16),
        "conv1d": ("Conv1d", None, bf16),
        "out_norm": ("HeadNorm", None, fp32),
        "out_proj": ("TERowParallelLinear", None, bf16),
    }
    assert layers[3] == {
        "linear_qkv": ("TELayerNormColumnParallelLinear", True, bf16),
        "q_layernorm": ("RMSNorm", True, bf16),
        "k_layernorm": ("RMSNorm", True, bf16),
        "linear_proj": ("TERowParallelLinear", None, bf16),
    }


@pytest.mark.parametrize("layout", [Sharding(tp=2, pp=2), Sharding(pp=2, vpp=2)], ids=str)
def test_load_then_export_is_bit_identical(layout: Sharding, folders: dict[str, Path], tmp_path: Path):
    saved = {folder: tmp_path / name for name, folder in folders.items()}
    flags = (*TRANSFORMER_ENGINE, *(SP if layout.tp > 1 else ()))
    run_world(
        layout.world,
        partial(sharded.save_loaded, saved, layout, flags=flags, adapt=_with_delta_nets),
        megatron=True,
    )
    for name, folder in folders.items():
        export(saved[folder], tmp_path / "out" / name, folder)
        assert_same(tensors(folder), tensors(tmp_path / "out" / name))


def test_every_parameter_is_in_the_table(folders: dict[str, Path]):
    [found] = run_world(1, _contents, list(folders.values()), Sharding(), TRANSFORMER_ENGINE, megatron=True)
    for folder, of_model in zip(folders.values(), found, strict=True):
        assert of_model["parameters"].keys() == {w.path for w in weights(read_config(folder)) if not w.buffer}
