"""The routers of a mixture of experts in a run: counting what they send where, keeping padding out, freezing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.recipe.schema import Recipe
from bft_megatron.reporting.expert_load import ExpertLoad
from bft_megatron.upstream import expert_bias, row_balance

Chunks = list[GPTModel]


def routers(chunks: Chunks) -> Iterator[TopKRouter]:
    """Yield the routers of this rank's layers."""
    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter))


def sizes(config: ModelConfig) -> tuple[list[int], int]:
    """Return the numbers of the layers that have experts, from 0, and the number of experts of each."""
    assert config.experts is not None, "a dense model has no routers"
    return [i for i in range(config.layers) if config.has_experts(i)], config.experts.count


def install(model: Any, recipe: Recipe, load: ExpertLoad) -> None:
    """Make a mixture's `GPTModelConfig` count its experts' load, and add its routers' own losses if any."""
    expert_bias.install()
    model.pre_wrap_hooks.append(watch(load))
    if recipe.moe.balance or recipe.moe.z_loss:
        row_balance.install()


def freeze(chunks: Chunks) -> Chunks:
    """Take the gradient from all weights of the routers, as a `GPTModelConfig.pre_wrap_hooks` hook."""
    for router in routers(chunks):
        router.requires_grad_(False)
    return chunks


def watch(load: ExpertLoad) -> Callable[[Chunks], Chunks]:
    """Return a `pre_wrap_hooks` hook after which the routers count into `load` and spread padding over all experts.

    Padding counts as no load. Only passes with gradients count: a layer that is recomputed has run once without.
    """

    def hook(router: TopKRouter, args: tuple[Any, ...], routed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        probs, chosen = routed
        padding = args[1].reshape(-1)
        if router.training and torch.is_grad_enabled():
            load.add(router.layer_number - 1, (chosen & ~padding[:, None]).sum(0))
        return spread(probs, chosen, padding, router.topk)

    def register(chunks: Chunks) -> Chunks:
        for router in routers(chunks):
            router.register_forward_hook(hook)
        return chunks

    return register


def spread(probs: Tensor, chosen: Tensor, padding: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Send padding to all experts in turn, with weight 0 -> (probs [T, E], chosen [T, E] bool).

    All of a row's padding is one token, which a router sends to the same experts; no token that counts attends to it.

    Args:
        padding: [T] bool.
        top: experts that a token is sent to; Megatron's dispatcher takes as many of every token.
    """
    experts = chosen.shape[-1]
    number = (padding.cumsum(0)[:, None] - 1) * top + torch.arange(top, device=padding.device)
    in_turn = torch.zeros_like(chosen).scatter_(1, number % experts, True)
    return probs.masked_fill(padding[:, None], 0), torch.where(padding[:, None], in_turn, chosen)
