"""Adapters on Transformer Engine's layers: where they sit, what they see, what a checkpoint holds of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine as te

from bft_megatron.hf.architectures import read_config
from bft_megatron.layers.delta_net import with_delta_nets
from bft_megatron.lora.adapters import lora_hook
from bft_megatron.lora.factors import Fresh
from bft_megatron.lora.layers import Adapter, adapters
from bft_megatron.lora.unfused import unfused_spec
from bft_megatron.recipe.schema import LoraSettings
from tests.helpers import sharded
from tests.helpers.sharded import TRANSFORMER_ENGINE, Sharding, stored_tensors
from tests.helpers.tiny_models import SavedModel
from tests.helpers.world import run_world

SETTINGS = LoraSettings(rank=3)


def _adapt(folder: Path, gpt: Any, spec: Any = None) -> None:
    """As `adapters.install` does, with the given layer spec in place of the default one."""
    config = read_config(folder)
    if spec is not None:
        gpt.transformer_layer_spec = spec
    gpt.pre_wrap_hooks.append(lora_hook(config, SETTINGS, Fresh(1)))


def _contents(folders: list[Path], layout: Sharding, flags: tuple[str, ...], spec: Any) -> list[dict[str, Any]]:
    found = []
    for folder in folders:
        with sharded.model(folder, layout, flags=flags, adapt=partial(_adapt, folder, spec=spec)) as chunks:
            own = [(path, adapter) for chunk in chunks for path, adapter in adapters(chunk)]
            trained = {n for c in chunks for n, p in c.named_parameters() if p.requires_grad}
            assert trained == {f"{path}.{name}" for path, adapter in own for name in adapter.weights}
            found.append(
                {
                    "adapters": {
                        weight.tensors[0].name: (adapter.get_parameter(name).detach(), _marks(adapter, name))
                        for _, adapter in own
                        for name, weight in adapter.weights.items()
                    },
                    "stored": set().union(*map(stored_tensors, chunks)),
                    "layers": {_layer_of(path, chunk) for chunk in chunks for path, _ in adapters(chunk)},
                }
            )
    return found


def _marks(adapter: Adapter, name: str) -> list[Any]:
    """By which Megatron chooses the ranks that sum a gradient, and those that count it in the norm."""
    parameter = adapter.get_parameter(name)
    return [getattr(parameter, mark, None) for mark in ("sequence_parallel", "allreduce", "tensor_model_parallel")]


def _layer_of(path: str, chunk: torch.nn.Module) -> str:
    """The class of the layer that an adapter belongs to."""
    return type(chunk.get_submodule(path.partition(".lora")[0])).__name__


def _assert_those_of_the_cpu(
    folders: list[Path],
    layout: Sharding,
    flags: tuple[str, ...],
    layers: set[str],
    more: tuple[str, ...] = (),
    spec: Any = unfused_spec,
) -> None:
    """The same factors at the same layers, bit for bit, marked alike, and nothing else trained or stored."""
    cpu = run_world(layout.world, _contents, folders, layout, flags, None, megatron=True)
    engine = run_world(
        layout.world, _contents, folders, layout, (*TRANSFORMER_ENGINE, *flags, *more), spec, megatron=True
    )
    seen = set[str]()
    for expected_rank, rank in zip(cpu, engine, strict=True):
        for expected, found in zip(expected_rank, rank, strict=True):
            seen |= found["layers"]
            assert found["stored"] == expected["stored"]
            assert found["adapters"].keys() == expected["adapters"].keys()
            for name, (value, marks) in expected["adapters"].items():
                assert torch.equal(found["adapters"][name][0], value), name
                assert found["adapters"][name][1] == marks, name
    assert seen == layers


LINEAR = {"TEColumnParallelLinear", "TERowParallelLinear"}
GROUPED = {"TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"}


@pytest.mark.parametrize("layout", [Sharding(), Sharding(tp=2, pp=2)], ids=str)
def test_adapters_are_those_of_the_cpu(layout: Sharding, models: list[SavedModel]):
    sequence = ("--sequence-parallel",) if layout.tp > 1 else ()
    _assert_those_of_the_cpu([m.folder for m in models], layout, sequence, LINEAR)


@pytest.mark.parametrize(("more", "layers"), [((), LINEAR), (("--moe-grouped-gemm",), LINEAR | GROUPED)])
@pytest.mark.parametrize("layout", [Sharding(tp=2), Sharding(tp=2, dp=2, ep=2, etp=2)], ids=str)
def test_adapters_of_mixtures_are_those_of_the_cpu(
    layout: Sharding, more: tuple[str, ...], layers: set[str], mixtures: list[SavedModel]
):
    sequence = ("--sequence-parallel",) if layout.tp > 1 else ()
    _assert_those_of_the_cpu([m.folder for m in mixtures], layout, sequence, layers, more)


def unfused_hybrid(config: Any, vp_stage: int | None = None) -> Any:
    """As `training.model` has it."""
    return with_delta_nets(unfused_spec)(config, vp_stage)


@pytest.mark.parametrize("layout", [Sharding(), Sharding(tp=2, pp=2)], ids=str)
def test_adapters_of_hybrids_are_those_of_the_cpu(layout: Sharding, hybrids: list[SavedModel]):
    sequence = ("--sequence-parallel",) if layout.tp > 1 else ()
    _assert_those_of_the_cpu([m.folder for m in hybrids], layout, sequence, LINEAR, spec=unfused_hybrid)


def _norms(folder: Path) -> tuple[set[str], set[str]]:
    """Kinds of the modules before the adapted column-parallel layers, and parameters of the layer that are norms'."""
    with sharded.model(
        folder,
        Sharding(),
        flags=TRANSFORMER_ENGINE,
        adapt=lambda gpt: setattr(gpt, "transformer_layer_spec", unfused_spec),
    ) as (chunk,):
        layer = chunk.decoder.layers[0]
        kinds = {type(norm).__module__.partition(".")[0] for norm in (layer.input_layernorm, layer.pre_mlp_layernorm)}
        return kinds, {name for name, _ in layer.named_parameters() if "norm" in name}


def test_norms_are_modules_of_their_own(models: list[SavedModel]):
    [(kinds, norms)] = run_world(1, _norms, models[0].folder, megatron=True)
    assert kinds == {"transformer_engine"}
    assert norms == {"input_layernorm.weight", "pre_mlp_layernorm.weight"}


def _refusal(folder: Path) -> str:
    with (
        pytest.raises(AssertionError) as error,
        sharded.model(folder, Sharding(), flags=TRANSFORMER_ENGINE, adapt=partial(_adapt, folder)),
    ):
        pass
    return str(error.value)


def test_a_layer_that_norms_its_own_input_is_refused(models: list[SavedModel]):
    """Its adapter would be given an input that is not normalised: a wrong function, in silence."""
    assert te.HAVE_TE
    [said] = run_world(1, _refusal, models[0].folder, megatron=True)
    assert "norms its own input" in said


def _whole(folders: list[Path], layout: Sharding, flags: tuple[str, ...], spec: Any) -> list[set[tuple[Any, ...]]]:
    found = []
    for folder in folders:
        adapt = (lambda gpt: setattr(gpt, "transformer_layer_spec", spec)) if spec else lambda _: None
        with sharded.model(folder, layout, flags=flags, adapt=adapt) as chunks:
            found.append(set().union(*map(stored_tensors, chunks)))
    return found


def test_the_unfused_layers_checkpoint_is_the_fused_ones(models: list[SavedModel], mixtures: list[SavedModel]):
    _assert_same_checkpoint([m.folder for m in (*models, *mixtures)], None, unfused_spec)


def test_the_unfused_layers_checkpoint_of_hybrids_is_the_fused_ones(hybrids: list[SavedModel]):
    _assert_same_checkpoint([m.folder for m in hybrids], with_delta_nets(None), unfused_hybrid)


def _assert_same_checkpoint(folders: list[Path], *specs: Any) -> None:
    fused, unfused = (
        run_world(2, _whole, folders, Sharding(tp=2), (*TRANSFORMER_ENGINE, "--sequence-parallel"), spec, megatron=True)
        for spec in specs
    )
    assert fused == unfused
