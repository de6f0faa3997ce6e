"""Which way the head takes, and what it refuses by name, with Megatron's own output layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bft_megatron.errors import FieldError
from bft_megatron.hf.architectures import read_config
from bft_megatron.labels import IGNORE_INDEX
from bft_megatron.recipe import reader
from bft_megatron.recipe.schema import ObjectiveSettings
from bft_megatron.run.resolved import Run
from bft_megatron.training import head, loop
from tests.helpers import objective_reference as reference
from tests.helpers.runs import MODEL, RECIPE
from tests.helpers.world import run_world

S, B, H, V, VOCABULARY = 8, 2, 12, 32, 29


def _unsuitable(name: str, layer: Any) -> None:
    """Give the layer one of the things that only calling it can do."""
    weight = layer.weight
    changes: dict[str, Callable[[], Any]] = {
        "hooks or adapters": lambda: layer.register_forward_hook(lambda *_: None),
        "adapters on the output layer": lambda: layer.add_module("adapter", torch.nn.Linear(1, 1)),
        "a bias": lambda: setattr(layer, "bias", torch.nn.Parameter(torch.zeros(V))),
        "use-mup": lambda: setattr(layer.config, "use_mup", True),
        "defer-embedding-wgrad-compute": lambda: setattr(layer.config, "defer_embedding_wgrad_compute", True),
        "cpu-offloading": lambda: setattr(layer.config, "cpu_offloading", True),
        "GTP": lambda: setattr(layer, "gtp_remat_size", 2),
        "Megatron-FSDP": lambda: setattr(weight, "get_main_grad", lambda: None),
        "disable_grad_reduce": lambda: setattr(layer, "disable_grad_reduce", True),
        "Quantized": lambda: setattr(layer, "__class__", type("Quantized", (type(layer),), {})),
    }
    changes[name]()


NAMES = [
    "hooks or adapters", "adapters on the output layer", "a bias", "use-mup", "defer-embedding-wgrad-compute",
    "cpu-offloading", "GTP", "Megatron-FSDP", "disable_grad_reduce", "Quantized",
]  # fmt: skip


def _layer() -> Any:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(num_layers=1, hidden_size=H, num_attention_heads=1)
    return ColumnParallelLinear(H, V, config=config, init_method=torch.nn.init.normal_, bias=False)


def _labels() -> Tensor:
    labels = torch.randint(VOCABULARY, (B, S), generator=torch.Generator().manual_seed(0))
    labels[0, :5] = IGNORE_INDEX
    return labels


def _call(layer: Any, choice: str, kernels: str = "torch") -> tuple[Tensor, int]:
    """-> log p [b, s], how often the output layer was called."""
    calls, settings = [], ObjectiveSettings(head=choice, chunk_size=3, kernels=kernels)
    hidden = torch.randn(S, B, H, generator=torch.Generator().manual_seed(2)).requires_grad_()
    mine = head.Head(settings, VOCABULARY, _labels(), entropy=False)
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    logp = mine(hidden_states=hidden, output_layer=layer, output_weight=None)
    expected = reference.logprobs((hidden @ layer.weight.t()), _labels().t(), VOCABULARY).t()
    torch.testing.assert_close(logp.double(), expected, rtol=1e-6, atol=1e-6)
    return logp.detach(), len(calls)


def _refusals() -> dict[str, str]:
    said = {}
    for name in NAMES:
        layer = _layer()
        _unsuitable(name, layer)
        try:
            _call(layer, "chunked")
        except FieldError as error:
            said[name] = str(error)
    return said


def test_what_only_the_output_layer_can_do_is_refused_by_name():
    (said,) = run_world(1, _refusals, megatron=True)
    for name in NAMES:
        assert name in said[name], said
        assert "objective.head" in said[name]
        assert "use logits" in said[name]


def _ways() -> list[int]:
    found = [_call(_layer(), choice)[1] for choice in ("logits", "chunked", "auto")]
    head.LOGITS_BYTES = S * B * V * 4 - 1
    found.append(_call(_layer(), "auto")[1])
    layer = _layer()
    layer.register_forward_hook(lambda *_: None)
    found.append(_call(layer, "auto")[1])
    return found


def test_auto_goes_by_the_size_of_the_logits_and_by_what_can_be_done():
    assert run_world(1, _ways, megatron=True) == [[1, 0, 1, 0, 1]]


def test_triton_is_refused_on_a_cpu(tmp_path: Path):
    made = reader.load(RECIPE, ["device=cpu", "objective.kernels=triton", f"output={tmp_path}"])
    with pytest.raises(FieldError, match="triton runs on GPUs alone") as error:
        loop.train(Run(made, read_config(MODEL), MODEL, _NoRows(), 1), None)
    assert error.value.field == "objective.kernels"


class _NoRows:
    steps = 1
