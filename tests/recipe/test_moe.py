"""Settings of experts in a recipe: refused for a dense model, and within their limits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bft_megatron.recipe import flags


@pytest.mark.parametrize("override", ["moe.balance=0.001", "moe.z_loss=0.001", "moe.freeze_router=true"])
def test_a_dense_model_has_no_routers(refused: Callable[..., str], override: str):
    assert refused(override) == f"{override}: the model has no experts: leave it out"


def test_a_coefficient_is_not_negative(refused: Callable[..., str]):
    assert "must be at least 0" in refused("moe.balance=-1")


@pytest.mark.parametrize("kind", ["aux_loss", "global_aux_loss", "sinkhorn", "quantile_balancing"])
def test_a_loss_that_depends_on_the_layout_is_refused(kind: str):
    assert "cannot be used here: " in (flags.refusal("moe-router-load-balancing-type", kind) or "")
